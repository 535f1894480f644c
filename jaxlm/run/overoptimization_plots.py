"""Over-optimization drawn: proxy, gold and verifier over the distance from the initial policy, best-of-n beside RL."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.config import UserError
from jaxlm.estimates import Estimate
from jaxlm.feedback.alarms import Alarm
from jaxlm.feedback.overoptimization import Fit
from jaxlm.run.report import COLORS, new_figure, save_figure

MEASURES = ("proxy", "gold", "verifier")


def overoptimization(
    panels: Mapping[str, Sequence[dict]],
    path,
    fits: Mapping[str, Mapping[str, Fit]] | None = None,
    alarms: Mapping[str, Alarm] | None = None,
    shared: bool = True,
) -> None:
    """Draws a panel for each entry, such as "best-of-n" and "RL", to a PNG: rewards over sqrt(KL) in sqrt(nats).

    panels: points of `overoptimization.best_of_n_curve`, or records of a run with "d"; of `MEASURES` each draws what
      its points hold, a number or an `Estimate`, whose interval is shaded. "gold/random" is the matched control.
    fits: panel -> measure -> its fitted gain over the initial policy, drawn dashed from the measure's value at the
      smallest d; the turnover is marked where it lies within the panel.
    alarms: panel -> alarm, marked at the point whose "step" it names.
    shared: one scale of rewards for all panels.
    """
    if not any(panels.values()):
        raise UserError("nothing to draw: no panel has a point")
    figure = new_figure(5.2 * len(panels), 4.2)
    grid = np.atleast_1d(figure.subplots(1, len(panels), sharey=shared))
    for axes, (title, points) in zip(grid, panels.items()):
        points = sorted(points, key=lambda p: p["d"])
        for color, name in zip(COLORS, MEASURES):
            drawn = [p for p in points if p.get(name) is not None]
            if not drawn:
                continue
            d, values = [p["d"] for p in drawn], [_value(p[name]) for p in drawn]
            axes.plot(d, values, "o-", color=color, markersize=3.5, linewidth=1.4, label=name)
            if all(isinstance(p[name], Estimate) for p in drawn):
                low, high = [p[name].low for p in drawn], [p[name].high for p in drawn]
                axes.fill_between(d, low, high, color=color, alpha=0.15, linewidth=0)
            if (fit := (fits or {}).get(title, {}).get(name)) is not None:
                _draw_fit(axes, fit, d, values, color, name)
        control = [p for p in points if "gold/random" in p]
        if control:
            values = [_value(p["gold/random"]) for p in control]
            axes.plot([p["d"] for p in control], values, ":", color="0.4", linewidth=1.2, label="gold, random choice")
        alarm = (alarms or {}).get(title)
        at = [p["d"] for p in points if alarm is not None and p.get("step") == alarm.since]
        if at:
            axes.axvline(at[0], color="0.3", linewidth=1, linestyle="-.", label=f"alarm: {alarm.what}")
        axes.set(title=title, xlabel=r"$\sqrt{\mathrm{KL}}$ to the initial policy", xlim=(0, None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    grid[0].set_ylabel("reward")
    save_figure(figure, path)


def _value(x) -> float:
    return x.value if isinstance(x, Estimate) else x


def _draw_fit(axes, fit: Fit, d: list[float], values: list[float], color: str, name: str) -> None:
    """The fitted curve, shifted so that it is the measure's own value at its first point."""
    x = np.linspace(0, max(d), 200)
    shift = values[0] - float(fit(d[0]))
    label = f"{name}: d ({fit.alpha:.2f} {-fit.beta:+.2f} {'d' if fit.form == 'best-of-n' else 'log d'})"
    axes.plot(x, fit(x) + shift, "--", color=color, linewidth=1, label=label)
    if fit.turnover is not None and 0 < fit.turnover <= max(d):
        axes.plot([fit.turnover], [fit.peak + shift], "v", color=color, markersize=6)
