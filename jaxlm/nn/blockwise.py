"""Attention that never holds all scores, in plain XLA loops (FlashAttention-2, arXiv:2307.08691).

Legend: B batch, K key/value heads, G queries per key head, C head width; q, s queries and keys of one block,
m, n numbers of query and key blocks. Blocks are walked one after another, in the forward and in the backward pass, so
the memory beyond inputs and outputs is that of one pair; pairs that index and window rule out are not computed.

Where the mesh cuts rows (axis `context`), each device walks the blocks of its own queries, over the keys and values of
the whole row: gathered in the forward pass, and again in the backward pass, after which their gradients are summed and
scattered (Llama 3's context parallelism, arXiv:2407.21783, section 3.3.2). Queries, outputs and their gradients stay
where they are. A device has the c-th part of a row as it stands there, so the first sees least and the last most: with
causal attention to the whole row, 2 - 1/c times the mean. (Llama 3 gives each device a part from either end of the row;
here every layer would have to send queries and outputs there and back.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.nn.quantized import Quantized, parts
from jaxlm.sharding import cuts, mesh_here, partition_spec

MASKED = -1e30  # finite, so that a row without any key gives no NaN


def blockwise(q_BTHC, k_BSKC, v_BSKC, queries, keys, rule, visible, block: int):
    """[B, T, H, C]. `rule` and `visible(queries, keys, rule, first_query, first_key)` as in attention.py.

    Keys and values that are `Quantized` become floats a block at a time, and have no gradient.
    """
    if cuts(("length",), q_BTHC.shape[1:2]) == 1:
        return _walked(q_BTHC, k_BSKC, v_BSKC, queries, keys, rule, visible, block)
    H, K = q_BTHC.shape[2], parts(k_BSKC)[0].shape[2]
    batch, length, heads, _ = partition_spec(("batch", "length", "heads", None), mesh_here(), q_BTHC.shape)
    shared = math.lcm(K, cuts(("heads",), (H,)))
    if H % shared:
        heads = None  # every device of `tensor` has them all
    elif shared > K:  # each device gets a copy of the key heads that its heads read
        k_BSKC, v_BSKC = jax.tree.map(lambda x: jnp.repeat(x, shared // K, axis=2), (k_BSKC, v_BSKC))

    def local(q_BTHC, k_BSKC, v_BSKC, *tokens):
        side, across = min(block, q_BTHC.shape[1]), length if rule.ordered else None
        return _walked(q_BTHC, k_BSKC, v_BSKC, tokens[:2], tokens[2:], rule, visible, side, across)

    # Keys of a cache are whole on every device already, as are, nearly for nothing, positions and segments.
    mine, whole = PartitionSpec(batch, length, heads), PartitionSpec(batch, None, heads)
    theirs = mine if rule.ordered else whole
    tokens = (PartitionSpec(batch, length),) * 2 + (PartitionSpec(batch),) * 2
    spread = jax.shard_map(
        local, mesh=mesh_here(), in_specs=(mine, theirs, theirs, *tokens), out_specs=mine, check_vma=False
    )
    return spread(q_BTHC, k_BSKC, v_BSKC, *queries, *keys)


def _walked(q_BTHC, k_BSKC, v_BSKC, queries, keys, rule, visible, block: int, across=None):
    """`blockwise` on one device. With `across`, mesh axes, it has the part of keys and values that is at the place of
    its queries in the row."""
    B, T, H, C = q_BTHC.shape
    S, K = keys[0].shape[1], parts(k_BSKC)[0].shape[2]
    q_mBqKGC = _cut(q_BTHC.reshape(B, T, K, H // K, C), block)
    tokens = tuple(_cut(x, block) for x in (*queries, *keys))
    walk = _Walk(rule, visible, block, T, -(-S // block), across)
    q_mBKGqC = q_mBqKGC.transpose(0, 1, 3, 4, 2, 5)
    k, v = (k_BSKC, v_BSKC) if across else jax.tree.map(lambda x: _cut(x, block).swapaxes(2, 3), (k_BSKC, v_BSKC))
    if isinstance(k, Quantized):
        out_mBKGqC = _forward(walk, q_mBKGqC, k, v, *tokens)[0]
    else:
        out_mBKGqC = _attend(walk, q_mBKGqC, k, v, *tokens)
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
    queries: int
    key_blocks: int
    across: object = None

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.block)

    def first_query(self, i):
        """Index in the row at which query block `i` starts."""
        start = i * self.block
        return start if self.across is None else jax.lax.axis_index(self.across) * self.queries + start

    def bounds(self, i):
        """First and one past the last key block that query block `i` can see."""
        if not self.rule.ordered:
            return 0, self.key_blocks
        window = self.rule.window
        low = 0 if window is None else jnp.maximum(0, self.first_query(i) - window + 1) // self.block
        last = i if self.across is None else (self.first_query(i) + self.block - 1) // self.block
        return low, jnp.minimum(last + 1, self.key_blocks)

    def gathered(self, *near):
        """Keys and values of the whole row in blocks, [n, B, K, s, C] each."""
        if self.across is None:
            return near
        whole = (jax.lax.all_gather(x, self.across, axis=1, tiled=True) for x in near)
        return tuple(_cut(x, self.block).swapaxes(2, 3) for x in whole)

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
        mask = self.visible(*sides, self.rule, self.first_query(i), j * self.block)[:, None, None]
        return jnp.where(mask, s, MASKED), mask, slope


def _scaled(x_BKGqs, scale_BKs):
    return x_BKGqs if scale_BKs is None else x_BKGqs * scale_BKs[:, :, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(walk, q, k, v, *tokens):
    return _forward(walk, q, k, v, *tokens)[0]


def _forward(walk, q, k, v, *tokens):
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    near, (k, v) = (k, v), walk.gathered(k, v)

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
    return out, (q, *near, tokens, out, logsumexp)


def _backward(walk, saved, dout):
    q, *near, tokens, out, logsumexp = saved
    (k, v), scattered = jax.vjp(walk.gathered, *near)
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
    return dq, *scattered((dk.astype(k.dtype), dv.astype(v.dtype))), *(None,) * 4


_attend.defvjp(_forward, _backward)
