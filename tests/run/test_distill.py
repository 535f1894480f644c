"""A student of its own size, taught by a run: on conversations, with the teacher's tokenizer, and refused without."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import experiments  # noqa: F401  registers definitions
from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.chat import Chat
from jaxlm.data.chat_sources import Messages
from jaxlm.data.tokenizer import Bytes, Chars
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Constant
from jaxlm.run import exits, load, train
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.log import read_metrics
from jaxlm.sharding import MeshConfig
from jaxlm.steps.distill import Distill
from jaxlm.steps.update import Train
from tests import tiny_run
from tests.run.test_train import assert_same, crashed_and_resumed


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("distill")
    tiny_run.make(root / "teacher", params=tiny_run.random_params(tiny_run.EXPERIMENT.model, scale=0.15))
    said = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "abc" * (i % 4)}] for i in range(60)
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in said))
    return Experiment(
        model=ModelConfig(layers=1, width=16, heads=2, hidden=32),
        data=Chat((Messages(str(root / "chats.jsonl")),), valid_fraction=0.2, context=63, workers=1, cache=str(root)),
        objective=Distill(str(root / "teacher")),
        optimizer=AdamW(lr=0.02, weight_decay=0.0, schedule=Constant()),
        train=Train(steps=12, batch_size=8, loss_chunk=16, log_every=4),
        evaluation=Evaluation(every=6, batch_size=8),
        checkpoint=Checkpointing(every=6),
        mesh=MeshConfig(fsdp=1),
    )


def test_the_student_comes_nearer_to_its_teacher(experiment, tmp_path):
    teacher = experiment.objective.teacher
    before = load.load_run(teacher).params
    assert train.train(experiment, tmp_path / "run") == exits.EXIT_DONE
    records = read_metrics(tmp_path / "run")
    first, last = (r for r in records if "eval/all/loss" in r)
    assert 0 < last["eval/all/loss"] < first["eval/all/loss"] < records[0]["train/loss"]
    assert last["eval/all/bits_per_byte"] > 0 and last["eval/all/cross_entropy"] > last["eval/all/loss"]
    jax.tree.map(np.testing.assert_array_equal, load.load_run(teacher).params, before)
    lineage = json.loads((tmp_path / "run" / "lineage.json").read_text())
    assert lineage["teacher"]["step"] == 7 and "parent" not in lineage
    assert load.load_run(tmp_path / "run").tokenizer.hash == load.load_run(teacher).tokenizer.hash


def test_the_named_experiment_takes_the_teachers_tokenizer(experiment, tmp_path):
    """As it ships, but for its length."""
    sets = [f"objective.teacher={experiment.objective.teacher}", f"data.cache={tmp_path}", "data.sources.0.count=40"]
    sets += ["data.context=512", "train.steps=1", "train.batch_size=4", "evaluation.max_batches=1"]
    e = config.resolve("distill_tiny", sets=sets)
    assert train.train(e, tmp_path / "run", e) == exits.EXIT_DONE
    student, teacher = (load.load_run(w) for w in (tmp_path / "run", experiment.objective.teacher))
    assert student.tokenizer.hash == teacher.tokenizer.hash and student.model.width == 64 != teacher.model.width
    assert read_metrics(tmp_path / "run")[-1]["eval/all/loss"] > 0


def test_resumed_ends_bit_equal(experiment, tmp_path, monkeypatch):
    e = config.override(experiment, {"train.steps": 4, "evaluation.every": 4, "checkpoint.every": 2})
    assert train.train(e, tmp_path / "whole", e) == exits.EXIT_DONE
    crashed_and_resumed(e, tmp_path / "run", monkeypatch, at=3)
    runs = [tmp_path / w for w in ("run", "whole")]
    assert_same(*(load.load_run(w).params for w in runs))
    ends = [read_metrics(w)[-1] for w in runs]
    assert ends[0]["eval/all/loss"] == ends[1]["eval/all/loss"] and ends[0]["train/loss"] == ends[1]["train/loss"]


def test_a_teacher_of_another_tokenizer_is_refused(experiment, tmp_path):
    tiny_run.make(tmp_path / "teacher")
    tokenizers.train(Chars(), ["abc"], 0).save(tmp_path / "teacher" / "tokenizer")
    data = dataclasses.replace(experiment.data, tokenizer=Bytes())
    asked = dataclasses.replace(experiment, data=data, objective=Distill(str(tmp_path / "teacher")))
    with pytest.raises(UserError, match=r"data.tokenizer is not that of teacher"):
        train.train(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
