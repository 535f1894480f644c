"""Samples K responses to each prompt from a run's checkpoint into a feedback store, and has programs rank them.

usage:
  python -m launch.collect --workdir=RUN --prompts=FILE.jsonl --store=FEEDBACK.db [--k=5] [options]
  python -m launch.collect --store=FEEDBACK.db --judge=RUN2                       only rank what is there

A line of --prompts is {"messages": [...]}, {"prompt": text} or {"question": text}; other fields, such as "answer", are
kept for scorers. Each response is kept with its token ids, log-probabilities, checkpoint and sampling. The same command
goes on where it was stopped, and samples nothing twice; another checkpoint adds its own responses to the same prompts.

People rank with launch.rank. Programs that rank here, each under its own annotator's name:
  --scorer=module:function   a reward function (prompts, completions, metadata) -> list of numbers or None
  --judge=RUN2               a run's model compares each two responses, by the probabilities of its answers A and B
  --judge_url=URL            the same by a model behind an OpenAI-compatible address, by what it writes
A judge sees each pair in both orders. A prompt with a verdict that cannot be read gets no ranking, and is counted. What
a judge has said stands beside the store, in FEEDBACK.db.journal.jsonl, and is not asked again. A judge's address must
be this machine's unless --judge_remote; its key comes from the environment variable --judge_key.

examples:
  python -m launch.collect --workdir=runs/sft --prompts=prompts.jsonl --store=runs/feedback.db --k=5
  python -m launch.rank --store=runs/feedback.db --annotator=ada
  python -m launch.collect --workdir=runs/ppo --prompts=prompts.jsonl --store=runs/feedback.db --judge=runs/judge
  python -m launch.arena --store=runs/feedback.db

Exit codes: 0 done; 2 bad input.
"""

import functools
import importlib

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data.conversation import prompt_ids
from jaxlm.feedback import pairwise
from jaxlm.feedback.collect import collect, read_prompts
from jaxlm.feedback.endpoint import Endpoint, say
from jaxlm.feedback.journal import FILE, Journal
from jaxlm.feedback.pairwise import Ranker, Verdicts, annotate, by_probability, by_scores, by_text, by_wins
from jaxlm.feedback.scoring import TIMEOUT
from jaxlm.feedback.store import Store
from jaxlm.run import rounds
from jaxlm.run.load import load_run
from jaxlm.run.policy import policy_of
from jaxlm.run.train import use_compilation_cache
from jaxlm.sample.chat import reply
from jaxlm.sample.engine import Sampling
from launch import common

SLOTS = 64  # how many replies are decoded at once

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that was fine-tuned on conversations.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one when not given.", lower_bound=0)
PROMPTS = flags.DEFINE_string("prompts", None, "JSONL file of prompts.")
STORE = flags.DEFINE_string("store", None, "The feedback store, an SQLite file; made when there is none.")
SYSTEM = flags.DEFINE_string("system", None, "System message of prompts that have none.")
K = flags.DEFINE_integer("k", 5, "Responses to each prompt.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of the samples.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the likeliest tokens that together reach this probability.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "End a response after this many tokens.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", lower_bound=0)
SCORER = flags.DEFINE_string("scorer", None, "module:function of a reward function that ranks by its values.")
SCORER_TIMEOUT = flags.DEFINE_float("scorer_timeout", TIMEOUT, "Seconds for --scorer to score a batch of 16 prompts.")
JUDGE = flags.DEFINE_string("judge", None, "Folder of a run whose model compares responses.")
CRITERION = flags.DEFINE_string("criterion", pairwise.BETTER, "What a judge is asked: which reply is ...?")
JUDGE_URL = flags.DEFINE_string("judge_url", None, "Address of a judge, up to the part before /chat/completions.")
JUDGE_MODEL = flags.DEFINE_string("judge_model", None, "Name of the model at --judge_url.")
JUDGE_KEY = flags.DEFINE_string("judge_key", None, "Environment variable that holds the key for --judge_url.")
JUDGE_REMOTE = flags.DEFINE_bool("judge_remote", False, "Allow a --judge_url on another machine.")
JUDGE_TIMEOUT = flags.DEFINE_float("judge_timeout", 60.0, "Seconds for a request to --judge_url.")


def sample(store: Store) -> None:
    prompts = read_prompts(PROMPTS.value, SYSTEM.value)
    sampling = Sampling(temperature=TEMPERATURE.value, top_p=TOP_P.value, max_tokens=MAX_TOKENS.value, seed=SEED.value)
    run = load_run(WORKDIR.value, STEP.value)
    room = run.experiment.data.context - sampling.max_tokens
    kept = [p for p in prompts if len(prompt_ids(p.conversation, run.tokenizer)) <= room]
    if len(kept) < len(prompts):
        print(
            f"note: {len(prompts) - len(kept)} of {len(prompts)} prompts are left out: with --max_tokens they do not "
            f"fit the context of {run.experiment.data.context}"
        )
    if not kept:
        raise UserError(f"no prompt of {PROMPTS.value} fits: choose smaller --max_tokens")
    ask = functools.partial(reply, run.model, run.params, run.tokenizer, slots=SLOTS)
    policy = policy_of(run)
    done = collect(store, ask, kept, policy, run.tokenizer.hash, K.value, sampling)
    print(f"{done.new} responses of {policy.name} to {len(kept)} prompts, {done.known} were there")


def scorer(name: str):
    """The function that `module:function` names; its module is imported."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"--scorer={name}: {e} (module:function is wanted)") from None
    if not callable(found):
        raise UserError(f"--scorer={name} is no function")
    return found


def rankers(verdicts: Verdicts) -> dict[str, Ranker]:
    """Annotator -> how it ranks."""
    file = storage.path(STORE.value)
    journal = Journal(file.parent, name=f"{file.name}.{FILE}")
    out: dict[str, Ranker] = {}
    by = "" if CRITERION.value == pairwise.BETTER else f", {CRITERION.value}"  # another question, another annotator
    if SCORER.value is not None:
        out[f"scorer {SCORER.value}"] = by_scores(scorer(SCORER.value), SCORER_TIMEOUT.value)
    if JUDGE_URL.value is not None:
        if JUDGE_MODEL.value is None:
            raise UserError("--judge_url needs --judge_model=NAME")
        endpoint = Endpoint(
            JUDGE_URL.value, JUDGE_MODEL.value, JUDGE_KEY.value, JUDGE_REMOTE.value, JUDGE_TIMEOUT.value
        )
        out[f"judge {endpoint.name}{by}"] = by_wins(by_text(say(endpoint, journal), CRITERION.value, verdicts))
    if JUDGE.value is not None:
        run = load_run(JUDGE.value)
        out[f"judge {policy_of(run).name}{by}"] = by_wins(
            by_probability(rounds.judge(run, journal), CRITERION.value, verdicts)
        )
    return out


def main() -> int:
    if STORE.value is None:
        raise UserError("--store=FILE is missing: the feedback store")
    if (WORKDIR.value is None) != (PROMPTS.value is None):
        raise UserError("--workdir=RUN and --prompts=FILE go together: what to ask, and whom")
    if WORKDIR.value is None and all(f.value is None for f in (SCORER, JUDGE, JUDGE_URL)):
        raise UserError("there is nothing to do: give --workdir and --prompts, or --scorer, --judge or --judge_url")
    use_compilation_cache()
    verdicts = Verdicts()
    ranking = rankers(verdicts)  # what is wrong with them shows before anything is sampled
    with Store(STORE.value, create=WORKDIR.value is not None) as store:
        if WORKDIR.value is not None:
            sample(store)
        for annotator, rank in ranking.items():
            done = annotate(store, annotator, rank)
            print(f"{annotator}: {done.ranked} prompts ranked, {done.known} were, {done.unranked} without a ranking")
    if verdicts.malformed or verdicts.missing:
        print(
            f"of {verdicts.asked} verdicts {verdicts.malformed} were neither A nor B, and {verdicts.missing} missing "
            "(too long for the judge, or no answer)"
        )
    return 0


if __name__ == "__main__":
    common.run(main)
