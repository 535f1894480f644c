"""Doubt in the training loss: where it is learned, what it sums, and that it is not there unless asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import transformer
from jaxlm.steps import pretrain, update
from jaxlm.steps.pretrain import THINK, THINK_END, TURN_END, NextToken, asides, at_hand, inside_thoughts
from tests.steps.offline import DOUBLE, TRAIN, batch, params


def thoughtful():
    """Rows with thoughts: from somewhere to somewhere, in half of the rows two of them; the first ends its turn."""
    plain, rng = batch(), np.random.default_rng(3)
    tokens = np.where(np.isin(plain.tokens, (THINK, THINK_END)), 40, plain.tokens)
    for b in range(len(tokens)):
        for low, high in ((0, 12), (12, 24))[: 1 + b % 2]:
            start, end = sorted(rng.choice(np.arange(low, high), 2, replace=False))
            tokens[b, start], tokens[b, end] = THINK, THINK_END
            tokens[b, end + 1] = TURN_END if low == 0 else 40
    return dataclasses.replace(plain, tokens=tokens, loss_mask=plain.loss_mask | (rng.random(tokens.shape) < 0.7))


def left_open(b):
    """The batch with its thoughts trained on: in every other row but for their ends, in each third but for places at
    random."""
    ends, inside = b.tokens[:, 1:] == THINK_END, np.asarray(inside_thoughts(b.tokens))[:, :-1]
    mask = b.loss_mask.copy()
    mask[:, 1:] |= inside
    mask[::2, 1:] &= ~ends[::2]
    mask[::3, 1:] &= ~inside[::3] | (np.random.default_rng(5).random(inside[::3].shape) < 0.7)
    return dataclasses.replace(b, loss_mask=mask)


def test_a_thought_is_open_from_its_first_symbol_to_the_last_token_before_its_second():
    row = [9, THINK, 9, 9, THINK_END, 9, THINK, THINK_END, 9, THINK, 9]
    assert inside_thoughts(jnp.array([row]))[0].tolist() == [t in (1, 2, 3, 6, 9, 10) for t in range(len(row))]


def test_at_hand_is_what_stands_before_it_in_its_own_conversation():
    plain = batch()
    tokens, segments = np.array([[5, 6, 5, 7, 7, 6, 8]]), np.array([[1, 1, 1, 1, 2, 2, 0]])
    found = at_hand(dataclasses.replace(plain, tokens=tokens, segments=segments))
    assert found.tolist() == [[False, True, False, False, False, False]]  # of 6, 5, 7, 7, 6, 8


def test_a_thought_that_ends_its_turn_is_an_aside_whatever_else_the_row_holds():
    row = [9, THINK, 9, THINK_END, 9, TURN_END, THINK, 9, THINK_END, TURN_END, THINK, 9, THINK_END]
    assert asides(jnp.array([row]))[0].tolist() == [t in (6, 7) for t in range(len(row) - 1)]
    assert not asides(jnp.array([[9, 9, TURN_END, 9]])).any()


@pytest.mark.parametrize("where", ["thoughts", "asides"])
def test_doubt_is_summed_over_thoughts_alone_where_nothing_is_scored_and_beside_the_likelihood_where_they_go_on(where):
    with jax.enable_x64(True):
        b, weights = left_open(thoughtful()), jax.tree.map(lambda x: x.astype("float64"), params(DOUBLE))
        terms, _ = pretrain.make_loss(NextToken(1.5, where), DOUBLE, TRAIN)(weights, b, None)
        hidden, _, _ = transformer.apply(
            DOUBLE, weights, *(jnp.asarray(x)[:, :-1] for x in (b.tokens, b.positions, b.segments))
        )
        p = np.asarray(jax.nn.softmax(transformer.unembed(DOUBLE, weights, hidden)))
        coefficient, total, weight = map(float, terms["doubt"])
    want, count, alone = 0.0, 0, {True: 0, False: 0}
    for row in range(len(p)):
        inside, spans = False, []
        for t in range(p.shape[1]):
            inside = b.tokens[row, t] == THINK or (inside and b.tokens[row, t] != THINK_END)
            if inside and b.tokens[row, t] == THINK:
                spans.append([])
            if inside:
                spans[-1].append(t)
        apart = [span for span in spans if where == "asides" and b.tokens[row, span[-1] + 2] != TURN_END]
        worked = {t for span in apart for t in span}
        partly = {t for span in spans for t in span if not b.loss_mask[row, [u + 1 for u in span]].all()}
        for t in sorted(t for span in spans for t in span):
            here = b.segments[row, : t + 1] == b.segments[row, t + 1]
            known = b.tokens[row, t + 1] in b.tokens[row, : t + 1][here]
            ends, scored = b.tokens[row, t + 1] == THINK_END, b.loss_mask[row, t + 1]
            marker, others = p[row, t, THINK_END], np.delete(p[row, t], THINK_END)
            target = min(1.5 * (1 - others.max() / others.sum()), 1)
            if scored and not ends and not known and t not in partly | worked:
                want -= target * np.log(marker / (1 - marker))
                count += 1
            if not scored:
                want -= target * np.log(marker) + (1 - target) * np.log(1 - marker)
                alone[ends] += 1
    assert count > {"thoughts": 12, "asides": 6}[where] and alone[True] > 0 and alone[False] > 2
    np.testing.assert_allclose(coefficient * total, want, rtol=1e-9)
    assert weight == float(terms["cross_entropy"][2]) == b.loss_mask[:, 1:].sum()


def test_cut_or_whole_the_gradient_is_the_same_and_without_doubt_it_is_the_likelihood():
    with jax.enable_x64(True):
        b, weights = thoughtful(), jax.tree.map(lambda x: x.astype("float64"), params(DOUBLE))
        found = {}
        for name, objective, chunk, parts in (
            ("whole", NextToken(doubt=1.0), None, 1),
            ("cut", NextToken(doubt=1.0), 7, 4),
            ("none", NextToken(), None, 1),
        ):
            loss = pretrain.make_loss(objective, DOUBLE, dataclasses.replace(TRAIN, loss_chunk=chunk))
            found[name] = update.gradients(loss, weights, b, jax.random.key(0), parts, "float64")
        for x, y in zip(*(jax.tree.leaves(found[n][0]) for n in ("whole", "cut")), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10)
        assert set(found["none"][1][1]) == {"cross_entropy"}
        moved = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.abs(x - y).max(), found["whole"][0], found["none"][0]))
        assert max(moved) > 1e-3
