"""Next-token prediction on packed rows: the training loss, and the sums behind validation loss and bits per byte.

Legend: B rows, T positions (a row holds T + 1 tokens), V vocabulary.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm import masked
from jaxlm.data.tokenizer import CONTROL
from jaxlm.data.trajectory import Trajectory
from jaxlm.losses import lm
from jaxlm.nn import transformer

THINK, THINK_END, TURN_END = CONTROL["<think>"], CONTROL["</think>"], CONTROL["<|im_end|>"]


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The log-likelihood of every token under the loss mask: pretraining on text, fine-tuning on conversations.

    With `doubt`, a model also learns to break a thought off where it does not know how it goes on: the symbol that ends
    it gets so many times the model's own probability that its best guess is wrong. So it does at each place of a
    thought but for what is at hand in the conversation and only to be copied; and of a thought that the loss mask
    leaves out in part, at the places left out alone. There nothing else is learned: a fact is asked about and not
    taught, for doubt as of what was only read, and what comes after a thought that breaks off is shown, and not where
    one does. Greedily decoded, a thought breaks off where the best guess has less than 0.62 at 1, and less than 0.78 at
    2. See `losses.lm.doubt_loss`.

    Of thoughts that the loss mask leaves whole, those that something follows may be work, such as the steps of a sum:
    who breaks off there has nothing left but to guess. With `doubt_in="asides"` only thoughts that end their turn teach
    doubt, such as those of `Thoughts`, beside the places left out.
    """

    doubt: float | None = None
    doubt_in: Literal["thoughts", "asides"] = "thoughts"


def token_logprobs(model, params, batch: Trajectory, chunk: int | None = None, key=None, marker: int | None = None):
    """Scores tokens[:, 1:] given what precedes them. Returns (logprobs, logsumexp, loss mask), each [B, T].

    With a `marker`, what `lm.token_logprobs` says of it comes after these.
    """
    hidden, _, _ = transformer.apply(
        model, params, batch.tokens[:, :-1], batch.positions[:, :-1], batch.segments[:, :-1], key=key
    )
    logprobs, logsumexp, *marked = lm.token_logprobs(model, params, hidden, batch.tokens[:, 1:], chunk, marker=marker)
    return logprobs, logsumexp, batch.loss_mask[:, 1:], *marked


def inside_thoughts(tokens_BT):
    """bool [B, T]: whether a thought that began at or before a token is still open after it."""
    return jnp.cumsum(tokens_BT == THINK, axis=1) > jnp.cumsum(tokens_BT == THINK_END, axis=1)


def at_hand(batch: Trajectory):
    """bool [B, T]: whether the next token stands in its conversation already, such as a piece of a name that was asked
    about: it can be copied, and whether that succeeds says nothing about what is known."""
    read, targets = batch.tokens[:, :-1, None], batch.tokens[:, None, 1:]
    before = jnp.tri(read.shape[1], dtype=bool).T[None]  # of the place read to that of the target's predecessor
    same = batch.segments[:, :-1, None] == batch.segments[:, None, 1:]
    return jnp.any((read == targets) & same & before, axis=1)


def partly_left_out(tokens_BT, mask_BT):
    """bool [B, T]: whether a place is inside a thought some of which is outside the mask, of the tokens that come
    next."""
    inside, thought = inside_thoughts(tokens_BT), jnp.cumsum(tokens_BT == THINK, axis=1)
    same = thought[:, :, None] == thought[:, None, :]
    return inside & jnp.any(same & (inside & ~mask_BT)[:, None, :], axis=2)


def asides(row):
    """bool [B, T]: whether a place is inside a thought that ends its turn, of whole rows [B, T + 1]."""
    tokens, following, after = row[:, :-1], row[:, 1:], jnp.pad(row, ((0, 0), (0, 1)))[:, 2:]
    inside, thought = inside_thoughts(tokens), jnp.cumsum(tokens == THINK, axis=1)
    last = inside & (following == THINK_END) & (after == TURN_END)
    same = thought[:, :, None] == thought[:, None, :]
    return inside & jnp.any(same & last[:, None, :], axis=2)


def make_loss(objective: NextToken, model, train):
    """The loss of the update contract."""
    marker = None if objective.doubt is None else THINK_END

    def loss(params, batch: Trajectory, key):
        key = key if model.dropout > 0 else None
        logprobs, logsumexp, mask, *marked = token_logprobs(model, params, batch, train.loss_chunk, key, marker)
        terms = lm.lm_loss(logprobs, logsumexp, mask, train.z_loss)
        if train.z_loss == 0.0:
            del terms["z_loss"]  # a figure in the log that takes no part in the loss misleads
        if marked:
            tokens = batch.tokens[:, :-1]
            inside, ends = inside_thoughts(tokens), batch.tokens[:, 1:] == THINK_END
            goes_on = inside & ~ends & ~at_hand(batch) & ~partly_left_out(tokens, mask)
            if objective.doubt_in == "asides":
                goes_on &= asides(batch.tokens)
            terms["doubt"] = lm.doubt_loss(*marked, goes_on, inside & ~mask, mask, objective.doubt)
        return terms, {}

    return loss


def evaluation_sums(model, chunk: int | None, params, batch: Trajectory, token_bytes_V):
    """Sums over the scored tokens of a batch: {"nats", "tokens", "bytes"}, float32 scalars."""
    logprobs, _, mask = token_logprobs(model, params, batch, chunk)
    return {
        "nats": masked.sum(-logprobs, mask),
        "tokens": jnp.sum(mask).astype(jnp.float32),
        "bytes": masked.sum(token_bytes_V[batch.tokens[:, 1:]], mask).astype(jnp.float32),
    }


def summarize(sums: dict[str, float]) -> dict[str, float]:
    """loss in nats per token; bits per byte of the text that the scored tokens stand for."""
    return {
        "loss": float(sums["nats"]) / max(float(sums["tokens"]), 1.0),
        "bits_per_byte": float(sums["nats"]) / math.log(2) / max(float(sums["bytes"]), 1.0),
    }


def add(a, b):
    return b if a is None else jax.tree.map(jnp.add, a, b)
