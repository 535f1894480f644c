"""Evaluates a trained model on a named suite, as a table or JSON, and keeps the result of every item.

usage:
  python -m launch.eval --workdir=DIR --suite=NAME [options]
  python -m launch.eval --workdir=DIR --suite=world|shots [--tools=calculator,python,search] [--world=DIR] [options]
  python -m launch.eval --list                                     suites and their tasks

The table has a line a metric: the value, its standard error over items, a 95% interval (Wilson's for accuracies and
scores, normal for losses), and what chance gives: one over the number of choices, the best constant answer of a
generation task, the uniform distribution over the vocabulary for losses. Results of two versions of a task must not be
compared. Held-out text is the run's own validation split.

The suites world and shots ask questions about the World that the run, or one that it came from, was trained on
(--world=DIR: that another run was trained on): of its held-out side, with exact truth, chat models in conversations and
base models in text. world asks each kind once; --tools offers tools, named in the order in which training named them,
with search over what the world tells nowhere else, and says whether they were called where one is needed. shots asks
with 0 to 8 examples before the question, with and without the steps of their solutions, and draws shots.png.

examples:
  python -m launch.eval --workdir=runs/a1 --suite=heldout
  python -m launch.eval --workdir=runs/a1 --suite=python --limit=50 --json
  python -m launch.eval --workdir=runs/sft --suite=world --tools=calculator,python
  python -m launch.eval --workdir=runs/sft --suite=shots --limit=20

In the workdir: eval/SUITE/TASK.jsonl with one object an item (prompt, choices or text, log-probabilities, verdict), and
eval/SUITE/results.json (with tools, eval/world_tools). Exit codes: 0 done; 2 bad input.
"""

import json
import sys
import tempfile

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError, nearest
from jaxlm.data.world.talk import write_index_files
from jaxlm.run import evals, tasks, world_tasks
from jaxlm.run.experiment import prepared
from jaxlm.run.load import Run, load_experiment, load_run
from jaxlm.run.train import use_compilation_cache
from jaxlm.tools import NAMES, by_name
from launch import common
from launch.tool_flags import UNSAFE_PYTHON

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that launch.train or launch.import_hf has written.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one when not given.", lower_bound=0)
SUITE = flags.DEFINE_string("suite", None, "Name of the suite; --list shows them.")
LIMIT = flags.DEFINE_integer("limit", None, "At most this many items a task (rows a source); all when not given.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the choice of items and wrong answers.", lower_bound=0)
TOOLS = flags.DEFINE_list("tools", [], f"Offered in the suites of the world: {', '.join(NAMES)}.")
WORLD = flags.DEFINE_string("world", None, "Workdir of the run whose world is asked about; the run's own by default.")
JSON = flags.DEFINE_bool("json", False, "Print the results as one JSON object instead of a table.")
LIST = flags.DEFINE_bool("list", False, "List the suites and their tasks, and exit.")


def ask_the_world(run: Run, out) -> dict:
    talk = world_tasks.find_world(run.experiment if WORLD.value is None else load_experiment(WORLD.value))
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_index_files(talk.world, storage.path(scratch) / "texts") if "search" in TOOLS.value else None
        tools = by_name(TOOLS.value, folder, scratch, UNSAFE_PYTHON.value)
        return world_tasks.run_suite(run, SUITE.value, talk, out, SEED.value, LIMIT.value, tools or None)


def main() -> int:
    if LIST.value:
        for name, found in sorted(evals.SUITES.items()):
            print(f"{name:12} {', '.join(f'{t.name} (version {t.version})' for t in found)}")
        for name in world_tasks.SUITES:
            print(f"{name:12} questions about the world of the run (version {world_tasks.VERSION})")
        return 0
    if SUITE.value is None:
        raise UserError("--suite=NAME is missing; --list shows the names")
    of_world = SUITE.value in world_tasks.SUITES
    if not of_world and SUITE.value not in evals.SUITES:
        raise UserError(f"unknown suite {SUITE.value!r}; {nearest(SUITE.value, [*evals.SUITES, *world_tasks.SUITES])}")
    if not of_world and (TOOLS.value or WORLD.value is not None):
        raise UserError(f"--tools and --world are for the suites {', '.join(world_tasks.SUITES)}")
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is missing: the folder of a trained run")
    use_compilation_cache()
    run = load_run(WORKDIR.value, STEP.value)
    out = storage.path(WORKDIR.value) / "eval" / (SUITE.value + ("_tools" if TOOLS.value else ""))
    if of_world:
        results = ask_the_world(run, out)
    else:
        valid = prepared(run.data).valid
        results = evals.run_suite(run, SUITE.value, tasks.heldout(run, valid), out, SEED.value, LIMIT.value)
    print(json.dumps(results) if JSON.value else f"step {run.step}\n{evals.table(results)}")
    print(f"every item: {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    common.run(main)
