"""Injects faults into runs of every stage at seeded random points, and compares each with a run that nothing befell.

usage:
  python -m tests.faults.run --trials=N [--seed=S] [--stage=NAME]... [--fault=NAME]... --out=FILE.jsonl

A soak, which interrupts and damages one longer run some 25 times:
  python -m tests.faults.run --fault=soak --out=soak.jsonl

Every pair of a stage and a fault takes its turn, the next round with the next seed. A fault that can strike in several
phases of a run strikes in another one each time; --phase=NAME asks for one, and --phase=all for every one of each
fault, once a round. One trial again, as it was:
  python -m tests.faults.run --only=STAGE/FAULT/SEED[/PHASE] --out=one.jsonl

A trial whose run was over before the fault came has tried nothing: it counts as not struck, not as passed.

In --folder stand the runs that nothing befell, what was compiled, and the run directories of trials that went wrong;
without it all of these are thrown away. Exit codes: 0 all came out as they must; 1 some did not.
"""

import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

from absl import flags, logging

from jaxlm.config import UserError
from launch import common
from tests.faults.definitions import STAGES
from tests.faults.faults import FAULTS, SOAK, Fault
from tests.faults.tally import one, table, trial

TRIALS = flags.DEFINE_integer("trials", None, "So many trials; unset, each stage with each fault once.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the first round.")
STAGE = flags.DEFINE_multi_enum("stage", [], STAGES, "Only this stage; may be repeated.")
FAULT = flags.DEFINE_multi_enum("fault", [], [f.name for f in (*FAULTS, SOAK)], "Only this fault; may be repeated.")
ONLY = flags.DEFINE_multi_string("only", [], "STAGE/FAULT/SEED: this trial; may be repeated.")
PHASES = sorted({p for f in FAULTS for p in f.phases})
PHASE = flags.DEFINE_multi_enum("phase", [], [*PHASES, "all"], "Strikes in this phase; may be repeated.")
OUT = flags.DEFINE_string("out", None, "File that gets a JSON line for each trial.")
FOLDER = flags.DEFINE_string("folder", None, "Folder to work in, kept for the next time.")


def chosen() -> list[tuple[str, Fault, int, str | None]]:
    """(stage, fault, seed, phase) of each trial."""
    if ONLY.value:
        return [one(text) for text in ONLY.value]
    stages, faults = STAGE.value or STAGES, FAULT.value or [f.name for f in FAULTS]

    def phases(f: Fault) -> list[str | None]:
        if "all" in PHASE.value:
            return [*f.phases] or [None]
        return [p for p in f.phases if p in PHASE.value] if PHASE.value else [None]

    turn = [(s, f, p) for f in (*FAULTS, SOAK) for s in stages if f.name in faults and s in f.stages for p in phases(f)]
    if not turn:
        raise UserError("no such fault befalls this stage in this phase")
    turns = ((s, f, SEED.value + i, p) for i in itertools.count() for s, f, p in turn)
    return list(itertools.islice(turns, TRIALS.value or len(turn)))


def main() -> int:
    if OUT.value is None:
        raise UserError("--out=FILE.jsonl is missing: what happened in each trial")
    logging.set_verbosity(logging.ERROR)
    todo = chosen()
    folder = FOLDER.value or tempfile.mkdtemp(prefix="faults-")
    records = []
    try:
        with open(OUT.value, "w") as out:
            for stage, fault, seed, phase in todo:
                r = trial(stage, fault, seed, phase, Path(folder).absolute())
                records.append(r)
                print(json.dumps(r), file=out, flush=True)
                word = {True: "ok", False: "WRONG", None: "--"}[r["ok"]]
                shown = "" if r["ok"] else f": {r['outcome']}"
                print(
                    f"{word:5} {stage:8} {fault.name:26} {seed:4} {r['seconds']:6.1f} s  {r['at']}{shown}", flush=True
                )
    finally:
        if FOLDER.value is None and all(r["ok"] is not False for r in records):
            shutil.rmtree(folder, ignore_errors=True)
    print(table(records))
    wrong = [r for r in records if r["ok"] is False]
    if wrong:
        print(f"{len(wrong)} went wrong; their run directories are in {folder}/trials", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    common.run(main)
