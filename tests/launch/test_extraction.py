"""launch.extraction in seconds: every stage, its figures and its resumption; and what the prompts give away."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.extraction import arm, small
from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data.world.biographies import biography
from jaxlm.data.world.corpus import texts, world_tables
from jaxlm.data.world.people import person
from launch import extraction

flags.FLAGS.set_gnu_getopt(True)
SETS = [
    "base.data.tokenizer=Bytes()",
    "base.data.context=512",
    "base.model.layers=1",
    "base.model.width=16",
    "base.model.heads=2",
    "tuned.data.context=512",
    "tuned.data.sources.0.count=20",
    "people.count=12",
    "people.attributes=hobby,dish",
    "asked=6",
]
SETS += [f"{p}.{k}" for p in ("base", "tuned") for k in ("train.steps=2", "train.batch_size=8")]
SETS += [f"{p}.evaluation.batch_size=8" for p in ("base", "tuned")]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("extraction")
    sets = SETS + [f"{p}.data.cache={root / 'cache'}" for p in ("base", "tuned")]
    return root / "w", sets, extraction.extraction(root / "w", ["multi5"], [3], True, sets)


def test_an_arm_is_asked_everything(done):
    workdir, _, results = done
    sides = ["held-out persons", "training persons"]
    for r in results.values():
        assert list(r["groups"]) == [*extraction.RECALL, *sides, *(f"{s}, direct" for s in sides)]
        assert all(e["n"] == 6 for n, e in r["groups"].items() if n not in extraction.RECALL)
        assert all(0 < e["n"] <= 6 and list(e["seeds"]) == ["3"] for e in r["groups"].values())
    written = json.loads((workdir / "results.json").read_text())
    assert written["augmentations"] == results and written["seeds"] == [3]
    assert (workdir / "table.md").read_text() == extraction.table(results)
    assert (workdir / "multi5" / "3" / "direct" / "checkpoints").is_dir()


def test_the_same_command_trains_nothing_again(done, capsys, monkeypatch):
    workdir, sets, results = done
    monkeypatch.setattr(extraction.tour_base, "train", None)
    assert extraction.extraction(workdir, ["multi5"], [3], True, sets) == results
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all("skipped" in line and "--redo" not in line for line in lines)


def test_arms_differ_in_how_facts_are_told_alone():
    arms = {name: arm(small(), name, 1, "r") for name in ("single", "multi5+permute+fullname")}
    a, b = arms.values()
    assert a.base.train == b.base.train and a.tuned[True].train == b.tuned[True].train
    assert a.base.seed == a.world.seed == 1 and a.tuned[False].parent == "r/base"
    facts = [[person(world_tables(x.world), i).facts for i in range(20)] for x in (a, b)]
    assert facts[0] == facts[1]
    counts = [sum(i.startswith("train/") for i, _ in texts(x.world)) for x in (a, b)]
    assert counts == [1500, 1500]
    assert not arm(config.parse_sets(small(), ["replay=false"]), "single", 0, "r").tuned[True].data.replay
    with pytest.raises(UserError, match="--augmentations"):
        arm(config.parse_sets(small(), ["people.augmentation.wordings=2"]), "single", 0, "r")


def test_beginnings_name_the_person_and_not_the_value():
    world = arm(small(), "multi5", 0, "r").world
    t = world_tables(world)
    asked = extraction.questions(world, "heldout", 60)
    assert len(asked) == 60 and all(q.split == "heldout" and q.known == "often" for q in asked)
    read = {i: " ".join(biography(t, person(t, i), e) for e in range(5)) for i in {q.person for q in asked}}
    for kind in extraction.RECALL:
        found = [(q, extraction.beginning(t, person(t, q.person), q, kind)) for q in asked]
        found = [(q, b) for q, b in found if b is not None]
        assert len(found) > 30
        for q, b in found:
            assert person(t, q.person).name in b and q.answer not in b and not b.endswith(" ")
            # Only in its place does the sentence stand in what was read.
            assert (f"{b} {q.answer}" in read[q.person]) == (kind == "in its place")
    assert extraction.completes(" chess.", "chess") and not extraction.completes(" chessboards", "chess")


def test_shares_are_pooled_over_seeds():
    def one(right):
        return {"groups": {"held-out persons": right, "another wording": []}, "chance": 0.1}

    r = extraction.summary({"single": {0: one([True, False, False, False]), 1: one([True, True])}})
    assert list(r["single"]["groups"]) == ["held-out persons"]
    e = r["single"]["groups"]["held-out persons"]
    assert e["value"] == 0.5 and e["n"] == 6 and e["seeds"] == {"0": 0.25, "1": 1.0} and e["low"] < 0.5 < e["high"]
    assert "| single | 0.500 [" in extraction.table(r) and extraction.table(r).endswith("| 0.100 |\n")


def test_bad_flags(tmp_path):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["extraction"])
    for options, message in (
        ({"workdir": None}, "--workdir=DIR is missing"),
        ({"augmentations": ["mutli5"]}, "unknown 'mutli5'; nearest: multi5"),
        ({"seeds": ["x"]}, "--seeds takes whole numbers"),
        ({"seeds": ["1", "1"]}, "each once"),
        ({"set": ["people.cuont=3"]}, "people.cuont"),
    ):
        with flagsaver.flagsaver(**{"workdir": str(tmp_path)} | options), pytest.raises(UserError, match=message):
            extraction.main()
