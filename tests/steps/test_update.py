"""The update: the same gradient for any number of microbatches and devices, clipping, and steps that are not finite.

float64 at 1e-9 where the question is algebra, float32 at 1e-5 relative where it is code.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import config, sharding, tree
from jaxlm.config import UserError
from jaxlm.data.trajectory import Trajectory
from jaxlm.nn import lora, transformer
from jaxlm.nn.lora import LoRA
from jaxlm.nn.transformer import ModelConfig, Precision
from jaxlm.optim import optimizers
from jaxlm.optim.optimizers import Adafactor, AdamW, Lion, Muon
from jaxlm.optim.schedules import Constant
from jaxlm.steps import pretrain, state, update
from jaxlm.steps.pretrain import NextToken
from jaxlm.steps.update import Train

MODEL = ModelConfig(vocab_size=50, vocab_multiple=2, layers=1, width=16, heads=2, kv_heads=1, hidden=32, tied=True)
OPTIMIZER = AdamW(lr=0.01, schedule=Constant())
WHOLE_LOSS = Train(loss_chunk=None)
B, T = 8, 12


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, T, B)  # each row holds two segments, and rows differ in how many tokens they score
    segments = np.where(np.arange(T + 1)[None] < lengths[:, None], 1, 2).astype(np.int32)
    positions = np.where(segments == 1, np.arange(T + 1)[None], np.arange(T + 1)[None] - lengths[:, None])
    mask = (positions > 0) & (rng.random((B, T + 1)) < np.linspace(0.2, 1.0, B)[:, None])
    return Trajectory(
        tokens=rng.integers(0, 50, (B, T + 1)).astype(np.int32),
        positions=positions.astype(np.int32),
        segments=segments,
        loss_mask=mask,
    )


def gradients(precision, accumulation, batch, z_loss=0.01):
    model = dataclasses.replace(MODEL, precision=precision)
    loss = pretrain.make_loss(NextToken(), model, Train(z_loss=z_loss, loss_chunk=None))
    params = transformer.init(model, jax.random.key(0))
    fn = functools.partial(update.gradients, loss, accumulation=accumulation, dtype=precision.accumulation)
    return jax.jit(fn)(params, batch, jax.random.key(1))


def assert_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = float(jnp.max(jnp.abs(y))) or 1.0
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_leaves_the_gradient_as_it_was(accumulation):
    with jax.enable_x64(True):
        double = Precision(params="float64", compute="float64", accumulation="float64")
        whole, parts = (gradients(double, n, make_batch()) for n in (1, accumulation))
        assert_close(parts, whole, 1e-9)
    whole, parts = (gradients(Precision(), n, make_batch()) for n in (1, accumulation))
    assert_close(parts, whole, 1e-5)


def test_the_loss_is_the_mean_over_all_scored_tokens_not_a_mean_of_means():
    batch = make_batch()
    _, (totals, metrics) = gradients(Precision(), 4, batch, z_loss=0.0)
    params = transformer.init(MODEL, jax.random.key(0))
    logprobs, _, mask = pretrain.token_logprobs(MODEL, params, batch)
    total, weight = metrics["cross_entropy"]
    assert float(weight) == mask.sum()
    assert float(total / weight) == pytest.approx(float(-logprobs[mask].mean()), rel=1e-5)
    assert float(totals["loss"]) == pytest.approx(float(total / weight), rel=1e-6)


def one_step(batch, mesh=None, train=None, optimizer=OPTIMIZER, steps=1, adapters=None):
    train = train or Train(loss_chunk=None)
    loss = pretrain.make_loss(NextToken(), MODEL, train)
    axes = lora.specs(MODEL, adapters)
    hyper = {k: jnp.float32(v) for k, v in update.hyperparameters(optimizer).items()}

    def adapted(params, batch, key):
        return loss(lora.attach(adapters, params), batch, key)

    def one(s, batch):
        return update.update(adapted, optimizer, axes, MODEL.precision, train, 0, s, batch, hyper, 10)

    mesh = mesh or sharding.make_mesh(sharding.MeshConfig(fsdp=1))
    s = state.create_sharded(MODEL, optimizer, 0, mesh, adapters)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
        batch = jax.device_put(batch, rows)
        compiled = jax.jit(one)
        for _ in range(steps):
            s, metrics = compiled(s, batch)
    return s, metrics


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}],
    ids=lambda m: "x".join(f"{k}{v}" for k, v in m.items()),
)
def test_eight_devices_take_the_same_steps_as_one(mesh):
    # A huge epsilon makes Adam linear in the gradient: its sign at tiny entries would hide or blow up differences.
    optimizer = dataclasses.replace(OPTIMIZER, eps=1.0, lr=1.0)
    alone, alone_metrics = one_step(make_batch(), optimizer=optimizer, steps=2)
    spread, metrics = one_step(
        make_batch(), sharding.make_mesh(sharding.MeshConfig(**mesh)), optimizer=optimizer, steps=2
    )
    assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 8
    assert_close(spread.params, alone.params, 1e-5)
    assert_close(metrics, alone_metrics, 1e-5)


LORA = LoRA(rank=4, alpha=8.0)


def test_adapters_alone_are_trained():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=1))
    before = state.create_sharded(MODEL, OPTIMIZER, 0, mesh, LORA)
    after, metrics = one_step(make_batch(), steps=30, adapters=LORA)
    _, first = one_step(make_batch(), adapters=LORA)
    assert float(metrics["loss"]) < float(first["loss"]) - 0.15
    frozen = [{k: s.params[k] for k in ("backbone", "heads")} for s in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *frozen)
    for (name, x), (_, y) in zip(*(tree.named_leaves(s.params["adapters"]) for s in (before, after))):
        assert np.any(np.asarray(x) != np.asarray(y)), name
    assert after.opt_state[0].mu.keys() == {"adapters"}
    pairs = tree.count(after.params["adapters"])
    assert tree.count(after.opt_state) < 2 * pairs + 8 and pairs < tree.count(after.params) / 3
    _, whole = one_step(make_batch())
    assert float(first["loss"]) == float(whole["loss"])  # B starts at zero: the same model, bit for bit


def test_eight_devices_train_adapters_as_one_does():
    optimizer = dataclasses.replace(OPTIMIZER, eps=1.0, lr=1.0)
    alone, _ = one_step(make_batch(), optimizer=optimizer, steps=2, adapters=LORA)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    spread, _ = one_step(make_batch(), mesh, optimizer=optimizer, steps=2, adapters=LORA)
    assert_close(spread.params, alone.params, 1e-5)
    up = state.create_sharded(MODEL, optimizer, 0, mesh, LORA).params["adapters"]["0"]["mlp"]["up"]
    assert up["a"].addressable_shards[0].data.size == up["a"].size // 4
    assert up["b"].addressable_shards[0].data.size == up["b"].size // 2


def test_parameters_and_moments_are_spread_not_copied():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    s = state.create_sharded(MODEL, OPTIMIZER, 0, mesh)
    for spread in (s.params, s.opt_state[0].mu):
        q = spread["backbone"]["blocks"]["0"]["attention"]["q"]["kernel"]
        assert q.addressable_shards[0].data.size == q.size // 8


@pytest.mark.parametrize("kind, adapters", [(Muon, None), (Muon, LORA), (Lion, None), (Adafactor, None)])
def test_every_optimizer_has_a_state_on_a_mesh_and_steps(kind, adapters):
    """Muon keeps no state for what it leaves to AdamW, and Adafactor's moments are smaller than its parameters."""
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    s, metrics = one_step(make_batch(), mesh, optimizer=kind(schedule=Constant()), adapters=adapters)
    described = state.abstract(MODEL, kind(schedule=Constant()), mesh, adapters)
    assert jax.tree.structure(s) == jax.tree.structure(described)
    assert [x.shape for x in jax.tree.leaves(s)] == [x.shape for x in jax.tree.leaves(described)]
    assert np.isfinite(metrics["loss"]) and int(s.skipped) == 0


def test_clipping_scales_the_whole_gradient_to_the_norm():
    def seen(clip):  # Adam's first moment after one step is the gradient times 1 - b1
        after, metrics = one_step(make_batch(), train=Train(clip=clip, loss_chunk=None))
        return after.opt_state[0].mu, float(metrics["gradient_norm"])

    (free, norm), (clipped, same_norm) = seen(None), seen(0.1)
    assert norm == pytest.approx(same_norm) and norm > 0.1
    assert_close(clipped, jax.tree.map(lambda g: g * (0.1 / norm), free), 1e-4)


def scaled_step(optimizer=OPTIMIZER, train=WHOLE_LOSS):
    """(state, batch) -> the next state and metrics, of a loss times what the batch has for its first reward."""
    loss = pretrain.make_loss(NextToken(), MODEL, train)

    def scaled(params, batch, key):
        terms, metrics = loss(params, batch.replace(rewards=None), key)
        return {k: (c, total * batch.rewards[0, 0], w) for k, (c, total, w) in terms.items()}, metrics

    hyper = {k: jnp.float32(v) for k, v in update.hyperparameters(optimizer).items()}
    axes = transformer.specs(MODEL)
    return jax.jit(lambda s, b: update.update(scaled, optimizer, axes, MODEL.precision, train, 0, s, b, hyper, 10))


def scaled_batch(scale):
    return make_batch().replace(rewards=np.full((B, T + 1), scale, np.float32))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    s, one = state.create(MODEL, OPTIMIZER, 0), scaled_step()
    after, metrics = one(s, scaled_batch(np.nan))
    assert int(after.step) == 1 and int(after.skipped) == 1 and float(metrics["skipped"]) == 1
    assert_same((after.params, after.opt_state), (s.params, s.opt_state))
    later, _ = one(after, scaled_batch(1))
    assert int(later.step) == 2 and int(later.skipped) == 1
    assert any(bool(jnp.any(x != y)) for x, y in zip(jax.tree.leaves(later.params), jax.tree.leaves(after.params)))


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_spike_is_left_out_as_if_the_run_had_been_told_to(kind):
    optimizer, bad = kind(lr=0.001, schedule=Constant(), spike=3.0), optimizers.FIRST + 2

    def trained(scale, train):
        s, one = state.create(MODEL, optimizer, 0), scaled_step(optimizer, train)
        seen = []
        for n in range(1, bad + 3):
            s, metrics = one(s, scaled_batch(scale if n == bad else 1))
            seen.append(int(metrics["skipped"]))
        return s, seen

    spiked, seen = trained(100.0, Train(loss_chunk=None))
    assert seen == [0] * (bad - 1) + [1] * 3
    assert_same(spiked, trained(100.0, Train(loss_chunk=None, skip=(bad,)))[0])
    assert_same(spiked, trained(1.0, Train(loss_chunk=None, skip=(bad,)))[0])
    assert trained(2.0, Train(loss_chunk=None))[1][-1] == 0, "twice the usual norm is none"


def test_what_watches_for_spikes_has_a_state_on_a_mesh():
    optimizer, mesh = (
        dataclasses.replace(OPTIMIZER, spike=3.0),
        sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2)),
    )
    alone, _ = one_step(make_batch(), optimizer=dataclasses.replace(optimizer, eps=1.0))
    spread, _ = one_step(make_batch(), mesh, optimizer=dataclasses.replace(optimizer, eps=1.0))
    assert jax.tree.structure(spread) == jax.tree.structure(state.abstract(MODEL, optimizer, mesh))
    assert (
        float(spread.opt_state.norm) == pytest.approx(float(alone.opt_state.norm), rel=1e-5)
        and alone.opt_state.norm > 0
    )
    with pytest.raises(UserError, match=r"set Muon\.spike"):
        Muon(rest=optimizer)


def test_another_learning_rate_does_not_recompile():
    traces = []
    loss = pretrain.make_loss(NextToken(), MODEL, Train(loss_chunk=None))

    @jax.jit
    def one(s, batch, hyper):
        traces.append(1)
        axes = transformer.specs(MODEL)
        return update.update(loss, OPTIMIZER, axes, MODEL.precision, Train(loss_chunk=None), 0, s, batch, hyper, 10)

    s = state.create(MODEL, OPTIMIZER, 0)
    for lr in (0.1, 0.2):
        optimizer = config.override(OPTIMIZER, {"lr": lr})
        hyper = {k: jnp.float32(v) for k, v in update.hyperparameters(optimizer).items()}
        _, metrics = one(s, make_batch(), hyper)
        assert float(metrics["learning_rate"]) == pytest.approx(lr)
    assert len(traces) == 1
