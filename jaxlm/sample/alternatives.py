"""What else a model could have said: the probability of each token of a reply, beside the likeliest ones.

T length (a bucket), N tokens of the reply (a bucket), K alternatives, V vocabulary, D model width.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.transformer import ModelConfig, apply, unembed
from jaxlm.sample.engine import MIN_PROMPT_BUCKET, bucket
from jaxlm.sample.show import pad, visible, width
from jaxlm.sample.slots import layout


class Alternatives(NamedTuple):
    """Of n tokens: the model's probability of each, and the ids and probabilities of the K likeliest in its place."""

    probabilities_n: np.ndarray
    ids_nK: np.ndarray
    probabilities_nK: np.ndarray


@functools.partial(jax.jit, static_argnames=("cfg", "N", "K"))
def _alternatives(cfg, params, tokens_1T: jax.Array, length: jax.Array, first: jax.Array, N: int, K: int):
    hidden_1TD, _, _ = apply(cfg, params, tokens_1T, *layout(tokens_1T, length[None]))
    at_N = jnp.minimum(first + jnp.arange(N), tokens_1T.shape[1] - 1)
    probabilities_NV = jax.nn.softmax(unembed(cfg, params, hidden_1TD[0, at_N - 1]))
    said_N = jnp.take_along_axis(probabilities_NV, tokens_1T[0, at_N][:, None], axis=1)[:, 0]
    return said_N, *jax.lax.top_k(probabilities_NV, K)


def alternatives(cfg: ModelConfig, params, prompt: Sequence[int], reply: Sequence[int], k: int) -> Alternatives:
    """The model's own distribution (temperature 1, nothing dropped) at each token of `reply` (ids) after `prompt`.

    Computed by one full pass; both together must be within what learned positions reach.
    """
    ids, n, k = [*prompt, *reply], len(reply), min(k, cfg.vocab_size)
    tokens = np.zeros((1, bucket(len(ids), MIN_PROMPT_BUCKET)), np.int32)
    tokens[0, : len(ids)] = ids
    sizes = jnp.int32(len(ids)), jnp.int32(len(prompt))
    said, likeliest, top = _alternatives(cfg, params, jnp.asarray(tokens), *sizes, N=bucket(n, 16), K=k)
    return Alternatives(np.asarray(said)[:n], np.asarray(top)[:n], np.asarray(likeliest)[:n])


def table(tokenizer, reply: Sequence[int], found: Alternatives, sampled: Sequence[bool]) -> str:
    """A line a token: what was said and how probable it was, then the likeliest; a tool's tokens have neither."""
    said = [visible(p) for p in tokenizer.pieces(reply)]
    wide = max([width(s) for s in said] + [len("token")])
    lines = [f"{pad('token', wide)}  {'probability':>11}  likeliest"]
    for n, piece in enumerate(said):
        if not sampled[n]:
            lines.append(f"{pad(piece, wide)}  {'(given)':>11}")
            continue
        names = [visible(p) for p in tokenizer.pieces(found.ids_nK[n].tolist())]
        others = "  ".join(f"{name} {p:.1%}" for name, p in zip(names, found.probabilities_nK[n]))
        lines.append(f"{pad(piece, wide)}  {found.probabilities_n[n]:>11.3%}  {others}")
    return "\n".join(lines)
