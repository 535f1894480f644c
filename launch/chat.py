"""Talks with a fine-tuned model in a terminal; the reply appears while it is written.

usage:
  python -m launch.chat --workdir=DIR [--system=TEXT] [--tools=calculator,python,search --index=FOLDER] [options]
  python -m launch.chat --workdir=DIR < questions.txt              one message a line, one reply after the other

Commands: /reset forgets what was said; /save FILE.jsonl writes it as chat messages, as data.sources=Messages(...) reads
them; /system TEXT sets the system message (/system alone removes it); /tools on|off; /probabilities on|off shows the
probability of each token of a reply and what was likeliest there; /help; /exit, or the end of the input.
Ctrl-C stops a reply, which is kept as far as it went.

What the model thinks, calls and is told by tools stands on lines of its own, dimmed in a terminal; --hide_thinking
leaves the thinking out. The tools are offered in a system message, after --system. python runs isolated from this
machine, and where nothing isolates it only with --unsafe_python; search looks into the texts below --index, or into an
index that jaxlm.tools.build_index has made.

Prompt and reply together stay within the context that the model was trained on: older exchanges are left out, and a
note says so. --temperature=0 takes the likeliest token each time. The same --seed and messages give the same replies.
Drafts: --draft=RUN lets a smaller model with the same tokenizer propose --draft_tokens tokens at a time, which the
model judges in one pass; the replies stay the model's own. --cache_dtype=int8 keeps keys and values in fewer bytes (of
both see launch.sample --help).

examples:
  python -m launch.chat --workdir=runs/sft
  python -m launch.chat --workdir=runs/sft --tools=calculator,python --temperature=0 --show_probabilities=3
  python -m launch.chat --workdir=runs/sft --draft=runs/small_sft
  echo 'What is your name?' | python -m launch.chat --workdir=runs/sft --hide_thinking

Exit codes: 0 done; 2 bad input, also when a line of input that does not come from a terminal could not be answered.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError, nearest
from jaxlm.data.conversation import Conversation, Message, prompt_ids, read_completion
from jaxlm.data.messages import to_messages
from jaxlm.data.world.talk import tools_message
from jaxlm.run.ask import is_chat
from jaxlm.run.load import Run, load_draft, load_run
from jaxlm.run.train import use_compilation_cache
from jaxlm.sample import alternatives
from jaxlm.sample.chat import fitted, reply
from jaxlm.sample.engine import Sampling
from jaxlm.sample.speculative import Draft
from jaxlm.sample.transcript import Printer
from jaxlm.tools import NAMES, Tool, by_name
from launch import common
from launch.cache_flags import CACHE_DTYPE
from launch.draft_flags import DRAFT, DRAFT_TOKENS
from launch.tool_flags import UNSAFE_PYTHON

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that was fine-tuned on conversations.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one when not given.", lower_bound=0)
SYSTEM = flags.DEFINE_string("system", None, "System message.")
TOOLS = flags.DEFINE_list("tools", [], f"What the model may call: {', '.join(NAMES)}.")
INDEX = flags.DEFINE_string("index", None, "For search: a folder of texts, or an index made of one.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Above 0; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the K likeliest tokens; 0 keeps all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the likeliest tokens that together reach this probability.")
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "End a reply after so many tokens; a third of the context if unset."
)
SEED = flags.DEFINE_integer("seed", 0, "Of the random draws.")
SHOW_PROBABILITIES = flags.DEFINE_integer("show_probabilities", None, "Show the K likeliest at each token.", 1)
HIDE_THINKING = flags.DEFINE_bool("hide_thinking", False, "Leave out what the model thinks before it answers.")

CHUNK = 4  # tokens that appear together, without a draft
LIKELIEST = 3  # of /probabilities on, where --show_probabilities does not say how many
COMMANDS = {
    "help": "this list",
    "reset": "forget what was said",
    "save": "FILE.jsonl: write what was said",
    "system": "TEXT: set the system message; without TEXT remove it",
    "tools": "on|off",
    "probabilities": "on|off",
    "exit": "end",
}


@dataclasses.dataclass
class Session:
    """A run, how it is talked to, and what was said so far."""

    run: Run
    sampling: Sampling
    tools: Mapping[str, Tool]
    system: str | None
    offered: bool  # whether the tools are
    probabilities: int  # how many alternatives are shown, 0 for none
    thinking: bool
    color: bool
    draft: Draft | None = None
    said: list[Message] = dataclasses.field(default_factory=list)
    replies: int = 0  # in all: each has random draws of its own
    noted: bool = False  # that older exchanges are left out
    saved: set[str] = dataclasses.field(default_factory=set)


def conversation(s: Session, *more: Message) -> Conversation:
    """All that the model is to see."""
    offer = tools_message(tuple(s.tools)) if s.tools and s.offered else None
    head = "\n\n".join(text for text in (s.system, offer) if text is not None)
    return Conversation((*([Message("system", head)] if head else []), *s.said, *more))


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------- exchanges
def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def exchange(s: Session, text: str) -> None:
    """One message and its reply, printed as it comes; both are kept unless there is no reply."""
    run, context = s.run, s.run.experiment.data.context
    user, tools = Message("user", text), s.tools if s.offered else {}
    asked = conversation(s, user)
    prompt = fitted(asked, run.tokenizer, s.sampling, context, bool(tools))
    if len(prompt) < len(prompt_ids(asked, run.tokenizer)) and not s.noted:
        note(f"older exchanges no longer fit into the context of {context} tokens and are left out from here on")
        s.noted = True
    printer = Printer(run.tokenizer, write, s.color, s.thinking)
    sampled, stopped = None, False
    try:
        (answer,) = reply(
            *(run.model, run.params, run.tokenizer, [asked], s.sampling),
            limit=context,
            sample_ids=[s.replies],
            slots=1,
            tools=tools or None,
            on_tokens=lambda _, ids: printer.feed(ids),
            chunk=CHUNK if s.draft is None else 1,  # of a step each, which gives several
            draft=s.draft,
        )
        sampled = answer.completion.sampled
    except KeyboardInterrupt:
        stopped = True
    printer.finish()
    s.replies += 1
    if stopped:
        note("stopped")
    elif answer.completion.finish_reason == "length":
        note(f"the reply ends at its limit of {s.sampling.max_tokens} tokens")
    if printer.ids:
        s.said += [user, read_completion(printer.ids, run.tokenizer)]
    if s.probabilities and sampled:
        found = alternatives.alternatives(run.model, run.params, prompt, answer.completion.ids, s.probabilities)
        write(alternatives.table(run.tokenizer, answer.completion.ids, found, sampled) + "\n")


# ----------------------------------------------------------------------------------------------------------- commands
def save(s: Session, name: str) -> None:
    if not s.said:
        raise UserError("/save: nothing was said yet")
    if not name.endswith(".jsonl"):
        raise UserError(f"/save FILE.jsonl: the name must end so, got {name!r}")
    target = storage.path(name)
    if name not in s.saved and target.exists():
        raise UserError(f"/save: {name} exists; choose another name")
    line = {"messages": to_messages(conversation(s))}
    with storage.disk_errors(target):
        storage.write_text(target, json.dumps(line, ensure_ascii=False) + "\n")
    s.saved.add(name)
    note(f"{len(line['messages'])} messages in {name}")


def _switch(name: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise UserError(f"/{name} takes on or off, got {value!r}")
    return value == "on"


def command(s: Session, line: str) -> bool:
    """Runs a line that begins with a slash; False when it ends the program."""
    name, _, rest = line[1:].strip().partition(" ")
    rest = rest.strip()
    if name not in COMMANDS:
        raise UserError(f"unknown command /{name}; {nearest(name, COMMANDS)} (a message begins otherwise)")
    if name == "help":
        print("\n".join(f"/{known} {what}" for known, what in COMMANDS.items()))
    elif name == "reset":
        s.said, s.noted = [], False
    elif name == "save":
        save(s, rest)
    elif name == "system":
        s.system = rest or None
    elif name == "tools":
        s.offered = _switch(name, rest)
        if s.offered and not s.tools:
            raise UserError("/tools on: none were given; start with --tools=calculator,python,search")
    elif name == "probabilities":
        s.probabilities = (SHOW_PROBABILITIES.value or LIKELIEST) if _switch(name, rest) else 0
    return name != "exit"


# ------------------------------------------------------------------------------------------------------------ the loop
def talk(s: Session, interactive: bool) -> int:
    failed = False
    for line in common.typed(interactive, "(/exit or Ctrl-D ends)"):
        line = line.rstrip("\n")
        if not line.strip():
            continue
        try:
            if not line.startswith("/"):
                exchange(s, line.strip())
            elif not command(s, line):
                break
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed = True
    return 2 if failed and not interactive else 0


def main() -> int:
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is missing: the folder of a run that was fine-tuned on conversations")
    if INDEX.value is not None and "search" not in TOOLS.value:
        raise UserError("--index is what the tool search looks into: --tools=search")
    with tempfile.TemporaryDirectory() as scratch:
        tools = by_name(TOOLS.value, INDEX.value, scratch, UNSAFE_PYTHON.value)
        use_compilation_cache()
        run = load_run(WORKDIR.value, STEP.value).with_cache_dtype(CACHE_DTYPE.value)
        prompt_ids(Conversation((Message("user", ""),)), run.tokenizer)  # says so if it cannot render conversations
        if not is_chat(run.experiment):
            note(
                f"{WORKDIR.value} was never fine-tuned on conversations: it completes text, and as replies that makes "
                "little sense; see launch.sample"
            )
        most = run.experiment.data.context // 3 if MAX_TOKENS.value is None else MAX_TOKENS.value
        session = Session(
            run=run,
            sampling=Sampling(
                temperature=TEMPERATURE.value,
                top_k=TOP_K.value,
                top_p=TOP_P.value,
                max_tokens=most,
                seed=SEED.value,
            ),
            tools=tools,
            system=SYSTEM.value,
            offered=bool(tools),
            probabilities=SHOW_PROBABILITIES.value or 0,
            thinking=not HIDE_THINKING.value,
            color=sys.stdout.isatty(),
            draft=None if DRAFT.value is None else load_draft(DRAFT.value, run, DRAFT_TOKENS.value),
        )
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"step {run.step}; /help shows the commands")
        return talk(session, interactive)


if __name__ == "__main__":
    common.run(main)
