"""Attention that never holds all scores, in plain XLA loops (FlashAttention-2, arXiv:2307.08691).

Legend: B batch, K key/value heads, G queries per key head, C head width; q, s queries and keys of one block,
m, n numbers of query and key blocks. Blocks are walked one after another, in the forward and in the backward pass, so
the memory beyond inputs and outputs is that of one pair; pairs that index and window rule out are not computed.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.nn.quantized import Quantized, parts

MASKED = -1e30  # finite, so that a row without any key gives no NaN


def blockwise(q_BTHC, k_BSKC, v_BSKC, queries, keys, rule, visible, block: int):
    """[B, T, H, C]. `rule` and `visible(queries, keys, rule, first_query, first_key)` as in attention.py.

    Keys and values that are `Quantized` become floats a block at a time, and have no gradient.
    """
    B, T, H, C = q_BTHC.shape
    S, K = parts(k_BSKC)[0].shape[1:3]
    q_mBqKGC = _cut(q_BTHC.reshape(B, T, K, H // K, C), block)
    tokens = tuple(_cut(x, block) for x in (*queries, *keys))
    walk = _Walk(rule, visible, block, -(-T // block), -(-S // block))
    q_mBKGqC = q_mBqKGC.transpose(0, 1, 3, 4, 2, 5)
    k_nBKsC, v_nBKsC = jax.tree.map(lambda x: _cut(x, block).swapaxes(2, 3), (k_BSKC, v_BSKC))
    if isinstance(k_BSKC, Quantized):
        out_mBKGqC = _forward(walk, q_mBKGqC, k_nBKsC, v_nBKsC, *tokens)[0]
    else:
        out_mBKGqC = _attend(walk, q_mBKGqC, k_nBKsC, v_nBKsC, *tokens)
    return out_mBKGqC.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, C)[:, :T]


def _cut(x, block: int):
    """[B, T, ...] -> [blocks, B, block, ...], zero-padded: a padded token has segment 0."""
    count = -(-x.shape[1] // block)
    x = jnp.pad(x, [(0, count * block - x.shape[1]) if i == 1 else (0, 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The static side: which pairs of blocks are met, and the scores of one pair."""

    rule: object
    visible: Callable
    block: int
    query_blocks: int
    key_blocks: int

    def bounds(self, i):
        """First and one past the last key block that query block `i` can see."""
        if not self.rule.ordered:
            return 0, self.key_blocks
        low = 0 if self.rule.window is None else jnp.maximum(0, i * self.block - self.rule.window + 1) // self.block
        return low, jnp.minimum(i + 1, self.key_blocks)

    def scores(self, q_BKGqC, k_BKsC, tokens, i, j):
        """(masked scores [B, K, G, q, s], mask, derivative of the scores by the plain products)."""
        dtype = jnp.promote_types(q_BKGqC.dtype, jnp.float32)
        k_BKsC, scale_BKs = parts(k_BKsC)
        k_BKsC = k_BKsC.astype(q_BKGqC.dtype)
        s = jnp.einsum("BKGqC,BKsC->BKGqs", q_BKGqC, k_BKsC, preferred_element_type=dtype) * self.rule.scale
        s = _scaled(s, scale_BKs)
        slope = jnp.asarray(self.rule.scale, dtype)
        if self.rule.softcap is not None:
            t = jnp.tanh(s / self.rule.softcap)
            s, slope = self.rule.softcap * t, self.rule.scale * (1 - jnp.square(t))
        q_position, q_segment, k_position, k_segment = tokens
        sides = (q_position[i], q_segment[i]), (k_position[j], k_segment[j])
        mask = self.visible(*sides, self.rule, i * self.block, j * self.block)[:, None, None]
        return jnp.where(mask, s, MASKED), mask, slope


def _scaled(x_BKGqs, scale_BKs):
    return x_BKGqs if scale_BKs is None else x_BKGqs * scale_BKs[:, :, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(walk, q, k, v, *tokens):
    return _forward(walk, q, k, v, *tokens)[0]


def _forward(walk, q, k, v, *tokens):
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def row(i):
        def pair(j, carry):
            acc, top, total = carry
            k_j, (v_j, v_scale) = jax.tree.map(lambda x: x[j], (k, parts(v)))
            s, mask, _ = walk.scores(q[i], k_j, tokens, i, j)
            new = jnp.maximum(top, jnp.max(s, axis=-1))
            p = jnp.where(mask, jnp.exp(s - new[..., None]), 0)
            shrink = jnp.exp(top - new)
            mixed = _scaled(p, v_scale).astype(q.dtype)
            update = jnp.einsum("BKGqs,BKsC->BKGqC", mixed, v_j.astype(q.dtype), preferred_element_type=dtype)
            return acc * shrink[..., None] + update, new, total * shrink + jnp.sum(p, axis=-1)

        like = q.shape[1:-1]
        start = (jnp.zeros(q.shape[1:], dtype), jnp.full(like, MASKED, dtype), jnp.zeros(like, dtype))
        acc, top, total = jax.lax.fori_loop(*walk.bounds(i), pair, start)
        total = jnp.where(total == 0, 1, total)
        return (acc / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, logsumexp = jax.lax.map(row, jnp.arange(walk.query_blocks))
    return out, (q, k, v, tokens, out, logsumexp)


def _backward(walk, saved, dout):
    q, k, v, tokens, out, logsumexp = saved
    dtype = logsumexp.dtype
    delta = jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1)

    def row(carry, i):
        def pair(j, carry):
            dq, dk, dv = carry
            s, mask, slope = walk.scores(q[i], k[j], tokens, i, j)
            p = jnp.where(mask, jnp.exp(s - logsumexp[i][..., None]), 0)
            dp = jnp.einsum("BKGqC,BKsC->BKGqs", dout[i], v[j], preferred_element_type=dtype)
            ds = (p * (dp - delta[i][..., None]) * slope).astype(q.dtype)
            dq += jnp.einsum("BKGqs,BKsC->BKGqC", ds, k[j], preferred_element_type=dtype)
            dk = dk.at[j].add(jnp.einsum("BKGqs,BKGqC->BKsC", ds, q[i], preferred_element_type=dtype))
            p = p.astype(dout.dtype)
            dv = dv.at[j].add(jnp.einsum("BKGqs,BKGqC->BKsC", p, dout[i], preferred_element_type=dtype))
            return dq, dk, dv

        dq, *carry = jax.lax.fori_loop(*walk.bounds(i), pair, (jnp.zeros(q.shape[1:], dtype), *carry))
        return tuple(carry), dq.astype(q.dtype)

    start = (jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype))
    (dk, dv), dq = jax.lax.scan(row, start, jnp.arange(walk.query_blocks))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), *(None,) * 4


_attend.defvjp(_forward, _backward)
