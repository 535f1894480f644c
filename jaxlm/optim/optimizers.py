"""Optimizers as nodes, built on optax. Which parameters decay, and which are matrices for Muon, follows their logical
axes, never `ndim`: a stacked bias has two dims and is still a bias.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxlm.config import UserError
from jaxlm.optim.schedules import Cosine, Schedule, factor


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    lr: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: Schedule = Cosine(warmup=100)
    spike: float | None = None  # an update with so many times the average gradient norm is left out


@dataclasses.dataclass(frozen=True)
class Muon:
    """Orthogonalized momentum for the matrices of the blocks (Jordan et al. 2024), `rest` for everything else.

    The update of a matrix is scaled by sqrt(max(1, outputs / inputs)).
    """

    lr: float = 0.02
    momentum: float = 0.95
    iterations: int = 5
    weight_decay: float = 0.0
    schedule: Schedule = Cosine(warmup=100)
    rest: AdamW = AdamW()
    spike: float | None = None  # an update with so many times the average gradient norm is left out

    def __post_init__(self):
        if self.rest.spike is not None:
            raise UserError("Muon.rest.spike: an update is left out as a whole; set Muon.spike")


@dataclasses.dataclass(frozen=True)
class Lion:
    """Sign of an interpolated momentum (arXiv:2302.06675); wants a lr 3-10 times below AdamW's."""

    lr: float = 1e-4
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 1.0
    schedule: Schedule = Cosine(warmup=100)
    spike: float | None = None  # an update with so many times the average gradient norm is left out


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Factored second moments, updates clipped by their root mean square (arXiv:1804.04235), without first moment."""

    lr: float = 1e-2
    decay_rate: float = 0.8
    clip: float = 1.0
    weight_decay: float = 0.0
    schedule: Schedule = Cosine(warmup=100)
    spike: float | None = None  # an update with so many times the average gradient norm is left out


Optimizer = AdamW | Muon | Lion | Adafactor

AVERAGED = 100  # updates that the average gradient norm is over, about
FIRST = 20  # updates before any is called a spike


class Watched(NamedTuple):
    """An optimizer's state beside the average norm of the gradients that it took; count: of these, up to AVERAGED."""

    inner: optax.OptState
    count: jax.Array
    norm: jax.Array


def _is_axes(x) -> bool:
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def _is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def decays(axes: tuple[str | None, ...]) -> bool:
    """True for what maps to or from the model width: projections and embeddings, never norms, biases or filters.

    Both factors of an adapter count as projections.
    """
    maps = "embed" in axes or "rank" in axes
    return maps and "taps" not in axes and len([a for a in axes if a != "layers"]) > 1


def matrix_dims(axes: tuple[str | None, ...]) -> contrib.MuonDimensionNumbers | None:
    """Input and output dims of a block's projection; None for embeddings, heads, norms and biases."""
    if not decays(axes) or "layers" not in axes or "vocab" in axes or "positions" in axes:
        return None
    own = [i for i, a in enumerate(axes) if a not in ("layers", "expert")]
    cut = 1 if axes[own[0]] in ("embed", "rank") else len(own) - 1
    return contrib.MuonDimensionNumbers(tuple(own[:cut]), tuple(own[cut:]))


def _scale_by_fan(axes):
    """Scales each matrix by sqrt(max(1, outputs / inputs))."""

    def update(updates, state, params=None):
        def one(u, a):
            dims = matrix_dims(a)
            if dims is None or _is_masked(u):
                return u
            size = [math.prod(u.shape[i] for i in d) for d in (dims.reduction_axis, dims.output_axis)]
            return u * max(1.0, size[1] / size[0]) ** 0.5

        return jax.tree.map(one, updates, axes, is_leaf=_is_masked), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _finish(cfg, axes, step, total_steps) -> list[optax.GradientTransformation]:
    lr = cfg.lr * factor(cfg.schedule, step, total_steps)
    mask = jax.tree.map(decays, axes, is_leaf=_is_axes)
    return [optax.add_decayed_weights(cfg.weight_decay, mask), optax.scale_by_learning_rate(lr)]


def _watches(cfg: Optimizer) -> bool:
    return getattr(cfg, "spike", None) is not None  # an optimizer of one's own need not know of spikes


def _watched(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        updates, inner = tx.update(updates, state.inner, params)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformation(lambda params: Watched(tx.init(params), jnp.int32(0), jnp.float32(0)), update)


def watch(cfg: Optimizer, state, norm):
    """(whether a gradient of this norm, before clipping, is as usual, the state that has taken it for such).

    After OLMo's skipped steps, with a ratio where those have deviations. A spike does not enter the average: one level
    for good is a run that diverges.
    """
    if not _watches(cfg):
        return True, state
    usual = (state.count < FIRST) | (norm <= cfg.spike * state.norm)
    count = jnp.minimum(state.count + 1, AVERAGED)
    return usual, state._replace(count=count, norm=state.norm + (norm - state.norm) / count)


def build(cfg: Optimizer, axes, step, total_steps, moments=jnp.float32) -> optax.GradientTransformation:
    """The optax transformation at one step; what `watch` needs is part of its state.

    cfg: its float fields may be traced, so that variants share one program. axes: tree of logical axes like the
    parameters. step: the current one, from 0, may be traced. moments: dtype of first moments.
    The state's structure depends on the kind of node, on whether `spike` is set, and on `axes` alone.
    """
    tx = _transformation(cfg, axes, step, total_steps, moments)
    return _watched(tx) if _watches(cfg) else tx


def _transformation(cfg: Optimizer, axes, step, total_steps, moments) -> optax.GradientTransformation:
    finish = _finish(cfg, axes, step, total_steps)
    if isinstance(cfg, AdamW):
        return optax.chain(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=moments), *finish)
    if isinstance(cfg, Lion):
        return optax.chain(optax.scale_by_lion(cfg.b1, cfg.b2, mu_dtype=moments), *finish)
    if isinstance(cfg, Adafactor):
        factored = optax.scale_by_factored_rms(decay_rate=cfg.decay_rate)
        return optax.chain(factored, optax.clip_by_block_rms(cfg.clip), *finish)
    labels = jax.tree.map(lambda a: "muon" if matrix_dims(a) else "rest", axes, is_leaf=_is_axes)
    matrices = jax.tree.map(matrix_dims, axes, is_leaf=_is_axes)

    def dims(updates):
        return jax.tree.map(lambda u, d: u if _is_masked(u) else d, updates, matrices, is_leaf=_is_masked)

    muon = optax.chain(
        contrib.scale_by_muon(
            ns_steps=cfg.iterations, beta=cfg.momentum, mu_dtype=moments, weight_dimension_numbers=dims
        ),
        _scale_by_fan(axes),
        *finish,
    )
    return optax.partition({"muon": muon, "rest": _transformation(cfg.rest, axes, step, total_steps, moments)}, labels)
