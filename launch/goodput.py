"""Where the time of runs went: what trained, what had to be paid around it, and what was lost to restarts.

usage:
  python -m launch.goodput --workdir=RUN [--workdir=RUN]... [--out=FILE.png]

A column for each phase, in seconds over all of a run's restarts, and the share of training in the whole (goodput):

PHASES
What a killed process did after its last line in metrics.jsonl is in no file, and the time between two processes is
not the run's.

Of runs of reinforcement learning then a column for each part of a step, in milliseconds and as a share, over the middle
half of the logged steps by their length, without the first one of each start. --out draws it.

PARTS
Each part ends with what the host reads of it, so devices owe nothing to the next one.

examples:
  python -m launch.goodput --workdir=runs/a1 --workdir=runs/a2
  python -m launch.goodput --workdir=runs/ppo --workdir=runs/grpo --out=rl_step.png

Exit codes: 0 done; 2 bad input.
"""

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.run import exits, goodput
from jaxlm.run.report import COLORS, new_figure, save_figure
from launch import common

for word, names in (("PHASES", goodput.PHASES), ("PARTS", goodput.STEP_PARTS)):
    __doc__ = __doc__.replace(word, "".join(f"  {name:14}{about}\n" for name, about in names.items()))

WORKDIR = flags.DEFINE_multi_string("workdir", [], "Folder of a run; may be repeated.")
OUT = flags.DEFINE_string(
    "out", None, "PNG to write: the parts of a step of reinforcement learning, a bar for each run."
)

Steps = dict[str, tuple[int, dict[str, float]]]  # run -> what `goodput.step_parts` gives


def table(found: dict[str, dict[str, float]]) -> str:
    """Runs by name with the seconds of their phases, a line each."""
    width = max(map(len, found), default=0)
    lines = [" " * width + "".join(f"{name:>11}" for name in (*goodput.PHASES, "goodput"))]
    for run, seconds in found.items():
        shown = [f"{seconds.get(name, 0.0):.1f}" for name in goodput.PHASES]
        shown.append(f"{seconds.get('step', 0.0) / sum(seconds.values()):.1%}")
        lines.append(run.ljust(width) + "".join(f"{x:>11}" for x in shown))
    return "\n".join(lines)


def steps_table(steps: Steps) -> str:
    """Runs by name with the parts of a step, in two lines each: milliseconds, and the share of the step."""
    width = max(map(len, [*steps, "a step, ms"]))
    lines = ["a step, ms".ljust(width) + "".join(f"{name:>14}" for name in (*goodput.STEP_PARTS, "all", "of steps"))]
    for run, (count, parts) in steps.items():
        seconds = [parts.get(name, 0.0) for name in goodput.STEP_PARTS]
        whole = sum(seconds)
        lines.append(run.ljust(width) + "".join(f"{1e3 * x:>14.1f}" for x in (*seconds, whole)) + f"{count:>14}")
        lines.append(" " * width + "".join(f"{x / whole:>14.1%}" for x in (*seconds, whole)))
    return "\n".join(lines)


def plot(steps: Steps, path) -> None:
    """Draws a bar for each run, the parts of its step one after another, with the shares of those that are wide enough
    to be written into."""
    figure = new_figure(9, 1.6 + 0.5 * len(steps))
    axes = figure.add_subplot()
    whole = [sum(parts.values()) for _, parts in steps.values()]
    left = [0.0] * len(steps)
    for color, name in zip(COLORS, goodput.STEP_PARTS, strict=True):
        ms = [1e3 * parts.get(name, 0.0) for _, parts in steps.values()]
        bars = axes.barh(range(len(steps)), ms, left=left, color=color, label=name)
        shares = [f"{x / w / 1e3:.0%}" if x > 60 * max(whole) else "" for x, w in zip(ms, whole)]
        axes.bar_label(bars, shares, label_type="center", color="white", fontsize=8)
        left = [at + x for at, x in zip(left, ms)]
    axes.set_yticks(range(len(steps)), list(steps), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(goodput.STEP_PARTS), frameon=False, fontsize=8)
    save_figure(figure, storage.path(path))


def main() -> int:
    if not WORKDIR.value:
        raise UserError("--workdir=RUN is missing: the folder of a run; may be repeated")
    if OUT.value is not None and not OUT.value.endswith(".png"):
        raise UserError(f"--out takes the name of a .png file, got {OUT.value!r}")
    found = {run: goodput.account(run) for run in WORKDIR.value}
    if untimed := [run for run, seconds in found.items() if not seconds]:
        raise UserError(f"{untimed[0]} was trained before its phases were timed")
    steps = {run: goodput.step_parts(run) for run in found}
    steps = {run: (count, parts) for run, (count, parts) in steps.items() if count}
    if OUT.value is not None and not steps:
        raise UserError("--out draws steps of reinforcement learning, and none of these runs has logged two of them")
    print(table(found))
    if steps:
        print(f"\n{steps_table(steps)}")
    if OUT.value is not None:
        plot(steps, OUT.value)
    return exits.EXIT_DONE


if __name__ == "__main__":
    common.run(main)
