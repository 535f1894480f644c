"""The stages of the tour that follow fine-tuning: what the assistant can say, what it knows, and what tools add."""

import dataclasses
import functools
import sys

from experiments.tour import Tour
from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data.world import talk as talks
from jaxlm.data.world.corpus import world_tables
from jaxlm.data.world.questions import Question, fact_questions
from jaxlm.data.world.talk import WorldConversations
from jaxlm.estimates import Estimate, proportion
from jaxlm.feedback import lessons, measures, probe
from jaxlm.feedback.judge import address
from jaxlm.run import probe_plots, side_by_side, world_tasks
from jaxlm.run.ask import Asked, too_long
from jaxlm.run.load import Run
from jaxlm.sample.chat import reply
from jaxlm.tools import Counters, IsolationError, Tool, by_name

SHOWN = 4  # transcripts of each kind on the page


def talk(t: Tour) -> WorldConversations:
    """How the last of the models was taught to talk."""
    return next(s for s in t.honest.data.sources if isinstance(s, WorldConversations))


def _items(t: Tour, task: str, split="heldout", count: int | None = None):
    return world_tasks.items(talk(t), task, t.asked if count is None else count, split, t.seed)


def _note(kept: int, of: int, what: str, run: Run) -> None:
    if kept < of:
        print(f"note: {of - kept} of {of} {what} do not fit the context of {run.experiment.data.context}")


def _accuracy(records: list[dict]) -> dict | None:
    return _plain(world_tasks.metrics(records).get("accuracy"))


def _said(estimate: dict | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.3f}"


def _plain(estimate: Estimate | None) -> dict | None:
    return None if estimate is None else dataclasses.asdict(estimate)


# ------------------------------------------------------------------------------------------------------------- facts
def facts(t: Tour, base: Run, middle: Run, assistant: Run) -> dict:
    """Exact match on facts told often, asked in wordings that no conversation used."""
    heldout = _items(t, "fact_often")
    tokens = world_tasks.budget(assistant, heldout)  # the same for all: a base model ends its answer with its line
    asked = {"people that fine-tuning has not a word about": [i.question for i in heldout]}
    tables = world_tables(t.world)
    trained = fact_questions(tables, "train", ("often",), heldout_wordings=True)
    asked["people of the conversations"] = sorted(trained, key=lambda q: address("facts", t.seed, q.id))[: t.asked]
    models = {
        "base, asked as text": (base, False),
        "base, asked in a conversation": (base, True),
        "before fine-tuning, asked in a conversation": (middle, True),
        "assistant": (assistant, True),
    }
    rows, shown = [], []
    for who, questions in asked.items():
        for model, (run, chat) in models.items():
            asked_of = world_tasks.ask(run, questions, max_tokens=tokens, chat=chat, work="none")
            records = [r for r in asked_of if "skipped" not in r]
            _note(len(records), len(asked_of), "questions", run)
            rows.append({"model": model, "asked about": who, "accuracy": _accuracy(records)})
            print(f"{model}, {who}: {_said(rows[-1]['accuracy'])}")
            if run is assistant:
                shown += [{k: r[k] for k in ("text", "answer", "reply", "outcome")} for r in records[:SHOWN]]
    return {"rows": rows, "shown": shown}


# --------------------------------------------------------------------------------------------------------- knowledge
def _ask(run: Run):
    return functools.partial(reply, run.model, run.params, run.tokenizer, limit=run.experiment.data.context, slots=64)


def _fitting(run: Run, questions: list, what: str) -> list:
    """Those that leave room for an answer in the trained context."""
    kept = [q for q in questions if too_long(run, Asked(q.text, probe.SAMPLING.max_tokens, q.system), True) is None]
    _note(len(kept), len(questions), what, run)
    return kept


def _questions(t: Tour, run: Run) -> dict[str, list]:
    """What is probed: on the training side, on the held-out side, and the latter with the text that tells at hand."""
    tables = world_tables(t.world)
    part = talk(t).part
    train, heldout = (probe.world_questions(tables, s, t.probed, t.seed, part=part) for s in ("train", "heldout"))
    opened = [talks.open_book(tables, q) for q in heldout[:: max(1, len(heldout) // t.asked)]]
    asked = {"train": train, "heldout": heldout, "open": opened}
    return {name: _fitting(run, found, f"questions ({name})") for name, found in asked.items()}


def probing(t: Tour, run: Run, out) -> dict:
    """Probes the assistant and writes the lessons; what it knows of the held-out side is for comparison alone."""
    storage.make_dir(out)
    asked = _questions(t, run)
    found = probe.probe(_ask(run), [q for side in asked.values() for q in side], t.samples)
    sides = dict(zip(asked, _cut(found, *asked.values())))
    for name, side in sides.items():
        probe.write_probed(out / f"{name}.jsonl", side)
    tables = world_tables(t.world)
    made = lessons.lessons(
        sides["train"], f"assistant@{run.step}", seed=t.seed, tables=tables, recollect=talk(t).recollect
    )
    lessons.write_lessons(out / "lessons.jsonl", made)
    classes = {c: sum(x.source["class"] == c for x in made) for c in probe.CLASSES}
    print(f"lessons: {', '.join(f'{n} {c}' for c, n in classes.items())}")
    return {
        "identity": storage.sha256_file(out / "lessons.jsonl"),
        "lessons": classes,
        "summaries": {name: measures.summary(side) for name, side in sides.items() if side},
    }


def _cut(found: list, *parts: list) -> list[list]:
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    return [found[end - len(part) : end] for end, part in zip(ends, parts)]


def _fitting_still(run: Run, probed: list) -> list:
    kept = {q.id for q in _fitting(run, [p.question for p in probed], "questions of the probe")}
    return [p for p in probed if p.question.id in kept]


def probing_again(t: Tour, run: Run, out) -> dict:
    """The same held-out questions after the lessons, beside thresholds on how sure the former answers were."""
    train = probe.read_probed(out / "train.jsonl")
    before, opened_before = (_fitting_still(run, probe.read_probed(out / f"{n}.jsonl")) for n in ("heldout", "open"))
    found = probe.probe(_ask(run), [p.question for p in (*before, *opened_before)], t.samples)
    after, opened_after = _cut(found, before, opened_before)
    probe.write_probed(out / "heldout_after.jsonl", after)
    probe.write_probed(out / "open_after.jsonl", opened_after)
    compared = measures.compare(before, after)
    thresholds = {s: measures.threshold_baseline(train, before, score=s) for s in measures.scores_of([*train, *before])}
    for name, side in compared["unknown"].items():
        factor = "none left" if side["factor"] is None else f"{side['factor']:.1f} times fewer"
        print(f"wrong on {name}: {side['before']['value']:.3f} before, {side['after']['value']:.3f} after: {factor}")
    if told := compared["known"].get("told"):
        print(f"coverage lost on facts told: {told['lost']['value']:.3f}")
    sides = {
        "before": before,
        "after": after,
        "open book, before": opened_before,
        "open book, after": opened_after,
    }
    summaries = {name: measures.summary(side) for name, side in sides.items() if side}
    try:
        _draw(out, before, summaries)
    except UserError as error:  # without matplotlib there is a page without pictures
        print(error, file=sys.stderr)
    shown = [
        {"text": b.question.text, "answer": b.question.answer, "group": probe.group(b.question)}
        | {"before": b.reply, "after": a.reply, "outcome": a.outcome}
        for name in probe.GROUPS
        for b, a in [(b, a) for b, a in zip(before, after) if probe.group(b.question) == name][:SHOWN]
    ]
    return {
        "compared": compared,
        "threshold": thresholds["mean_logprob"],
        "thresholds": thresholds,
        "summaries": summaries,
        "shown": shown,
    }


def _draw(out, before: list, summaries: dict[str, dict]) -> None:
    """How sure and how often right; and what is refused at what loss, by training and by every threshold."""
    shown = {name: summaries[name]["calibration"]["agreement"] for name in ("before", "after")}
    probe_plots.reliability(shown, out / "reliability.png")
    coverage, wrong = (summaries["after"][name] for name in ("coverage", "wrong_on_unknown"))
    if coverage and wrong:
        curves = {score: measures.curve(before, score) for score in measures.scores_of(before)}
        point = (coverage["value"], wrong["value"])
        probe_plots.risk_coverage(curves, out / "risk_coverage.png", {"fine-tuned": point})


# ------------------------------------------------------------------------------------------------------------- tools
def _registry(t: Tour, out) -> dict[str, Tool]:
    """The tools of the conversations, over what the world tells nowhere else."""
    folder = talks.write_index_files(t.world, out / "texts")
    names = talk(t).tools
    try:
        return by_name(names, folder, out)
    except IsolationError as error:
        print(f"without the tool python: {error}", file=sys.stderr)
        return by_name([n for n in names if n != "python"], folder, out)


def _spare(pairs: list) -> dict | None:
    """How often a tool is called for what the model answers rightly without, of (without tools, with them)."""
    called = [bool(helped["called"]) for plain, helped in pairs if plain["outcome"] == "right"]
    return _plain(proportion(called)) if called else None


def tools(t: Tour, run: Run, out) -> dict:
    """Accuracy with and without tools where one is needed, and how often one is called where none is."""
    registry, half = _registry(t, out), (t.asked + 1) // 2
    kinds = {
        "facts only in the index": [i for k in ("fact_withheld", "fact_stranger") for i in _items(t, k, count=half)],
        "facts told often": _items(t, "fact_often"),
        "identity": _items(t, "identity"),
    }
    for task in t.world.tasks:
        found = _items(t, task, count=4 * t.asked)
        for_tools = [i for i in found if i.question.tool in registry]
        kinds[f"{task}, by a tool"] = for_tools[: t.asked]
        kinds[f"{task}, by hand"] = [i for i in found if i.question.by_hand and i not in for_tools][: t.asked]
    kinds = {k: found for k, found in kinds.items() if found}
    asked = [i.question for found in kinds.values() for i in found]
    limits = [n for found in kinds.values() for n in [world_tasks.budget(run, found)] * len(found)]
    counters = Counters()
    without = world_tasks.ask(run, asked, max_tokens=limits)
    told = world_tasks.ask(run, asked, max_tokens=limits, tools=registry, counters=counters)
    rows, shown, spared = [], [], []
    for kind, *both in zip(kinds, *(_cut(records, *kinds.values()) for records in (without, told))):
        # Asked both ways or not at all: an offer of tools is longer than none.
        pairs = [(p, h) for p, h in zip(*both) if "skipped" not in p and "skipped" not in h]
        _note(len(pairs), len(both[0]), f"questions ({kind})", run)
        if not pairs:
            continue
        plain, helped = zip(*pairs)
        rows.append(
            {"kind": kind, "needed": helped[0]["needed"], "without": _accuracy(plain), "with": _accuracy(helped)}
            | {"called": _plain(proportion([bool(r["called"]) for r in helped])), "spare": _spare(pairs)}
        )
        spared += [] if helped[0]["needed"] else pairs
        without_, with_, called = (_said(rows[-1][k]) for k in ("without", "with", "called"))
        print(f"{kind}: {without_} without tools, {with_} with; called for {called}")
        shown += [{"kind": kind, "text": r["text"], "answer": r["answer"], "parts": r["parts"]} for r in helped[:2]]
    return {
        "rows": rows,
        "metrics": {k: _plain(e) for k, e in world_tasks.tool_metrics(told).items()}
        | {"not needed, right without/called": _spare(spared)},
        "calls": {k: v for k, v in counters.metrics().items() if not k.endswith("/seconds")},  # the same when redone
        "tools": list(registry),
        "shown": shown,
    }


# --------------------------------------------------------------------------------------------------------- prompting
def one_of_each(t: Tour) -> list[Question]:
    """A held-out question of each kind."""
    return [i.question for task in world_tasks.task_names(talk(t)) for i in _items(t, task, count=1)]


def prompting(t: Tour, runs: dict[str, Run], out) -> dict:
    """Accuracy against the number of examples, and what each model says to the same prompts."""
    storage.make_dir(out)
    found = {
        label: world_tasks.run_suite(run, "shots", talk(t), out / label, t.seed, t.shots)
        for label, run in runs.items()
        if label != "honest"
    }
    try:
        world_tasks.plot_shots(found, out / "shots.png")
    except UserError as error:
        print(error, file=sys.stderr)
    rows = side_by_side.side_by_side(runs, one_of_each(t))
    print(side_by_side.text(rows))
    return {"shots": found, "side_by_side": rows}
