"""How every suite of the benchmark says what it has measured: rows of figures, a table, a plot.

Results are {part: {row: {figure: value}}}. Arms take turns, round by round, so that what else the machine does falls on
all of them. A spread is the least, the median and the most of the rounds; a rate is that of the median round.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

SECONDS, FLOPS, MEMORY = "seconds", "model FLOPs utilization", "GB at most"
OURS, RATIO = "jaxlm", "times as fast"
# What a plot shows of a row: the first of these that it has.
DRAWN = ("tokens per second", "MB per second", "ms an update", "score", SECONDS)


# ------------------------------------------------------------------------------------------------------- measurements
def in_turn(arms: Mapping[str, Callable[[], object]], repetitions: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of every call: all arms once, then all again, and so on, after one call of each that is not counted
    (`warm`)."""
    for arm in arms.values() if warm else ():
        arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repetitions):
        for name, arm in arms.items():
            begin = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def max_resident(who: int) -> float:
    """Most resident memory so far, in MB (Linux counts KiB, macOS bytes). who: as of `resource.getrusage`."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def peak_here() -> float:
    """The same of this program alone: on Linux `ru_maxrss` begins with what the parent held when it started us."""
    try:
        with open("/proc/self/status", encoding="utf-8") as f:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in f if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return max_resident(resource.RUSAGE_SELF)


def held_bytes(compiled) -> int:
    """Memory of a `jax.stages.Compiled` by XLA's own account: what it is given, needs beside that, and returns."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


# --------------------------------------------------------------------------------------------------------------- rows
def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def row(
    seconds: Sequence[float],
    done: Mapping[str, float] | None = None,
    *,
    flops: float | None = None,
    peak: float | None = None,
    memory: float | None = None,
) -> dict:
    """The figures of one arm. seconds: of each round. done: how much a round gets done, by unit. flops: operations of a
    round, by the convention of `jaxlm.nn.flops`, held against a `peak` a second. memory: bytes at most."""
    middle = statistics.median(seconds)
    found: dict = {SECONDS: spread(seconds)} | {f"{unit} per second": n / middle for unit, n in (done or {}).items()}
    if flops is not None and peak is not None:
        found[FLOPS] = flops / middle / peak
    return found | ({} if memory is None else {MEMORY: memory / 1e9})


def compared(seconds: Mapping[str, Sequence[float]]) -> dict:
    """How many times as fast as each other arm ours is, round by round; the best other arm is the one that counts."""
    others = [n for n in seconds if n != OURS]
    if not others:
        return {}
    best = min(others, key=lambda n: statistics.median(seconds[n]))
    ratios = {n: spread([t / o for t, o in zip(seconds[n], seconds[OURS])]) for n in others}
    return {
        RATIO: {"as": best} | ratios[best],
        f"{RATIO} as": {n: r["median"] for n, r in ratios.items()},
    }


# ------------------------------------------------------------------------------------------------------- the two shows
def table(results: Mapping[str, Mapping]) -> str:
    """One line a figure, nested ones indented; a spread as the least, the median and the most."""
    rows: list[tuple[str, str] | str] = []
    for part, figures in results.items():
        rows.append(part)
        for name, value in figures.items():
            for inner, v in value.items() if isinstance(value, dict) and not is_spread(value) else [(None, value)]:
                if isinstance(v, dict):
                    v = " .. ".join(f"{v[k]:,.3g}" for k in ("min", "median", "max"))
                if isinstance(v, float):
                    v = f"{v:,.2f}" if abs(v) >= 1 else f"{v:.3f}"
                shown = f"{v:,}" if isinstance(v, int) else str(v)
                rows.append((name if inner is None else f"{name}/{inner}", shown))
    width = max([34, *(len(row[0]) + 1 for row in rows if not isinstance(row, str))])
    return "\n".join(row if isinstance(row, str) else f"  {row[0]:<{width}}{row[1]:>16}" for row in rows)


def is_spread(value) -> bool:
    return isinstance(value, dict) and value.keys() == {"median", "min", "max"}


def drawn(results: Mapping[str, Mapping]) -> dict[tuple[str, str], dict[str, tuple[float, float, float]]]:
    """{(part, figure): {row: (value, least, most)}}: what there is to draw. A part is drawn by the first of DRAWN that
    one of its rows has; the ends of a rate are those of the fastest and the slowest round."""
    panels = {}
    for part, rows in results.items():
        rows = {name: r for name, r in rows.items() if isinstance(r, dict) and not name.startswith(RATIO)}
        figure = next((f for f in DRAWN if any(_drawable(r.get(f), r) for r in rows.values())), None)
        if figure is not None:
            panels[part, figure] = {n: _ends(r[figure], r) for n, r in rows.items() if _drawable(r.get(figure), r)}
    return panels


def _drawable(value, row: Mapping) -> bool:
    return is_spread(value) or isinstance(value, int | float)


def _ends(value, row: Mapping) -> tuple[float, float, float]:
    if is_spread(value):
        return value["median"], value["min"], value["max"]
    s = row.get(SECONDS)
    return (value, value * s["median"] / s["max"], value * s["median"] / s["min"]) if is_spread(s) else (value,) * 3


def plot(results: Mapping[str, Mapping], path) -> None:
    """Draws a panel for each part, a bar for each arm; the lines are the fastest and the slowest round."""
    from jaxlm import storage
    from jaxlm.run.report import COLORS, new_figure, save_figure

    panels = drawn(results)
    columns = max(1, min(3, len(panels)))
    rows = math.ceil(len(panels) / columns) or 1
    figure = new_figure(3.6 * columns + 0.6, 0.9 + rows * (1.0 + 0.3 * max(map(len, panels.values()), default=1)))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_visible(False)
    for axes, ((part, name), bars) in zip(figure.axes, panels.items()):
        axes.set_visible(True)
        for i, (value, least, most) in enumerate(bars.values()):
            ends = [[value - least], [most - value]]
            axes.barh(i, value, xerr=ends, color=COLORS[i == 0], height=0.7, error_kw={"linewidth": 0.9})
        axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
        axes.invert_yaxis()
        axes.set_title(part, fontsize=10)
        axes.set_xlabel(name, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, storage.path(path))
