"""Completes text with a trained model, and shows what it sees: tokens, probabilities, attention.

usage:
  python -m launch.sample --workdir=DIR --prompt=TEXT [options]
  python -m launch.sample --workdir=DIR --prompt=- < file          the prompt from standard input

Sampling: --temperature=0 takes the likeliest token each time; higher is bolder. --top_k, --top_p and --min_p drop
unlikely tokens, in this order, after the temperature. The same --seed gives the same text; samples of one call differ.
Sampling ends at the end token, a --stop text (left out of what is printed), a --stop_id, or --max_tokens.

Drafts: --draft=RUN lets a smaller model with the same tokenizer propose --draft_tokens tokens at a time, which the
model judges in one pass (speculative decoding). What comes out has the model's own distribution, whatever the draft is:
greedy text stays the same, a sampled one is another draw than without. How many of the proposals were accepted is told
on standard error. It can pay when the draft is several times smaller and mostly agrees: train it on the same text, or
distill it from the model (distill_tiny).

Memory: --cache_dtype=bfloat16 or int8 keeps keys and values of what was read and said in fewer bytes, for long texts or
many samples. Probabilities are then slightly others (launch.bench --suite=decode says by how much). Unset, the
model's definition decides.

Looking: --show_probabilities=K draws the model's own distribution of the next token (temperature 1, nothing dropped).
--show_tokens prints the prompt as the tokenizer cuts it, with ids; spaces show as a low bar, line ends as an arrow.
--show_attention=FILE.png draws which token attends to which, a panel a layer, averaged over heads. With one of these,
nothing is sampled unless --num_samples is given.

examples:
  python -m launch.sample --workdir=runs/a1 --prompt='def main():' --num_samples=3 --temperature=0.8 --top_p=0.95
  python -m launch.sample --workdir=runs/a1 --prompt='The list is' --temperature=0 --stop='.' --max_tokens=40
  python -m launch.sample --workdir=runs/a1 --prompt='import ' --show_probabilities=10
  python -m launch.sample --workdir=runs/a1 --prompt='Return a new array' --show_tokens --show_attention=attention.png
  python -m launch.sample --workdir=runs/a1 --prompt='x = [' --json | python -m json.tool
  python -m launch.sample --workdir=runs/a1 --draft=runs/small --draft_tokens=4 --prompt='def main():' --temperature=0
  python -m launch.sample --workdir=runs/a1 --prompt='class ' --num_samples=64 --cache_dtype=int8

With --json, standard output is one object: prompt, prompt_ids, step, settings, cache_dtype, samples [{text, ids,
logprobs, finish_reason}], and tokens, next_token, draft where asked for. Log-probabilities are the model's at the
temperature in use (1 when it is 0), before anything is dropped. Exit codes: 0 done; 2 bad input.
"""

import dataclasses
import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.nn.transformer import attention_weights, cache_dtype
from jaxlm.run.load import load_draft, load_run
from jaxlm.run.train import use_compilation_cache
from jaxlm.sample import show, speculative
from jaxlm.sample.engine import Completion, Sampling, generate, next_token_distribution
from launch import common
from launch.cache_flags import CACHE_DTYPE
from launch.draft_flags import DRAFT, DRAFT_TOKENS

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that launch.train or launch.import_hf has written.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one when not given.", lower_bound=0)
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; - reads standard input.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "How many completions (1, or 0 with a --show flag).", 0)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Above 0; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the K likeliest tokens; 0 keeps all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the likeliest tokens that together reach this probability.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Keep tokens at least this many times as likely as the likeliest.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "End after this many tokens.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random draws.")
STOP = flags.DEFINE_multi_string("stop", [], "End before this text; may be repeated.")
STOP_ID = flags.DEFINE_multi_integer("stop_id", [], "End at this token id; may be repeated.")
SHOW_PROBABILITIES = flags.DEFINE_integer("show_probabilities", None, "Show the K likeliest next tokens.", 1)
SHOW_TOKENS = flags.DEFINE_bool("show_tokens", False, "Show how the prompt is cut into tokens.")
SHOW_ATTENTION = flags.DEFINE_string("show_attention", None, "Draw who attends to whom into this PNG file.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of text.")


def read_prompt() -> str:
    if PROMPT.value is None:
        raise UserError("--prompt=TEXT is missing; --prompt=- reads standard input")
    if PROMPT.value != "-":
        return PROMPT.value
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"standard input is not valid UTF-8: byte {e.start} is {e.object[e.start]:#04x}") from None


def draw_attention(run, ids: list[int]) -> None:
    path = storage.path(SHOW_ATTENTION.value)
    if path.suffix != ".png":
        raise UserError(f"--show_attention takes the name of a .png file, got {SHOW_ATTENTION.value!r}")
    if not path.parent.is_dir():
        raise UserError(f"--show_attention: there is no folder {path.parent}")
    show.check_attention_length(len(ids))
    tokens_1T = jnp.asarray([ids])
    weights = attention_weights(run.model, run.params, tokens_1T, jnp.arange(len(ids))[None], jnp.ones_like(tokens_1T))
    show.attention_png(path, np.asarray(weights)[:, 0], run.tokenizer.pieces(ids))


def print_sample(prompt: str, number: int, of: int, completion: Completion) -> None:
    if of > 1:
        print(f"--- sample {number + 1} of {of}: {len(completion.ids)} tokens, {completion.finish_reason} ---")
    prompt = f"\x1b[1m{prompt}\x1b[0m" if sys.stdout.isatty() else prompt
    print(prompt + completion.text)


def main() -> int:
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is missing: the folder of a trained run")
    prompt = read_prompt()
    sampling = Sampling(
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        max_tokens=MAX_TOKENS.value,
        stop_ids=tuple(STOP_ID.value),
        stop_strings=tuple(STOP.value),
        seed=SEED.value,
    )
    looks = SHOW_TOKENS.value or SHOW_PROBABILITIES.value is not None or SHOW_ATTENTION.value is not None
    count = NUM_SAMPLES.value if NUM_SAMPLES.value is not None else int(not looks)
    use_compilation_cache()
    run = load_run(WORKDIR.value, STEP.value).with_cache_dtype(CACHE_DTYPE.value)
    draft = None if DRAFT.value is None or not count else load_draft(DRAFT.value, run, DRAFT_TOKENS.value)
    ids = run.encode(prompt)
    if not ids:
        raise UserError(
            "the prompt is empty, and this run's documents have no start token to begin from: give some text"
        )
    columns = shutil.get_terminal_size().columns
    out = {"prompt": prompt, "prompt_ids": ids, "step": run.step, "settings": dataclasses.asdict(sampling)}
    out["cache_dtype"] = cache_dtype(run.model)

    if SHOW_TOKENS.value:
        cut = run.tokenizer.encode(prompt)
        out["tokens"] = [{"id": i, "token": p} for i, p in zip(cut, run.tokenizer.pieces(cut))]
        if not JSON.value:
            print(show.token_view(run.tokenizer, cut, columns, color=sys.stdout.isatty()))
    if SHOW_PROBABILITIES.value is not None:
        probabilities = next_token_distribution(run.model, run.params, ids)
        out["next_token"] = show.likeliest(run.tokenizer, probabilities, SHOW_PROBABILITIES.value)
        if not JSON.value:
            print(show.probability_table(run.tokenizer, probabilities, SHOW_PROBABILITIES.value, columns))
    if SHOW_ATTENTION.value is not None:
        draw_attention(run, ids)
        out["attention"] = SHOW_ATTENTION.value
        if not JSON.value:
            print(f"attention drawn in {SHOW_ATTENTION.value}")

    if count and len(ids) + sampling.max_tokens > run.experiment.data.context:
        reach, context = len(ids) + sampling.max_tokens, run.experiment.data.context
        print(f"note: this may reach {reach} tokens, training saw contexts of {context}", file=sys.stderr)
    asked = run.model, run.params, run.tokenizer, [ids] * count, sampling
    if draft is None:
        completions = generate(*asked)
    else:
        completions, worth = speculative.generate(*asked, draft)
        out["draft"] = dataclasses.asdict(worth) | {"rate": worth.rate, "tokens_per_step": worth.tokens_per_step}
        print(
            f"note: of {worth.drafted} tokens that the draft proposed {worth.accepted} were accepted "
            f"({worth.rate:.0%}); a pass of the model gave {worth.tokens_per_step:.2f}",
            file=sys.stderr,
        )
    out["samples"] = [dataclasses.asdict(c) for c in completions]
    if JSON.value:
        print(json.dumps(out, ensure_ascii=False))
    else:
        for i, completion in enumerate(completions):
            print_sample(prompt, i, count, completion)
    return 0


if __name__ == "__main__":
    common.run(main)
