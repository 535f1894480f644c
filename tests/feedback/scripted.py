"""A model in a few lines: what it says to a prompt is looked up, its draws follow from seed and sample id."""

import hashlib

from jaxlm.data.conversation import Message
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion


def unit(*parts) -> float:
    """A number in 0..1 that belongs to these parts."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**32


def replied(text: str, logprob: float = -1.0, tokens: int = 2, finish_reason: str = "stop") -> Reply:
    spread = (logprob / tokens,) * tokens
    completion = Completion(tuple(range(tokens)), spread, text, finish_reason, (True,) * tokens)
    return Reply(Message("assistant", text), completion)


class Scripted:
    """`says(prompt, draw)` gives a text or a Reply; `draw` is None where sampling is greedy, else in 0..1.

    `calls` holds how many conversations each call had.
    """

    def __init__(self, says):
        self.says, self.calls = says, []

    def __call__(self, conversations, sampling, *, sample_ids):
        settings = sampling if isinstance(sampling, list) else [sampling] * len(conversations)
        self.calls.append(len(conversations))
        out = []
        for c, s, i in zip(conversations, settings, sample_ids, strict=True):
            prompt = c.messages[-1].text
            said = self.says(prompt, None if s.temperature == 0 else unit(prompt, s.seed, i))
            out.append(replied(said) if isinstance(said, str) else said)
        return out
