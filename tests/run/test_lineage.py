import dataclasses
import json
import os
import pathlib
import platform

import pytest

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.run import lineage


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 8
    vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 10
    batch_size: int = 4


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    every: int = 5


@dataclasses.dataclass(frozen=True)
class Definition:
    model: Model = Model()
    train: Train = Train()
    checkpoint: Checkpointing = Checkpointing()


def workdir_of(tmp_path, **values):
    cfg = config.override(Definition(), {"model.vocab_size": 64} | values)
    (tmp_path / "config.json").write_text(config.to_json(cfg))
    return tmp_path


def test_the_same_experiment_may_go_on(tmp_path):
    lineage.check_same_experiment(tmp_path / "not there", Definition())
    w = workdir_of(tmp_path)
    lineage.check_same_experiment(w, Definition())  # the vocabulary comes from the tokenizer later
    bound = config.override(Definition(), {"model.vocab_size": 64})
    lineage.check_same_experiment(w, bound)
    lineage.check_same_experiment(w, config.override(bound, {"train.steps": 20, "checkpoint.every": 1}))


def test_a_run_whose_definition_is_gone_is_known_by_its_newest_checkpoint(tmp_path):
    for step, width in [(9, 16), (10, 8)]:
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        workdir_of(folder, **{"model.width": width})
    lineage.check_same_experiment(tmp_path, Definition())
    with pytest.raises(UserError, match=r"model\.width: 8 -> 16 \(its own"):
        lineage.check_same_experiment(tmp_path, config.override(Definition(), {"model.width": 16}))


def test_other_random_numbers_are_refused():
    about = lineage.metadata({"packed": "a"})
    assert about["hashes"] == {"packed": "a"}
    lineage.check_same_draws(about)
    lineage.check_same_draws({"hashes": {}})  # of before they were told
    other = about | {"rng": about["rng"] | {"implementation": "rbg"}}
    with pytest.raises(UserError, match="JAX_DEFAULT_PRNG_IMPL=rbg JAX_THREEFRY_PARTITIONABLE=True"):
        lineage.check_same_draws(other)


def test_another_experiment_is_named_by_its_differences(tmp_path):
    w = workdir_of(tmp_path)
    with pytest.raises(UserError) as e:
        lineage.check_same_experiment(w, config.override(Definition(), {"model.width": 16, "train.batch_size": 8}))
    assert "model.width: 8 -> 16; train.batch_size: 4 -> 8 (its own -> asked for); choose another" in str(e.value)
    with pytest.raises(UserError, match=r"model\.vocab_size: 64 -> 65"):
        lineage.check_same_experiment(w, config.override(Definition(), {"model.vocab_size": 65}))


@dataclasses.dataclass(frozen=True)
class Whole:
    data: Train = Train()


@dataclasses.dataclass(frozen=True)
class Several:
    first: Definition = Definition()
    second: Definition = Definition()
    asked: int = 5


def test_what_may_change_may_change_in_every_part(tmp_path):
    parts = ("first.", "second.")
    (tmp_path / "config.json").write_text(config.to_json(Several()))
    longer = {"first.train.steps": 20, "second.checkpoint.every": 1}
    lineage.check_same_experiment(tmp_path, config.override(Several(), longer), parts)
    for change in ({"second.model.width": 16}, {"asked": 6}):
        (path,) = change
        with pytest.raises(UserError, match=rf"holds another experiment: {path.replace('.', '[.]')}: \d+ -> \d+ \("):
            lineage.check_same_experiment(tmp_path, config.override(Several(), longer | change), parts)
    # In the part that is named alone.
    with pytest.raises(UserError, match=r"second\.checkpoint\.every: 5 -> 1"):
        lineage.check_same_experiment(tmp_path, config.override(Several(), longer), ("first.",))


def test_a_workdir_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text('{"schema_version": 1, "node": "Definition", "unheard_of": 1}')
    with pytest.raises(UserError, match=r"another kind or version.*choose another"):
        lineage.check_same_experiment(tmp_path, Definition())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        lineage.check_same_experiment(tmp_path, Definition())
    with pytest.raises(UserError, match="is a file"):
        lineage.check_same_experiment(tmp_path / "config.json", Definition())


def test_data_that_changed_is_named():
    lineage.check_same_data({"corpus": {"a": "1"}, "tokenizer": "2"}, {"tokenizer": "2", "corpus": {"a": "1"}})
    with pytest.raises(UserError) as e:
        lineage.check_same_data({"corpus": {"a": "1" * 64}}, {"corpus": {"a": "2" * 64}, "packed": "3"})
    assert f"corpus/a: {'1' * 12} -> {'2' * 12}; packed: none -> 3; bring the former data back" in str(e.value)
    assert str(e.value).endswith("choose another --workdir")  # who has no --allow is not told of it


OLD, NEW = {"corpus": "1", "tokenizer": "2", "packed": "3"}, {"corpus": "1", "tokenizer": "4", "packed": "5"}


def test_what_is_allowed_by_name_may_differ_and_is_recorded(tmp_path):
    w = workdir_of(tmp_path)
    lineage.write_lineage(w, OLD, parent={"step": 5})
    other = config.override(Definition(), {"model.vocab_size": 64, "train.batch_size": 8})
    refused = pytest.raises(UserError, match=r"4 -> 8 .*; choose another --workdir, or .* --allow=train\.batch_size$")
    with lineage.allowing(w, (), Definition()), refused:
        lineage.check_same_experiment(w, other)
    for names in (["train.batch_size"], ["checkpoint", "train"]):
        with lineage.allowing(w, names, Definition()):
            lineage.check_same_experiment(w, other)
            lineage.check_same_tokenizer(w, "2")
            with pytest.raises(UserError, match=r"tokenizer: 2 -> 4; .* --allow=data\.tokenizer$"):
                lineage.check_same_tokenizer(w, "4")
            with pytest.raises(UserError, match=r"tokenizer: 2 -> 4; packed: 3 -> 5; .* --allow=data\.tokenizer$"):
                lineage.check_same_data(OLD, NEW)
            lineage.check_same_data(OLD, OLD)
            before = (w / "lineage.json").read_text()
            lineage.check_same_data(OLD, OLD)  # who then finds another reason to refuse has changed nothing
            assert (w / "lineage.json").read_text() == before
            lineage.write_allowed()
    told = json.loads((w / "lineage.json").read_text())["allowed"]
    assert [t["differences"] for t in told] == [["train.batch_size: 4 -> 8"]] * 2


def test_what_is_offered_is_short_and_helps(tmp_path):
    """Many paths stand under few names; where the model differs too, no name helps, and none is offered."""
    w = workdir_of(tmp_path)
    with lineage.allowing(w, (), Definition()):
        many = [*(f"data.sources.0.{i}" for i in range(7)), "optimizer.lr"]
        assert lineage._otherwise(many).endswith("--allow=data,optimizer")
        assert lineage._otherwise([*many, "model.width"]) == "choose another --workdir"


@pytest.mark.parametrize("name", ["data", "tokenizer", "data.tokenizer"])
def test_an_allowed_tokenizer(tmp_path, name):
    lineage.write_lineage(tmp_path, OLD, parent={"step": 5})
    with lineage.allowing(tmp_path, [name], Whole()):
        lineage.check_same_tokenizer(tmp_path, "4")
        lineage.write_allowed()  # nothing goes on
        assert "allowed" not in json.loads((tmp_path / "lineage.json").read_text())
        lineage.check_same_data(OLD, NEW)
        lineage.write_allowed()
    got = json.loads((tmp_path / "lineage.json").read_text())
    assert got["hashes"] == NEW and got["parent"] == {"step": 5}
    assert [told["differences"] for told in got["allowed"]] == [["tokenizer: 2 -> 4", "packed: 3 -> 5"]]
    with lineage.allowing(tmp_path, [], Whole()):
        lineage.check_same_data(NEW, NEW)
        lineage.write_allowed()
    assert json.loads((tmp_path / "lineage.json").read_text()) == got


@pytest.mark.parametrize(("name", "words"), [("model.width", "hold arrays of the model"), ("trian", "nearest: train")])
def test_what_cannot_be_allowed(tmp_path, name, words):
    with pytest.raises(UserError, match=words), lineage.allowing(tmp_path, [name], Definition()):
        pass


def test_environment_keeps_every_start_and_names_nobody(tmp_path):
    lineage.write_environment(tmp_path)
    lineage.write_environment(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    starts = json.loads(text)["starts"]
    assert len(starts) == 2
    assert starts[0]["packages"]["jax"] and starts[0]["devices"]["count"] == 8 and starts[0]["devices"]["kind"]
    assert platform.node() not in text or len(platform.node()) < 4
    assert str(pathlib.Path.home()) not in text and os.getcwd() not in text


def test_git_state_is_optional(monkeypatch):
    monkeypatch.setattr(lineage, "_git", lambda *a: None)
    assert lineage.git_state() is None
    monkeypatch.setattr(lineage, "_git", lambda *a: "abc\n" if a[0] == "rev-parse" else "")
    assert lineage.git_state() == {"commit": "abc", "changed": False}
    monkeypatch.setattr(lineage, "_git", lambda *a: "abc\n" if a[0] == "rev-parse" else "+ a line")
    assert lineage.git_state()["changed"] and len(lineage.git_state()["diff_sha256"]) == 64


def test_lineage_file(tmp_path):
    lineage.write_lineage(tmp_path, {"corpus": "1"}, parent={"workdir": "runs/a", "step": 5})
    got = json.loads((tmp_path / "lineage.json").read_text())
    assert got["hashes"] == {"corpus": "1"} and got["parent"]["step"] == 5
