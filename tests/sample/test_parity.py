"""The certificate over batch, padding, packing, temperature and dtype; and that it sees what it is there for."""

import dataclasses
import functools

import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.nn.transformer import Precision
from jaxlm.sample.engine import Sampling, generate
from jaxlm.sample.parity import certificate, trainer_logprobs
from tests.sample.small import CONVOLVED, LOUD, TOKENIZER, WINDOWED, random_params

TEMPERATURES = (0.0, 0.5, 1.0, 2.0)


@functools.cache
def rollout(cfg, slots=8):
    """(params, prompts, completions, temperatures), with forced tokens in some."""
    g = np.random.default_rng(0)
    prompts = [g.integers(32, 288, g.integers(1, 30)).tolist() for _ in range(16)]
    temperatures = [TEMPERATURES[i % 4] for i in range(16)]
    settings = [
        Sampling(temperature=t, max_tokens=int(g.integers(8, 17)), max_forced=16, top_k=20, stop_ids=LOUD)
        for t in temperatures
    ]
    respond = lambda i, ids: [40] * 9 if len(ids) < 12 else None  # noqa: E731
    params = random_params(cfg, loud=True)
    completions = generate(cfg, params, TOKENIZER, prompts, settings, slots=slots, respond=respond)
    return params, prompts, completions, temperatures


@pytest.mark.parametrize(
    "cfg, slots, length, rows",
    [(WINDOWED, 8, None, 16), (WINDOWED, 8, 256, 2), (WINDOWED, 2, 256, 2), (CONVOLVED, 8, 256, 2)],
    ids=["padded", "packed", "two slots", "convolved"],
)
def test_single_precision_agrees_below_1e_4(cfg, slots, length, rows):
    params, prompts, completions, temperatures = rollout(cfg, slots)
    got = certificate(cfg, params, prompts, completions, temperatures, length, rows)
    print(f"float32: at most {got['max']:.1e}, mean {got['mean']:.1e} nats")  # pytest -rP shows it
    assert got["max"] < 1e-4 and got["mean"] < 1e-5
    assert max(got[f"temperature_{t:g}/max"] for t in TEMPERATURES) == got["max"]
    assert got["tokens"] == sum(sum(c.sampled) for c in completions) < sum(len(c.ids) for c in completions)


def test_half_precision_is_told_as_it_is():
    """bfloat16 keeps 8 bits: at logits of around 10, differences of a few hundredths are rounding, not a bug.

    Whether there is any hangs on the shapes: some matmuls round alike for sampler and trainer.
    """
    cfg = dataclasses.replace(WINDOWED, precision=Precision(compute="bfloat16"))
    got = certificate(cfg, *rollout(cfg), length=256, rows=2)
    print(f"bfloat16: at most {got['max']:.1e}, mean {got['mean']:.1e} nats")
    assert 1e-4 < got["mean"] < 0.05 and got["max"] < 0.5


def test_it_sees_a_wrong_temperature_a_wrong_position_and_stale_parameters():
    params, prompts, completions, temperatures = rollout(WINDOWED)
    assert certificate(WINDOWED, params, prompts, completions, 1.0)["max"] > 0.1
    shifted = [[32, *p] for p in prompts]
    assert certificate(WINDOWED, params, shifted, completions, temperatures)["max"] > 0.1
    stale = random_params(WINDOWED, seed=2, loud=True)
    assert certificate(WINDOWED, stale, prompts, completions, temperatures)["max"] > 0.1
    broken = [dataclasses.replace(c, logprobs=(float("nan"),) * len(c.ids)) for c in completions]
    assert not certificate(WINDOWED, params, prompts, broken, temperatures)["max"] < 1e-4


def test_packed_rows_hold_several_sequences_and_give_the_same():
    args = rollout(WINDOWED)
    padded, packed = (trainer_logprobs(WINDOWED, *args, length=n, rows=r) for n, r in ((None, 16), (256, 2)))
    for a, b, c in zip(padded, packed, args[2]):
        assert len(a) == len(c.ids)
        np.testing.assert_allclose(a, b, atol=1e-4)
    with pytest.raises(UserError, match="rows have 16"):
        trainer_logprobs(WINDOWED, *args, length=16)
