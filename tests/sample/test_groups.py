"""Requests of one prompt: it is computed once, and each of them gets what it would get had it been computed for it."""

import dataclasses

import numpy as np
import pytest

from jaxlm.nn.transformer import ModelConfig
from jaxlm.sample import engine, slots
from jaxlm.sample.engine import Sampling, generate
from jaxlm.sample.requests import Request
from tests.sample.small import CONVOLVED, TOKENIZER, WINDOWED, random_params
from tests.sample.test_continuous import in_order, mixed_requests, params_of, responder


def in_groups(*sizes, seed=0):
    """Requests of as many prompts as there are sizes, so many of each, out of order. What is longest is each prompt's
    own, the rest each request's."""
    number = np.repeat(np.arange(len(sizes)), sizes)
    prompts, settings, ids = mixed_requests(len(number), seed)
    settings = [dataclasses.replace(s, max_tokens=settings[n].max_tokens) for n, s in zip(number, settings)]
    order = np.random.default_rng(seed).permutation(len(number)).tolist()
    return in_order(order, [prompts[n] for n in number], settings, ids)


# Of 8 slots two are filled at once: 13 prompts in 24 requests have two rows a prefill, 3 prompts one row.
SOME = in_groups(4, 1, 4, 1, 1, 4, 1, 3, 1, 1, 1, 1, 1)
ALL = in_groups(8, 8, 8, seed=1)


@pytest.fixture
def fed(monkeypatch):
    """(rows, tokens a row, prompts among the rows) of each prefill."""
    found, real = [], slots.prefill

    def prefill(cfg, params, state, slot, tokens, lengths, starts):
        found.append((*tokens.shape, int(np.sum((lengths > 0) & (starts == 0)))))
        return real(cfg, params, state, slot, tokens, lengths, starts)

    monkeypatch.setattr(slots, "prefill", prefill)
    return found


def apart(monkeypatch, rows):
    """From here on each request has its prompt computed, by prefills of so many rows."""
    monkeypatch.setattr(Request, "source", property(lambda r: r.index))
    monkeypatch.setattr(engine, "prompt_rows", lambda *_: rows)


def decode(cfg, requests, slots=8):
    return generate(cfg, params_of(cfg), TOKENIZER, *requests, slots, respond=responder())


@pytest.mark.parametrize(
    ("cfg", "requests", "rows"),
    [(WINDOWED, SOME, 2), (CONVOLVED, SOME, 2), (CONVOLVED, ALL, 1)],
    ids=["windowed", "convolved", "one row"],
)
def test_a_shared_prompt_gives_what_each_gives_by_itself(cfg, requests, rows, monkeypatch, fed):
    """Bit for bit, through refills and forced tokens; and each prompt is fed once, whenever its requests come."""
    prompts = {tuple(p) for p in requests[0]}
    want = decode(cfg, requests)
    assert sum(not all(c.sampled) for c in want) > 3
    assert sum(n for *_, n in fed) == len(prompts) and {P for P, _, n in fed if n} == {rows}
    fed.clear()
    apart(monkeypatch, rows)
    assert decode(cfg, requests) == want
    assert sum(n for *_, n in fed) == len(requests[0]) == 24


def test_alone_and_in_a_group():
    """No more is needed for equal bits than equal rows: at four slots a prefill always has one."""
    together = decode(CONVOLVED, ALL, slots=4)
    for i in (0, 11, 23):
        assert decode(CONVOLVED, in_order([i], *ALL), slots=4) == [together[i]]


# ---------------------------------------------------------------------------------------------------------- the cost
TINY = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, hidden=32)


def ask(groups, of, slots=16):
    """So many prompts of 20 tokens, so many requests of each, all of one length."""
    prompts = [[40 + i] * 20 for i in range(groups) for _ in range(of)]
    settings = Sampling(max_tokens=2, temperature=0.0)
    return generate(TINY, random_params(TINY), TOKENIZER, prompts, settings, slots=slots)


def test_a_group_of_eight_costs_an_eighth(fed):
    """Tokens through the model, the empty rows' too: 8 prompts of 8 requests, against 64 different prompts."""
    ask(64, 1)
    different = sum(P * T for P, T, _ in fed)
    fed.clear()
    ask(8, 8)
    assert [x for x in fed if x[2] != 1] == [] and len(fed) == 8
    assert 8 * sum(P * T for P, T, _ in fed) == different == 64 * 32


def test_rows_are_few_numbers():
    """Powers of two up to a quarter of the slots, whatever is asked: so few programs compile."""
    before = slots.prefill._cache_size()
    for groups, of in ((16, 1), (8, 2), (5, 3), (4, 4), (2, 8), (1, 16), (1, 9)):
        ask(groups, of)
    assert slots.prefill._cache_size() - before <= 3
    rows = {engine.prompt_rows(64, n, d, s) for n in range(1, 40) for d in range(1, n + 1) for s in (1, 8, 512)}
    assert rows == {1, 2, 4, 8, 16}
    assert engine.prompt_rows(64, 512, 64) == 2 and engine.prompt_rows(64, 512, 64, shards=8) == 8
    assert engine.prompt_rows(64, 64, 33) == 16 and engine.prompt_rows(2, 8, 1) == 1
