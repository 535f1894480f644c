"""Elo between checkpoints or runs, from the rankings of their responses in a feedback store: a table and a plot.

usage:
  python -m launch.arena --store=FEEDBACK.db [--annotators=A,B] [--anchor=PLAYER] [--out=DIR]

A player is a checkpoint, named workdir@step. Every two responses of different players that somebody has ranked together
are a game, and a tie is half a win for each. Fill the store with launch.collect, once for each checkpoint with the same
--prompts, and rank by launch.rank or by --scorer or --judge of launch.collect.

Elo is fitted to all games at once (Bradley-Terry, maximum likelihood): 400 points are odds of 10 to 1. The interval is
the bootstrap's over prompts. --anchor=PLAYER puts that player at 1000; without it the mean of all is there. Who always
won, or never met the others, has a rating only by a small prior (a fraction of a tie with an average player); the table
marks it. Look at the intervals before you call one player better.

In --out: elo.json and elo.png. Exit codes: 0 done; 2 bad input.
"""

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.feedback.arena import DRAWS, arena, games_of, table
from jaxlm.feedback.store import Store
from jaxlm.run import arena_plot
from launch import common

STORE = flags.DEFINE_string("store", None, "The feedback store.")
ANNOTATORS = flags.DEFINE_list("annotators", [], "Count the rankings of these alone; all when not given.")
ANCHOR = flags.DEFINE_string("anchor", None, "The player at 1000.")
BOOTSTRAP = flags.DEFINE_integer("bootstrap", DRAWS, "Draws for the intervals.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "Folder for elo.json and elo.png.")


def main() -> int:
    if STORE.value is None:
        raise UserError("--store=FILE is missing: the feedback store")
    with Store(STORE.value, create=False) as store:
        games = games_of(store, ANNOTATORS.value or None)
    if not games:
        raise UserError(f"{STORE.value} has no ranking that holds responses of two checkpoints")
    result = arena(games, ANCHOR.value, draws=BOOTSTRAP.value, seed=SEED.value)
    print(table(result))
    if OUT.value is not None:
        out = storage.make_dir(OUT.value)
        storage.write_json(out / "elo.json", result.as_dict())
        arena_plot.standings(result, out / "elo.png")
    return 0


if __name__ == "__main__":
    common.run(main)
