"""Speculative decoding: the target's tokens and probabilities, whatever the draft is."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxlm import sharding
from jaxlm.config import UserError
from jaxlm.nn.transformer import LearnedPositions, ModelConfig, abstract, specs
from jaxlm.sample import engine, speculative
from jaxlm.sample.engine import Sampling
from jaxlm.sample.speculative import Acceptance, Draft
from launch.bench_decode import Numbers
from tests.sample.small import CONVOLVED, LOUD, TOKENIZER, full_logits, random_params
from tests.sample.test_continuous import in_order, mixed_requests, responder
from tests.sample.test_groups import SOME, apart
from tests.sample.test_logits import chi_square

K = 3
REQUESTS = mixed_requests(24, seed=3)
CFG = CONVOLVED  # all that has to be taken back: a whole cache, a ring, and last inputs
PARAMS = random_params(CFG, loud=True)


@functools.cache
def draft_of(noise):
    """The target's parameters, disturbed: by little it mostly agrees, by much it does not."""
    return Draft(CFG, jax.tree.map(lambda x, y: x + noise * y, PARAMS, random_params(CFG, 5)), K)


def run(requests, draft, slots=8, **options):
    prompts, sampling, ids = requests
    return speculative.generate(CFG, PARAMS, TOKENIZER, prompts, sampling, draft, ids, slots, **options)


def plain(requests, slots=8, **options):
    return engine.generate(CFG, PARAMS, TOKENIZER, *requests, slots, **options)


def changed(requests, **changes):
    return requests[0], [dataclasses.replace(s, **changes) for s in requests[1]], requests[2]


# --------------------------------------------------------------------------------------------------------- the rule
V = 5
weights = arrays(np.float32, V, elements=st.one_of(st.just(0.0), st.floats(2**-10, 1, width=32)))
distributions = weights.filter(lambda w: w.sum() > 0).map(lambda w: w / w.sum())


@given(distributions, distributions)
@settings(max_examples=200, deadline=None)
def test_what_is_kept_and_what_replaces_it_are_together_the_target(p, q):
    kept = q * np.minimum(1, p / np.where(q > 0, q, 1))
    instead = np.asarray(speculative.residual(p[None], q[None]))[0]
    assert instead.min() >= 0 and abs(instead.sum() - 1) < 1e-5
    np.testing.assert_allclose(kept + (1 - kept.sum()) * instead, p, atol=1e-6)


def test_judged_tokens_follow_the_target_at_every_place():
    """20,000 rows of two drafted tokens whose distributions differ much from the target's, some with zeros."""
    N, T = 20_000, 3
    g = np.random.default_rng(0)
    p_TV, q_TV = (g.dirichlet(np.full(V, 0.5), T).astype(np.float32) for _ in range(2))
    p_TV[1, 0] = q_TV[1, 1] = 0
    p_TV, q_TV = (x / x.sum(-1, keepdims=True) for x in (p_TV, q_TV))
    whole = lambda x: jnp.broadcast_to(x, (N, *x.shape))  # noqa: E731
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(jax.random.key(1), i), T))(jnp.arange(N))
    # Drawn with the same keys, as a draft does: what the judgement draws must not hang on it.
    draws = jax.vmap(jax.vmap(jax.random.categorical), in_axes=(0, None))
    drafted = draws(keys[:, :2], jnp.log(q_TV[:2]))
    tokens, kept = jax.jit(speculative.judge)(keys, whole(p_TV), whole(q_TV[:2]), drafted, jnp.ones(N))
    tokens, kept = np.asarray(tokens), np.asarray(kept)
    chance = np.minimum(p_TV, q_TV).sum(-1)[:2]
    assert abs((kept > 0).mean() - chance[0]) < 0.02 and abs((kept > 1).mean() - chance.prod()) < 0.02
    for t in range(T):
        said = tokens[kept >= t, t]
        statistic, freedom = chi_square(np.bincount(said, minlength=V), p_TV[t])
        assert len(said) > 500 and statistic < freedom + 5 * np.sqrt(2 * freedom), t


# ------------------------------------------------------------------------------------------------ whole completions
# Window and full layers, positions that end, and a draft of another depth.
TINY = ModelConfig(
    vocab_size=4, layers=2, width=16, heads=2, pattern=("window", "full"), window=2, positions=LearnedPositions(8)
)
SMALLER = dataclasses.replace(TINY, layers=1)
TARGET, PROPOSER = (jax.tree.map(lambda x: x * 0.6, random_params(cfg, 3)) for cfg in (TINY, SMALLER))
STOP = 3


def tiny(prompts, s, params=(TARGET, PROPOSER), **options):
    draft = Draft(SMALLER, params[1], 2)
    return speculative.generate(TINY, params[0], Numbers(4), prompts, s, draft, slots=64, **options)


def exact(prompt, s: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of each completion, from the logits of full passes."""
    found = {}

    def go(ids, probability):
        if len(ids) == s.max_tokens or STOP in ids:
            found[ids] = probability
            return
        scaled = np.full(TINY.vocab_size, -np.inf)
        logits = full_logits(TINY, TARGET, [*prompt, *ids], 8)[-1, : TINY.vocab_size] / s.temperature
        best = np.argsort(-logits)[: s.top_k or None]
        scaled[best] = logits[best]
        p = np.exp(scaled - scaled.max())
        for i in best:
            go((*ids, int(i)), probability * p[i] / p.sum())

    go((), 1.0)
    return found


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.4, 3)])
def test_completions_have_the_probabilities_of_the_target(temperature, top_k):
    N, prompt = 3000, [0, 1, 2, 0]
    s = Sampling(temperature=temperature, top_k=top_k, max_tokens=4, stop_ids=(STOP,))
    expected = exact(prompt, s)
    assert len(expected) > 30 and abs(sum(expected.values()) - 1) < 1e-5
    out, worth = tiny([prompt] * N, s)
    assert 0.2 < worth.rate < 0.9  # both ways of getting a token have their part
    place = {ids: i for i, ids in enumerate(expected)}
    counts = np.bincount([place[c.ids] for c in out], minlength=len(place))
    statistic, freedom = chi_square(counts, np.array([*expected.values()]))
    assert freedom > 15 and statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_greedy_tokens_are_those_of_the_engine():
    """Through stops, limits, stop strings, forced tokens and refilled slots, with drafts good and bad."""
    requests = changed(REQUESTS, temperature=0.0)
    want = plain(requests, respond=responder())
    assert {c.finish_reason for c in want} == {"stop", "length"} and sum(not all(c.sampled) for c in want) > 5
    for noise, low, high in ((2.0, 0, 0.3), (0.03, 0.3, 0.95)):
        got, worth = run(requests, draft_of(noise), respond=responder())
        assert low <= worth.rate < high
        for a, b in zip(want, got):
            assert dataclasses.replace(a, logprobs=()) == dataclasses.replace(b, logprobs=())
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_a_draft_that_is_the_target_is_never_refused():
    """The engine's tokens, in the fewest steps: so its cache is right behind stops and forced tokens too."""
    draft = draft_of(0.0)
    got, worth = run(REQUESTS, draft, respond=responder())
    assert [c.ids for c in got] == [c.ids for c in plain(REQUESTS, respond=responder())]
    free = changed(REQUESTS, stop_strings=())  # which cut between two looks of the host
    got, worth = run(free, draft, respond=lambda i, ids: [40 + i] * (1 + i % 7) if ids[-1] in LOUD else None)
    # The prefill gives the first token of each stretch.
    stretches = [len(list(g)) for c in got for sampled, g in itertools.groupby(c.sampled) if sampled]
    assert sum(not all(c.sampled) for c in got) > 5 and worth.tokens == sum(stretches) - len(stretches)
    assert worth.steps == sum(-(-(n - 1) // (K + 1)) for n in stretches)
    _, worth = run(changed(free, stop_ids=()), draft)
    assert worth.rate == 1.0 and worth.drafted > 100


def test_logprobs_are_those_of_full_passes():
    """At any temperature, behind refused and forced tokens: the cache holds what was kept, and nothing else."""
    requests = changed(REQUESTS, seed=3)
    out, worth = run(requests, draft_of(0.03), respond=responder())
    assert 0.2 < worth.rate < 0.95 and sum(not all(c.sampled) for c in out) > 5
    for prompt, s, c in zip(requests[0], requests[1], out):
        logits = full_logits(CFG, PARAMS, [*prompt, *c.ids])[len(prompt) - 1 : -1]
        logprobs = np.asarray(jax.nn.log_softmax(logits / (s.temperature or 1.0)))
        want = np.where(c.sampled, logprobs[np.arange(len(c.ids)), c.ids], 0)
        np.testing.assert_allclose(c.logprobs, want, atol=1e-4)
        assert sum(c.sampled) <= s.max_tokens


def test_a_request_does_not_depend_on_its_company():
    """Bit for bit: in another order and alone, with forced tokens; and other seeds say something else."""
    draft = draft_of(0.03)
    want, _ = run(REQUESTS, draft, respond=responder())
    order = np.random.default_rng(1).permutation(len(want)).tolist()
    assert run(in_order(order, *REQUESTS), draft, respond=responder())[0] == in_order(order, want)[0]
    forced = next(i for i, c in enumerate(want) if not all(c.sampled))
    for i in (0, forced):
        assert run(in_order([i], *REQUESTS), draft, respond=responder())[0] == [want[i]]
    warm = [Sampling(max_tokens=16, seed=seed) for seed in (1, 1, 2, 2)]
    assert len({c.ids for c in run(([[40]] * 4, warm, [0, 1, 0, 1]), draft)[0]}) == 4


def test_a_shared_prompt_is_fed_to_both_models_once(monkeypatch):
    """And each request gets, bit for bit, what it gets when the prompt is fed for it alone."""
    fed, real = [], speculative.prefill

    def prefill(*arguments):
        *_, lengths, starts = arguments
        fed.append(int(np.sum((lengths > 0) & (starts == 0))))
        return real(*arguments)

    monkeypatch.setattr(speculative, "prefill", prefill)
    want, worth = run(SOME, draft_of(0.03), respond=responder())
    assert sum(fed) == len({tuple(p) for p in SOME[0]}) == 13 and 0.2 < worth.rate < 0.95
    fed.clear()
    apart(monkeypatch, rows=2)
    assert run(SOME, draft_of(0.03), respond=responder()) == (want, worth) and sum(fed) == 24


def test_learned_positions_bound_both_models():
    prompts, s = [[1] * n for n in range(1, 9)], Sampling(max_tokens=50, temperature=0.0)
    want = engine.generate(TINY, TARGET, Numbers(4), prompts, s)
    got, _ = tiny(prompts, s)
    assert [c.ids for c in got] == [c.ids for c in want] and [len(c.ids) for c in got] == [*range(8, 0, -1)]
    short = Draft(dataclasses.replace(SMALLER, positions=LearnedPositions(7)), {})
    with pytest.raises(UserError, match=r"1 \+ 8 tokens but the draft's learned positions reach 7"):
        speculative.generate(TINY, TARGET, Numbers(4), prompts, s, short)


def test_several_devices_say_what_one_says():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
    where = [sharding.tree_shardings(mesh, specs(cfg), abstract(cfg)) for cfg in (TINY, SMALLER)]
    prompts, s = [[i % 4, 1, 2] for i in range(32)], [Sampling(temperature=t, max_tokens=6) for t in (0.0, 0.8)] * 16
    want, alone = tiny(prompts, s)
    got, together = tiny(prompts, s, jax.device_put((TARGET, PROPOSER), tuple(where)), mesh=mesh)
    assert [c.ids for c in got] == [c.ids for c in want] and together == alone and 0.2 < alone.rate < 0.9


def test_bad_drafts_are_one_clear_line():
    other = dataclasses.replace(CFG, vocab_size=300)
    with pytest.raises(UserError, match="a vocabulary of 300 and the target one of 288: they must have the same tok"):
        run(([[40]], [Sampling()], [0]), Draft(other, {}))
    with pytest.raises(UserError, match="at least 1 token a step, got 0"):
        Draft(CFG, {}, 0)
    assert run(([], [], []), draft_of(0.03)) == ([], Acceptance())
