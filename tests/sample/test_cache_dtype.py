"""The decoder with its cache in other dtypes: how far it then is from the trainer, and that nothing else changes."""

import functools

import jax

from jaxlm import sharding
from jaxlm.nn.transformer import abstract, slot_bytes, specs, with_cache_dtype
from jaxlm.sample import engine, slots, speculative
from jaxlm.sample.parity import by_cache_dtype, certificate
from tests.sample.small import CONVOLVED, TOKENIZER, WINDOWED, random_params
from tests.sample.test_continuous import mixed_requests, responder

# Nats, (max, mean), at logits whose spread is around 10; with convolutions, of these random weights, one token of a
# hundred differs by 1.5 in int8, on every path alike. That a wrong scale shows: tests/nn/test_quantized.py.
BOUNDS = {"float32": (1e-4, 1e-5), "bfloat16": (0.15, 0.02), "int8": (0.5, 0.06), "int8, convolved": (3.0, 0.08)}


def quantized(cfg):
    return with_cache_dtype(cfg, "int8")


@functools.cache
def params_of(cfg):
    return random_params(cfg, loud=True)


def within(gap, name):
    print(f"{name}: at most {gap['max']:.1e}, mean {gap['mean']:.1e} nats")  # pytest -rP shows it
    most, mean = BOUNDS[name]
    return gap["max"] < most and gap["mean"] < mean


def test_the_certificate_tells_what_each_dtype_costs():
    prompts, settings, _ = mixed_requests(16, seed=3)
    found = by_cache_dtype(WINDOWED, params_of(WINDOWED), TOKENIZER, prompts, settings, slots=8)
    assert list(found) == ["float32", "bfloat16", "int8"] and all(within(gap, name) for name, gap in found.items())
    assert found["float32"]["mean"] < 0.01 * found["int8"]["mean"] and found["int8"]["tokens"] > 40


@functools.cache
def decoded(n, mesh=None):
    """(prompts, settings, completions) of the first n requests, some with forced tokens."""
    cfg, params = quantized(CONVOLVED), params_of(CONVOLVED)
    prompts, settings, ids = (x[:n] for x in mixed_requests(16, seed=3))
    if mesh is not None:
        params = jax.device_put(params, sharding.tree_shardings(mesh, specs(cfg), abstract(cfg)))
    done = engine.generate(cfg, params, TOKENIZER, prompts, settings, ids, 8, respond=responder(), mesh=mesh)
    return prompts, settings, done


def certified(prompts, settings, done):
    return certificate(CONVOLVED, params_of(CONVOLVED), prompts, done, [s.temperature for s in settings])


def test_refilled_slots_hold_nothing_of_those_before():
    """16 requests through 8 slots; the first of them get the same when alone, bit for bit."""
    whole, few = decoded(16), decoded(5)
    assert few[2] == whole[2][:5] and any(not all(c.sampled) for c in whole[2])
    assert within(certified(*whole), "int8, convolved")


def test_eight_devices():
    """Rounding may be another and then a value's eight bits too, so that draws differ: each is held to the trainer."""
    mesh = sharding.make_mesh(sharding.MeshConfig(replica=2, fsdp=2, tensor=2))
    assert within(certified(*decoded(16, mesh)), "int8, convolved")
    with jax.set_mesh(mesh):
        state = slots.empty(quantized(WINDOWED), 8, 32, 4, 64)
    values, scale = state.cache[1]["k"]  # [B, K, capacity, C]
    assert values.sharding.shard_shape(values.shape) == (2, 1, 64, 8)
    assert scale.sharding.shard_shape(scale.shape) == (2, 1, 64)
    whole = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    assert whole == 8 * slot_bytes(quantized(WINDOWED), 64)


def test_what_a_draft_proposed_in_vain_is_taken_back():
    """A draft that is often wrong; the target's tokens stay within what int8 costs."""
    cfg, params = quantized(CONVOLVED), params_of(CONVOLVED)
    noisy = jax.tree.map(lambda x, y: x + 0.1 * y, params, random_params(CONVOLVED, 5))
    prompts, settings, ids = mixed_requests(16, seed=3)
    draft = speculative.Draft(cfg, noisy, 3)
    done, worth = speculative.generate(cfg, params, TOKENIZER, prompts, settings, draft, ids, 8, respond=responder())
    assert 0 < worth.accepted < worth.drafted
    assert within(certified(prompts, settings, done), "int8, convolved")
