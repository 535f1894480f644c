"""The page that launch.lab ends with, and its pictures."""

import itertools
import sys
from collections.abc import Mapping

import numpy as np

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.estimates import Estimate
from jaxlm.feedback.alarms import Alarm
from jaxlm.feedback.overoptimization import Fit, curve
from jaxlm.run.overoptimization_plots import overoptimization
from jaxlm.run.report import COLORS, Page, label_axes, new_figure, save_figure
from launch import lab_results

SMOOTHED = ("proxy", "gold", "verifier", "d")


def _points(records, window: int) -> list[dict]:
    """A run's course as means of `window` records, some twenty of them to draw."""
    columns = {name: lab_results.smoothed(records, name, window) for name in SMOOTHED}
    kept = sorted({*range(0, len(records), max(1, len(records) // 20)), len(records) - 1})
    return [{"step": records[i]["step"]} | {name: float(c[i]) for name, c in columns.items()} for i in kept]


def _fit(found: Mapping | None) -> dict[str, Fit]:
    """A fit as it was before it became JSON, for the picture, which reads no interval of it."""
    return {} if found is None else {"gold": Fit(**found)}


def _alarm(run: Mapping, drawn: list[dict]) -> Alarm | None:
    """The first alarm, moved to the nearest point that is drawn."""
    if not run["alarms"]:
        return None
    first = Alarm(**run["alarms"][0])
    nearest = min((p["step"] for p in drawn), key=lambda step: abs(step - first.since))
    return Alarm(first.what, nearest, first.seen, first.amount, first.why)


def one_seed(arm: Mapping, count: int, window: int, path) -> None:
    """Proxy, gold and verifier over sqrt(KL) for one number of labels: best-of-n, and each run beside it."""
    best = arm["best_of_n"][str(count)]
    title = f"best-of-n, {count} labels"
    panels = {title: [{k: Estimate(**v) if isinstance(v, dict) else v for k, v in p.items()} for p in best["points"]]}
    fits, alarms = {title: _fit(best["fit"])}, {}
    for run in arm["rl"].values():
        if run["labels"] == count:
            title = f"RL, {count} labels" + (", KL penalty" if run["penalty"] else "")
            panels[title] = _points(run["records"], window)
            fits[title] = _fit(run["fit"])
            if (alarm := _alarm(run, panels[title])) is not None:
                alarms[title] = alarm
    overoptimization(panels, path, fits, alarms)


def all_seeds(results: Mapping, path) -> None:
    """Over sqrt(KL) proxy and gold with the curves of Gao et al. fitted to gold, and below them the verifier:
    best-of-n on the left, reinforcement learning on the right; a color for each number of labels, a line a seed.

    A fitted curve has the mean coefficients of the seeds (`lab_results.mean_fit`) and begins at their policies' mean.
    The run with a penalty has none: it stays where no curve can be told from another.
    """
    figure, arms = new_figure(11, 6.4), list(results["arms"].values())
    grid = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(3, 1))
    colors, window = dict(zip(results["labels"], itertools.cycle(COLORS))), results["definition"]["window"]
    origin = sum(arm["baseline"] for arm in arms) / len(arms)
    panels = [(0, f"best-of-n, {c} labels", c, False, [a["best_of_n"][str(c)]["points"] for a in arms]) for c in colors]
    panels += [(1, name, run["labels"], run["penalty"], [_points(a["rl"][name]["records"], window) for a in arms])
               for name, run in arms[0]["rl"].items()]  # fmt: skip
    for column, name, count, penalty, curves in panels:
        style = {"color": colors[count], "linewidth": 1.3}
        about, dashes = f"{count} labels" + (", KL penalty" if penalty else ""), "--" if penalty else "-"
        drawn = [("gold", 0, dashes), ("verifier", 1, dashes), *([] if penalty else [("proxy", 0, ":")])]
        for what, row, line in drawn:
            for i, points in enumerate(curves):
                xy = ([p[k] if isinstance(p[k], float) else p[k]["value"] for p in points] for k in ("d", what))
                grid[row][column].plot(*xy, line, label=None if i else f"{what}, {about}", **style)
        if not penalty and (found := results["summary"]["fits"].get(name)) is not None:
            alpha, beta = found["alpha"]["value"], found["beta"]["value"]
            x = np.linspace(0, max(p["d"] for points in curves for p in points), 200)
            label = f"fit: d ({alpha:.2f} {-beta:+.2f} {'log d' if found['form'] == 'rl' else 'd'})"
            y = origin + curve(found["form"], alpha, beta, x)
            grid[0][column].plot(x, y, "-.", color=colors[count], linewidth=2.4, alpha=0.55, label=label)
    for (above, below), title in zip(grid.T, ("best-of-n", "reinforcement learning")):
        label_axes(above, "", "reward")
        label_axes(below, r"$\sqrt{\mathrm{KL}}$ to the initial policy", "verifier")
        above.legend(frameon=False, fontsize=8)
        below.get_legend().remove()  # the colors are those above
        above.set_title(title)
    save_figure(figure, path)


def page(results: Mapping, command: str, folder) -> Page:
    """folder: where the pictures are, those that could be drawn."""
    s, out = results["summary"], Page("Over-optimization of a proxy reward")
    out.paragraph(
        "The gold reward is wanted, a proxy that has learned from some of its choices is optimized. Rewards are in "
        "standard deviations of the initial policy's samples. Brackets: 95% intervals over seeds; then each seed.",
        soft=True,
    )
    out.heading("What is shown")
    out.table(["", ""], [[what, "yes" if yes else "no"] for what, yes in lab_results.shown(s).items()])
    if (folder / "all.png").exists():
        out.image(
            folder / "all.png",
            "Gold, proxy and verifier over the distance from the initial policy, a line for each seed; "
            "dash-dotted: the curves of Gao et al., fitted to gold",
        )
    out.heading("Best-of-n")
    names, cell = lab_results.NAMES, lab_results.cell
    rows = [[c, cell(s["accuracy"][c]), *(cell(s["best_of_n"][c][k]) for k in names)] for c in map(str, s["labels"])]
    out.table(["labels", "accuracy of the proxy", *(f"{k} at n={s['n']}" for k in names)], rows)
    out.heading("Reinforcement learning")
    heads = {"peak": "highest gold", "d_peak": "at sqrt KL", "end": "gold at the end", "proxy": "proxy at the end",
             "d": "sqrt KL at the end"}  # fmt: skip
    rows = [[name, *(cell(r[k]) for k in heads)] for name, r in s["rl"].items()]
    out.table(["run", *heads.values()], rows)
    out.subheading("The curves of Gao et al., fitted to gold; d is sqrt KL")
    out.table(list(lab_results.FIT_HEADS), lab_results.fit_rows(s))
    out.subheading("Share of the highest gain in gold that is kept, by seed")
    out.table(["remedy", *map(str, s["seeds"])], [[name, *values] for name, values in s["kept"].items()])
    for seed, arm in results["arms"].items():
        out.heading(f"Seed {seed}")
        for count in results["labels"]:
            if (picture := folder / f"{seed}_{count}.png").exists():
                out.image(picture, f"Seed {seed}, {count} labels; dashed: the curves of Gao et al., fitted")
        rows = [
            [name, a["what"], a["since"], a["seen"], a["why"]] for name, r in arm["rl"].items() for a in r["alarms"]
        ]
        out.table(["run", "alarm", "since step", "known at step", "why"], rows)
    out.heading("Again")
    out.pre(command)
    return out


def write(results: Mapping, command: str, folder) -> None:
    """`index.html` and the pictures; without matplotlib the page alone."""
    storage.make_dir(folder)
    try:
        all_seeds(results, folder / "all.png")
        for seed, arm in results["arms"].items():
            for count in results["labels"]:
                one_seed(arm, count, results["definition"]["window"], folder / f"{seed}_{count}.png")
    except UserError as error:
        print(error, file=sys.stderr)
    page(results, command, folder).write(folder / "index.html")
