import json

import pytest

from experiments.tour import TOURS, Tour
from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.run import stages
from launch import tour, tour_base
from tests import tiny_run

STAGES = (
    "curate", "tokenize", "pretrain", "evaluate", "sample", "assist", "facts", "probe", "honest", "reprobe", "tools",
    "prompting", "report",
)  # fmt: skip
SETS = [
    "base.data.tokenizer=Bytes()",
    "base.data.context=512",
    "base.model.layers=1",
    "base.model.width=16",
    "base.model.heads=2",
    "world.people.count=24",
    "world.people.unmentioned=24",
    "world.people.never=0.4",
    "world.people.augmentation.exposures=2",
    "world.people.augmentation.wordings=2",
    "world.problems=20",
    "world.tasks=arithmetic,spell",
    "assistant.data.sources.0.turns=1",
    "honest.data.sources.0.turns=1",
    "asked=4",
    "probed=4",
    "samples=2",
    "shots=2",
]
for part in ("base", "assistant", "honest"):
    SETS += [f"{part}.train.steps=3", f"{part}.train.batch_size=8", f"{part}.evaluation.batch_size=8"]
for part in ("assistant", "honest"):
    SETS += [f"{part}.data.context=512", f"{part}.data.sources.0.count=40"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("tour")
    lines = [json.dumps({"text": t}) for t in tiny_run.texts(60)]
    (root / "texts.jsonl").write_text("\n".join([*lines, lines[0], json.dumps({"text": "short"})]))
    caches = [f"{part}.data.cache={root / 'cache'}" for part in ("base", "assistant", "honest")]
    sets = [*SETS, f"text=Files(path={root / 'texts.jsonl'})", *caches]
    return root / "w", sets, tour.tour(root / "w", "smoke", sets, [], [])


def test_every_stage_says_what_it_found(done):
    _, _, records = done
    results = {n: r["result"] for n, r in records.items()}
    assert tuple(results) == STAGES
    assert results["curate"]["report"]["complete"] and results["curate"]["sources"]["files"]["documents"] == 60
    assert [s["removed"] for s in results["curate"]["report"]["steps"]] == [1, 1, 0, 0]
    assert results["tokenize"]["vocab_size"] == 288 and len(results["tokenize"]["pieces"]) == tour_base.SAMPLE_CHARACTERS
    assert results["pretrain"]["steps"] == 3 and results["pretrain"]["last"]["eval/all/bits_per_byte"] > 0
    bits, error = results["evaluate"]["bits_per_byte"]
    metric = results["evaluate"]["results"]["tasks"]["loss"]["metrics"]["files/bits_per_byte"]
    assert bits == pytest.approx(metric["value"]) and error == pytest.approx(metric["stderr"])
    assert 0.5 < results["evaluate"]["bound"]["bits_per_byte"] < 4
    prompts = [s["prompt"] for s in results["sample"]["samples"]]
    assert prompts[0] == "" and len(prompts) > 1 and all(s["text"] for s in results["sample"]["samples"])
    assert len(results["sample"]["distribution"]["next"]) == 10


def test_the_page_shows_it_and_needs_no_other_file(done):
    workdir, _, records = done
    text = (workdir / "report" / "index.html").read_text()
    for heading in ("The text", "Its tokens", "The training", "What it has learned", "What it writes", "Again, and"):
        assert f">{heading}" in text
    assert "LZMA2" in text and "ExactDuplicates" in text and "standard error" in text
    assert records["curate"]["result"]["report"]["steps"][0]["step"] in text
    assert 'src="data:image/png;base64,' in text
    for outside in ("<script", "<link", 'src="http', "url("):
        assert outside not in text


def test_the_same_command_skips_and_redo_does_one_again(done):
    workdir, sets, _ = done
    before = {p: p.stat().st_mtime_ns for p in (workdir / "stages").iterdir()}
    again = tour.tour(workdir, "smoke", sets, [], ["sample"])
    changed = [p.stem for p in before if p.stat().st_mtime_ns != before[p]]
    assert changed == ["sample"]  # it came out the same, so the page stands
    assert tuple(again) == STAGES


def test_another_definition_is_refused_and_harms_nothing(done):
    workdir, sets, _ = done
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"holds another experiment: base\.model\.width: 16 -> 32"):
        tour.tour(workdir, "smoke", [*sets, "base.model.width=32"], [], [])
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def test_pretraining_again_keeps_the_former_run(done, monkeypatch, tmp_path):
    run = tmp_path / "pretrain"
    run.mkdir()
    monkeypatch.setattr(tour_base, "train", lambda *a: 42)
    with pytest.raises(stages.Stopped) as stopped:
        tour_base.training(None, None, storage.path(run), True)
    assert stopped.value.code == 42
    assert [p.name for p in tmp_path.iterdir()] == ["pretrain-1"]


@pytest.mark.parametrize("scale", TOURS)
def test_scales_resolve(scale, tmp_path):
    t, own = tour.definition(scale, ["seed=3", "world.people.values=30"], str(tmp_path))
    assert config.from_dict(Tour, config.to_dict(t)) == t
    talk, lessons = t.honest.data.sources
    assert talk.world == t.world == t.base.data.sources[0] and talk.world.people.values == 30
    assert lessons.path == f"{tmp_path}/probe/lessons.jsonl"
    assert t.assistant.parent == f"{tmp_path}/pretrain" and t.honest.parent == f"{tmp_path}/assistant"
    assert [e.seed for e in (t.base, t.assistant, t.honest)] == [3, 3, 3] and own.base.seed == 0
