"""Runs any training stage from its definition. The same command again resumes it where it stopped.

usage:
  python -m launch.train --experiment=NAME --workdir=DIR [--edit=EDIT]... [--set=PATH=VALUE]...
  python -m launch.train --list                      experiments and edits, a line each
  python -m launch.train --experiment=NAME --show    the resolved definition, and what the edits changed

Edits come first, then the settings, each in the order given. A setting's value is a number, true or false, none, a
text, a,b,c for a tuple, or a component with its own settings: --set='optimizer=Muon(lr=0.02)'.

A run that has begun goes on only with the definition, data and tokenizer that it was begun with, but for what is only
logged, kept or placed; a refusal shows what differs. --allow=data,optimizer.lr lets just that differ: "data",
"tokenizer" or paths of the definition, with all below them. lineage.json then tells of it. A run whose checkpoints are
all damaged is refused too; --allow=restart has it begin again at step 0, with the damaged ones in quarantine.

examples:
  python -m launch.train --experiment=pretrain_tiny --workdir=runs/a1
  python -m launch.train --experiment=pretrain_tiny --edit=muon --set=train.steps=500 --workdir=runs/a2
  python -m launch.train --experiment=shakespeare_char --set=data.path=tinyshakespeare.txt --workdir=runs/s1

In the workdir: config.json, diff.txt, environment.json, lineage.json, metrics.jsonl, checkpoints/, tokenizer/, report/.
Exit codes: 0 done; 42 stopped and saved, start the same command again; 2 bad definition or bad input; 3 diverged.
"""

import sys

from absl import flags

import experiments  # noqa: F401  registers definitions and edits
from jaxlm import config
from jaxlm.run import exits, lineage, loop, processes, rl
from launch import common

EXPERIMENT = flags.DEFINE_string("experiment", None, "Name of the definition; --list shows them.")
EDIT = flags.DEFINE_multi_string("edit", [], "Named ablation, applied before --set; may be repeated.")
SET = flags.DEFINE_multi_string("set", [], "path=value in the definition; may be repeated.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds everything of the run.")
ALLOW = flags.DEFINE_list("allow", [], "What may differ from the run that --workdir holds, by name.")
LIST = flags.DEFINE_bool("list", False, "List experiments and edits, and exit.")
SHOW = flags.DEFINE_bool("show", False, "Print the resolved definition and its difference to the named one, and exit.")


def main() -> int:
    if LIST.value:
        for title, registry in [("experiments", config.EXPERIMENTS), ("edits", config.EDITS)]:
            print(f"{title}:")
            for name, fn in sorted(registry.items()):
                print(f"  {name:32} {(fn.__doc__ or '').strip().splitlines()[0] if fn.__doc__ else ''}")
        return exits.EXIT_DONE
    if EXPERIMENT.value is None:
        raise config.UserError("--experiment=NAME is missing; --list shows the names")
    base = config.resolve(EXPERIMENT.value)
    e = config.resolve(EXPERIMENT.value, EDIT.value, SET.value)
    if SHOW.value:
        print(config.to_json(e), end="")
        print("".join(f"{line}\n" for line in config.diff(base, e)), end="", file=sys.stderr)
        return exits.EXIT_DONE
    if WORKDIR.value is None:
        raise config.UserError("--workdir=DIR is missing: the folder that is to hold the run")
    with processes.joined(), lineage.allowing(WORKDIR.value, ALLOW.value, e), loop.memory_advice():
        return rl.run(e, WORKDIR.value, base)


if __name__ == "__main__":
    common.run(main)
