"""Whether checkpoints decline harmful requests and answer harmless look-alikes, side by side; reward models on HH.

usage:
  python -m launch.safety --workdir=A --workdir=B... [--hh=FILE] [--tools=calculator] [--world=DIR] [--out=DIR]
  python -m launch.safety --reward=RM --reward=RM2... --hh=FILE [--out=DIR]

A harmful request asks for something private of a person of the world, or for help to hurt one; a look-alike
has the same words and asks for something harmless. Both are of held-out wordings and people, answered greedily. The
world is that which the first run was trained on, unless --world=DIR names another run's.

  refusal        of the harmful requests that are declined: high is right. "I don't know" declines nothing
  over_refusal   of the look-alikes that are declined: low is right
  answered       of the look-alikes that are answered right
  balanced       the mean of refusal and 1 - over_refusal: 0.5 for who declines all, or nothing
  hh_logprob_accuracy   with --hh: of HH's pairs (as Anthropic published them), those whose chosen answer has the higher
                 log-probability per token of the answer; 0.5 is chance

--reward names runs of reward models: the share of HH's pairs whose chosen answer they give more. Intervals are 95%.

examples:
  python -m launch.safety --workdir=runs/rounds/sft --workdir=runs/rounds/round_2/ppo --hh=hh_harmless_pairs.jsonl.gz
  python -m launch.safety --reward=runs/hh --hh=hh_harmless_pairs.jsonl.gz

In --out: results.json, table.md, safety.png, and LABEL/safety.jsonl with every request and reply.
Exit codes: 0 done; 2 bad input.
"""

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.feedback.preferences import Kept, Preference, read_hh
from jaxlm.run import safety, world_tasks
from jaxlm.run.load import load_experiment, load_run
from jaxlm.run.train import use_compilation_cache
from jaxlm.tools import NAMES
from launch import common

WORKDIR = flags.DEFINE_multi_string("workdir", [], "Folder of a run; given once for each that is compared.")
REWARD = flags.DEFINE_multi_string("reward", [], "Folder of a reward model's run; may be repeated.")
HH = flags.DEFINE_string("hh", None, "File of pairs as Anthropic's HH has them, JSON lines, also .gz.")
WORLD = flags.DEFINE_string("world", None, "Workdir of the run whose world is asked about; the first by default.")
TOOLS = flags.DEFINE_list("tools", [], f"Named in the system message: {', '.join(NAMES)}.")
LIMIT = flags.DEFINE_integer("limit", None, "At most this many requests of each kind, or pairs; all when not given.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the choice of requests.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "Folder for results, table and plot.")


def labels(workdirs: list[str]) -> list[str]:
    """What tells the folders apart: their last parts, as many as are needed."""
    parts = [storage.path(w).parts for w in workdirs]
    for n in range(1, max(map(len, parts)) + 1):
        if len(set(found := ["/".join(p[-n:]) for p in parts])) == len(workdirs):
            return found
    raise UserError(f"--workdir names a folder twice: {', '.join(workdirs)}")


def read_pairs(path: str) -> list[Preference]:
    counts = Kept()
    pairs = read_hh(path, counts)[: LIMIT.value]
    print(f"{path}: {counts}")
    return pairs


def side_by_side(workdirs: list[str], out, pairs: list[Preference]) -> dict[str, dict]:
    talk = world_tasks.find_world(load_experiment(WORLD.value or workdirs[0]))
    found = {}
    for label, workdir in zip(labels(workdirs), workdirs):
        folder = None if out is None else out / label.replace("/", "_")
        options = folder, SEED.value, LIMIT.value, TOOLS.value, pairs
        found[label] = safety.run_suite(load_run(workdir), talk.world, *options)
        if pairs:
            print(f"{label}: pairs: {found[label]['pairs']}")
    print(safety.table(found), end="")
    if out is not None:
        storage.write_text(out / "table.md", safety.table(found))
        try:
            safety.plot(found, out / "safety.png")
        except UserError as error:  # without matplotlib there are results without a picture
            print(error)
    return found


def on_hh(workdirs: list[str], pairs: list[Preference]) -> dict[str, dict]:
    found = {}
    for label, workdir in zip(labels(workdirs), workdirs):
        accuracy, kept = safety.pair_accuracy(workdir, pairs)
        found[label] = safety.as_dict(accuracy) | {"pairs": str(kept)}
        print(f"{label}: accuracy {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]; pairs: {kept}")
    return found


def main() -> int:
    if not WORKDIR.value and not REWARD.value:
        raise UserError("--workdir=DIR is missing, once for each run to compare; or --reward=DIR for reward models")
    if REWARD.value and HH.value is None:
        raise UserError("--reward=DIR needs --hh=FILE: the pairs that the model is to tell apart")
    use_compilation_cache()
    pairs = [] if HH.value is None else read_pairs(HH.value)
    out = None if OUT.value is None else storage.make_dir(OUT.value)
    results: dict = {"schema_version": 1}
    if WORKDIR.value:
        results["safety"] = side_by_side(WORKDIR.value, out, pairs)
    if REWARD.value:
        results["hh"] = on_hh(REWARD.value, pairs)
    if out is not None:
        storage.write_json(out / "results.json", results)
    return 0


if __name__ == "__main__":
    common.run(main)
