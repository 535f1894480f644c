"""What the policy says at a step, and how it becomes rows to train on.

Sampling is a function of the parameters, the seed and the step: a prompt's place in the step and a sample's rank give
its sample id, and nothing else does, so that an interrupted rollout comes out the same again. The ids that were
sampled are those that are trained on.

A sequence is a prompt with its reply, arrays of one length. Several of them are packed into a row, whole, each a
segment of its own; padded rows are the case of one sequence a row.

Legend: R rows, T row length (context + 1), n length of a sequence.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jaxlm import sharding
from jaxlm.config import UserError
from jaxlm.data.chat import fit
from jaxlm.data.conversation import Message, read_completion
from jaxlm.data.prompts import Prompt, ids_of
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.trajectory import Trajectory
from jaxlm.feedback import parts, scoring
from jaxlm.feedback.scoring import Reward
from jaxlm.nn.transformer import ModelConfig
from jaxlm.sample.chat import Reply, fitted, reply
from jaxlm.sample.engine import Between, Completion, Sampling, generate
from jaxlm.tools import Counters, Tool


@dataclasses.dataclass(frozen=True)
class Sampler:
    """All that decides how a policy is sampled, its parameters, the prompts and the seed aside. between: decides
    nothing; called on the way, as in `generate`."""

    model: ModelConfig
    tokenizer: Tokenizer
    context: int  # most tokens of prompt and reply together
    max_tokens: int
    tools: Mapping[str, Tool] | None = None
    max_calls: int = 4
    slots: int | None = None
    mesh: jax.sharding.Mesh | None = None
    between: Between | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """place: of its prompt among those of the step; samples of one prompt share it."""

    prompt: Prompt
    place: int
    rank: int
    prompt_ids: tuple[int, ...]
    reply: Reply
    temperature: float

    @property
    def ended(self) -> bool:
        """By a stop token, and not by the limit."""
        return self.reply.completion.finish_reason == "stop"

    @property
    def length(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self.reply.completion.sampled)


def seed_of(seed: int, stream: int, step: int) -> int:
    """The seed of one step's sampling, 32 bits."""
    return int(np.random.SeedSequence([seed % 2**64, stream, step]).generate_state(1)[0])


def prompt_ids(p: Prompt, tokenizer: Tokenizer, context: int, max_tokens: int, may_call: bool = False) -> list[int]:
    """What the policy is given of a prompt; `UserError` where that leaves no room for `max_tokens` in the context.

    may_call: whether it has tools.
    """
    try:
        if not isinstance(p.asked, str):
            return fitted(p.asked, tokenizer, Sampling(max_tokens=max_tokens), context, may_call)
        ids, room = ids_of(p, tokenizer), context - max_tokens
        if len(ids) > room:
            raise UserError(f"it has {len(ids)} tokens, and {room} fit")
        return ids
    except UserError as e:
        room = f"data.context={context} less objective.max_tokens={max_tokens}"
        raise UserError(f"prompt {p.id}: {e}: {room}; leave it out, or change one of these") from None


def sample(
    s: Sampler,
    params,
    prompts: Sequence[Prompt],
    samples: int,
    temperature: float,
    seed: int,
    first: int = 0,
    counters: Counters | None = None,
    on_done: Callable[[list[Sample]], None] | None = None,
) -> list[Sample]:
    """`samples` replies to each prompt, those of a prompt together. first: the place of the first prompt. on_done: gets
    those that have ended while others are decoded, as in `generate`.

    Raises `UserError` as `prompt_ids`.
    """
    sampling = Sampling(temperature=temperature, max_tokens=s.max_tokens, seed=seed)
    where = [(p, first + i, rank) for i, p in enumerate(prompts) for rank in range(samples)]
    sample_ids = [place * samples + rank for _, place, rank in where]
    as_text = isinstance(prompts[0].asked, str)

    def read(c: Completion) -> Reply:
        return Reply(Message("assistant", c.text) if as_text else read_completion(c.ids, s.tokenizer), c)

    def made(i: int, r: Reply) -> Sample:
        p, place, rank = where[i]
        return Sample(p, place, rank, tuple(repeated[i]), r, temperature)

    def done(ended: Mapping[int, Completion]) -> None:
        on_done([made(i, read(c)) for i, c in ended.items()])

    told = None if on_done is None else done
    each = [prompt_ids(p, s.tokenizer, s.context, s.max_tokens, s.tools is not None) for p in prompts]
    repeated = [ids for ids in each for _ in range(samples)]
    if as_text:
        completions = generate(
            *(s.model, params, s.tokenizer, repeated, sampling, sample_ids, s.slots),
            on_done=told, between=s.between, mesh=s.mesh,
        )  # fmt: skip
        replies = [read(c) for c in completions]
    else:
        replies = reply(
            *(s.model, params, s.tokenizer, [p.asked for p, _, _ in where], sampling),
            limit=s.context, sample_ids=sample_ids, slots=s.slots, tools=s.tools, counters=counters,
            max_calls=s.max_calls, on_done=told, between=s.between, mesh=s.mesh,
        )  # fmt: skip
    return [made(i, r) for i, r in enumerate(replies)]


# ------------------------------------------------------------------------------------------------------ the rewards
def score(reward: Reward, found: Sequence[Sample], step: int, timeout: float | None, name: str) -> list[float | None]:
    """What a reward function gives each sample.

    The metadata holds, besides the prompt's own, the sample's `address`, `finish_reason` and number of `tokens`.
    """
    about = [
        s.prompt.metadata
        | {
            parts.ADDRESS: f"{step}/{s.place}/{s.rank}",
            "finish_reason": s.reply.completion.finish_reason,
            "tokens": s.length,
        }
        for s in found
    ]
    return scoring.scores(reward, [s.prompt.asked for s in found], [s.reply for s in found], about, timeout, name)


# -------------------------------------------------------------------------------------------------------- the rows
Columns = dict[str, np.ndarray]  # name -> [n]

FILL = {"temperature": 1.0}  # what padding holds where that is not 0: no temperature is 0


def columns(s: Sample) -> Columns:
    """The fields of `Trajectory` that the sampler knows."""
    c, before = s.reply.completion, len(s.prompt_ids)
    tokens = np.array([*s.prompt_ids, *c.ids], np.int32)
    return {
        "tokens": tokens,
        "sampled_by_policy": np.array([*[False] * before, *c.sampled], bool),
        "rollout_logprobs": np.array([*[0.0] * before, *c.logprobs], np.float32),
        "temperature": np.full(len(tokens), s.temperature or 1.0, np.float32),
    }


def layout(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which sequences share a row of so many tokens."""
    return list(fit(lengths, width))


def row_count(needed: int, unit: int) -> int:
    """Rows of a batch: at least `needed`, a multiple of `unit`, and one of few numbers, so that few programs compile.

    At most a fifth of the rows is empty.
    """
    units = -(-max(needed, 1) // unit)
    step = 1 << max(0, units.bit_length() - 3)
    return -(-units // step) * step * unit


def arrange(sequences: Sequence[Columns], rows: Sequence[Sequence[int]], count: int, width: int) -> Trajectory:
    """Numpy [count, width]: the sequences that `rows` names, with their positions and segments; the rest is padding."""
    names = sequences[0].keys() if sequences else ()
    out = {k: np.full((count, width), FILL.get(k, 0), sequences[0][k].dtype) for k in names}
    positions, segments = np.zeros((2, count, width), np.int32)
    for r, members in enumerate(rows):
        at = 0
        for number, i in enumerate(members, 1):
            span = slice(at, at + len(sequences[i]["tokens"]))
            for name in names:
                out[name][r, span] = sequences[i][name]
            positions[r, span], segments[r, span] = np.arange(span.stop - at), number
            at = span.stop
    return Trajectory(**out, positions=positions, segments=segments)


def gathered(x_RT: np.ndarray, sequences: Sequence[Columns], rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The inverse of `arrange` for one field: each sequence's part, in the order of the sequences."""
    out: list = [None] * len(sequences)
    for r, members in enumerate(rows):
        at = 0
        for i in members:
            out[i] = x_RT[r, at : at + len(sequences[i]["tokens"])]
            at += len(out[i])
    return out


def place(batch: Trajectory, mesh) -> Trajectory:
    """The same rows as global arrays over the mesh's batch axes; every process holds them all."""

    def one(x):
        where = sharding.sharding_for(mesh, ("batch", *(None,) * (x.ndim - 1)))
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(one, batch)
