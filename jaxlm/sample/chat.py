"""An assistant's turn: conversations in, messages out, through the decoder."""

import dataclasses
from collections.abc import Sequence

from jaxlm.data.conversation import END, MARKS, Conversation, Message, prompt_ids, read_completion
from jaxlm.nn.transformer import ModelConfig
from jaxlm.sample.engine import Completion, Sampling, generate


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model said. `completion` holds the ids and log-probabilities that `message` was read from."""

    message: Message
    completion: Completion


def reply(
    cfg: ModelConfig,
    params,
    tokenizer,
    conversations: Sequence[Conversation],
    sampling: Sampling | Sequence[Sampling],
    *,
    limit: int | None = None,
    sample_ids: Sequence[int] | None = None,
    slots: int | None = None,
) -> list[Reply]:
    """The next assistant turn of each conversation, in order.

    `sampling`, `sample_ids` and `slots` as in `generate`; the end of a turn stops, and the model may think. `limit`:
    most tokens of prompt and reply together, such as the trained context: older exchanges are dropped to fit.
    """
    control = tokenizer.control
    settings = [sampling] * len(conversations) if isinstance(sampling, Sampling) else list(sampling)
    settings = [
        dataclasses.replace(
            s,
            stop_ids=(*s.stop_ids, control[END]),
            control_ids=(*s.control_ids, *(control[m] for m in MARKS["thinking"])),
        )
        for s in settings
    ]
    prompts = [
        prompt_ids(c, tokenizer, None if limit is None else limit - s.max_tokens)
        for c, s in zip(conversations, settings, strict=True)
    ]
    completions = generate(cfg, params, tokenizer, prompts, settings, sample_ids, slots)
    return [Reply(read_completion(c.ids, tokenizer), c) for c in completions]
