"""The figures of several tours side by side, as a table in Markdown: what one of them shows, shown again by the others.

usage:
  python -m launch.tour_seeds --workdir=TOUR --workdir=TOUR... [--out=FILE]

A column for each tour, named by its seed, then their mean, from three on with a 95% interval over tours (Student's t,
cut off at 0 and 1, which no share is beyond; `lost` may be negative, and its interval is cut off at -1). Rows of stages
that a tour has not done stay empty. `lost` and `times fewer` compare the same held-out questions before
and after the last fine-tuning; `times fewer` of the mean is that of the mean rates.

examples:
  for s in 0 1 2; do python -m launch.tour --scale=tiny --workdir=runs/tiny$s --set=seed=$s; done
  python -m launch.tour_seeds --workdir=runs/tiny0 --workdir=runs/tiny1 --workdir=runs/tiny2

Exit codes: 0 done; 2 bad input.
"""

import dataclasses
from collections.abc import Callable, Sequence

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.run import exits, stages
from jaxlm.run.statistics import half_width, summarize
from launch import common

WORKDIR = flags.DEFINE_multi_string("workdir", [], "Folder of a tour; given once for each.")
OUT = flags.DEFINE_string("out", None, "File for the table, besides printing it.")

READ = ("facts", "probe", "reprobe", "tools")
ABOUT = {"withheld": "withheld facts of known people", "stranger": "strangers", "untold": "both"}
TOLD = {"often": "told often", "told": "all told"}


@dataclasses.dataclass(frozen=True)
class Row:
    """value: the results of a tour's stages by name -> a figure, or None. of: two rows whose ratio this row is. least:
    of the figure, which is never above 1."""

    name: str
    value: Callable[[dict], float | None] | None = None
    of: tuple["Row", "Row"] | None = None
    digits: int = 3
    least: float = 0.0


def _at(found: dict, *path: str) -> float | None:
    """The figure at the end of a path into nested results; None where a step of it is missing."""
    for name in path:
        if (found := found.get(name)) is None:
            return None
    return found


def _figure(name: str, *path: str, least: float = 0.0) -> Row:
    return Row(name, lambda found: _at(found, *path), least=least)


def _listed(name: str, stage: str, where: dict[str, str], *path: str) -> Row:
    """A figure of the row of a stage's list that has these values."""

    def value(found):
        rows = found.get(stage, {}).get("rows", [])
        row = next((r for r in rows if all(r[k] == v for k, v in where.items())), {})
        return _at(row, *path)

    return Row(name, value)


def _asked() -> list[Row]:
    absent, trained = "people that fine-tuning has not a word about", "people of the conversations"
    models = ("base, asked as text", "base, asked in a conversation", "before fine-tuning, asked in a conversation")
    own = [(m, absent) for m in (*models, "assistant")] + [("assistant", trained)]
    return [
        _listed(f"{who}: {model}", "facts", {"model": model, "asked about": who}, "accuracy", "value")
        for model, who in own
    ]


def _known() -> list[Row]:
    rows = []
    for side, name in ABOUT.items():
        path = ("reprobe", "compared", "unknown", side)
        before = _figure(f"wrong, {name}: before", *path, "before", "value")
        after = _figure(f"wrong, {name}: after", *path, "after", "value")
        rows += [before, after, Row(f"wrong, {name}: times fewer", of=(before, after), digits=1)]
    for side, name in TOLD.items():
        path = ("reprobe", "compared", "known", side)
        rows += [_figure(f"right, {name}: {when}", *path, when, "value") for when in ("before", "after")]
        rows.append(_figure(f"right, {name}: lost", *path, "lost", "value", least=-1.0))
    test = ("reprobe", "threshold", "test")
    rows.append(_figure("threshold instead: wrong, both", *test, "unknown", "untold", "after", "value"))
    rows.append(_figure("threshold instead: lost, all told", *test, "known", "told", "lost", "value", least=-1.0))
    for when in ("before", "after", "open book, before", "open book, after"):
        path = ("reprobe", "summaries", when)
        if not when.startswith("open"):
            rows.append(_figure(f"over-refusal, all told: {when}", *path, "over_refusal", "value"))
            rows.append(_figure(f"calibration error of agreement: {when}", *path, "calibration", "agreement", "ece"))
        else:
            rows.append(_figure(f"{when}: right, withheld", *path, "groups", "withheld", "right", "value"))
    return rows


HELPED = (
    ("without tools", "without"),
    ("with", "with"),
    ("called", "called"),
    ("called, of those right without tools", "spare"),
)


def _tools(found: Sequence[dict]) -> list[Row]:
    kinds = list(dict.fromkeys(r["kind"] for one in found for r in one.get("tools", {}).get("rows", [])))
    rows = []
    for kind in kinds:
        rows += [_listed(f"{kind}: {label}", "tools", {"kind": kind}, key, "value") for label, key in HELPED]
    return rows


def rows(found: Sequence[dict]) -> list[Row]:
    """What is compared: facts, knowing its limits, tools."""
    metrics = list(dict.fromkeys(m for one in found for m in one.get("tools", {}).get("metrics", {})))
    over_all = [_figure(f"over all questions: {m}", "tools", "metrics", m, "value") for m in metrics]
    return [*_asked(), *_known(), *_tools(found), *over_all]


def _mean(values: Sequence[float | None], digits: int, least: float) -> str:
    if None in values:
        return ""
    s = summarize(values)
    half = half_width(s) if s.n > 2 else None
    low, high = (s.mean, s.mean) if half is None else (max(s.mean - half, least), min(s.mean + half, 1.0))
    bounds = "" if half is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{s.mean:.{digits}f}{bounds}"


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def cells(row: Row, found: Sequence[dict]) -> list[str]:
    """A row's figures, one for each tour and then their mean."""
    if row.of is None:
        values = [row.value(one) for one in found]
        mean = _mean(values, row.digits, row.least)
    else:
        sides = [[side.value(one) for one in found] for side in row.of]
        values = [_ratio(*pair) for pair in zip(*sides)]
        whole = None if None in (*sides[0], *sides[1]) else _ratio(*map(sum, sides))
        mean = "" if whole is None else f"{whole:.{row.digits}f}"
    return ["" if v is None else f"{v:.{row.digits}f}" for v in values] + [mean]


def table(names: Sequence[str], found: Sequence[dict]) -> str:
    """The Markdown table of tours `names` with the results `found` of their stages; rows nobody has are left out."""
    lines = [["", *names, "mean"], ["---"] * (len(names) + 2)]
    for row in rows(found):
        if any(shown := cells(row, found)):
            lines.append([row.name, *shown])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read(workdir: str) -> tuple[str, dict]:
    """(name of a tour, the results of its stages); `UserError` where there is none."""
    root = storage.path(workdir)
    done = stages.records(root, READ)
    if not done:
        raise UserError(f"{workdir} has none of the stages {', '.join(READ)} of launch.tour; run it there first")
    seed = storage.read_json(root / "config.json")["seed"]
    return f"seed {seed}", {name: record["result"] for name, record in done.items()}


def main() -> int:
    if not WORKDIR.value:
        raise UserError("--workdir=TOUR is missing: the folder of a tour, once for each")
    names, found = zip(*map(read, WORKDIR.value))
    text = table(names, found)
    print(text, end="")
    if OUT.value:
        storage.write_text(storage.path(OUT.value), text)
    return exits.EXIT_DONE


if __name__ == "__main__":
    common.run(main)
