"""Rounds of sample, rank, retrain reward, PPO: an assistant learns from rankings of its own answers, as one command.

usage:
  python -m launch.rounds --workdir=DIR --parent=RUN [--scale=smoke|tiny] [--rounds=2] [--judge=RUN2]
                          [--set=PATH=VALUE]... [--redo=STAGE]...

The parent is a run that was fine-tuned on talk about a World, such as the assistant of launch.tour. First it reads
demonstrations by many hands (data/world/manners.py): that is the policy of round 0, called sft. Then each round k:
  collect_k    K responses of the policy before to each prompt, into feedback.db, with ids and log-probabilities; ranked
               by the gold scorer (feedback/gold.py), or by --judge=RUN2, a run's model; exported to a file
  reward_k     a reward model from all rankings so far, normalized on responses of round 0
  ppo_k        PPO from the policy before, against that reward model; KL penalized and measured to the policy before
  evaluate_k   gold of sft, of best-of-n of sft by the same reward model and of the new policy on held-out prompts, its
               gain with a 95% interval paired by prompt, its KL to sft, what it gains at equal KL beside best-of-n, Elo
  report_k     one page: report/round_k.html
The same command again skips what is done and goes on where it stopped, in mid-training too. More --rounds go on from
those that are done. Gold is never what a policy is trained on.

Scales: smoke, minutes, to see that everything runs; tiny, to see it learn. Any setting of experiments/rounds.py by
--set, such as --set=prompts=800, --set=ppo.train.steps=60, --set=mix.harmful=3, --set=sft=none (the parent as it is),
--set=reward_parent=RUN3 (reward models and critics of another size, with the parent's tokenizer).

examples:
  python -m launch.rounds --workdir=runs/rounds --parent=runs/tour/assistant
  python -m launch.rounds --workdir=runs/rounds1 --parent=runs/tour/assistant --set=seed=1 --rounds=3
  python -m launch.arena --store=runs/rounds/evaluation.db --annotators='gold, round 2'

In the workdir: sft/, round_k/reward, round_k/ppo (run directories), feedback.db, evaluation.db, stages/, results.json.
Exit codes: 0 done; 42 stopped and saved, start the same command again; 2 bad input; 3 diverged.
"""

import dataclasses

from absl import flags

from experiments.rounds import SCALES, Rounds
from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.run import exits, lineage, stages
from jaxlm.run.train import use_compilation_cache
from launch import common
from launch.rounds_stages import Place, check, todo

WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds everything of the rounds.")
PARENT = flags.DEFINE_string("parent", None, "Workdir of the assistant to begin with.")
SCALE = flags.DEFINE_enum("scale", "tiny", sorted(SCALES), "How large; see above.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "How many rounds.", lower_bound=1)
JUDGE = flags.DEFINE_string("judge", None, "Workdir of a model that ranks in the gold scorer's place.")
SET = flags.DEFINE_multi_string("set", [], "path=value in the definition, after those of the scale; may be repeated.")
REDO = flags.DEFINE_multi_string("redo", [], "Run this stage again from scratch; may be repeated.")


PARTS = ("sft.", "reward.", "ppo.")  # where experiments stand in the definition


def definition(scale: str, sets: list[str], judge: str | None) -> tuple[Rounds, Rounds]:
    """(the definition with `sets`, the scale's own)"""
    own = SCALES[scale]()
    x = config.parse_sets(own, sets)
    return x if judge is None else dataclasses.replace(x, judge=judge), own


def check_same(root, x: Rounds, sets: list[str], judge: str | None) -> None:
    """Raises `UserError` where `root` holds rounds of another definition: what differs, and what to give instead."""
    if not (lines := lineage.differences(root, x, PARTS)):
        return
    fits = [s for s in SCALES if not lineage.differences(root, definition(s, sets, judge)[0], PARTS)]
    give = f"give --scale={fits[0]}" if fits else "give the settings that it was begun with"
    raise UserError(f"{lineage.held(root, lines)}; to go on there {give}, otherwise choose another --workdir")


def run(workdir, parent: str, scale: str, count: int, sets: list[str], judge: str | None = None, redo=()) -> dict:
    """Runs what is not done; returns the records of all stages. Raises `exits.Stopped` when a training was stopped."""
    root = storage.path(workdir)
    x, own = definition(scale, sets, judge)
    check(x)
    check_same(root, x, sets, judge)
    storage.make_dir(root)
    storage.write_json(root / "config.json", {"schema_version": config.SCHEMA_VERSION} | config.to_dict(x))
    use_compilation_cache()
    todos = todo(Place(x, own, root, parent), count)
    return stages.run(
        root, todos, config.to_dict(x) | {"parent": parent}, (), redo, lambda line: print(line, flush=True)
    )


def main() -> int:
    if WORKDIR.value is None or PARENT.value is None:
        raise UserError("--workdir=DIR and --parent=RUN are needed: where to work, and the assistant to begin with")
    done = run(WORKDIR.value, PARENT.value, SCALE.value, ROUNDS.value, SET.value, JUDGE.value, REDO.value)
    print(f"\n{sum(r['seconds'] for r in done.values()) / 60:.1f} minutes in all")
    print((storage.path(WORKDIR.value) / "table.md").read_text(), end="")
    print(f"look at  {storage.path(WORKDIR.value) / 'report' / f'round_{ROUNDS.value}.html'}")
    return exits.EXIT_DONE


if __name__ == "__main__":
    common.run(main)
