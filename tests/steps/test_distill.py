"""Distillation through the whole model: zero from oneself, the definition from full logits, chunks, one gradient."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxlm.losses.distill import Forward, JensenShannon, Reverse
from jaxlm.nn import transformer
from jaxlm.steps import distill
from jaxlm.steps.distill import Distill
from tests.steps import offline
from tests.steps.offline import DOUBLE, MODEL, TRAIN

TEACHER = dataclasses.replace(MODEL, width=32, vocab_multiple=8)  # of another size, padded otherwise: 56 columns


KINDS = (Forward(), Reverse(), JensenShannon())
TEMPERATURE = 2.0


@functools.cache
def computed():
    """Of each kind (divergences, the same in chunks, of oneself, terms), then both models' probabilities."""
    b = offline.batch()
    inputs = [x[:, :-1] for x in (b.tokens, b.positions, b.segments)]

    @jax.jit
    def found(ours, theirs):
        out = []
        for kind in KINDS:
            objective, teacher = Distill("teacher", kind, TEMPERATURE), (TEACHER, theirs)
            whole, cut = (distill.token_divergences(objective, MODEL, ours, teacher, b, chunk) for chunk in (None, 7))
            itself = distill.token_divergences(objective, MODEL, ours, (MODEL, ours), b)
            out.append((whole, cut, itself, distill.make_loss(objective, MODEL, TRAIN, teacher)(ours, b, None)[0]))
        logits = (
            transformer.unembed(m, p, transformer.apply(m, p, *inputs)[0])[..., :50]
            for m, p in ((MODEL, ours), (TEACHER, theirs))
        )
        return out, [jax.nn.softmax(x / TEMPERATURE) for x in logits]

    return found(offline.params(), offline.params(TEACHER, seed=1))


@pytest.mark.parametrize("i", range(3), ids=[type(k).__name__ for k in KINDS])
def test_the_divergence_of_the_scored_tokens_whole_and_in_chunks(i):
    found, (s, t) = computed()
    s, t, mask = np.float64(s), np.float64(t), offline.batch().loss_mask[:, 1:]

    def kl(p, q):
        return np.sum(p * np.log(p / q), -1)

    half = (s + t) / 2
    want = (kl(t, s), kl(s, t), (kl(t, half) + kl(s, half)) / 2)[i]
    whole, cut, itself, terms = found[i]
    np.testing.assert_allclose(whole, np.where(mask, want, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(itself, 0, atol=1e-5)
    coefficient, total, weight = terms["distill"]
    assert float(coefficient) == TEMPERATURE**2 and float(weight) == mask.sum()
    assert float(total) == pytest.approx(want[mask].sum(), rel=1e-4)


def test_one_gradient_however_the_batch_is_cut():
    with jax.enable_x64(True):
        reference = dataclasses.replace(TEACHER, precision=DOUBLE.precision), None
        reference = reference[0], offline.params(reference[0], seed=1)
    loss = distill.make_loss(Distill("teacher"), DOUBLE, dataclasses.replace(TRAIN, loss_chunk=8), reference)
    gradient, _ = offline.same_on_microbatches_and_devices(loss, ("lm",), {"fsdp": 4, "tensor": 2})
    assert np.abs(gradient["heads"]["lm"]["kernel"]).max() > 1e-3
