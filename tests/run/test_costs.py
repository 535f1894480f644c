"""What the steps cost by XLA's own analysis: a guard against slower programs that needs no clock."""

import json

import jax
import numpy as np
import pytest

from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.nn.transformer import ModelConfig, init
from jaxlm.sample import slots
from jaxlm.sample.engine import Sampling, generate
from tests.goldens import make_costs

WITHIN = 0.03  # of the recorded cost; a program that has become cheaper by more is to be recorded, too


def test_no_program_has_become_dearer():
    recorded = json.loads(make_costs.FILE.read_text())
    if (version := recorded.pop("jax")) != jax.__version__:
        pytest.skip(f"recorded with jax {version}: another compiler's costs are its own")
    found = make_costs.costs()
    assert found.keys() == recorded.keys()
    other = [
        f"{name} {what}: {found[name][what]:.6g}, recorded {cost:.6g}"
        for name, costs in recorded.items()
        for what, cost in costs.items()
        if abs(found[name][what] - cost) > WITHIN * cost
    ]
    assert not other, "\n".join([*other, "if that is meant: python -m tests.goldens.make_costs"])


def test_other_prompts_and_settings_of_the_same_sizes_compile_nothing():
    cfg, tokenizer = ModelConfig(vocab_size=512, layers=1, width=16, heads=2, hidden=32), BytesTokenizer()
    params, rng = init(cfg, jax.random.key(0)), np.random.default_rng(0)

    def asked(lengths, **settings):
        prompts = [rng.integers(1, 200, n).tolist() for n in lengths]
        programs = slots.empty, slots.prefill, slots.place, slots.decode
        before = [f._cache_size() for f in programs]
        generate(cfg, params, tokenizer, prompts, Sampling(max_tokens=8, **settings), slots=4)
        return [f._cache_size() - n for f, n in zip(programs, before)]

    assert asked([5, 9, 16, 20, 31, 7]) == [1, 2, 1, 1]  # prompts of two buckets
    assert asked([11, 30, 3, 14, 1], temperature=0.7, top_p=0.9, seed=5, top_k=3, min_p=0.01) == [0, 0, 0, 0]
