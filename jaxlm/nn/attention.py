"""Causal attention behind one function, `attend`, with an implementation for each kind of device.

Legend: B batch, T query length, S key length, H query heads, K key/value heads, G = H / K, C head width.
A key is attended when it lies in the query's segment and not after it, and in a window layer when its position is
greater than the query's position - window. Segment 0 is padding: never attended, and zero comes out at its queries.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.config import UserError
from jaxlm.nn.blockwise import MASKED
from jaxlm.nn.blockwise import blockwise as in_blocks
from jaxlm.nn.quantized import mixed_BHTC, parts, scores_BHTS
from jaxlm.sharding import cuts, of_several_runs, platform

CPU_BLOCKWISE_FROM = 256  # queries from which making scores block by block is faster on CPU
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's name for the primitive that the fused kernel is
MOST_SCORES = 2**31  # bytes of scores per device above which other devices make them block by block


@dataclasses.dataclass(frozen=True)
class Rule:
    """The static part of attention. `ordered`: queries and keys are the same tokens, later index meaning later."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    ordered: bool = True


def attend(q_BTHC, k_BSKC, v_BSKC, queries, keys, rule: Rule, implementation: str = "auto"):
    """Attention output [B, T, H, C]. `queries` and `keys` are (positions, segments), int32 [B, T] and [B, S].

    Keys and values from a cache may be in another dtype than the queries, or `Quantized`.
    """
    name = choose(q_BTHC, k_BSKC, rule, implementation)
    out_BTHC = {"plain": plain, "blockwise": blockwise, "cudnn": cudnn}[name](
        q_BTHC, k_BSKC, v_BSKC, queries, keys, rule
    )
    return jnp.where(queries[1][:, :, None, None] > 0, out_BTHC, jnp.zeros_like(out_BTHC))


def choose(q_BTHC, k_BSKC, rule: Rule, implementation: str = "auto") -> str:
    """The implementation that runs: the one asked for, or the best that the default device supports."""
    if implementation == "cudnn" and rule.ordered:
        refusal = cudnn_refuses(q_BTHC, k_BSKC, rule)
        if refusal:
            raise UserError(f"model.attention=cudnn: {refusal}; use auto")
        return "cudnn"
    if implementation in ("plain", "blockwise"):
        return implementation
    if cudnn_refuses(q_BTHC, k_BSKC, rule) is None:
        return "cudnn"
    if platform() == "cpu":
        return "blockwise" if q_BTHC.shape[1] >= CPU_BLOCKWISE_FROM else "plain"
    B, T, H, C = q_BTHC.shape
    scores = 4 * B * H * T * parts(k_BSKC)[0].shape[1] // cuts(("batch", "length", "heads", None), (B, T, H, C))
    return "blockwise" if scores > MOST_SCORES else "plain"


def mask_BTS(queries, keys, rule: Rule, first_query: int = 0, first_key: int = 0):
    """Who attends to whom; `first_*` are the indices at which the given slices start."""
    (q_position, q_segment), (k_position, k_segment) = queries, keys
    T, S = q_position.shape[1], k_position.shape[1]
    mask = q_segment[:, :, None] == k_segment[:, None, :]
    if rule.ordered:
        later = jax.lax.broadcasted_iota(jnp.int32, (1, T, S), 1) + first_query
        mask &= later >= jax.lax.broadcasted_iota(jnp.int32, (1, T, S), 2) + first_key
    else:
        mask &= (k_position[:, None, :] <= q_position[:, :, None]) & (k_segment[:, None, :] > 0)
    if rule.window is not None:
        mask &= k_position[:, None, :] > q_position[:, :, None] - rule.window
    return mask


def weights_BHTS(q_BTHC, k_BSKC, mask, rule: Rule):
    """Softmax of the capped, masked scores, in float32 or wider."""
    dtype = jnp.promote_types(q_BTHC.dtype, jnp.float32)
    scores = scores_BHTS(q_BTHC, k_BSKC, dtype) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    return jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)


def plain(q_BTHC, k_BSKC, v_BSKC, queries, keys, rule: Rule):
    """All scores at once: XLA's own fusions, memory B * H * T * S."""
    weights = weights_BHTS(q_BTHC, k_BSKC, mask_BTS(queries, keys, rule), rule)
    return mixed_BHTC(weights, v_BSKC, q_BTHC.dtype).swapaxes(1, 2)


def blockwise(q_BTHC, k_BSKC, v_BSKC, queries, keys, rule: Rule, block: int | None = None):
    """Block by block, in loops (blockwise.py): memory independent of T * S, rows cut over devices where they are."""
    block = block or (64 if platform() == "cpu" else 512)
    return in_blocks(q_BTHC, k_BSKC, v_BSKC, queries, keys, rule, mask_BTS, block)


def cudnn_refuses(q_BTHC, k_BSKC, rule: Rule) -> str | None:
    """Why cuDNN's fused attention cannot be used on the default device and the mesh, or None when it can."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or "rocm" in device.client.platform_version.lower() or capability is None:
        return "the device is no NVIDIA GPU"
    capability = float(capability)
    if capability < 8.0:
        return f"the device has compute capability {capability}, below 8.0"
    if not rule.ordered:
        return "keys from a cache are not in order"
    if rule.softcap is not None:
        return "it has no soft cap on the scores"
    if q_BTHC.dtype not in (jnp.bfloat16, jnp.float16) or k_BSKC.dtype != q_BTHC.dtype:
        return f"it takes bfloat16 or float16, not {q_BTHC.dtype}"
    widest = 256 if capability >= 9.0 else 128
    if q_BTHC.shape[-1] > widest or q_BTHC.shape[-1] % 8:
        return f"head width {q_BTHC.shape[-1]} is above {widest} or no multiple of 8"
    if q_BTHC.shape[1] % 2:
        return f"length {q_BTHC.shape[1]} is odd"
    if cuts(("length",)) > 1:
        return f"it takes whole rows, and mesh.context cuts them into {cuts(('length',))}"
    H, K = q_BTHC.shape[2], k_BSKC.shape[2]
    if cuts(("heads",), (H,)) != cuts(("kv_heads",), (K,)):
        return f"mesh.tensor divides only one of {H} heads and {K} key heads, and it takes both alike"
    return None


def cudnn(q_BTHC, k_BSKC, v_BSKC, queries, keys, rule: Rule):
    """NVIDIA's fused kernel. Segments and window go in as a mask: its own window is trusted with neither.

    (Before JAX's pull request 39512 its backward pass also makes a gradient of the mask, which nothing reads.)
    """
    mask = mask_BTS(queries, keys, rule)[:, None]
    if of_several_runs():
        # JAX's rule for a mapped axis takes a mask of each head, and a mapped one, which that of shared rows is not.
        mapped = (q_BTHC[:, :1, :1, :1] > 0) & False
        mask = jnp.broadcast_to(mask | mapped, (*mask.shape[:1], q_BTHC.shape[2], *mask.shape[2:]))
    return jax.nn.dot_product_attention(
        q_BTHC, k_BSKC, v_BSKC, mask=mask, scale=rule.scale, is_causal=True, implementation="cudnn"
    )
