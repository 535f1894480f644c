import json
import re

import pytest

from experiments.tour import TOURS, Tour
from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.data.world.corpus import texts, world_tables
from jaxlm.data.world.people import person
from jaxlm.data.world.talk import conversation
from jaxlm.feedback.measures import SCORES
from jaxlm.feedback.probe import classify, plain_question, read_probed
from jaxlm.feedback.probe import group as probe_group
from jaxlm.run import exits
from jaxlm.run.load import load_run
from jaxlm.run.report import Page
from jaxlm.sample import engine
from jaxlm.tools import Counters, IsolationError
from launch import tour, tour_assistant, tour_base, tour_feedback, tour_page_assistant, tour_page_feedback
from launch.tour_page_assistant import SCORE_NAMES
from tests import tiny_run

STAGES = (
    "curate", "tokenize", "pretrain", "evaluate", "sample", "midtrain", "assist", "facts", "probe", "honest", "reprobe",
    "tools", "prompting", "demonstrate", "sft", "baseline", "collect_1", "reward_1", "ppo_1", "evaluate_1", "report_1",
    "verify", "arena", "side_by_side", "report",
)  # fmt: skip
SETS = [
    "base.data.tokenizer=Bytes()",
    "base.data.context=256",
    "base.model.layers=1",
    "base.model.width=16",
    "base.model.heads=2",
    "world.people.count=24",
    "world.people.unmentioned=24",
    "world.people.passing=10",
    "world.people.train_fraction=0.5",
    "world.people.attributes=hobby,dish",
    "world.people.once=0.3",
    "world.people.never=0.3",
    "world.people.augmentation.exposures=2",
    "world.people.augmentation.wordings=2",
    "world.problems=20",
    "world.tasks=arithmetic,spell",
    "midtrain.data.sources.0.turns=1",
    "assistant.data.sources.0.turns=1",
    "honest.data.sources.0.turns=1",
    "asked=8",
    "probed=4",
    "samples=2",
    "shots=4",
    *("feedback.demonstrations=40", "feedback.prompts=8", "feedback.responses=4", "feedback.pool=40"),
    *("feedback.heldout=6", "feedback.best_of=4", "feedback.samples=2", "feedback.max_tokens=16"),
    *("feedback.reward.data.context=640", "feedback.reward.data.valid_fraction=0.3"),
    *("feedback.ppo.objective.minibatches=1", "feedback.ppo.objective.heldout_prompts=2"),
    *("verified.objective.heldout_prompts=2", "verified.objective.max_tokens=16"),
    *("feedback.ppo.objective.preflight=off", "verified.objective.preflight=off"),
]
for part in ("base", "midtrain", "assistant", "honest"):
    SETS += [f"{part}.train.steps=3", f"{part}.train.batch_size=8", f"{part}.evaluation.batch_size=8"]
for part in ("feedback.sft", "feedback.reward", "feedback.ppo", "verified"):
    SETS += [f"{part}.train.steps=2", f"{part}.train.batch_size=8", f"{part}.evaluation.every=2"]
for part in ("feedback.sft", "feedback.ppo", "verified"):
    SETS.append(f"{part}.data.context=320")
for part in ("midtrain", "assistant", "honest"):
    SETS += [f"{part}.data.context=320", f"{part}.data.sources.0.count=40"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("tour")
    lines = [json.dumps({"text": t}) for t in tiny_run.texts(60)]
    (root / "texts.jsonl").write_text("\n".join([*lines, lines[0], json.dumps({"text": "short"})]))
    caches = [
        f"{part}.data.cache={root / 'cache'}"
        for part in ("base", "midtrain", "assistant", "honest", "feedback.sft", "feedback.reward")
    ]
    sets = [*SETS, f"text=Files(path={root / 'texts.jsonl'})", *caches]
    with pytest.MonkeyPatch.context() as m:
        # Nearly all of the time is the compiler's: one shape instead of a dozen.
        for name, size in {"MIN_PROMPT_BUCKET": 256, "MIN_TOKENS_BUCKET": 256, "MIN_CAPACITY": 512}.items():
            m.setattr(engine, name, size)
        yield root / "w", sets, tour.tour(root / "w", "smoke", sets, [], [])


def test_every_stage_says_what_it_found(done):
    _, _, records = done
    results = {n: r["result"] for n, r in records.items()}
    assert tuple(results) == STAGES
    assert results["curate"]["report"]["complete"] and results["curate"]["sources"]["files"]["documents"] == 60
    assert [s["removed"] for s in results["curate"]["report"]["steps"]] == [1, 1, 0, 0]
    assert (
        results["tokenize"]["vocab_size"] == 288 and len(results["tokenize"]["pieces"]) == tour_base.SAMPLE_CHARACTERS
    )
    assert results["pretrain"]["steps"] == 3 and results["pretrain"]["last"]["eval/all/bits_per_byte"] > 0
    bits, error = results["evaluate"]["bits_per_byte"]
    # Both count every byte of the held-out text, one by documents and one by packed rows.
    assert bits == pytest.approx(results["pretrain"]["last"]["eval/all/bits_per_byte"], rel=1e-4)
    metrics = results["evaluate"]["results"]["tasks"]["loss"]["metrics"]
    errors = [metrics[f"{name}/bits_per_byte"]["stderr"] for name in ("world", "files")]
    assert 0 < error < max(errors)
    assert 0.5 < results["evaluate"]["bound"]["bits_per_byte"] < 4
    prompts = [s["prompt"] for s in results["sample"]["samples"]]
    assert prompts[0] == "" and len(prompts) > 1 and all(s["text"] for s in results["sample"]["samples"])
    assert len(results["sample"]["distribution"]["next"]) == 10


def test_the_assistant_is_asked_probed_and_taught(done):
    workdir, _, records = done
    results = {n: r["result"] for n, r in records.items()}
    facts = results["facts"]["rows"]
    assert len({(r["model"], r["asked about"]) for r in facts}) == len(facts) == 8
    assert all(r["accuracy"]["n"] == 8 for r in facts) and results["facts"]["shown"]
    # What the model knew is what the lessons teach, and what they teach is what the next training read.
    before = read_probed(workdir / "probe" / "train.jsonl")
    assert {probe_group(p.question) for p in before} == {"often", "once", "withheld", "stranger"}
    classes = [classify(p) for p in before]
    made = [json.loads(line) for line in (workdir / "probe" / "lessons.jsonl").read_text().splitlines()]
    assert results["probe"]["lessons"]["unknown"] == classes.count("unknown") > 0
    assert sum(results["probe"]["lessons"].values()) == len(made)
    assert {x["source"]["question"] for x in made} <= {p.question.id for p in before}
    unknown = [x["messages"][-1]["content"] for x in made if x["source"]["class"] == "unknown"]
    assert all(thought["type"] == "thinking" and not thought["text"].endswith(".") for thought, _ in unknown)
    assert "eval/lessons/loss" in results["honest"]["last"]
    after = results["reprobe"]
    asked = len(read_probed(workdir / "probe" / "heldout.jsonl"))
    assert after["compared"]["questions"] == after["summaries"]["after"]["questions"] == asked
    assert set(after["summaries"]) == {"before", "after", "open book, before", "open book, after"}
    assert set(after["compared"]["unknown"]) == {"withheld", "stranger", "untold"} and after["threshold"]["test"]
    assert set(after["thresholds"]) == set(SCORES) and after["thresholds"]["mean_logprob"] == after["threshold"]
    assert all(t["test"]["unknown"]["untold"] for t in after["thresholds"].values())


def test_tools_and_prompts_are_tried(done):
    _, _, records = done
    tools, prompting = (records[n]["result"] for n in ("tools", "prompting"))
    kinds = {r["kind"]: r for r in tools["rows"]}
    assert {"facts only in the index", "facts told often", "identity", "arithmetic, by a tool"} <= set(kinds)
    assert kinds["facts only in the index"]["needed"] == "search" and kinds["facts told often"]["needed"] is None
    assert kinds["arithmetic, by a tool"]["needed"] == "calculator" and kinds["arithmetic, by hand"]["needed"] is None
    assert all(r[k]["n"] == 8 for r in tools["rows"] for k in ("without", "with", "called"))
    assert {"calculator", "search"} <= set(tools["tools"])
    assert {"tools/calls", "tools/failures"} <= set(tools["calls"])
    for label in ("base", "assistant"):
        tasks = prompting["shots"][label]["tasks"]
        assert set(tasks) == {"fact_often", "arithmetic", "spell"}
        assert {"direct/0 shots", "steps/1 shots"} <= set(tasks["arithmetic"]["metrics"])
    assert [prompting["shots"][label]["form"] for label in ("base", "assistant")] == ["text", "chat"]
    assert all(set(row["replies"]) == {"base", "assistant", "honest"} for row in prompting["side_by_side"])
    assert len(prompting["side_by_side"]) == 8


def test_it_learns_from_rankings_and_from_checked_answers(done):
    workdir, _, records = done
    results = {n: r["result"] for n, r in records.items()}
    assert results["evaluate_1"]["gain"]["n"] == 6 and results["collect_1"]["rankings"] > 0
    told = results["verify"]["told"]
    assert {"pass@1", "greedy", "length"} <= set(told["before"]) & set(told["after"])
    # Both learn from the model that the page calls the one that knows its limits.
    for run in ("feedback/sft", "verified"):
        assert load_run(workdir / run).experiment.parent == str(workdir / "honest")
    names = [s["name"] for s in results["arena"]["standings"]]
    assert sorted(names) == sorted(["assistant", "that knows its limits", "many hands", "PPO", "checked rewards"])
    rows = results["side_by_side"]["rows"]
    assert [r["prompt"] for r in rows] == [r["prompt"] for r in results["prompting"]["side_by_side"]]
    assert all(set(r["replies"]) == {"base", *names} for r in rows)
    for early, late in (("base", "base"), ("honest", "that knows its limits")):
        said = [r["replies"][early] for r in results["prompting"]["side_by_side"]]
        assert [r["replies"][late] for r in rows] == said


def test_the_page_shows_it_and_needs_no_other_file(done):
    workdir, _, records = done
    text = (workdir / "report" / "index.html").read_text()
    for heading in (
        *("The text", "Its tokens", "The training", "What it has learned", "What it writes", "From text to answers"),
        *("Knowing what it knows", "With the book open", "Tools", "Examples in the prompt", "Side by side"),
        *("Learning from rankings", "Learning from checked answers", "Arena", "All of them side by side"),
        "Again, and",
    ):
        assert f">{heading}" in text
    for shown in (
        *("facts only in the index", "by a threshold instead", "told nowhere, of a stranger", "steps/1 shots"),
        *("calls made", "of them failed"),
    ):
        assert shown in text
    assert all(name.replace("'", "&#x27;") in text for name in SCORE_NAMES.values())
    assert "LZMA2" in text and "ExactDuplicates" in text and "standard error" in text
    assert records["curate"]["result"]["report"]["steps"][0]["step"] in text
    assert 'src="data:image/png;base64,' in text
    for outside in ("<script", "<link", 'src="http', "url("):
        assert outside not in text


def test_calls_and_failures_are_counted_by_tool(tmp_path):
    counters = Counters()
    for name, ok in (("search", True), ("search", False), ("search", True), ("calculator", True)):
        counters.add(name, ok, 0.1)
    calls = {k: v for k, v in counters.metrics().items() if not k.endswith("/seconds")}
    out = Page("page")
    tour_page_assistant.tools(out, {"tools": ["search"], "rows": [], "metrics": {}, "shown": [], "calls": calls})
    out.write(tmp_path / "page.html")
    table = (tmp_path / "page.html").read_text().partition(">calls made<")[2].partition("</table>")[0]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table)
    assert cells == ["calculator", "1", "0", "search", "3", "1", "all", "4", "1"]


@pytest.mark.parametrize("stage", ["sample", "tools"])
def test_the_same_command_skips_and_redo_does_one_again(done, stage):
    workdir, sets, first = done
    before = {p: p.stat().st_mtime_ns for p in (workdir / "stages").iterdir()}
    again = tour.tour(workdir, "smoke", sets, [], [stage])
    changed = [p.stem for p in before if p.stat().st_mtime_ns != before[p]]
    assert changed == [stage]  # it came out the same, so the stages after it stand
    assert tuple(again) == STAGES and again[stage]["result"] == first[stage]["result"]


def test_what_checked_answers_tell_of_thoughts_is_kept_and_shown(tmp_path, monkeypatch):
    told = {"eval/pass@1": 0.2, "eval/thinking/better": 0.1, "eval/reward": 1.0}
    records = [{"step": 0} | told, {"step": 1, "train/loss": 0.0}, {"step": 2} | told | {"eval/thinking/worse": 0.3}]
    monkeypatch.setattr(tour_feedback, "training", lambda *_: {"identity": "", "steps": 2, "last": {}})
    monkeypatch.setattr(tour_feedback, "read_metrics", lambda _: records)
    t, own = tour.definition("smoke", [], str(tmp_path))
    found = tour_feedback.verify(t, own, tmp_path, False)
    assert found["told"]["before"] == {"pass@1": 0.2, "thinking/better": 0.1}
    out = Page("tour")
    tour_page_feedback.checked(out, found, tmp_path)
    shown = re.findall(r"<tr><td>(.*?)</td><td.*?>(.*?)</td><td.*?>(.*?)</td></tr>", out.render())
    assert [r[0] for r in shown] == ["pass@1", "thinking/better", "thinking/worse"]
    assert shown[2][1] == "-" and float(shown[2][2]) == 0.3


def test_without_isolation_there_are_the_other_tools(monkeypatch, tmp_path, capsys):
    def refused(unsafe=False):
        raise IsolationError("nothing isolates here")

    monkeypatch.setattr("jaxlm.tools.python_tool", refused)
    t, _ = tour.definition("smoke", SETS, str(tmp_path))
    assert "python" in t.honest.data.sources[0].tools
    found = tour_assistant._registry(t, tmp_path / "tools")
    assert list(found) == ["calculator", "search"] and "nothing isolates here" in capsys.readouterr().err
    hits = found["search"].run("hobby")
    assert hits.startswith("[1] ") and (tmp_path / "tools" / "index.db").exists()


def test_what_does_not_fit_the_context_is_left_out(tmp_path, capsys):
    tiny_run.make(tmp_path)  # a context of 128 bytes, of which the answer takes 64
    run = load_run(tmp_path)
    short, long = plain_question("Who?", "I", "a"), plain_question(60 * "Who? ", "I", "b")
    assert tour_assistant._fitting(run, [long, short, long], "questions") == [short]
    assert "note: 2 of 3 questions do not fit the context of 128" in capsys.readouterr().out


def test_another_definition_is_refused_and_harms_nothing(done):
    workdir, sets, _ = done
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"holds another experiment: base\.model\.width: 16 -> 32"):
        tour.tour(workdir, "smoke", [*sets, "base.model.width=32"], [], [])
    for other, redo in (
        ("honest.objective.doubt=3", "reprobe"),
        ("verified.seed=3", "honest"),
        ("base.seed=3", "report"),
    ):
        with pytest.raises(UserError, match="or what to do again: --redo=STAGE"):
            tour.tour(workdir, "smoke", [*sets, other], [], [redo])
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def test_another_definition_of_what_is_done_again_is_welcome(done):
    workdir, sets, _ = done
    for other, redo in (("honest.objective.doubt=3", ["honest"]), ("feedback.ppo.seed=3", ["ppo_1"]), ("asked=9", [])):
        tour._check(workdir, tour.definition("smoke", [*sets, other], str(workdir))[0], redo)


def test_what_the_last_model_is_taught_changes_no_question(tmp_path):
    """Else the probe, from which it is taught, would be asked again."""
    sets = ([], ["honest.data.sources.0.search=0.9"], ["honest.data.sources.0.part=0.5,1.0"])
    same, shares, people = (tour.fields(tour.definition("smoke", s, str(tmp_path))[0]) for s in sets)
    assert same["talk"] == shares["talk"] and same["honest"] != shares["honest"]
    assert same["talk"] != people["talk"]


def test_pretraining_again_keeps_the_former_run(done, monkeypatch, tmp_path):
    run = tmp_path / "pretrain"
    run.mkdir()
    monkeypatch.setattr(tour_base, "train", lambda *a: 42)
    with pytest.raises(exits.Stopped):
        tour_base.training(None, None, storage.path(run), True)
    assert [p.name for p in tmp_path.iterdir()] == ["pretrain-1"]


def test_the_assistant_is_told_nothing_about_the_people_whom_the_figures_are_about(tmp_path):
    t, _ = tour.definition("smoke", ["told=train"], str(tmp_path))
    everyone = [person(world_tables(t.world), i) for i in range(t.world.people.count)]
    names = [p.name for p in everyone if p.split == "heldout"]

    def named(texts) -> bool:
        return any(name in text for text in texts for name in names)

    def biographies(world):
        return (text for i, text in texts(world) if i.startswith("train/"))

    assert names and named(biographies(t.world))
    for e in (t.midtrain, t.assistant, t.honest):
        talk = e.data.sources[0]
        assert not named(repr(conversation(talk, "train", i)) for i in range(300))
    # Before it, memory is asked for nothing; in it, there are conversations alone; after it, whom it is told about.
    assert not t.midtrain.data.sources[0].facts and t.assistant.data.sources[0].facts
    assert len(t.assistant.data.sources) == 1 and not t.assistant.data.replay
    assert not any(named(biographies(world)) for world in (t.honest.data.sources[1].text, *t.honest.data.replay))
    assert all(named(biographies(world)) for world in (t.midtrain.data.sources[1].text, *t.midtrain.data.replay))


@pytest.mark.parametrize("scale", TOURS)
def test_scales_resolve(scale, tmp_path):
    t, own = tour.definition(scale, ["seed=3", "world.people.values=30"], str(tmp_path))
    assert config.from_dict(Tour, config.to_dict(t)) == t
    talk, thoughts, lessons = t.honest.data.sources
    assert thoughts.text.people == t.world.people and not thoughts.text.problems
    assert talk.world == t.world == t.base.data.sources[0] and talk.world.people.values == 30
    assert lessons.path == f"{tmp_path}/probe/lessons.jsonl"
    trainings = (t.base, t.midtrain, t.assistant, t.honest)
    parents = [None, *(f"{tmp_path}/{name}" for name in ("pretrain", "midtrain", "assistant"))]
    assert [e.parent for e in trainings] == parents
    assert [e.seed for e in trainings] == [3, 3, 3, 3] and own.base.seed == 0
