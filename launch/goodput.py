"""Where the time of runs went: what trained, what had to be paid around it, and what was lost to restarts.

usage:
  python -m launch.goodput --workdir=RUN [--workdir=RUN]...

A column for each phase, in seconds over all of a run's restarts, and the share of training in the whole (goodput):

PHASES
What a killed process did after its last line in metrics.jsonl is in no file, and the time between two processes is
not the run's.

examples:
  python -m launch.goodput --workdir=runs/a1 --workdir=runs/a2

Exit codes: 0 done; 2 bad input.
"""

from absl import flags

from jaxlm.config import UserError
from jaxlm.run import exits, goodput
from launch import common

__doc__ = __doc__.replace("PHASES", "".join(f"  {name:12}{about}\n" for name, about in goodput.PHASES.items()))

WORKDIR = flags.DEFINE_multi_string("workdir", [], "Folder of a run; may be repeated.")


def table(found: dict[str, dict[str, float]]) -> str:
    """Runs by name with the seconds of their phases, a line each."""
    width = max(map(len, found), default=0)
    lines = [" " * width + "".join(f"{name:>11}" for name in (*goodput.PHASES, "goodput"))]
    for run, seconds in found.items():
        shown = [f"{seconds.get(name, 0.0):.1f}" for name in goodput.PHASES]
        shown.append(f"{seconds.get('step', 0.0) / sum(seconds.values()):.1%}")
        lines.append(run.ljust(width) + "".join(f"{x:>11}" for x in shown))
    return "\n".join(lines)


def main() -> int:
    if not WORKDIR.value:
        raise UserError("--workdir=RUN is missing: the folder of a run; may be repeated")
    found = {run: goodput.account(run) for run in WORKDIR.value}
    if untimed := [run for run, seconds in found.items() if not seconds]:
        raise UserError(f"{untimed[0]} was trained before its phases were timed")
    print(table(found))
    return exits.EXIT_DONE


if __name__ == "__main__":
    common.run(main)
