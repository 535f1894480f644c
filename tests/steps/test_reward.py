"""The reward model's step: where a score is read, the oracles through the whole model, one gradient however cut."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.trajectory import Trajectory
from jaxlm.nn import transformer
from jaxlm.steps import ranked, reward
from jaxlm.steps.reward import BestOfK, BradleyTerry, PlackettLuce, RewardModel
from tests.steps import offline
from tests.steps.offline import DOUBLE, MODEL, S, T

HEADS = ("reward",)


@functools.cache
def packed_scores():
    return np.asarray(jax.jit(lambda p, b: reward.scores(MODEL, p, b))(offline.params(MODEL, HEADS), offline.batch()))


def test_a_score_is_read_at_the_last_token_packed_as_alone():
    """Packed beside others, or alone and padded, within 1e-5; what stands in the padding matters nowhere."""
    b = offline.batch()
    alone = list(offline.answers(b))
    rows = Trajectory(
        tokens=np.full((len(alone), T + 1), 7, np.int32),
        positions=np.zeros((len(alone), T + 1), np.int32),
        segments=np.zeros((len(alone), T + 1), np.int32),
        rank=np.zeros((len(alone), 1), np.int32),
    )
    for i, (_, _, tokens, *_) in enumerate(alone):
        rows.tokens[i, : len(tokens)] = tokens
        rows.positions[i, : len(tokens)] = np.arange(len(tokens))
        rows.segments[i, : len(tokens)] = 1
    params = offline.params(MODEL, HEADS)
    score = jax.jit(lambda p, b: (reward.scores(MODEL, p, b), transformer.apply(
        MODEL, p, b.tokens[:, :-1], b.positions[:, :-1], b.segments[:, :-1])[0]))  # fmt: skip
    scores, hidden = score(params, rows)
    for i, (row, s, tokens, *_) in enumerate(alone):
        head = params["heads"]["reward"]
        want = np.asarray(hidden[i, len(tokens) - 1]) @ np.asarray(head["kernel"]) + head["bias"]
        assert float(scores[i, 0]) == pytest.approx(float(want), abs=1e-5)
        assert packed_scores()[row, s - 1] == pytest.approx(float(want), abs=1e-5)
    assert not packed_scores()[b.prompt_id == 0].any()
    garbage = rows.replace(tokens=np.where(rows.segments > 0, rows.tokens, 3))
    np.testing.assert_array_equal(score(params, garbage)[0], scores)


@functools.cache
def row_of_four():
    """A row of four answers with ranks 0 to 3, and the hidden states at their last tokens."""
    row = next(i for i, shape in enumerate(offline.SHAPE) if shape == (4,))
    one = jax.tree.map(lambda x: x[row : row + 1], offline.batch())
    one = one.replace(rank=np.array([[0, 1, 2, 3, 0, 0]], np.int32))
    last = [np.flatnonzero(one.segments[0] == s)[-1] for s in (1, 2, 3, 4)]
    one.tokens[0, last] = (11, 12, 13, 14)
    inputs = [x[:, :-1] for x in (one.tokens, one.positions, one.segments)]
    hidden = jax.jit(lambda p, *xs: transformer.apply(MODEL, p, *xs)[0])(offline.params(MODEL, HEADS), *inputs)
    return one, np.float64(hidden[0, last])


def solved(values):
    """Parameters whose head gives the answers of `row_of_four` these rewards, and the row."""
    (one, hidden), params = row_of_four(), offline.params(MODEL, HEADS)
    kernel = np.linalg.lstsq(hidden, np.array(values), rcond=None)[0]
    return params | {"heads": {"reward": {"kernel": jnp.float32(kernel), "bias": jnp.float32(0)}}}, one


@pytest.mark.parametrize(
    "loss, at_zero, at_gaps",
    [
        (BradleyTerry(), math.log(2), 0.207038),
        (PlackettLuce(), math.log(24), 1.161057),
        (BestOfK(), math.log(4), 0.440190),
    ],
    ids=["bradley_terry", "plackett_luce", "best_of_k"],
)
def test_the_oracles_through_the_whole_model(loss, at_zero, at_gaps):
    """Rewards 2, 1, 0, -1 in their order, and all alike: the loss of InstructGPT, Plackett and Luce, best of four."""
    value = jax.jit(lambda p, b: reward.make_loss(RewardModel(loss), MODEL)(p, b, None))
    for rewards, want in (((2, 1, 0, -1), at_gaps), ((0, 0, 0, 0), at_zero)):
        ((coefficient, total, weight),) = value(*solved(rewards))[0].values()
        assert float(coefficient * total / weight) == pytest.approx(want, abs=1e-5) and float(weight) == 1


def test_the_loss_is_the_mean_over_prompts_of_the_mean_over_their_pairs():
    loss = reward.make_loss(RewardModel(BradleyTerry(margin=0.5)), MODEL)
    terms, metrics = jax.jit(lambda p, b: loss(p, b, None))(offline.params(MODEL, HEADS), offline.batch())
    by_prompt: dict = {}
    for row, s, _, _, number, rank in offline.answers(offline.batch()):
        by_prompt.setdefault((row, number), []).append((packed_scores()[row, s - 1], rank))
    losses, right, count = [], 0.0, 0
    for group in by_prompt.values():
        gaps = [a - b for a, i in group for b, j in group if i < j]
        losses.append(sum(math.log1p(math.exp(0.5 - g)) for g in gaps) / math.comb(len(group), 2))
        right, count = right + sum((np.sign(g) + 1) / 2 for g in gaps), count + len(gaps)
    ((_, total, weight),) = terms.values()
    assert float(weight) == len(losses) == sum(map(len, offline.SHAPE))
    assert float(total) == pytest.approx(sum(losses), rel=1e-5)
    assert [float(x) for x in metrics["accuracy"]] == [right, count]


def test_one_gradient_however_the_batch_is_cut():
    loss = reward.make_loss(RewardModel(BradleyTerry(margin=0.5)), DOUBLE)
    gradient, _ = offline.same_on_microbatches_and_devices(loss, HEADS, {"fsdp": 4, "tensor": 2}, (2, 4))
    assert abs(gradient["heads"]["reward"]["bias"]) < 1e-12  # only differences are trained
    assert np.abs(gradient["heads"]["reward"]["kernel"]).max() > 0.01


def test_evaluation_says_what_the_scores_say():
    """Against counting by hand; a set in two batches as in one."""
    b, rng = offline.batch(), np.random.default_rng(5)
    values = np.round(rng.normal(size=(offline.B, S)), 1).astype(np.float32) * 3
    values[0, 0] = values[0, 1]
    run = jax.jit(lambda v, b: ranked.evaluation_sums(*ranked.by_prompt(v, b), {"x": (1.0, 3.0, 2.0)}))
    halves = [jax.tree.map(lambda x: x[h], (values, b)) for h in (slice(0, 4), slice(4, 8))]  # noqa: B023
    sums, (first, second) = run(values, b), (run(*half) for half in halves)
    both = jax.tree.map(np.add, *map(jax.device_get, (first, second)))
    for name in sums.keys() - {"loss", "weight"}:
        np.testing.assert_allclose(both[name], sums[name], rtol=1e-5, err_msg=name)
    by_prompt: dict = {}
    for row, s, _, _, number, rank in offline.answers(b):
        by_prompt.setdefault((row, number), []).append((float(values[row, s - 1]), rank))
    gaps, agreements, best = [], [], []
    for group in by_prompt.values():
        mine = [a - c for a, i in group for c, j in group if i < j]
        gaps += mine
        agreements.append(np.mean(np.sign(mine)))
        top = [rank for value, rank in group if value == max(v for v, _ in group)]
        best.append(np.mean([rank == min(r for _, r in group) for rank in top]))
    found = ranked.summarize(sums)
    assert found["loss"] == 1.5
    assert found["accuracy"] == pytest.approx(np.mean((np.sign(gaps) + 1) / 2), rel=1e-5)
    assert found["margin"] == pytest.approx(np.mean(gaps), rel=1e-5)
    assert found["rank_agreement"] == pytest.approx(np.mean(agreements), rel=1e-5)
    assert found["best_found"] == pytest.approx(np.mean(best), rel=1e-5)
    sure = 1 / (1 + np.exp(-np.abs(gaps)))
    place = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    error = sum(abs(sum((np.sign(gaps) + 1)[place == i] / 2) - sum(sure[place == i])) for i in range(10)) / len(gaps)
    assert found["calibration_error"] == pytest.approx(error, rel=1e-4)
    assert sum(math.isnan(v) for k, v in found.items() if k.startswith("reliability/")) == 10 - len(set(place))
