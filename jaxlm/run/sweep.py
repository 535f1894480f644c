"""Ablations: a grid of variants of one experiment times seeds, and what the runs' metrics say about it.

A variant is the experiment after some edits and settings; the first one, `baseline`, has none of the grid's. A run is
one variant with one seed, in a workdir of its own, made by the same command as any other training run.
"""

import dataclasses
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Sequence

from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.run import checkpoint, log, objectives, report
from jaxlm.run.experiment import Experiment
from jaxlm.run.statistics import CONFIDENCE, noise_floor, paired_difference, summarize, verdict
from jaxlm.steps import preference
from jaxlm.steps.preference import Preference

SCHEMA_VERSION = 1
BASELINE = "baseline"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the grid adds to the experiment. `edits` and `sets` are texts as launch.train takes them."""

    name: str
    edits: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------- grid
def grid(edit_grid: Iterable[str], vary: Iterable[str]) -> list[Variant]:
    """Every edit entry (`a`, or `a+b` for both in that order) with every combination of varied values.

    edit_grid: entries; vary: texts `path=v1,v2`. The baseline comes first; each path also keeps its own value only
    in the baseline, so that a value of interest has to be named.
    """
    settings = []
    for text in vary:
        path, equals, values = text.partition("=")
        choices = config.split_commas(values)
        if not equals or not choices:
            raise UserError(f"--vary takes path=value,value,..., got {text!r}")
        settings.append([f"{path.strip()}={v}" for v in choices])
    entries = [()] + [tuple(part.strip() for part in entry.split("+")) for entry in edit_grid if entry.strip()]
    variants = [Variant(BASELINE)]
    for edits, sets in itertools.product(entries, itertools.product(*settings)):
        if edits or sets:
            variants.append(Variant("+".join([*edits, *sets]), edits, sets))
    return variants


def drop_repeats(resolved: dict[Variant, Experiment]) -> tuple[dict[Variant, Experiment], list[str]]:
    """Leaves out variants whose definition stands in the grid already; says which, one line each."""
    kept, notes = {}, []
    for variant, experiment in resolved.items():
        same = next((other.name for other, e in kept.items() if e == experiment), None)
        if same is None:
            kept[variant] = experiment
        else:
            notes.append(f"{variant.name} resolves to the same definition as {same}: it runs once, as {same}")
    return kept, notes


def undone(variant: Variant, common: Experiment, edited: Experiment, sets: Iterable[str]) -> list[str]:
    """Says, one line each, which of a variant's edited paths a setting of all variants writes over again.

    Settings come after edits, so a variant may lose what makes it one. common, edited: the definition without and with
    the variant's edits, before any settings.
    """
    changed = [line.split(": ")[0] for line in config.diff(common, edited)]
    return [
        f"--set={text} comes after the edits of {variant.name} and overrides what they did to it"
        for text in sets
        if any(path == (p := text.partition("=")[0].strip()) or path.startswith(f"{p}.") for path in changed)
    ]


def folder(variant: Variant, seed: int) -> str:
    """Relative workdir of a run: names that every file system takes."""
    name = re.sub(r"[^A-Za-z0-9_.+=-]+", "_", variant.name)
    if name != variant.name or len(name) > 100:
        name = f"{name[:80]}-{storage.sha256_text(variant.name)[:8]}"
    return f"runs/{name}/seed{seed}"


# ---------------------------------------------------------------------------------------------------- equal compute
def flops_per_step(e: Experiment, vocab_size: int) -> float:
    """Training FLOPs of one update, without a teacher's, which may be gone when the sweep is answered; `vocab_size`
    binds a model whose vocabulary comes from its tokenizer."""
    e = dataclasses.replace(e, model=dataclasses.replace(e.model, vocab_size=e.model.vocab_size or vocab_size))
    compared = isinstance(e.objective, Preference) and preference.needs_reference(e.objective)
    each = objectives.flops_per_token(e, (e.model, None) if compared else None)
    return each * e.train.batch_size * e.data.context


def steps_at_equal_flops(baseline_steps: int, baseline_flops: float, variant_flops: float) -> int:
    """Whole updates of the variant that cost what the baseline's do, to the nearest update."""
    return max(1, round(baseline_steps * baseline_flops / variant_flops))


# ---------------------------------------------------------------------------------------------------------- outcomes
def final_metrics(workdir, steps: int) -> dict[str, float] | None:
    """The `eval/...` metrics after the last update; None when the run has not got there.

    Of a run that an alarm has ended they are those at its end, not of the checkpoint that others read.
    """
    try:
        records = log.read_metrics(workdir)
    except UserError:  # nothing has been trained there yet
        return None
    chosen = storage.path(workdir) / checkpoint.CHOSEN
    if records and chosen.exists() and storage.read_json(chosen)["ended"] == records[-1]["step"]:
        steps = records[-1]["step"]  # it has not gone on since an alarm ended it
    return next(
        ({k: v for k, v in r.items() if k.startswith("eval/")} or None for r in records if r["step"] == steps), None
    )


def check_definition(workdir, wanted: Experiment) -> None:
    """Raises `UserError` when a finished run in `workdir` is of another definition than the grid asks for."""
    had = config.from_json(Experiment, (storage.path(workdir) / "config.json").read_text())
    if wanted.model.vocab_size is None:
        wanted = config.override(wanted, {"model.vocab_size": had.model.vocab_size})
    if lines := config.diff(had, wanted):
        raise UserError(
            f"{workdir} holds a run of another definition ({'; '.join(lines[:3])}); "
            "choose another --workdir or remove that run"
        )


def choose_metric(runs: Iterable[dict[str, float]]) -> str:
    """Bits per byte of all validation sets together, for it compares across tokenizers too; else the only loss."""
    names = set.intersection(*(set(r) for r in runs))
    for ending in ("bits_per_byte", "loss"):
        if f"eval/all/{ending}" in names:
            return f"eval/all/{ending}"
        found = [n for n in names if n.endswith(f"/{ending}")]
        if len(found) == 1:
            return found[0]
    raise UserError(f"say which metric decides, with --metric; these are there: {', '.join(sorted(names)) or 'none'}")


def analyze(
    variants: Sequence[Variant],
    values: dict[str, dict[int, float | None]],
    metric: str,
    lower_is_better: bool = True,
    costs: dict[str, dict[str, float]] | None = None,
) -> dict:
    """The answer of a sweep as a JSON-able dict.

    values: variant name -> seed -> the metric's final value, None or non-finite where the run diverged.
    costs: variant name -> {"steps": updates of a run, "flops": FLOPs of a run}, for the table.
    """
    good = {v.name: {s: x for s, x in values[v.name].items() if x is not None and math.isfinite(x)} for v in variants}
    rows = []
    for variant in variants:
        runs, mine = values[variant.name], good[variant.name]
        difference = None if variant.name == BASELINE else paired_difference(mine, good[BASELINE])
        diverged = len(runs) - len(mine)
        said = "" if variant.name == BASELINE else verdict(difference, lower_is_better)
        rows.append(
            {
                "name": variant.name,
                "edits": list(variant.edits),
                "sets": list(variant.sets),
                **(costs or {}).get(variant.name, {}),
                "seeds": {str(s): mine.get(s) for s in runs},
                **(dataclasses.asdict(summarize(mine.values())) if mine else {"n": 0, "mean": None, "std": None}),
                "difference": dataclasses.asdict(difference) if difference else None,
                "verdict": f"diverged ({diverged} of {len(runs)})" if diverged else said,
            }
        )
    floor = noise_floor(m.values() for m in good.values())
    return {
        "schema_version": SCHEMA_VERSION,
        "metric": metric,
        "lower_is_better": lower_is_better,
        "confidence": CONFIDENCE,
        "noise_floor": dataclasses.asdict(floor) if floor else None,
        "variants": rows,
    }


# ------------------------------------------------------------------------------------------------------ presentation
def _digits(results: dict) -> int:
    """Decimals that show the noise's second digit, and no more."""
    floor = results["noise_floor"]
    if not floor or floor["std"] <= 0:
        return 4
    return min(8, max(2, 1 - math.floor(math.log10(floor["std"]))))


def table(results: dict) -> str:
    """A Markdown table, the baseline first and the others from best to worst, with the noise stated below."""
    d, sign = _digits(results), 1 if results["lower_is_better"] else -1
    shown = "steps" in results["variants"][0]
    header = ["variant", "seeds", "mean", "std", "difference", "95% interval", "verdict"]
    header += ["steps", "FLOPs"] if shown else []
    rows = [header]
    first, *others = results["variants"]
    for r in [first, *sorted(others, key=lambda r: math.inf if r["mean"] is None else sign * r["mean"])]:
        delta = r["difference"]
        row = [
            r["name"],
            str(r["n"]),
            "-" if r["mean"] is None else f"{r['mean']:.{d}f}",
            "-" if r["std"] is None else f"{r['std']:.{d}f}",
            "-" if not delta else f"{delta['mean']:+.{d}f}",
            "-" if not delta or delta["low"] is None else f"[{delta['low']:+.{d}f}, {delta['high']:+.{d}f}]",
            r["verdict"] or "-",
        ]
        rows.append(row + ([str(r["steps"]), f"{r['flops']:.3g}"] if shown else []))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join([*lines, "", *_notes(results, d)]) + "\n"


def _notes(results: dict, d: int) -> list[str]:
    better = "lower" if results["lower_is_better"] else "higher"
    lines = [f"{results['metric']} after the last update, {better} is better; differences are paired by seed."]
    floor = results["noise_floor"]
    if floor is None:
        lines.append("One seed a variant: the noise is unknown, so nothing can be called better or worse.")
    else:
        lines.append(
            f"Noise floor: seeds spread by {floor['std']:.{d}f} (pooled over variants, {floor['df']} degrees of "
            f"freedom); unpaired, {floor['n']} seeds each show a difference of {floor['detectable']:.{d}f} or more."
        )
    compared = sum(r["difference"] is not None for r in results["variants"])
    if floor and compared > 1:
        missed = compared * (1 - results["confidence"])
        lines.append(f"{compared} comparisons at 95%: expect {missed:.2g} false verdicts from noise alone.")
    return lines + results.get("notes", [])


def plot(results: dict, path) -> None:
    """PNG: a point for each seed, the mean with its interval, the baseline and its noise as a band."""
    first, *others = [r for r in results["variants"] if r["n"]] or [None]
    if first is None:
        return
    sign = 1 if results["lower_is_better"] else -1
    rows = [first, *sorted(others, key=lambda r: sign * r["mean"])][::-1]
    figure = report.new_figure(8, 1.4 + 0.5 * len(rows))
    axes = figure.add_subplot()
    floor = results["noise_floor"]
    if floor:
        axes.axvspan(first["mean"] - floor["std"], first["mean"] + floor["std"], color="0.92", label="seeds' std")
    axes.axvline(first["mean"], color="0.5", lw=1, ls="--", label=f"mean of {first['name']}")
    colors = {"better": "tab:green", "worse": "tab:red"}
    for y, r in enumerate(rows):
        color = colors.get(r["verdict"], "tab:blue" if r["name"] == first["name"] else "0.35")
        points = [x for x in r["seeds"].values() if x is not None]
        axes.plot(points, [y] * len(points), "o", color=color, alpha=0.45, ms=5)
        delta = r["difference"]
        if delta and delta["low"] is not None:
            # The interval is that of the paired difference, drawn around the variant's mean.
            axes.errorbar(r["mean"], y, xerr=(delta["high"] - delta["low"]) / 2, fmt="|", color=color, ms=14, capsize=4)
        else:
            axes.plot(r["mean"], y, "|", color=color, ms=14)
    names = ["\n".join(textwrap.wrap(r["name"].replace("+", " +"), 36)).replace(" +", "+") for r in rows]
    axes.set_yticks(range(len(rows)), names, fontsize="small")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{results['metric']} ({'lower' if results['lower_is_better'] else 'higher'} is better)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, fontsize="small", frameon=False)
    report.save_figure(figure, path)
