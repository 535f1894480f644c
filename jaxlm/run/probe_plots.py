"""What a probe shows, drawn: is a model as often right as it is sure, and what does each wrong answer less cost?"""

from collections.abc import Mapping, Sequence

from jaxlm.run.report import COLORS, new_figure, save_figure


def reliability(calibrations: Mapping[str, dict | None], path) -> None:
    """Draws accuracy over confidence, a curve for each calibration (`feedback.measures.calibration`), to a PNG.

    The bars are the 95% intervals of the bins; the legend has the expected calibration error.
    """
    figure = new_figure(5.2, 4.8)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="as often right as sure")
    for i, (name, found) in enumerate((n, c) for n, c in calibrations.items() if c is not None):
        bins = found["bins"]
        accuracy = [b["accuracy"] for b in bins]
        below, above = ([abs(a["value"] - a[end]) for a in accuracy] for end in ("low", "high"))
        axes.errorbar(
            [b["confidence"] for b in bins],
            [a["value"] for a in accuracy],
            yerr=[below, above],
            fmt="o-",
            color=COLORS[i % len(COLORS)],
            markersize=4,
            linewidth=1.4,
            elinewidth=0.8,
            label=f"{name} (error {found['ece']:.3f})",
        )
    axes.set(xlabel="confidence", ylabel="share of answers that are right", xlim=(0, 1.02), ylim=(0, 1.02))
    _finish(axes)
    save_figure(figure, path)


def risk_coverage(
    curves: Mapping[str, Sequence[dict]], path, points: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Draws wrong answers on unknown facts over coverage on known ones, to a PNG.

    curves: of `feedback.measures.curve`, one for each score. points: name -> (coverage, wrong), such as a fine-tuned
    model's.
    """
    figure = new_figure(5.6, 4.4)
    axes = figure.add_subplot()
    for i, (name, curve) in enumerate(curves.items()):
        drawn = [p for p in curve if p["coverage"] is not None and p["wrong"] is not None]
        axes.plot(
            [p["coverage"] for p in drawn],
            [p["wrong"] for p in drawn],
            color=COLORS[i % len(COLORS)],
            linewidth=1.4,
            marker=".",
            markersize=4,
            label=name,
        )
    for i, (name, (coverage, wrong)) in enumerate((points or {}).items(), len(curves)):
        axes.plot([coverage], [wrong], "o", color=COLORS[i % len(COLORS)], markersize=7, label=name)
    axes.set(
        xlabel="known facts answered right",
        ylabel="unknown facts answered wrong",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    _finish(axes)
    save_figure(figure, path)


def _finish(axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
