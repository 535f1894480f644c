"""Best of n: samples answers of a run, scores them, and writes the best as conversations to fine-tune on, with a control.

usage:
  python -m launch.best_of_n --workdir=RUN --prompts=FILE.jsonl --out=DIR --n=16 --reward=RM            a reward model
  python -m launch.best_of_n --workdir=RUN --prompts=FILE.jsonl --out=DIR --n=16 --verifier=numeric     the truth
  python -m launch.best_of_n --workdir=RUN --prompts=FILE.jsonl --out=DIR --n=16 --scorer=module:function

A line of --prompts is {"messages": [...]}, {"prompt": text} or {"question": text}; a verifier compares with its "answer":
for program what a program prints, or a list of [source that comes before it, what it then prints]. Programs run isolated,
and where nothing isolates them only with --unsafe_python.
Of n answers to each prompt the highest-scoring one goes to chosen.jsonl, and one of the same n at random to random.jsonl:
the matched control, as many answers of the same policy to the same prompts. What fine-tuning on the chosen gains over the
control is the score's doing, the rest that of training on one's own samples.

examples:
  python -m launch.best_of_n --workdir=runs/sft --prompts=prompts.jsonl --out=runs/best --n=8 --reward=runs/rm
  python -m launch.train --experiment=sft_tiny --set=parent=runs/sft --set='data.sources=Messages(path=runs/best/chosen.jsonl)' --workdir=runs/rs
  python -m launch.train --experiment=sft_tiny --set=parent=runs/sft --set='data.sources=Messages(path=runs/best/random.jsonl)' --workdir=runs/rs_random

The same command goes on where it was stopped; answers are in --out/samples.db. In --out also results.json.
Exit codes: 0 done; 2 bad input.
"""  # noqa: E501  commands stay on one line

import dataclasses
import functools

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError, nearest
from jaxlm.feedback import parts, verifiers
from jaxlm.feedback.collect import read_prompts
from jaxlm.feedback.scoring import TIMEOUT, Reward
from jaxlm.feedback.store import Store
from jaxlm.run import best_of_n, reward, rounds
from jaxlm.run.load import Run, load_run
from jaxlm.run.train import use_compilation_cache
from jaxlm.sample.engine import Sampling
from jaxlm.tools import NAMES, by_name
from launch import common
from launch.tool_flags import UNSAFE_PYTHON

VERIFIERS = {n: getattr(verifiers, n) for n in ("exact", "text", "numeric", "gsm8k", "program")}

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that was fine-tuned on conversations.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one when not given.", lower_bound=0)
PROMPTS = flags.DEFINE_string("prompts", None, "JSONL file of prompts.")
OUT = flags.DEFINE_string("out", None, "Folder for the answers and what is chosen of them.")
N = flags.DEFINE_integer("n", 16, "Answers to each prompt, of which one is chosen.", lower_bound=2)
REWARD = flags.DEFINE_string("reward", None, "Folder of a reward model's run.")
VERIFIER = flags.DEFINE_string("verifier", None, f"How an answer is compared with the truth: {', '.join(VERIFIERS)}.")
SCORER = flags.DEFINE_string("scorer", None, "module:function of a reward function.")
SCORER_TIMEOUT = flags.DEFINE_float("scorer_timeout", TIMEOUT, "Seconds for --scorer to score all answers.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of the samples.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "End an answer after this many tokens.", lower_bound=1)
TOOLS = flags.DEFINE_list("tools", [], f"That may be called: {', '.join(NAMES[:2])}.")
SYSTEM = flags.DEFINE_string("system", None, "System message of prompts that have none.")
SEED = flags.DEFINE_integer("seed", 0, "Of the samples, and of the choice among ties.", lower_bound=0)


def scorer(run: Run) -> tuple[Reward, float | None]:
    """The one that the flags name, with its time limit: only what comes from elsewhere may hang."""
    given = [n for n, f in (("reward", REWARD), ("verifier", VERIFIER), ("scorer", SCORER)) if f.value is not None]
    if len(given) != 1:
        raise UserError("one of --reward=RUN, --verifier=NAME and --scorer=module:function is needed")
    if REWARD.value is not None:
        return reward.reward_function(REWARD.value, run.tokenizer.hash), None
    if SCORER.value is not None:
        return parts.reward((parts.Function(SCORER.value),), None, run.tokenizer), SCORER_TIMEOUT.value
    if VERIFIER.value not in VERIFIERS:
        raise UserError(f"--verifier: unknown {VERIFIER.value!r}; {nearest(VERIFIER.value, VERIFIERS)}")
    verifier = VERIFIERS[VERIFIER.value]
    if VERIFIER.value == "program":
        verifier = functools.partial(verifier, unsafe=UNSAFE_PYTHON.value)
    return verifiers.verified(verifier, name=VERIFIER.value), None


def main() -> int:
    if WORKDIR.value is None or PROMPTS.value is None or OUT.value is None:
        raise UserError("--workdir=RUN, --prompts=FILE and --out=DIR are needed")
    use_compilation_cache()
    run, prompts = load_run(WORKDIR.value, STEP.value), read_prompts(PROMPTS.value, SYSTEM.value)
    (score, timeout), out = scorer(run), storage.make_dir(OUT.value)
    tools = by_name(TOOLS.value, None, out, UNSAFE_PYTHON.value) if TOOLS.value else None
    sampling = Sampling(temperature=TEMPERATURE.value, max_tokens=MAX_TOKENS.value, seed=SEED.value)
    with Store(out / "samples.db") as store:
        found = rounds.respond(store, run, prompts, N.value, sampling, tools)
    groups = [best_of_n.Group(p, tuple(responses)) for p, responses in zip(prompts, found, strict=True)]
    chosen = best_of_n.select(groups, score, N.value, SEED.value, timeout)
    best_of_n.write(chosen, out / "chosen.jsonl", out / "random.jsonl")
    told = {f: dataclasses.asdict(getattr(chosen, f)) for f in ("best", "random", "pool", "gain")}
    about = {"prompts": len(chosen.chosen), "left_out": chosen.left_out, "n": N.value, "kl": chosen.kl}
    storage.write_json(out / "results.json", {"schema_version": 1} | told | about)
    print(f"{len(chosen.chosen)} prompts, {chosen.left_out} left out; KL at most {chosen.kl:.3f} nats")
    for name in told:
        e = getattr(chosen, name)
        print(f"{name:7} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]")
    return 0


if __name__ == "__main__":
    common.run(main)
