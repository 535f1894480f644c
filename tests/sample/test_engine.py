"""The decoder against full forward passes, and what must not depend on a request's neighbours."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import rng
from jaxlm.config import UserError
from jaxlm.nn.transformer import LearnedPositions, apply, unembed
from jaxlm.sample import engine, slots
from jaxlm.sample.engine import Sampling, generate, next_token_distribution
from jaxlm.sample.score import score
from tests.sample.small import TOKENIZER, WINDOWED, random_params

MODEL = WINDOWED
PROMPTS = [TOKENIZER.encode(t) for t in ("a", "hello", "the quick brown fox jumps over", "x" * 20, "12", "() ")]


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@jax.jit
def full_logits(params, tokens_1T):
    positions = jnp.arange(tokens_1T.shape[1])[None]
    return unembed(MODEL, params, apply(MODEL, params, tokens_1T, positions, jnp.ones_like(tokens_1T))[0])[0]


def logits_after(params, tokens):
    padded = jnp.asarray([tokens + [0] * (64 - len(tokens))])  # causal: what follows does not reach back
    return np.asarray(full_logits(params, padded))[len(tokens) - 1]


def run(params, prompts=PROMPTS, **settings):
    slots = settings.pop("slots", 8)
    sample_ids = settings.pop("sample_ids", None)
    return generate(MODEL, params, TOKENIZER, prompts, Sampling(**settings), sample_ids, slots)


def test_greedy_equals_step_by_step_full_passes_and_logprobs_agree(params):
    allowed = engine.allowed_tokens(MODEL, TOKENIZER, Sampling())
    for prompt, completion in zip(PROMPTS, run(params, temperature=0.0, max_tokens=24)):
        tokens = list(prompt)
        for got, logprob in zip(completion.ids, completion.logprobs):
            logits = logits_after(params, tokens)
            assert got == np.argmax(np.where(allowed, logits, -np.inf))
            assert abs(logprob - jax.nn.log_softmax(logits)[got]) < 1e-4
            tokens.append(got)
        assert len(completion.ids) == 24 or completion.ids[-1] == TOKENIZER.eos


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_logprobs_equal_full_passes_at_any_temperature(params, temperature):
    settings = {"temperature": temperature, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "max_tokens": 24}
    for prompt, completion in zip(PROMPTS, run(params, **settings)):
        tokens = list(prompt)
        for got, logprob in zip(completion.ids, completion.logprobs):
            expected = jax.nn.log_softmax(jnp.asarray(logits_after(params, tokens)) / temperature)[got]
            assert abs(logprob - expected) < 1e-4
            tokens.append(got)


def test_score_equals_the_sampler(params):
    completions = run(params, max_tokens=16)
    scored = score(MODEL, params, [p + list(c.ids) for p, c in zip(PROMPTS, completions)], rows=4)
    for prompt, completion, logprobs in zip(PROMPTS, completions, scored):
        np.testing.assert_allclose(logprobs[len(prompt) - 1 :], completion.logprobs, atol=1e-4)


def test_the_draw_is_the_published_key(params):
    """fold_in(seed, SAMPLE, sample id, token index), so that anyone can draw the same token again."""
    completion = run(params, prompts=[PROMPTS[2]], seed=11, sample_ids=[5], max_tokens=8)[0]
    allowed = engine.allowed_tokens(MODEL, TOKENIZER, Sampling())
    tokens = list(PROMPTS[2])
    for i, got in enumerate(completion.ids):
        key = rng.stream_key(jax.random.key(11), rng.SAMPLE, 5, i)
        assert got == jax.random.categorical(key, np.where(allowed, logits_after(params, tokens), -np.inf))
        tokens.append(got)


def test_a_request_does_not_depend_on_its_company(params):
    mine = Sampling(temperature=0.9, top_p=0.95, max_tokens=20, seed=3)
    others = [
        Sampling(temperature=0.0, max_tokens=3),
        Sampling(top_k=2, seed=9, max_tokens=20),
        Sampling(min_p=0.2, max_tokens=1),
        Sampling(max_tokens=20, stop_strings=("e", "a")),
        Sampling(max_tokens=5, stop_ids=(TOKENIZER.encode("z")[0],)),
    ]
    prompt = PROMPTS[2]
    alone = generate(MODEL, params, TOKENIZER, [prompt], mine, [7], slots=8)[0]
    for place in (0, 3, 5):
        prompts = [PROMPTS[i] for i in (0, 1, 3, 4, 5)]
        settings, ids = list(others), [0, 1, 2, 3, 4]
        prompts.insert(place, prompt)
        settings.insert(place, mine)
        ids.insert(place, 7)
        assert generate(MODEL, params, TOKENIZER, prompts, settings, ids, slots=8)[place] == alone  # bit for bit


def test_seeds_and_samples_differ_and_repeat(params):
    a, b, c = (run(params, prompts=[PROMPTS[1]] * 4, seed=s, max_tokens=12) for s in (0, 1, 0))
    assert a == c
    assert len({x.ids for x in a + b}) == 8


def test_first_tokens_follow_the_distribution(params):
    N = 1600
    settings = Sampling(max_tokens=1, temperature=1.0)
    got = generate(MODEL, params, TOKENIZER, [PROMPTS[1]] * N, settings, slots=8)
    counts = np.bincount([c.ids[0] for c in got], minlength=TOKENIZER.vocab_size)
    expected = next_token_distribution(MODEL, params, PROMPTS[1])[: TOKENIZER.vocab_size]
    expected = expected * engine.allowed_tokens(MODEL, TOKENIZER, settings)[: TOKENIZER.vocab_size]
    expected = expected / expected.sum() * N
    big = expected >= 5
    statistic = ((counts[big] - expected[big]) ** 2 / expected[big]).sum()
    assert big.sum() > 10
    assert statistic < big.sum() + 5 * np.sqrt(2 * big.sum())


def test_waves_keep_the_order(params):
    prompts = [TOKENIZER.encode(t) for t in "abcdefghijklmnopqrst"]
    one_by_one = [run(params, prompts=[p], sample_ids=[i], max_tokens=6)[0] for i, p in enumerate(prompts)]
    assert run(params, prompts=prompts, max_tokens=6) == one_by_one


def test_settings_do_not_recompile(params):
    run(params, max_tokens=8)
    before = slots.decode._cache_size(), slots.prefill._cache_size()
    run(params, max_tokens=9, temperature=0.0, stop_ids=(40, 41))
    run(params, max_tokens=30, top_k=3, top_p=0.5, min_p=0.1, seed=77, stop_strings=("q",))
    assert (slots.decode._cache_size(), slots.prefill._cache_size()) == before


def test_a_step_reads_each_layer_where_it_lies():
    """Out of a stack, XLA copies it first: read, written and read again. Counted by the compiler, not timed."""
    cfg = dataclasses.replace(MODEL, layers=4, width=64, heads=2, kv_heads=None, head_width=None, hidden=256)
    params = random_params(cfg)
    scalar, idle = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), bool)
    state = jax.eval_shape(lambda: slots.empty(cfg, B=1, N=32, S=4, capacity=64))

    def moved(params):
        return slots.decode.lower(cfg, params, state, idle, scalar, scalar).compile().cost_analysis()["bytes accessed"]

    blocks = params["backbone"]["blocks"]
    size = sum(x.nbytes for x in jax.tree.leaves(blocks))
    assert moved(params) - moved(engine.laid_out(params)) > size


def test_stops(params):
    free = run(params, prompts=[PROMPTS[1]], max_tokens=24, temperature=1.0, seed=1)[0]
    assert free.finish_reason == "length" and len(free.ids) == 24
    # a stop id ends the row, is part of the ids and not of the text
    at = 10
    stopped = run(params, prompts=[PROMPTS[1]], max_tokens=24, temperature=1.0, seed=1, stop_ids=(free.ids[at],))[0]
    first = free.ids.index(free.ids[at])
    assert stopped.finish_reason == "stop" and stopped.ids == free.ids[: first + 1]
    assert stopped.text == TOKENIZER.decode(free.ids[:first])
    assert stopped.logprobs == free.logprobs[: first + 1]
    # a stop string over several tokens, found between two visits of the device
    string = TOKENIZER.decode(free.ids[9:12])
    cut = run(params, prompts=[PROMPTS[1]], max_tokens=24, temperature=1.0, seed=1, stop_strings=("never!", string))[0]
    assert cut.finish_reason == "stop" and cut.ids == free.ids[: len(cut.ids)]
    assert string in TOKENIZER.decode(cut.ids) and string not in TOKENIZER.decode(cut.ids[:-1])
    assert cut.text == TOKENIZER.decode(free.ids).split(string)[0]


def test_control_tokens_are_sampled_only_when_asked_for(params):
    # A model that wants nothing but control tokens.
    kernel = np.array(params["heads"]["lm"]["kernel"])
    kernel[:, 32:] = 0
    kernel[:, :32] *= 5
    biased = params | {"heads": {"lm": {"kernel": jnp.asarray(kernel)}}}
    think = TOKENIZER.control["<think>"]
    for completion in run(biased, max_tokens=16, stop_ids=(9,)):
        assert all(i >= 32 or i in (TOKENIZER.eos, 9) for i in completion.ids)
    ids = {i for c in run(biased, max_tokens=16, control_ids=(think, 0, 2)) for i in c.ids}
    assert think in ids and not ids & {0, 1, 2}


def test_learned_positions_bound_the_length():
    cfg = dataclasses.replace(MODEL, positions=LearnedPositions(24), layers=1, pattern=("full",), window=None)
    params = random_params(cfg)
    out = generate(cfg, params, TOKENIZER, [[40] * 20, [41] * 24], Sampling(max_tokens=50, temperature=0.0))
    assert [len(c.ids) for c in out] == [5, 1] and all(np.isfinite(c.logprobs).all() for c in out)
    with pytest.raises(UserError, match="25 tokens but the model's learned positions reach 24"):
        generate(cfg, params, TOKENIZER, [[40] * 25], Sampling())


def test_bad_requests_are_one_clear_line(params):
    for settings in ({"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"max_tokens": 0}, {"top_k": -1}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(settings))):
            Sampling(**settings)
    with pytest.raises(UserError, match="prompt is empty"):
        run(params, prompts=[[]])
    with pytest.raises(UserError, match="outside the vocabulary"):
        run(params, prompts=[[5000]])


def test_a_vocabulary_without_padding_loses_no_ordinary_token():
    foreign = types.SimpleNamespace(vocab_size=40, control={"<|endoftext|>": 39}, pad=0, bos=39, eos=39)
    allowed = engine.allowed_tokens(MODEL, foreign, Sampling())
    assert allowed[:40].all() and not allowed[40:].any()  # one token is start and end: as an end it may be sampled
