"""Evaluates a trained model on a named suite, as a table or JSON, and keeps the result of every item.

usage:
  python -m launch.eval --workdir=DIR --suite=NAME [options]
  python -m launch.eval --list                                     suites and their tasks

The table has a line a metric: the value, its standard error over items, a 95% interval (Wilson's for accuracies and
scores, normal for losses), and what chance gives: one over the number of choices, the best constant answer of a
generation task, the uniform distribution over the vocabulary for losses. Results of two versions of a task must not be
compared. Held-out text is the run's own validation split.

examples:
  python -m launch.eval --workdir=runs/a1 --suite=heldout
  python -m launch.eval --workdir=runs/a1 --suite=python --limit=50 --json

In the workdir: eval/SUITE/TASK.jsonl with one object an item (prompt, choices or text, log-probabilities, verdict), and
eval/SUITE/results.json. Exit codes: 0 done; 2 bad input.
"""

import json
import sys

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.run import evals, tasks
from jaxlm.run.experiment import prepared
from jaxlm.run.load import load_run
from jaxlm.run.train import use_compilation_cache
from launch import common

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that launch.train or launch.import_hf has written.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one when not given.", lower_bound=0)
SUITE = flags.DEFINE_string("suite", None, "Name of the suite; --list shows them.")
LIMIT = flags.DEFINE_integer("limit", None, "At most this many items a task (rows a source); all when not given.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the choice of items and wrong answers.", lower_bound=0)
JSON = flags.DEFINE_bool("json", False, "Print the results as one JSON object instead of a table.")
LIST = flags.DEFINE_bool("list", False, "List the suites and their tasks, and exit.")


def main() -> int:
    if LIST.value:
        for name, found in sorted(evals.SUITES.items()):
            print(f"{name:12} {', '.join(f'{t.name} (version {t.version})' for t in found)}")
        return 0
    if SUITE.value is None:
        raise UserError("--suite=NAME is missing; --list shows the names")
    evals.find_suite(SUITE.value)
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is missing: the folder of a trained run")
    use_compilation_cache()
    run = load_run(WORKDIR.value, STEP.value)
    valid = prepared(run.data).valid
    out = storage.path(WORKDIR.value) / "eval" / SUITE.value
    results = evals.run_suite(run, SUITE.value, tasks.heldout(run, valid), out, SEED.value, LIMIT.value)
    print(json.dumps(results) if JSON.value else f"step {run.step}\n{evals.table(results)}")
    print(f"every item: {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    common.run(main)
