"""The one gradient step. Every stage hands it a loss.

A loss is `(params, batch, key) -> ({term: (coefficient, sum, weight)}, {metric: (sum, weight)})`. Each term is divided
once, by its weight over the whole batch, so 1, 2 or 4 microbatches and 1 or 8 devices give the same gradient. Weights
depend on the batch alone, never on the parameters.

Legend: A microbatches, B rows.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm import config, rng, tree
from jaxlm.optim import optimizers, schedules
from jaxlm.steps.state import TrainState, branches


@dataclasses.dataclass(frozen=True)
class Train:
    """How long and how: `batch_size` rows an update, cut into `accumulation` microbatches."""

    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1
    clip: float | None = 1.0  # global gradient norm
    z_loss: float = 0.0
    loss_chunk: int | None = 1024  # positions of each row whose logits exist at once; None: all
    log_every: int = 10  # and at each step that is followed by an evaluation or a save
    skip: tuple[int, ...] = ()  # updates to leave out, by the number that the log gives them, such as bad batches
    max_skipped: int = 50  # so many updates left out in a row, and the run has diverged
    hang_seconds: float | None = 1800.0  # without an end of a step, evaluation, save or restore, and it ends
    tensorboard: bool = False


def hyperparameters(optimizer) -> dict[str, float]:
    """The float settings by path: they enter the step as arrays, so that changing one does not recompile."""
    return {p: v for p, v in config.leaves(optimizer).items() if type(v) is float}


def _microbatches(batch, count: int):
    """[B, ...] -> [A, B/A, ...], each taking every A-th row, so that rows stay on their devices."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)


def gradients(loss: Callable, params, batch, key, accumulation: int, dtype):
    """Gradient of the sum of coefficient * sum / weight over the terms.

    batch: pytree of [B, ...]; B must be a multiple of `accumulation`. dtype: of the accumulated gradient.
    Returns (gradients, ({"loss": total}, {name: (sum, weight)})) where the metrics hold the terms too.
    """
    terms, _ = loss(params, batch, key)
    # Only the weights of this pass are used: the compiler drops the rest of it.
    weights = {name: jax.lax.stop_gradient(weight) for name, (_, _, weight) in terms.items()}

    def objective(params, microbatch, key):
        terms, metrics = loss(params, microbatch, key)
        total = sum(c * s / jnp.maximum(weights[name], 1) for name, (c, s, _) in terms.items())
        return total, ({"loss": total}, {name: (s, w) for name, (_, s, w) in terms.items()} | metrics)

    grad = jax.grad(objective, has_aux=True)
    if accumulation == 1:
        return grad(params, batch, key)

    def add(carry, i_and_microbatch):
        i, microbatch = i_and_microbatch
        g, m = grad(params, microbatch, jax.random.fold_in(key, i))
        total, metrics = carry
        return (jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, g), jax.tree.map(jnp.add, metrics, m)), None

    parts = _microbatches(batch, accumulation)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(grad, params, first, key)
    zero = (
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, dtype)), params),
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1]),
    )
    (total, metrics), _ = jax.lax.scan(add, zero, (jnp.arange(accumulation), parts))
    return jax.tree.map(lambda g, p: g.astype(p.dtype), total, params), metrics


def update(loss, optimizer, axes, precision, train: Train, seed: int, state: TrainState, batch, hyper, total_steps):
    """One step: gradients, clipping, the optimizer; parameters and moments stay as they were where it is left out.

    That is with a gradient that is not finite, with a spike (`optimizer.spike`), and where `train.skip` says so.
    Gradients are made of `state.trainable` alone, and all else is as it was. axes: logical axes of the whole parameter
    tree. hyper: `hyperparameters(optimizer)` as arrays. Returns (state, metrics), metrics as float32 scalars.
    """
    optimizer = config.replace_leaves(optimizer, hyper)
    key = rng.stream_key(jax.random.key(seed), rng.DROPOUT, state.step)
    accumulated = jnp.dtype(precision.accumulation)
    trained = state.trained

    def loss_of_trained(trained, batch, key):
        return loss(state.params | trained, batch, key)

    grads, (totals, sums) = gradients(loss_of_trained, trained, batch, key, train.accumulation, accumulated)
    norm = tree.global_norm(grads)
    if train.clip is not None:
        scale = jnp.minimum(1.0, train.clip / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
    axes = branches(axes, state.trainable)
    tx = optimizers.build(optimizer, axes, state.step, total_steps, jnp.dtype(precision.moments))
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    moved = jax.tree.map(lambda p, u: p + u.astype(p.dtype), trained, updates)

    usual, opt_state = optimizers.watch(optimizer, opt_state, norm)
    told = jnp.any(state.step + 1 == jnp.asarray(train.skip, jnp.int32))
    good = jnp.isfinite(norm) & usual & ~told
    moved, opt_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (moved, opt_state), (trained, state.opt_state)
    )
    skipped = state.skipped + jnp.where(good, 0, 1)
    means = {name: s / jnp.maximum(w, 1) for name, (s, w) in sums.items()}
    metrics = (
        totals
        | means
        | {
            "gradient_norm": norm,
            "learning_rate": optimizer.lr * schedules.factor(optimizer.schedule, state.step, total_steps),
            "skipped": skipped,
        }
    )
    metrics = {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}
    new = state.replace(params=state.params | moved, opt_state=opt_state, step=state.step + 1, skipped=skipped)
    return new, metrics
