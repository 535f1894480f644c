"""Questions put to a trained run, as text to a base model and as a conversation to a chat model, in one call."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jaxlm.config import UserError
from jaxlm.data.chat import Chat
from jaxlm.data.conversation import Message, prompt_ids
from jaxlm.data.preferences import Preferences
from jaxlm.data.prompting import Example, few_shot_conversation, few_shot_text, stop_strings
from jaxlm.data.world.talk import Work, tools_message
from jaxlm.run.experiment import Experiment
from jaxlm.run.load import Run, load_experiment
from jaxlm.sample.chat import reply
from jaxlm.sample.engine import Completion, Sampling, generate
from jaxlm.tools import Counters, Tool

GREEDY = Sampling(temperature=0.0)


def ancestry(experiment: Experiment) -> Iterator[Experiment]:
    """A definition, its parent's, and so on, as far as the parents' workdirs are still there."""
    yield experiment
    while experiment.parent is not None:
        try:
            experiment = load_experiment(experiment.parent)
        except UserError:
            return
        yield experiment


def is_chat(experiment: Experiment) -> bool:
    """Whether the model was fine-tuned on conversations, in this run or in one that it came from."""
    return any(isinstance(e.data, Chat | Preferences) for e in ancestry(experiment))


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question, and how it is put.

    shots: examples before it. work: where their steps are shown, see `shown_reply`; a base model writes steps of its
    own unless it is "none".
    """

    text: str
    max_tokens: int
    system: str | None = None
    shots: tuple[Example, ...] = ()
    work: Work = "think"


@dataclasses.dataclass(frozen=True)
class Said:
    """A reply, or why there is none."""

    message: Message
    completion: Completion | None
    skipped: str | None = None


def _prompt(run: Run, asked: Asked, chat: bool):
    """(what is put to the model, its length in tokens)"""
    if chat:
        conversation = few_shot_conversation(asked.shots, asked.text, asked.work, asked.system)
        return conversation, len(prompt_ids(conversation, run.tokenizer))
    text = few_shot_text(asked.shots, asked.text, asked.work != "none")
    ids = run.encode(text if asked.system is None else f"{asked.system}\n\n{text}")
    return ids, len(ids)


def too_long(run: Run, asked: Asked, chat: bool) -> str | None:
    """Why a question cannot be put with all of its examples, or None when it can."""
    length, context = _prompt(run, asked, chat)[1], run.experiment.data.context
    if length + asked.max_tokens <= context:
        return None
    return f"{length} tokens of prompt and {asked.max_tokens} of reply, data.context is {context}"


def replies(
    run: Run,
    asked: Sequence[Asked],
    *,
    chat: bool | None = None,
    tools: Mapping[str, Tool] | None = None,
    counters: Counters | None = None,
    sampling: Sampling = GREEDY,
) -> list[Said]:
    """The answer to each question, in order; greedy unless `sampling` says otherwise (its max_tokens is not used).

    chat: as a conversation or as text; unset, what the run was trained on. tools: offered to a chat model by a system
    message, where a question has none of its own. A question that does not fit the trained context is skipped: no
    example is ever dropped silently.
    """
    chat = is_chat(run.experiment) if chat is None else chat
    if tools and not chat:
        raise UserError(f"{run.workdir} is a base model: tools are called in conversations only")
    if tools:
        offer = tools_message(tuple(tools))
        asked = [dataclasses.replace(a, system=offer) if a.system is None else a for a in asked]
    context = run.experiment.data.context
    skipped = {i: why for i, a in enumerate(asked) if (why := too_long(run, a, chat))}
    places, prompts, settings = [i for i in range(len(asked)) if i not in skipped], [], []
    for a in (asked[i] for i in places):
        prompt, length = _prompt(run, a, chat)
        stops = () if chat else stop_strings(a.work != "none")
        forced = context - length - a.max_tokens  # what tools may write
        prompts.append(prompt)
        settings.append(dataclasses.replace(sampling, max_tokens=a.max_tokens, max_forced=forced, stop_strings=stops))
    if not places:
        said = []
    elif chat:
        found = reply(
            *(run.model, run.params, run.tokenizer, prompts, settings),
            limit=context,
            sample_ids=places,
            tools=tools,
            counters=counters,
        )
        said = [Said(r.message, r.completion) for r in found]
    else:
        found = generate(run.model, run.params, run.tokenizer, prompts, settings, places)
        said = [Said(Message("assistant", c.text), c) for c in found]
    out = dict(zip(places, said, strict=True))
    out |= {i: Said(Message("assistant", ""), None, why) for i, why in skipped.items()}
    return [out[i] for i in range(len(asked))]
