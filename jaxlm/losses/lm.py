"""Language modeling: log-probabilities of tokens without ever holding all logits, and the loss terms made of them.

Legend: B batch, T length, D model width, V padded vocabulary. The shift is made once, by the caller: logprobs[t] scores
the token at t, so hidden[:, t] comes from the tokens before it (rows of context + 1 tokens: the step feeds
tokens[:, :-1] and scores tokens[:, 1:]).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxlm import masked
from jaxlm.nn.definition import ModelConfig
from jaxlm.nn.transformer import unembed
from jaxlm.sharding import constrain, cuts


def token_logprobs(
    cfg: ModelConfig,
    params,
    hidden_BTD,
    targets_BT,
    chunk: int | None = None,
    temperature_BT=None,
    entropy: bool = False,
    marker: int | None = None,
):
    """(log-probability of each target, log of the softmax's denominator), both [B, T], in float32 or wider.

    `entropy`: also the entropy of each distribution, in nats, as a third.
    `marker`: also the logit of this token's probability, and the doubt: the probability, without it, that the best
    token is not the next one. These come last.

    `chunk` positions of every row are scored at a time and scored again in the backward pass, so at most B * chunk * V
    logits exist; unset, all at once. `chunk` need not divide T, and changes neither values nor gradients.
    `temperature_BT` ([B, T] or [B, 1], above 0) divides the logits, for tokens that were sampled with it.
    """

    def score(hidden, targets, temperature=None):
        logits = unembed(cfg, params, hidden)
        if temperature is not None:
            logits = logits / temperature[..., None].astype(logits.dtype)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        # A compare and a sum: fused with the rest, where a gather's gradient would be a scatter.
        chosen = jnp.sum(jnp.where(column == targets[..., None], logits, 0), axis=-1)
        scored = (chosen - logsumexp, logsumexp)
        if entropy:
            mean_logit = jnp.sum(jnp.exp(logits - logsumexp[..., None]) * logits, axis=-1)
            scored += (logsumexp - mean_logit,)
        if marker is not None:
            others = jnp.where(column == marker, -jnp.inf, logits)
            total = jax.nn.logsumexp(others, axis=-1)
            scored += (logits[..., marker] - total, 1 - jnp.exp(jnp.max(others, axis=-1) - total))
        return scored

    columns = [hidden_BTD, targets_BT]
    if temperature_BT is not None:
        columns.append(jnp.broadcast_to(temperature_BT, targets_BT.shape))
    # The kernel is cast inside, so that its gradient is summed over chunks in the parameters' dtype.
    return by_chunks(score, columns, chunk)


def by_chunks(score: Callable, columns: Sequence[jax.Array], chunk: int | None):
    """`score(*columns)`, a tree of [B, T] of arrays [B, T, ...], with `chunk` positions of every row at a time (None:
    all), which are scored again in the backward pass. `score` is given more dims between B and its part of T.

    Where the mesh cuts rows (axis `context`), each device scores its share of a chunk, out of its own part of the row.
    """
    B, T = columns[0].shape[:2]
    if chunk is None or chunk >= T:
        return score(*columns)
    parts = cuts(("length",), (T,))
    rows = (B,) if parts == 1 else (B, parts)
    each, chunk, at = T // parts, -(-chunk // parts), len(rows)
    count = -(-each // chunk)

    def cut(x):
        x = x.reshape(*rows, each, *x.shape[2:])
        spare = [(0, count * chunk - each) if i == at else (0, 0) for i in range(x.ndim)]
        x = jnp.pad(x, spare, constant_values=1)  # no temperature is 0
        x = jnp.moveaxis(x.reshape(*rows, count, chunk, *x.shape[at + 1 :]), at, 0)
        return x if parts == 1 else constrain(x, (None, "batch", "length") + (None,) * (x.ndim - 3))

    def joined(s):
        return jnp.moveaxis(s, 0, at).reshape(*rows, count * chunk)[..., :each].reshape(B, T)

    scores = jax.lax.map(lambda xs: jax.checkpoint(score)(*xs), tuple(cut(x) for x in columns))
    return jax.tree.map(joined, scores)


def lm_loss(logprobs_BT, logsumexp_BT, mask_BT, z_loss_coefficient=0.0):
    """Terms {name: (coefficient, sum, weight)}: the cross-entropy in nats, and the z-loss logsumexp^2 (PaLM).

    The caller divides each sum by its weight, the number of scored tokens, once all microbatches and devices are in.
    """
    weight = jnp.sum(mask_BT, dtype=logprobs_BT.dtype)
    return {
        "cross_entropy": (1.0, -masked.sum(logprobs_BT, mask_BT), weight),
        "z_loss": (z_loss_coefficient, masked.sum(jnp.square(logsumexp_BT), mask_BT), weight),
    }


def doubt_loss(logit_BT, doubt_BT, scored_BT, alone_BT, mask_BT, scale):
    """A term as those of `lm_loss`, beside which it makes the marker's probability `scale` times the doubt, at most 1.

    logit, doubt: see `token_logprobs`. scored, alone: the places that are to learn it. Where the next token is scored,
    and another than the marker, the cross-entropy holds -log(1 - p) of the marker's probability p, and with this,
    -c log(p / (1 - p)), it is least at p = c; where it is not, this holds both. Nothing is learned through c, the
    target. After the [IDK] token of Cohen et al. 2024 (arXiv 2412.06676), which is given what the right token lacks; a
    model's own doubt needs no truth, and is there as well where all choices are equally likely.
    """
    target = jax.lax.stop_gradient(jnp.minimum(scale * doubt_BT, 1))
    weight = jnp.sum(mask_BT, dtype=logit_BT.dtype)  # that of the cross-entropy, which it is weighed against
    loss = -masked.sum(target * logit_BT, (mask_BT & scored_BT) | alone_BT)
    return (1.0, loss + masked.sum(jax.nn.softplus(logit_BT), alone_BT), weight)
