"""Whole runs: resumed equals uninterrupted bit by bit, one device equals eight, SIGTERM saves, divergence ends."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data.prepare import ByDocument, Data
from jaxlm.data.tokenizer import Bytes, BytesTokenizer, Chars
from jaxlm.nn import lora
from jaxlm.nn.lora import LoRA
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW, Lion
from jaxlm.optim.schedules import Cosine
from jaxlm.run import checkpoint, exits, goodput, lineage, load, manifest, rl_evals, rl_metrics, train
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.log import raw_metrics, read_metrics
from jaxlm.sharding import MeshConfig
from jaxlm.steps.distill import Distill
from jaxlm.steps.update import Train

STEPS = 6


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = list("abcdefgh") + ["reads", "text", "learns", "which", "word", "comes", "next"]
    documents = [{"text": " ".join(rng.choice(words, 60))} for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    return Experiment(
        model=ModelConfig(layers=1, width=16, heads=2, hidden=32, tied=True),
        data=Data(
            path=str(folder / "text.jsonl"),
            curation=None,
            tokenizer=Bytes(),
            split=ByDocument(valid_fraction=0.2),
            context=32,
            workers=1,
            cache=str(folder / "cache"),
        ),
        optimizer=AdamW(lr=0.01, schedule=Cosine(warmup=1)),
        train=Train(steps=STEPS, batch_size=8, log_every=1),
        evaluation=Evaluation(every=3, max_batches=2, batch_size=8),
        checkpoint=Checkpointing(every=2),
        mesh=MeshConfig(fsdp=1),
    )


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train.train(experiment, workdir, experiment) == exits.EXIT_DONE
    return workdir


def saved(experiment, workdir):
    """Every array of the newest checkpoint, by name."""
    e = train.bind(experiment, config.from_json(Experiment, (workdir / "config.json").read_text()).model.vocab_size)
    mesh = train.sharding.make_mesh(MeshConfig(fsdp=1))
    with checkpoint.Checkpoints(workdir, e.checkpoint) as checkpoints:
        state, _ = checkpoints.restore(train.state.abstract(e.model, e.optimizer, mesh, e.lora))
    return jax.device_get(state)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_leaves_what_a_reader_needs(experiment, whole):
    for name in ("config.json", "diff.txt", "environment.json", "lineage.json", "metrics.jsonl", "report/loss.png"):
        assert (whole / name).exists(), name
    assert (whole / "diff.txt").read_text() == f"model.vocab_size: None -> {saved_vocab(whole)}\n"
    records = read_metrics(whole)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert all(np.isfinite(r["train/loss"]) and r["train/skipped"] == 0 for r in records)
    assert records[0]["train/seconds_to_first_step"] > 0 and records[-1]["train/tokens_per_second"] > 0
    assert {r["step"] for r in records if "eval/all/loss" in r} == {3, 6}
    assert records[-1]["eval/all/bits_per_byte"] > 0
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    spent = goodput.account(whole)
    assert list(spent) == ["initialise", "compile", "data", "step", "evaluate", "save"]
    assert sum(spent.values()) <= records[-1]["seconds"] + spent["initialise"]
    assert 0 < records[-1]["checkpoint/hash_seconds"] < records[-1]["checkpoint/write_seconds"]


def test_a_checkpoint_holds_what_says_what_it_is(whole):
    folder = whole / "checkpoints" / str(STEPS)
    for name in ("config.json", "lineage.json", "tokenizer/tokenizer.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
        assert name in manifest.read(folder)["files"]
    about = manifest.read(folder)
    tokenizer = load.load_run(whole).tokenizer
    assert about["metadata"]["hashes"]["tokenizer"] == tokenizer.hash
    assert about["metadata"]["rng"] == {"implementation": "threefry2x32", "partitionable": True}
    losses = {r["step"]: r["eval/all/loss"] for r in read_metrics(whole) if "eval/all/loss" in r}
    assert about["metric"] == losses[STEPS] and about["best"] == {"step": STEPS, "metric": min(losses.values())}


def saved_vocab(workdir):
    return json.loads((workdir / "config.json").read_text())["model"]["vocab_size"]


class Stop:
    """Stops a run right after the batch of a given step has been asked for, as SIGTERM or a crash would."""

    def __init__(self, monkeypatch, at, action):
        original = train.Loader.batch

        def batch(loader, step):
            if step == at:
                action()
            return original(loader, step)

        monkeypatch.setattr(train.Loader, "batch", batch)


def crashed_and_resumed(e, workdir, monkeypatch, at, between=lambda: None):
    """A run that a power cut stops when it has asked for the batch of step `at`, and that goes on to its end."""

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as m:
        Stop(m, at, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(e, workdir, e)
    between()
    assert train.train(e, workdir, e) == exits.EXIT_DONE


@pytest.mark.parametrize("at", [1, 3, 4])
def test_sigterm_saves_and_the_resumed_run_ends_bit_equal(experiment, whole, tmp_path, monkeypatch, at):
    with monkeypatch.context() as m:
        Stop(m, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.train(experiment, tmp_path / "run", experiment) == exits.EXIT_PREEMPTED
    assert train.train(experiment, tmp_path / "run", experiment) == exits.EXIT_DONE
    assert_same(saved(experiment, tmp_path / "run"), saved(experiment, whole))
    losses = [[r["train/loss"] for r in read_metrics(w)] for w in (tmp_path / "run", whole)]
    assert losses[0] == losses[1]


def test_a_crash_loses_only_the_steps_since_the_last_save(experiment, whole, tmp_path, monkeypatch):
    def saved_so_far():
        assert checkpoint.newest(tmp_path / "run") == 4

    crashed_and_resumed(experiment, tmp_path / "run", monkeypatch, at=5, between=saved_so_far)
    assert goodput.account(tmp_path / "run")["restore"] > 0
    assert_same(saved(experiment, tmp_path / "run"), saved(experiment, whole))


def test_the_best_checkpoint_stays_the_best_over_a_restart(experiment, tmp_path, monkeypatch):
    losses = iter([0.1, 0.5, 0.9])  # at steps 2, 4 and 6: the first is the best
    monkeypatch.setattr(train, "evaluate_function", lambda *_: lambda params: {"all": {"loss": next(losses)}})
    e = config.override(experiment, {"evaluation.every": 2, "checkpoint.keep_latest": 1, "checkpoint.keep_best": 1})
    with monkeypatch.context() as m:
        Stop(m, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.train(e, tmp_path / "run", e) == exits.EXIT_PREEMPTED
    assert train.train(e, tmp_path / "run", e) == exits.EXIT_DONE
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 6]


def test_a_finished_run_started_again_changes_nothing(experiment, whole):
    before = (whole / "metrics.jsonl").read_text()
    assert train.train(experiment, whole, experiment) == exits.EXIT_DONE
    assert (whole / "metrics.jsonl").read_text() == before


def test_eight_devices_give_the_losses_of_one(experiment, whole, tmp_path):
    e = config.override(experiment, {"mesh.fsdp": 4, "mesh.tensor": 2})
    assert train.train(e, tmp_path / "run", experiment) == exits.EXIT_DONE
    one, eight = ([r["train/loss"] for r in read_metrics(w)] for w in (whole, tmp_path / "run"))
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_a_workdir_of_another_experiment_is_refused_and_left_as_it_is(experiment, whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    other = config.override(experiment, {"optimizer.lr": 0.02})
    with pytest.raises(UserError, match=r"another experiment.*optimizer\.lr: 0\.01 -> 0\.02"):
        train.train(other, whole, experiment)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_a_run_goes_on_with_what_is_allowed_to_differ(experiment, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    e = config.override(experiment, {"optimizer.lr": 0.02})
    with lineage.allowing(run, ["optimizer"], e):
        assert train.train(e, run, experiment) == exits.EXIT_DONE
    assert train.train(e, run, experiment) == exits.EXIT_DONE  # its definition from now on
    (told,) = json.loads((run / "lineage.json").read_text())["allowed"]
    assert told["differences"] == ["optimizer.lr: 0.01 -> 0.02"]


def test_updates_left_out_have_lines_of_their_own_and_stay_out_when_resumed(experiment, tmp_path, monkeypatch):
    e = config.override(experiment, {"train.skip": (2, 4, STEPS), "train.log_every": STEPS})
    assert train.train(e, tmp_path / "whole", experiment) == exits.EXIT_DONE
    lines = [r for r in read_metrics(tmp_path / "whole") if "train/skipped" in r]
    assert [(r["step"], r["train/skipped"]) for r in lines] == [(1, 0), (2, 1), (3, 1), (4, 2), (STEPS, 3)]
    assert all(r["train/gradient_norm"] > 0 for r in lines)
    crashed_and_resumed(e, tmp_path / "run", monkeypatch, at=3)
    assert_same(saved(e, tmp_path / "run"), saved(e, tmp_path / "whole"))


def test_evaluations_and_saves_find_no_step_that_has_no_time_yet(experiment, tmp_path):
    """What is read from the devices there would wait for earlier steps, and their time would not be the steps'."""
    e = config.override(experiment, {"train.log_every": 100, "train.skip": (2,), "checkpoint.every": 5})
    assert train.train(e, tmp_path / "run", experiment) == exits.EXIT_DONE
    records = list(raw_metrics(tmp_path / "run"))
    assert [r["step"] for r in records if "train/loss" in r] == [1, 3, 5, STEPS]
    kinds = ["train" if "train/loss" in r else "eval" for r in records if "train/loss" in r or "eval/all/loss" in r]
    assert kinds == ["train", "train", "eval", "train", "train", "eval"]
    # What was left out is told before the evaluation: later, it would supersede it.
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "eval/all/loss" in r] == [3, STEPS]


@pytest.mark.parametrize("this", [0, 1])
def test_only_process_0_writes(experiment, tmp_path, monkeypatch, this):
    monkeypatch.setattr(jax, "process_index", lambda: this)
    root = train.open_workdir(tmp_path / "run", BytesTokenizer())
    train.write_definition(root, experiment, None, BytesTokenizer())
    rl_metrics.write_help(root)
    rl_evals.Evaluation(experiment, None, None, None, None, root)._keep(3, [], None)
    found = {str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file()}
    wanted = {"config.json", "diff.txt", "environment.json", "samples/00000003.jsonl", rl_metrics.HELP_FILE}
    assert (found >= {*wanted, "tokenizer/tokenizer.json"}) if this == 0 else not found


def test_a_beginning_is_watched_and_runs_out_of_memory_like_a_step(experiment, tmp_path, monkeypatch):
    def too_large(*_):
        assert "watchdog" in [t.name for t in threading.enumerate()]
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3000000 bytes.")

    monkeypatch.setattr(train, "initial_state", too_large)
    with pytest.raises(UserError, match=r"out of memory on cpu \(asked for 3000000 bytes\): set"):
        train.train(experiment, tmp_path / "run", experiment)


def test_a_refused_tokenizer_does_not_replace_the_runs_own(experiment, whole):
    other = types.SimpleNamespace(hash="another")
    with pytest.raises(UserError, match=r"tokenizer: \w{12} -> another; bring the former data back"):
        train.open_workdir(whole, other)


@pytest.mark.parametrize("other", ["optimizer", "data", "teacher"])
def test_a_refusal_leaves_what_was_written(experiment, whole, tmp_path, other):
    """What may differ is written down only when nothing that may not has been found."""
    if other == "teacher":
        teacher, run = shutil.copytree(whole, tmp_path / "teacher"), tmp_path / "run"
        experiment = dataclasses.replace(experiment, objective=Distill(str(teacher)))
        assert train.train(experiment, run, experiment) == exits.EXIT_DONE
        shutil.rmtree(teacher / "checkpoints" / str(STEPS))  # as one that still trains prunes
    else:
        run = shutil.copytree(whole, tmp_path / "run")
    e = config.override(experiment, {"optimizer.lr": 2e-3, "train.steps": STEPS + 1})
    if other == "optimizer":
        e, words = dataclasses.replace(e, optimizer=Lion()), "is of another model or optimizer"
    elif other == "teacher":
        words = rf"has no checkpoint of step {STEPS}; it has \["
    else:
        text = Path(experiment.data.path).read_text().replace("reads", "leads")
        (tmp_path / "other.jsonl").write_text(text)
        e, words = config.override(e, {"data.path": str(tmp_path / "other.jsonl")}), "the data has changed"
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with lineage.allowing(run, ["optimizer", "data.path"], e), pytest.raises(UserError, match=words):
        train.train(e, run, experiment)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files


def test_a_run_that_is_never_finite_ends(experiment, tmp_path):
    e = config.override(
        experiment, {"optimizer.lr": 1e38, "train.max_skipped": 2, "train.clip": None, "train.steps": 9}
    )
    with pytest.raises(exits.Diverged, match=r"all of the last \d updates"):
        train.train(e, tmp_path / "run", experiment)


@pytest.mark.parametrize("at", [None, 4])
def test_a_last_checkpoint_that_may_not_be_kept_is_no_end_like_another(experiment, tmp_path, monkeypatch, at):
    """Neither done nor stopped and saved, when the evaluation of the last step, or of the one it is stopped at, is no
    number."""
    losses = iter([0.5, float("nan")])
    monkeypatch.setattr(train, "evaluate_function", lambda *_: lambda params: {"all": {"loss": next(losses)}})
    e = config.override(experiment, {"evaluation.every": 3 if at is None else 2, "train.steps": 6})
    if at is not None:
        Stop(monkeypatch, at - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(exits.Diverged, match=rf"checkpoint {at or 6} .* is not saved: its metric is nan; .* step "):
        train.train(e, tmp_path / "run", e)
    assert checkpoint.newest(tmp_path / "run") < (at or 6)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"train.batch_size": 9, "train.accumulation": 2}, "multiple of train.accumulation 2"),
        ({"model.vocab_size": 7}, "model.vocab_size is 7, the tokenizer has"),
        ({"model.heads": 3}, "no multiple of model.heads"),
        ({"mesh.fsdp": 99}, "needs 99 devices, 8 are here"),
        ({"data.context": 10**6}, "1000000"),
        ({"data.path": "nowhere/text.txt"}, "nowhere"),
        ({"train.steps": 0}, "at least 1"),
        ({"train.hang_seconds": 0.0}, "must be above 0"),
        ({"train.log_every": -1}, "train.log_every must be at least 1, got -1"),
        ({"train.max_skipped": 0}, "train.max_skipped must be at least 1, got 0"),
        ({"train.loss_chunk": 0}, "train.loss_chunk must be at least 1, got 0"),
        ({"train.clip": -1.0}, "train.clip must be above 0, or none for no clipping, got -1"),
        ({"evaluation.every": 0}, "evaluation.every must be at least 1, got 0"),
        ({"evaluation.batch_size": 0}, "evaluation.batch_size must be at least 1, got 0"),
        ({"evaluation.max_batches": 0}, "evaluation.max_batches must be at least 1, got 0"),
        ({"optimizer.lr": -1e-3}, "optimizer.lr must be a number from 0 on, got -0.001"),
        ({"optimizer.weight_decay": float("nan")}, "optimizer.weight_decay must be a number"),
        ({"mesh.tensor": 0}, "mesh.tensor must be at least 1, got 0"),
        ({"lora": LoRA(rank=2)}, "its parent"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_definitions_are_refused_before_anything_is_written(experiment, tmp_path, values, words):
    e = config.override(experiment, values)
    with pytest.raises(UserError, match=words):
        train.train(e, tmp_path / "run", experiment)
    assert not (tmp_path / "run").exists()


def test_adapters_for_what_the_model_lacks_are_refused(experiment, whole, tmp_path):
    e = config.override(experiment, {"parent": str(whole), "lora": LoRA(targets=("gate", "query"))})
    with pytest.raises(UserError, match="no projection 'query'"):
        train.train(e, tmp_path / "run", experiment)


def test_a_child_starts_from_its_parents_parameters_with_its_model_and_tokenizer(experiment, whole, tmp_path):
    asked = config.override(
        experiment, {"parent": str(whole), "model": None, "data.tokenizer": None, "train.steps": 1, "optimizer.lr": 0.0}
    )
    assert train.train(asked, tmp_path / "child", experiment) == exits.EXIT_DONE
    child = train.inherit(asked)
    assert_same(saved(child, tmp_path / "child").params, saved(experiment, whole).params)
    lineage = json.loads((tmp_path / "child" / "lineage.json").read_text())
    assert lineage["parent"]["step"] == STEPS
    assert lineage["parent"]["hashes"]["tokenizer"] == lineage["hashes"]["tokenizer"]
    assert train.train(asked, tmp_path / "child", experiment) == exits.EXIT_DONE  # resumes, and is the same experiment


def test_adapters_resume_bit_equal_and_children_start_from_the_merged_model(experiment, whole, tmp_path, monkeypatch):
    inherited = {"parent": str(whole), "model": None, "data.tokenizer": None}
    asked = config.override(experiment, inherited | {"train.steps": 4, "lora": LoRA(rank=2)})
    assert train.train(asked, tmp_path / "a", experiment) == exits.EXIT_DONE
    with monkeypatch.context() as m:
        Stop(m, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.train(asked, tmp_path / "b", experiment) == exits.EXIT_PREEMPTED
    assert train.train(asked, tmp_path / "b", experiment) == exits.EXIT_DONE
    ended = saved(train.inherit(asked), tmp_path / "a")
    assert_same(saved(train.inherit(asked), tmp_path / "b"), ended)
    parent = saved(experiment, whole).params
    assert_same({k: ended.params[k] for k in ("backbone", "heads")}, {k: parent[k] for k in ("backbone", "heads")})

    run = load.load_run(tmp_path / "a")
    assert_same(run.params, lora.merge(LoRA(rank=2), ended.params))
    assert np.any(run.params["backbone"]["blocks"]["0"]["mlp"]["up"]["kernel"]
                  != parent["backbone"]["blocks"]["0"]["mlp"]["up"]["kernel"])  # fmt: skip
    asked = config.override(
        asked, {"parent": str(tmp_path / "a"), "optimizer.lr": 0.0, "train.steps": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
    )
    assert train.train(asked, tmp_path / "child", experiment) == exits.EXIT_DONE
    child = load.load_run(tmp_path / "child").params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), child, run.params)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"parent": "nowhere"}, "no such workdir: nowhere; name the run to take with --set=parent=WORKDIR$"),
        ({"model": None}, "only with a parent"),
        ({"model.width": 32}, r"model differs from that of parent .*width: 16 -> 32"),
        ({"data.tokenizer": Chars()}, "vocab_size|not that of parent"),
    ],
    ids=str,
)
def test_a_child_that_does_not_fit_its_parent_is_refused(experiment, whole, tmp_path, values, words):
    parent = {} if values == {"model": None} else {"parent": str(whole)}
    with pytest.raises(UserError, match=words):
        train.train(config.override(experiment, parent | values), tmp_path / "child", experiment)


def test_validation_is_weighted_by_tokens_and_bytes(experiment, whole):
    """`all` is the mean over tokens: with one source it is that source's."""
    last = read_metrics(whole)[-1]
    name = next(k.split("/")[1] for k in last if k.startswith("eval/") and not k.startswith("eval/all"))
    assert last[f"eval/{name}/loss"] == last["eval/all/loss"]
    # A byte tokenizer scores a byte a token, and bos and eos stand for none.
    assert last["eval/all/bits_per_byte"] >= last["eval/all/loss"] / np.log(2)


def test_dropout_draws_other_masks_each_step_and_the_same_on_resume(experiment, tmp_path, monkeypatch):
    e = config.override(experiment, {"model.dropout": 0.5, "train.steps": 4})
    assert train.train(e, tmp_path / "a", experiment) == exits.EXIT_DONE
    with monkeypatch.context() as m:
        Stop(m, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.train(e, tmp_path / "b", experiment) == exits.EXIT_PREEMPTED
    assert train.train(e, tmp_path / "b", experiment) == exits.EXIT_DONE
    assert_same(saved(e, tmp_path / "a"), saved(e, tmp_path / "b"))
    no_dropout = dataclasses.replace(e, model=dataclasses.replace(e.model, dropout=0.0))
    assert train.train(no_dropout, tmp_path / "c", experiment) == exits.EXIT_DONE
    losses = [[r["train/loss"] for r in read_metrics(tmp_path / w)] for w in "ac"]
    assert losses[0][0] != losses[1][0]
