"""The certificate over batch, padding, packing, temperature and dtype; and that it sees what it is there for."""

import dataclasses
import functools

import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.nn.transformer import Precision
from jaxlm.sample.engine import Sampling, generate
from jaxlm.sample.parity import certificate, trainer_logprobs
from tests.sample.small import CONVOLVED, TOKENIZER, WINDOWED, random_params

TEMPERATURES = (0.0, 0.5, 1.0, 2.0)


@functools.cache
def rollout(cfg, slots=8):
    g = np.random.default_rng(0)
    prompts = [g.integers(32, 288, g.integers(1, 30)).tolist() for _ in range(16)]
    temperatures = [TEMPERATURES[i % 4] for i in range(16)]
    settings = [
        Sampling(temperature=t, max_tokens=int(g.integers(1, 25)), top_k=20, stop_ids=tuple(range(100, 160)))
        for t in temperatures
    ]
    respond = lambda i, ids: [40] * 9 if len(ids) < 12 else None  # noqa: E731
    params = random_params(cfg)
    return (
        params,
        prompts,
        generate(cfg, params, TOKENIZER, prompts, settings, slots=slots, respond=respond),
        temperatures,
    )


@pytest.mark.parametrize("cfg", [WINDOWED, CONVOLVED], ids=["windowed", "convolved"])
def test_single_precision_agrees_below_1e_4(cfg):
    results = []
    for slots in (8, 2) if cfg is WINDOWED else (8,):
        for length, rows in ((None, 16), (None, 4), (192, 2)):
            got = certificate(cfg, *rollout(cfg, slots), length=length, rows=rows)
            assert got["max"] < 1e-4 and got["mean"] < 1e-5
            assert {f"temperature_{t:g}/max" for t in TEMPERATURES} < got.keys()
            assert max(got[f"temperature_{t:g}/max"] for t in TEMPERATURES) == got["max"]
            results.append(got)
    completions = rollout(cfg)[2]
    assert results[0]["tokens"] == sum(map(sum, (c.sampled for c in completions)))
    assert not all(all(c.sampled) for c in completions)


def test_half_precision_is_told_as_it_is():
    """bfloat16 keeps 8 bits: at logits of around 10, differences of a few hundredths are rounding, not a bug."""
    cfg = dataclasses.replace(WINDOWED, precision=Precision(compute="bfloat16"))
    got = certificate(cfg, *rollout(cfg))
    assert 1e-4 < got["mean"] < 0.05 and got["max"] < 0.5


def test_it_sees_a_wrong_temperature_a_wrong_position_and_stale_parameters():
    params, prompts, completions, temperatures = rollout(WINDOWED)
    assert certificate(WINDOWED, params, prompts, completions, 1.0)["max"] > 0.1
    shifted = [[32, *p] for p in prompts]
    assert certificate(WINDOWED, params, shifted, completions, temperatures)["max"] > 0.1
    stale = random_params(WINDOWED, seed=2)
    assert certificate(WINDOWED, stale, prompts, completions, temperatures)["max"] > 0.1
    broken = [dataclasses.replace(c, logprobs=(float("nan"),) * len(c.ids)) for c in completions]
    assert not certificate(WINDOWED, params, prompts, broken, temperatures)["max"] < 1e-4


def test_packed_rows_hold_several_sequences_and_give_the_same():
    args = rollout(WINDOWED)
    padded, packed = (trainer_logprobs(WINDOWED, *args, length=n, rows=r) for n, r in ((None, 16), (192, 2)))
    for a, b, c in zip(padded, packed, args[2]):
        assert len(a) == len(c.ids)
        np.testing.assert_allclose(a, b, atol=1e-4)
    with pytest.raises(UserError, match="rows have 16"):
        trainer_logprobs(WINDOWED, *args, length=16)
