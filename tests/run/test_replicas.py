"""Runs that train in one program: each ends as it would alone, and none of them stops another."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data import loader
from jaxlm.data.prepare import ByDocument, Data
from jaxlm.data.tokenizer import Bytes
from jaxlm.nn.lora import LoRA
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW, Muon
from jaxlm.optim.schedules import Cosine
from jaxlm.run import checkpoint, exits, load, replicas, train
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.log import read_metrics
from jaxlm.sharding import MeshConfig
from jaxlm.steps.distill import Distill
from jaxlm.steps.policy import PolicyGradient
from jaxlm.steps.pretrain import NextToken
from jaxlm.steps.update import Train

STEPS = 6
VARIANTS = [(0.01, 0), (0.03, 1), (0.01, 2), (0.001, 0)]  # learning rate and seed
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32, sums of another order, through six updates


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """With dropout and two microbatches: what is random in a step, and what is summed in it, is each run's own."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["reads", "text", "learns", "which", "word", "comes", "next"]
    documents = [{"text": " ".join(rng.choice(words, 60))} for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    return Experiment(
        model=ModelConfig(layers=1, width=16, heads=2, hidden=32, tied=True, dropout=0.1),
        data=Data(
            path=str(folder / "text.jsonl"),
            curation=None,
            tokenizer=Bytes(),
            split=ByDocument(valid_fraction=0.2),
            context=32,
            workers=1,
            cache=str(folder / "cache"),
        ),
        optimizer=AdamW(schedule=Cosine(warmup=1)),
        train=Train(steps=STEPS, batch_size=4, accumulation=2, log_every=1, max_skipped=2),
        evaluation=Evaluation(every=3, max_batches=2, batch_size=8),
        checkpoint=Checkpointing(every=2),
        mesh=MeshConfig(fsdp=2),
    )


def variants(experiment, root, values=VARIANTS):
    return {
        str(root / f"{lr}-{seed}"): config.override(experiment, {"optimizer.lr": lr, "seed": seed})
        for lr, seed in values
    }


@pytest.fixture(scope="module")
def together(experiment, tmp_path_factory):
    runs = variants(experiment, tmp_path_factory.mktemp("together"))
    assert replicas.train_together(runs, experiment) == exits.EXIT_DONE
    return list(runs)


@pytest.fixture(scope="module")
def alone(experiment, tmp_path_factory):
    runs = variants(experiment, tmp_path_factory.mktemp("alone"))
    for workdir, e in runs.items():
        assert train.train(e, workdir, experiment) == exits.EXIT_DONE
    return list(runs)


def saved(workdir):
    """Every array of the newest checkpoint."""
    e = load.load_bound(workdir)
    mesh = replicas.sharding.make_mesh(MeshConfig(fsdp=1))
    with checkpoint.Checkpoints(workdir, e.checkpoint) as checkpoints:
        state, _ = checkpoints.restore(train.state.abstract(e.model, e.optimizer, mesh, e.lora))
    return jax.device_get(state)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), a, b)


def test_each_ends_as_it_would_alone(experiment, together, alone):
    ends = []
    for mine, theirs in zip(together, alone):
        assert_close(saved(mine), saved(theirs))
        for file in ("config.json", "diff.txt", "lineage.json"):
            assert Path(mine, file).read_text() == Path(theirs, file).read_text()
        logs = read_metrics(mine), read_metrics(theirs)
        assert [r["step"] for r in logs[0]] == list(range(1, STEPS + 1))
        for a, b in zip(*logs):
            said = [{k for k in r if not k.startswith("checkpoint/")} for r in (a, b)]  # told when a save is complete
            assert said[0] == said[1]
            for name in ("train/loss", "train/gradient_norm", "train/learning_rate", "eval/all/loss"):
                if name in a:
                    np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
        assert Path(mine, "report/loss.png").exists()
        ends.append(logs[0][-1]["eval/all/loss"])
    assert len(set(ends)) == len(VARIANTS)  # seeds and learning rates do what they should


class Stop:
    """Sends SIGTERM when the batch of a given step is asked for."""

    def __init__(self, monkeypatch, at):
        original = replicas.Loader.batch

        def batch(loader, step):
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(loader, step)

        monkeypatch.setattr(replicas.Loader, "batch", batch)


def test_stopped_runs_go_on_from_the_step_that_all_have_or_each_alone(experiment, together, tmp_path, monkeypatch):
    runs = variants(experiment, tmp_path)
    with monkeypatch.context() as m:
        Stop(m, 2)
        assert replicas.train_together(runs, experiment) == exits.EXIT_PREEMPTED
    first, *others = runs
    assert all(checkpoint.newest(w) == 3 for w in runs)
    shutil.copytree(first, tmp_path / "single")
    shutil.rmtree(f"{first}/checkpoints/3")  # as if the power had gone before the last save was done

    assert replicas.train_together(runs, experiment) == exits.EXIT_DONE
    for mine, theirs in zip(runs, together):
        assert_same(saved(mine), saved(theirs))
        assert [r["train/loss"] for r in read_metrics(mine)] == [r["train/loss"] for r in read_metrics(theirs)]
    assert all(Path(w, "checkpoints/quarantine/3").is_dir() for w in others)

    assert train.train(runs[first], tmp_path / "single", experiment) == exits.EXIT_DONE
    assert_close(saved(tmp_path / "single"), saved(together[0]))


def test_a_finished_set_started_again_changes_nothing(experiment, together):
    runs = dict(zip(together, variants(experiment, Path()).values()))
    before = [Path(w, "metrics.jsonl").read_text() for w in together]
    assert replicas.train_together(runs, experiment) == exits.EXIT_DONE
    assert [Path(w, "metrics.jsonl").read_text() for w in together] == before


def test_a_diverged_run_does_not_stop_the_others(experiment, together, tmp_path):
    runs = variants(experiment, tmp_path, [(1e38, 0), *VARIANTS[1:]])
    assert replicas.train_together(runs, experiment) == exits.EXIT_DONE
    bad, *good = runs
    assert exits.has_diverged(bad) and not any(map(exits.has_diverged, good))
    assert read_metrics(bad)[-1]["step"] < STEPS and checkpoint.newest(bad) < STEPS
    for mine, theirs in zip(good, together[1:]):
        assert_same(saved(mine), saved(theirs))


def test_when_all_have_diverged_there_is_nothing_to_go_on_with(experiment, tmp_path):
    runs = variants(experiment, tmp_path, [(1e38, seed) for seed in range(4)])
    assert replicas.train_together(runs, experiment) == exits.EXIT_DIVERGED
    assert all(map(exits.has_diverged, runs))


def test_children_begin_with_their_parent_and_train_their_own_adapters(experiment, alone, tmp_path):
    asked = dataclasses.replace(experiment, parent=alone[0], model=None, lora=LoRA(rank=2))
    asked = config.override(asked, {"data.tokenizer": None, "train.steps": 2, "evaluation.every": 2})
    runs = variants(asked, tmp_path, VARIANTS[:2])
    assert replicas.train_together(runs, asked) == exits.EXIT_DONE
    parent, ends = saved(alone[0]).params, [saved(w) for w in runs]
    for end in ends:
        assert_same({k: end.params[k] for k in ("backbone", "heads")}, {k: parent[k] for k in ("backbone", "heads")})
    workdir, e = next(iter(variants(asked, tmp_path / "alone", VARIANTS[:1]).items()))
    assert train.train(e, workdir, asked) == exits.EXIT_DONE
    assert_close(ends[0], saved(workdir))


def test_students_learn_from_one_teacher(experiment, alone, tmp_path):
    """What is learned against is read once, for all; a float setting of the objective is each run's own."""
    asked = config.override(experiment, {"objective": Distill(alone[0]), "train.steps": 2, "evaluation.every": 2})
    runs = variants(asked, tmp_path, [(0.01, 0), (0.001, 1)])
    runs = {w: config.override(e, {"objective.temperature": 1.0 + i}) for i, (w, e) in enumerate(runs.items())}
    assert replicas.train_together(runs, asked) == exits.EXIT_DONE
    workdir, e = list(runs.items())[1]
    assert train.train(e, tmp_path / "alone", asked) == exits.EXIT_DONE
    assert_close(saved(workdir), saved(tmp_path / "alone"))
    ends = [read_metrics(w)[-1]["eval/all/loss"] for w in (workdir, tmp_path / "alone")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model.width": 32}, r"they differ in model\.width: 16 -> 32, and may only in seed, optimizer\.lr"),
        ({"train.batch_size": 8}, r"train\.batch_size: 4 -> 8"),
        ({"train.steps": 7}, r"train\.steps: 6 -> 7"),
        ({"optimizer": Muon()}, r"optimizer: .*AdamW.* -> .*Muon"),
        ({"optimizer.spike": 4.0}, r"optimizer\.spike: None -> 4\.0, and may only in seed"),
        ({"objective": NextToken(doubt=1.0)}, r"objective\.doubt: None -> 1\.0"),
        ({"mesh.tensor": 2}, "each run is whole on its own"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_runs_of_other_programs_are_refused(experiment, tmp_path, values, words):
    runs = {str(tmp_path / "a"): experiment, str(tmp_path / "b"): config.override(experiment, values)}
    with pytest.raises(UserError, match=f"b and .*a cannot train in one program: .*{words}"):
        replicas.train_together(runs, experiment)
    assert not any(tmp_path.iterdir())


def test_a_teacher_that_is_missing_is_told_with_its_setting(experiment, tmp_path):
    runs = variants(config.override(experiment, {"objective": Distill("nowhere")}), tmp_path)
    with pytest.raises(UserError, match=r"^no such workdir: nowhere; .* --set=objective\.teacher=WORKDIR$"):
        replicas.train_together(runs)


def test_what_may_differ_is_no_obstacle(experiment):
    e = dataclasses.replace(experiment, objective=NextToken(doubt=1.0))
    other = config.override(e, {"seed": 7, "optimizer.weight_decay": 0.0, "objective.doubt": 2.0})
    assert replicas.obstacle(e, other) is None
    policy = dataclasses.replace(e, objective=PolicyGradient())
    assert "trains alone" in replicas.obstacle(policy, policy)


def test_the_devices_that_divide_the_runs_are_used():
    assert [replicas.make_mesh(MeshConfig(), n).size for n in (1, 6, 8, 9, 16)] == [1, 6, 8, 3, 8]
    assert replicas.make_mesh(MeshConfig(fsdp=1), 8).size == 1


def test_nothing_is_sent_between_devices(experiment):
    """Each device computes its own runs: the step of four runs on two devices holds no collective."""
    e = config.override(experiment, {"model.vocab_size": 300})
    mesh = replicas.make_mesh(e.mesh, 4)
    batch = loader.described(4 * e.train.batch_size, e.data.context + 1, 0, mesh)
    program = replicas.step_function([e] * 4, mesh)
    text = program.lower(replicas.abstract(e, mesh, 4), batch).compile().as_text()
    assert not [name for name in ("all-reduce", "all-gather", "collective-permute", "all-to-all") if name in text]
