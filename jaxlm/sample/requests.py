"""What is asked of the decoder and what comes back: the host's side of it, without any computation.

V padded vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxlm.config import UserError
from jaxlm.nn.rope import LearnedPositions
from jaxlm.nn.transformer import ModelConfig, padded_vocab


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request is sampled; see `sample/logits.py` for the order of the filters.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. max_tokens counts sampled tokens, the stop token
    among them; max_forced bounds the tokens that `respond` may add. The tokenizer's end token always stops; stop_ids
    add others. A stop string stops at the token that completes it, and is left out of the text. Padding, unknown and
    start tokens are never sampled; the other control tokens (roles, tools) only when they are among stop_ids or
    control_ids.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 64
    max_forced: int = 512
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    control_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self):
        def require(ok: bool, what: str):
            if not ok:
                raise UserError(what)

        # Below 1e-3 a float32 logit divided by the temperature loses the differences that it should sharpen.
        require(
            self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
            f"temperature must be 0 (greedy) or between 0.001 and 1000, got {self.temperature}",
        )
        require(0 <= self.top_k < 2**31, f"top_k must be 0 (off) or a number of tokens, got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1 (off), got {self.top_p}")
        require(0 <= self.min_p <= 1, f"min_p must be between 0 (off) and 1, got {self.min_p}")
        require(1 <= self.max_tokens < 2**31, f"max_tokens must be at least 1, got {self.max_tokens}")
        require(0 <= self.max_forced < 2**31, f"max_forced must be at least 0, got {self.max_forced}")
        require(0 <= self.seed < 2**32, f"seed must be between 0 and 4294967295, got {self.seed}")
        require(all(self.stop_strings), "a stop string must not be empty")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation, with one entry per token in `ids`, `logprobs` and `sampled`.

    ids: with the stop id when one was sampled, with the tokens of a stop string, and with forced tokens. logprobs: of
    those ids under the model at the temperature in use (1 when greedy), before top-k, top-p, min-p and the ban on
    control tokens; 0 for forced tokens, which the model did not choose. sampled: False for forced tokens. text:
    decoded, without the stop id or stop string.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    sampled: tuple[bool, ...]


@dataclasses.dataclass
class Request:
    """One request on its way through the decoder: what was asked, and its completion so far."""

    index: int
    prompt: list[int]
    sampling: Sampling
    sample_id: int
    stops: tuple[int, ...]
    room: int | None  # longest completion that learned positions reach
    unfed: int  # how many of the last tokens, of prompt and completion, the next prefill feeds
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampled: list[bool] = dataclasses.field(default_factory=list)
    before: str = ""  # text up to the last forced token, in which no stop string is looked for

    def longest(self, forced: int) -> int:
        """Length of the completion at which it ends, given that so many of its tokens are forced."""
        most = self.sampling.max_tokens + forced
        return most if self.room is None else min(most, self.room)

    @property
    def forced(self) -> int:
        return len(self.sampled) - sum(self.sampled)

    @property
    def source(self) -> tuple[int, ...] | int:
        """What its next prefill is computed from: the prompt, which others may have too, or what it alone holds."""
        return self.index if self.ids else tuple(self.prompt)

    @property
    def stopped(self) -> bool:
        return bool(self.ids) and self.sampled[-1] and self.ids[-1] in self.stops


def make_requests(
    cfg: ModelConfig,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    sample_ids: Sequence[int] | None,
) -> list[Request]:
    """A request per prompt; `UserError` for an empty prompt, an id out of range, or one beyond learned positions."""
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    sample_ids = range(len(prompts)) if sample_ids is None else sample_ids

    @functools.cache  # most requests share a Sampling
    def checked_stops(s: Sampling) -> tuple[int, ...]:
        check_ids((*s.stop_ids, *s.control_ids), tokenizer)
        return stop_tokens(tokenizer, s)

    made = []
    for prompt, s, i in zip(prompts, settings, sample_ids, strict=True):
        if len(prompt) == 0:
            raise UserError("the prompt is empty: give at least one token, such as the start token")
        check_ids(prompt, tokenizer)
        room = max_new_tokens(cfg, len(prompt))
        if room is not None and room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens but the model's learned positions reach {cfg.positions.length}"
            )
        ids = [int(t) for t in prompt]
        made.append(Request(len(made), ids, s, int(i), checked_stops(s), room, unfed=len(ids)))
    return made


def check_ids(ids: Sequence[int], tokenizer) -> None:
    outside = [t for t in ids if not 0 <= t < tokenizer.vocab_size]
    if outside:
        raise UserError(f"token id {outside[0]} is outside the vocabulary of {tokenizer.vocab_size}")


def max_new_tokens(cfg: ModelConfig, prompt_length: int) -> int | None:
    """How many tokens can follow a prompt before learned positions run out; None without such a limit."""
    if not isinstance(cfg.positions, LearnedPositions):
        return None
    return cfg.positions.length - prompt_length + 1  # the last token is sampled but never fed


def stop_tokens(tokenizer, sampling: Sampling) -> tuple[int, ...]:
    return tuple(dict.fromkeys([*([tokenizer.eos] if tokenizer.eos is not None else []), *sampling.stop_ids]))


def allowed_tokens(cfg: ModelConfig, tokenizer, sampling: Sampling) -> np.ndarray:
    """Which ids may be sampled, bool [V]: see `Sampling`."""
    allowed = np.zeros(padded_vocab(cfg), bool)
    allowed[: tokenizer.vocab_size] = True
    control = set(tokenizer.control.values())
    never = {tokenizer.pad, tokenizer.bos, tokenizer.control.get("<|unk|>")}
    # A foreign vocabulary without padding pads with an ordinary token, which must stay.
    allowed[list(control - (set(sampling.control_ids) - never))] = False
    allowed[list(stop_tokens(tokenizer, sampling))] = True  # last: some vocabularies have one token for start and end
    return allowed


# ------------------------------------------------------------------------------------------- what the model has said
def take(r: Request, tokenizer, ids: Sequence[int], logprobs: Sequence[float]) -> bool:
    """Adds sampled tokens, up to the one that completes a stop string; True if there is one."""
    known = len(r.ids)
    n = _cut(r, tokenizer, [*r.ids, *ids])
    count = len(ids) if n is None else n - known
    r.ids += ids[:count]
    r.logprobs += logprobs[:count]
    r.sampled += [True] * count
    return n is not None


def _cut(r: Request, tokenizer, ids: list[int]) -> int | None:
    """How many of `ids` it takes to complete a stop string, given that `r.ids` do not; None if none does."""
    strings, skip = r.sampling.stop_strings, len(r.before)

    def complete(n: int) -> bool:
        text = tokenizer.decode(ids[:n])[skip:]
        return any(s in text for s in strings)

    if not strings or len(ids) == len(r.ids) or not complete(len(ids)):
        return None
    return next(n for n in range(len(r.ids) + 1, len(ids) + 1) if complete(n))


def force(r: Request, tokenizer, ids: Sequence[int]) -> bool:
    """Adds forced tokens, or returns False when with them nothing more could be sampled, and adds nothing."""
    check_ids(ids, tokenizer)
    forced = r.forced + len(ids)
    if forced > r.sampling.max_forced or len(r.ids) + len(ids) >= r.longest(forced):
        return False
    r.ids += (int(i) for i in ids)
    r.logprobs += [0.0] * len(ids)
    r.sampled += [False] * len(ids)
    r.before, r.unfed = tokenizer.decode(r.ids), len(ids) + 1  # the stop id was sampled, but not fed yet
    return True


def complete(r: Request, tokenizer, cut: bool = False, stop: bool = False) -> Completion:
    """The completion of a request that has ended: `cut` at a stop string, or by `stop`, a stop id that ends it."""
    text = tokenizer.decode(r.ids[: len(r.ids) - (r.stopped and not cut)])
    if cut:
        rest = text[len(r.before) :]
        text = r.before + rest[: min(rest.find(s) for s in r.sampling.stop_strings if s in rest)]
    reason = "stop" if cut or stop else "length"
    return Completion(tuple(r.ids), tuple(r.logprobs), text, reason, tuple(r.sampled))
