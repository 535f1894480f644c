"""DPO's family through the whole model: equal models, the formulas on sums made one answer at a time, the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.losses.preference import Dpo, Hinge, Ipo, SimPo
from jaxlm.nn.lora import LoRA
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Constant
from jaxlm.run import train
from jaxlm.run.experiment import Experiment
from jaxlm.sample.score import score
from jaxlm.steps import preference, state
from jaxlm.steps.preference import Preference
from tests.steps import offline
from tests.steps.offline import DOUBLE, MODEL, TRAIN

LOSSES = (Dpo(beta=0.5), Dpo(beta=0.5, label_smoothing=0.1), Ipo(beta=0.5), Hinge(beta=0.5), SimPo(beta=1.5, gamma=0.2))


@functools.cache
def logprobs(seed: int):
    """(sum over its own tokens, their number) of each answer, each scored in a row of its own."""
    found = list(offline.answers(offline.batch()))
    scored = score(MODEL, offline.params(seed=seed), [tokens.tolist() for _, _, tokens, *_ in found])
    return {
        (row, s): (float(each[mask[1:]].sum()), int(mask.sum()))
        for each, (row, s, _, mask, _, _) in zip(scored, found, strict=True)
    }


def pair_loss(cfg, gap):
    """Of a pair, as the papers have it."""
    match cfg:
        case Dpo(beta=b, label_smoothing=e):
            return (1 - e) * np.log1p(np.exp(-b * gap)) + e * np.log1p(np.exp(b * gap))
        case Ipo(beta=b):
            return (gap - 1 / (2 * b)) ** 2
        case Hinge(beta=b):
            return max(0.0, 1 - b * gap)
        case SimPo(beta=b, gamma=g):
            return np.log1p(np.exp(-(b * gap - g)))


@functools.cache
def packed():
    """(terms, sums of an evaluation) of each loss, on packed rows, in one program."""

    @jax.jit
    def values(policy, reference, b):
        out = []
        for cfg in LOSSES:
            ref = None if isinstance(cfg, SimPo) else (MODEL, reference)
            loss = preference.make_loss(Preference(cfg), MODEL, TRAIN, ref)
            sums = preference.evaluation_sums(Preference(cfg), MODEL, None, ref, policy, b)
            out.append((loss(policy, b, None)[0], sums))
        return out

    return dict(zip(LOSSES, values(offline.params(), offline.params(seed=1), offline.batch()), strict=True))


@pytest.mark.parametrize("cfg", LOSSES, ids=repr)
def test_packed_rows_give_what_single_answers_do(cfg):
    ours, theirs = logprobs(0), logprobs(1)
    by_prompt: dict = {}
    for row, s, _, _, number, rank in offline.answers(offline.batch()):
        (own, length), (ref, _) = ours[row, s], theirs[row, s]
        by_prompt.setdefault((row, number), []).append((own / length if isinstance(cfg, SimPo) else own - ref, rank))
    want, right = 0.0, []
    for group in by_prompt.values():
        gaps = [a - b for a, i in group for b, j in group if i < j]
        want += sum(pair_loss(cfg, g) for g in gaps) / (len(group) * (len(group) - 1) / 2)
        right += [(np.sign(g) + 1) / 2 for g in gaps]
    terms, sums = packed()[cfg]
    ((_, total, weight),) = terms.values()
    assert float(weight) == len(by_prompt)
    assert float(total) == pytest.approx(want, rel=2e-5) == float(sums["loss"])
    assert float(sums["right"] / sums["pairs"]) == pytest.approx(np.mean(right), abs=1e-6)


def test_one_gradient_however_the_batch_is_cut():
    with jax.enable_x64(True):
        reference = DOUBLE, offline.params(DOUBLE, seed=1)
    loss = preference.make_loss(Preference(), DOUBLE, TRAIN, reference)
    gradient, _ = offline.same_on_microbatches_and_devices(loss, ("lm",), {"fsdp": 8})
    assert np.abs(gradient["heads"]["lm"]["kernel"]).max() > 1e-3


OPTIMIZER = AdamW(lr=0.01, weight_decay=0.0, schedule=Constant())


def two_steps(objective: Preference, adapters: LoRA | None):
    """(metrics of two updates, reference before, reference after, state) of a run that starts from its reference."""
    e = Experiment(MODEL, objective=objective, optimizer=OPTIMIZER, lora=adapters, train=TRAIN)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=1))
    s = state.create_sharded(MODEL, OPTIMIZER, 0, mesh, adapters)
    before = jax.device_get(s.params)
    frozen = None if adapters else jax.tree.map(jnp.copy, s.params)
    step = train.step_function(e, mesh, (MODEL, frozen))
    rows = offline.batch()
    rows = rows.replace(rank=np.broadcast_to(np.arange(offline.S, dtype=np.int32), rows.rank.shape))  # no ties
    metrics = []
    for _ in range(2):
        s, m = step(s, jax.device_put(rows, sharding.replicated(mesh)))
        metrics.append(jax.device_get(m))
    return metrics, before, frozen, s


@pytest.mark.parametrize("adapters", [None, LoRA(rank=2)], ids=["whole", "adapters"])
def test_the_first_loss_is_that_of_equal_models_and_the_reference_stays(adapters):
    (first, second), before, frozen, s = two_steps(Preference(Dpo()), adapters)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-5) and first["gradient_norm"] > 1e-3
    assert second["loss"] < first["loss"] and second["margin"] > 0.01
    if adapters is None:  # a donated buffer could not be read any more
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
        assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(s.params), jax.tree.leaves(before)))
    else:
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(s.params["backbone"]), before["backbone"])


def test_prompts_and_what_tools_wrote_are_not_scored():
    """The mask alone says what a policy wrote: with none of an answer under it, the answer weighs nothing."""
    b = offline.batch()
    none = b.replace(loss_mask=np.zeros_like(b.loss_mask))
    sums = jax.jit(lambda p, b: preference.response_logprobs(MODEL, p, b, 8))
    assert not np.any(sums(offline.params(), none)) and np.any(sums(offline.params(), b))
    junk = dataclasses.replace(b, tokens=np.where(b.segments == 0, 9, b.tokens))
    np.testing.assert_array_equal(sums(offline.params(), junk), sums(offline.params(), b))
