"""Elo with its intervals, drawn."""

from jaxlm.feedback.arena import Arena
from jaxlm.run.report import COLORS, new_figure, save_figure


def standings(result: Arena, path) -> None:
    """Draws each player's Elo and 95% interval to a PNG, the best on top; players of a group have one color."""
    color = {name: COLORS[i % len(COLORS)] for i, group in enumerate(result.groups) for name in group}
    figure = new_figure(6.4, 1.2 + 0.36 * len(result.standings))
    axes = figure.add_subplot()
    for place, s in enumerate(reversed(result.standings)):
        error = [[max(0.0, s.elo - s.low)], [max(0.0, s.high - s.elo)]]
        axes.errorbar(
            [s.elo], [place], xerr=error, fmt="o", color=color[s.name], markersize=5, elinewidth=1.2, capsize=3
        )
    axes.set_yticks(range(len(result.standings)), [s.name.replace("$", r"\$") for s in reversed(result.standings)])
    what = "the mean of all" if result.anchor is None else result.anchor.replace("$", r"\$")
    axes.axvline(result.center, color="0.6", linewidth=1, linestyle="--")
    axes.set(xlabel=f"Elo, with 95% intervals ({result.center:g}: {what})")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
