"""The decoder over eight devices: rows over the batch axes, heads over tensor."""

import dataclasses

import jax
import numpy as np

from jaxlm import sharding
from jaxlm.nn.transformer import abstract, specs
from jaxlm.sample import slots
from jaxlm.sample.engine import Sampling, generate
from tests.sample.small import LOUD, TOKENIZER, WINDOWED, random_params

PROMPTS = [TOKENIZER.encode(t) for t in ("a", "hello", "the quick fox", "x" * 16, "12")] * 3


def test_eight_devices_say_what_one_says():
    """Greedy and sampled tokens equal, log-probabilities within 1e-4: sums run in another order, no more.

    Where two tokens tie within rounding the choice may differ; with these weights none do.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig(replica=2, fsdp=2, tensor=2))
    params = random_params(WINDOWED, loud=True)
    spread = jax.device_put(params, sharding.tree_shardings(mesh, specs(WINDOWED), abstract(WINDOWED)))
    assert len(jax.tree.leaves(spread)[0].sharding.device_set) == 8
    settings = [Sampling(temperature=t, max_tokens=12, max_forced=16, stop_ids=LOUD) for t in (0.0, 0.8, 1.2)] * 5
    respond = lambda i, ids: [50, 51, 52] if len(ids) < 6 else None  # noqa: E731

    def run(params, mesh=None):
        return generate(WINDOWED, params, TOKENIZER, PROMPTS, settings, slots=8, respond=respond, mesh=mesh)

    alone, before = run(params), [f._cache_size() for f in (slots.place, slots.decode)]
    together = run(spread, mesh)
    # Shardings stay what they are, from one visit to the next; prompts have as many rows a prefill as answers of tools.
    assert [f._cache_size() - n for f, n in zip((slots.place, slots.decode), before)] == [1, 1]
    assert sum(not all(c.sampled) for c in alone) > 5
    for a, b in zip(alone, together):
        assert dataclasses.replace(a, logprobs=()) == dataclasses.replace(b, logprobs=())
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_the_cache_is_spread():
    mesh = sharding.make_mesh(sharding.MeshConfig(replica=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        state = slots.empty(WINDOWED, 8, 32, 4, 64)
    keys = state.cache[1]["k"]  # [B, K, capacity, C]
    assert keys.sharding.shard_shape(keys.shape) == (2, 1, 64, 8)
    assert state.ids_BN.sharding.is_fully_replicated
