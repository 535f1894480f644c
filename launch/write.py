"""Has a model write conversations for fine-tuning from templates, filters them, and keeps where each comes from.

usage:
  python -m launch.write --workdir=RUN --templates=FILE.jsonl --out=FILE.jsonl [--count=1000] [options]

A line of --templates:
  {"name": "explain", "text": "Explain {what} to {whom}.", "slots": {"what": ["rain", "snow"], "whom": ["a child"]}}
The text with a value in each slot is the user's message, and the model's reply completes the conversation; all
combinations come before one comes again. With "writes": "request" the text asks the model for a user's message, which
it then replies to in a fresh conversation. "system": a system message of the conversation that is written.

The templates are taken in turn. Thrown away, and counted: what leaves no room for a reply, and replies that ran into
--max_tokens, are empty, shorter or longer than --characters, refuse, echo the request, are mostly no letters, go in
circles, or are there already. Each line of --out has its "messages", for the chat source Messages, and its "source":
model, template, slots, number, seed.

examples:
  python -m launch.write --workdir=runs/sft --templates=templates.jsonl --out=written.jsonl --count=2000
  python -m launch.train --experiment=sft_tiny --set=parent=runs/sft --workdir=runs/sft2 \\
      --set='data.sources=Messages(path="written.jsonl")'

Questions about passages, kept where the model answers them with the passage at hand: launch.probe --passages.
Exit codes: 0 done; 2 bad input.
"""

import functools

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data.conversation import prompt_ids
from jaxlm.feedback.lessons import write_lessons
from jaxlm.feedback.written import FILTERS, WRITING, Filtered, characters, read_templates, write_conversations
from jaxlm.run.load import load_run
from jaxlm.run.policy import policy_of
from jaxlm.run.train import use_compilation_cache
from jaxlm.sample.chat import reply
from jaxlm.sample.engine import Sampling
from launch import common

SLOTS = 64  # replies that are decoded at once

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that was fine-tuned on conversations.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one when not given.", lower_bound=0)
TEMPLATES = flags.DEFINE_string("templates", None, "JSONL file of templates.")
OUT = flags.DEFINE_string("out", None, "JSONL file for the conversations.")
COUNT = flags.DEFINE_integer("count", 1000, "Conversations to try.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", WRITING.temperature, "Of the samples.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "End a text after this many tokens.")
CHARACTERS = flags.DEFINE_list("characters", ["2", "4000"], "Least and most characters of a reply that is kept.")
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", lower_bound=0)


def main() -> int:
    for name, flag in (("workdir", WORKDIR), ("templates", TEMPLATES), ("out", OUT)):
        if flag.value is None:
            raise UserError(f"--{name} is missing: --workdir=RUN, --templates=FILE and --out=FILE are needed")
    try:
        least, most = map(int, CHARACTERS.value)
    except ValueError:
        least, most = 1, 0
    if not 0 <= least <= most:
        raise UserError(f"--characters={','.join(CHARACTERS.value)}: the least and the most are wanted, such as 2,4000")
    if storage.path(OUT.value).exists():
        raise UserError(f"{OUT.value} is there already: choose another --out")
    templates = read_templates(TEMPLATES.value)
    use_compilation_cache()
    run = load_run(WORKDIR.value, STEP.value)
    ask = functools.partial(reply, run.model, run.params, run.tokenizer, slots=SLOTS, limit=run.experiment.data.context)
    sampling = Sampling(temperature=TEMPERATURE.value, max_tokens=MAX_TOKENS.value, seed=SEED.value)

    def fits(prompt) -> bool:
        return len(prompt_ids(prompt, run.tokenizer)) + sampling.max_tokens <= run.experiment.data.context

    filters, counts = {**FILTERS, "length": characters(least, most)}, Filtered()
    made = write_conversations(ask, templates, COUNT.value, policy_of(run).name, filters, sampling, counts, fits)
    rejected = ", ".join(f"{reason} {n}" for reason, n in counts.rejected.most_common()) or "none"
    print(f"{counts.written} conversations written, {counts.kept} kept; rejected: {rejected}")
    write_lessons(OUT.value, made)
    return 0


if __name__ == "__main__":
    common.run(main)
