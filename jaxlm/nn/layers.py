"""What layers are made of: initializers, norms, linear maps, activations, dropout, the MLP.

Legend: B batch, T length, D model width, F hidden width. Parameters are declared once, with shape, logical axes and
initializer together, and come out of `init` boxed with their axes (see transformer.py).
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.sharding import constrain, cuts

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"]

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


# --------------------------------------------------------------------------------------------------- initializers
@dataclasses.dataclass(frozen=True)
class GPT2Init:
    """Every kernel and embedding normal with `std`, biases zero (GPT-2).

    `scale_residual` divides the kernels that write into the residual stream by sqrt(2 layers).
    """

    std: float = 0.02
    scale_residual: bool = True


@dataclasses.dataclass(frozen=True)
class FanInInit:
    """Kernels normal with std `scale` / sqrt(fan-in); biases zero.

    A tied embedding counts as the output kernel that it is (fan-in: the width); an untied one, which is only looked up,
    has std `scale`, as have learned positions in the same model. `zero_residual` starts the kernels that write into
    the residual stream at zero, so that every block begins as the identity.
    """

    scale: float = 1.0
    zero_residual: bool = False


def kernel_init(cfg, fan_in: int, residual: bool = False):
    """Initializer of a kernel; `residual` marks those that write into the residual stream."""
    match cfg.init:
        case GPT2Init(std, scale_residual):
            return nn.initializers.normal(std / math.sqrt(2 * cfg.layers) if residual and scale_residual else std)
        case FanInInit(scale, zero_residual):
            if residual and zero_residual:
                return nn.initializers.zeros
            return nn.initializers.normal(scale / math.sqrt(fan_in))
    raise TypeError(cfg.init)


def embedding_init(cfg):
    """Initializer of token and position embeddings."""
    match cfg.init:
        case GPT2Init(std):
            return nn.initializers.normal(std)
        case FanInInit(scale):
            return nn.initializers.normal(scale / math.sqrt(cfg.width) if cfg.tied else scale)
    raise TypeError(cfg.init)


def declare(module: nn.Module, name: str, init, shape: tuple[int, ...], axes: tuple[str | None, ...]):
    """A parameter of `module` in the dtype of `cfg.precision.params`."""
    init = nn.with_logical_partitioning(init, axes)
    return module.param(name, init, shape, jnp.dtype(module.cfg.precision.params))


# ----------------------------------------------------------------------------------------------------------- norms
@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) * (scale + scale_offset), after arXiv:1910.07467; Gemma stores scale - 1, so scale_offset is 1."""

    eps: float = 1e-6
    scale_offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / std * scale + bias; `bias` False leaves the last term out."""

    eps: float = 1e-5
    bias: bool = True


def _row(w, x):
    """`w` [D] shaped to broadcast over the last dim of `x`."""
    return w.reshape((1,) * (x.ndim - 1) + w.shape).astype(x.dtype)


class Norm(nn.Module):
    """The norm that `cfg.norm` names, over the last dim, computed in float32 or wider, returned in `x`'s dtype."""

    cfg: object
    axis: str | None  # logical axis of the normalized dim

    @nn.compact
    def __call__(self, x):
        norm, width, dtype = self.cfg.norm, x.shape[-1], x.dtype
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
        if isinstance(norm, RMSNorm):
            start = nn.initializers.constant(1.0 - norm.scale_offset)
            scale = declare(self, "scale", start, (width,), (self.axis,))
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + norm.eps)
            return (x * (_row(scale, x) + norm.scale_offset)).astype(dtype)
        scale = declare(self, "scale", nn.initializers.ones, (width,), (self.axis,))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + norm.eps) * _row(scale, x)
        if norm.bias:
            x = x + _row(declare(self, "bias", nn.initializers.zeros, (width,), (self.axis,)), x)
        return x.astype(dtype)


# ----------------------------------------------------------------------------------------------------- linear maps
def linear(x, kernel, bias=None, inputs: int = 1, dtype=None):
    """Contracts the last `inputs` dims of `x` with the first of `kernel`, in `x`'s dtype; adds `bias` if given.

    `dtype` is the result's, if it is to be wider. The gradient's products are in `x`'s dtype all the same.
    """
    dtype, kernel = dtype or x.dtype, kernel.astype(x.dtype)
    rows, out = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    y = _contracted(inputs, x.dtype, x, kernel) if dtype == x.dtype else _widened(inputs, dtype, x, kernel)
    if bias is not None:
        y = y + bias.astype(dtype).reshape((1,) * len(rows) + out)
    return y


def _contracted(inputs: int, dtype, x, kernel):
    rows, shared, out = x.shape[: x.ndim - inputs], kernel.shape[:inputs], kernel.shape[inputs:]
    if cuts(("length",)) == 1:
        # One plain matmul: XLA on CPU takes twice as long for a step whose weight gradients contract two dims. Where
        # length is spread, merging it with the batch would gather the activations.
        x, kernel = x.reshape(-1, math.prod(shared)), kernel.reshape(-1, math.prod(out))
        return jnp.matmul(x, kernel, preferred_element_type=dtype).reshape(*rows, *out)
    contract = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return jax.lax.dot_general(x, kernel, (contract, ((), ())), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _widened(inputs: int, dtype, x, kernel):
    return _contracted(inputs, dtype, x, kernel)


def _widened_forward(inputs, dtype, x, kernel):
    return _contracted(inputs, dtype, x, kernel), (x, kernel)


def _widened_backward(inputs, dtype, saved, dy):
    """JAX would widen the other factor of both products to `dy`'s dtype: those of the logits, a small model's largest,
    then ran in float32, on a GPU at half of bfloat16's rate."""
    x, kernel = saved
    return jax.vjp(functools.partial(_contracted, inputs, x.dtype), x, kernel)[1](dy.astype(x.dtype))


_widened.defvjp(_widened_forward, _widened_backward)


def dropout(x, rate: float, key):
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); no key or no rate: `x`."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


PREVIOUS = ((0, 0, 0), (1, -1, 0), (0, 0, 0), (0, 0, 0))  # pads [B, parts, ...]: each part is given the one before it


class ShortConv(nn.Module):
    """x plus a causal depthwise convolution of it: what the last few tokens were, at next to no cost.

    Canon layers (Allen-Zhu 2025), after the short convolutions of H3 and RWKV's token shift. The filter starts at zero
    and never reaches into another segment.
    """

    cfg: object

    @nn.compact
    def __call__(self, x_BTD, positions_BT, segments_BT, recent=None):
        """(output [B, T, D], new recent). `recent` [B, R, D], R >= taps - 1: the inputs before these, with a cache."""
        taps, (B, T, D) = self.cfg.short_conv, x_BTD.shape
        kernel = declare(self, "kernel", nn.initializers.zeros, (taps, self.cfg.width), ("taps", "embed"))
        parts = cuts(("length",), (T,))
        if recent is None and parts > 1 and T // parts >= taps - 1:
            # Each device's part of a row on its own, after the last of the part before: all that devices need send.
            x = constrain(x_BTD.reshape(B, parts, T // parts, D), ("batch", "length", None, None))
            before = jax.lax.pad(x[:, :, T // parts - taps + 1 :], jnp.zeros((), x.dtype), PREVIOUS)
            out = self.filtered(kernel, x, before, positions_BT.reshape(B, parts, T // parts))[0]
            return out.reshape(B, T, D), None
        before = jnp.zeros_like(x_BTD[:, :1]).repeat(taps - 1, 1) if recent is None else recent.astype(x_BTD.dtype)
        out, seen = self.filtered(kernel, x_BTD, before, positions_BT)
        if recent is not None:  # the inputs that end with each row's last real token
            last = jnp.max(jnp.where(segments_BT > 0, jnp.arange(T)[None] + 1, 0), axis=1)
            take = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, before.shape[1]))
            recent = take(seen, last).astype(recent.dtype)
        return out, recent

    def filtered(self, kernel, x, before, positions):
        """(output as `x` [..., T, D], `before` and `x` after each other). positions: of `x`, [..., T]."""
        seen, (R, T) = jnp.concatenate([before, x], axis=-2), (before.shape[-2], x.shape[-2])
        out = x
        for back in range(self.cfg.short_conv):
            part = jax.lax.slice_in_dim(seen, R - back, R - back + T, axis=x.ndim - 2)
            out = out + jnp.where(positions[..., None] >= back, part * _row(kernel[back], x), 0)
        return out, seen


class Mlp(nn.Module):
    """Position-wise feed-forward layer: down(act(up x)), or gated down(act(gate x) * up x) (arXiv:2002.05202)."""

    cfg: object

    @nn.compact
    def __call__(self, x_BTD):
        cfg = self.cfg
        act = ACTIVATIONS[cfg.activation]
        hidden_BTF = self.project("up", x_BTD, cfg.width, cfg.hidden_width, ("embed", "hidden"))
        if cfg.gated:
            hidden_BTF = act(self.project("gate", x_BTD, cfg.width, cfg.hidden_width, ("embed", "hidden"))) * hidden_BTF
        else:
            hidden_BTF = act(hidden_BTF)
        hidden_BTF = constrain(hidden_BTF, ("batch", "length", "hidden"))
        return self.project("down", hidden_BTF, cfg.hidden_width, cfg.width, ("hidden", "embed"), residual=True)

    def project(self, name, x, inputs, outputs, axes, residual=False):
        return Linear(self.cfg, (inputs,), (outputs,), axes, self.cfg.mlp_bias, residual, name=name)(x)


class Linear(nn.Module):
    """A dense map with its kernel [*inputs, *outputs] and optional bias [*outputs]; `axes` name the kernel's dims."""

    cfg: object
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    bias: bool
    residual: bool = False

    @nn.compact
    def __call__(self, x):
        init = kernel_init(self.cfg, math.prod(self.inputs), self.residual)
        kernel = declare(self, "kernel", init, (*self.inputs, *self.outputs), self.axes)
        bias = None
        if self.bias:
            bias = declare(self, "bias", nn.initializers.zeros, self.outputs, self.axes[len(self.inputs) :])
        y = linear(x, kernel, bias, len(self.inputs))
        if self.has_variable("params", "lora_a"):  # put there by lora.attach
            low = linear(x, self.get_variable("params", "lora_a"), inputs=len(self.inputs))
            y = y + linear(low, self.get_variable("params", "lora_b"))
        return y
