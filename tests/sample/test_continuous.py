"""Slots that are refilled, and forced tokens: against full passes, and whatever shares the batch."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.nn.transformer import LearnedPositions
from jaxlm.sample import engine
from jaxlm.sample import slots as device
from jaxlm.sample.engine import Sampling, generate
from tests.sample import watched
from tests.sample.scripted import AUTOMATON, automaton, say, symbol
from tests.sample.small import CONVOLVED, LOUD, TOKENIZER, WINDOWED, assert_follows, random_params


def params_of(cfg):
    return random_params(cfg, loud=True)


@pytest.fixture(params=[WINDOWED, CONVOLVED], ids=["windowed", "convolved"])
def cfg(request):
    return request.param


def mixed_requests(n, seed):
    """(prompts, settings, sample ids): lengths, temperatures, filters, stops and seeds all over the place."""
    g = np.random.default_rng(seed)
    prompts = [g.integers(32, 288, g.integers(1, 30)).tolist() for _ in range(n)]
    settings = [
        Sampling(
            temperature=float(g.choice([0.0, 0.7, 1.3])),
            top_k=int(g.choice([0, 20])),
            max_tokens=int(g.integers(1, 17)),
            max_forced=16,
            stop_ids=LOUD if g.random() < 0.7 else tuple(g.integers(32, 288, g.integers(0, 3)).tolist()),
            stop_strings=("q", "XY") if g.random() < 0.3 else (),
            seed=int(g.integers(0, 9)),
        )
        for _ in range(n)
    ]
    return prompts, settings, g.integers(0, 1000, n).tolist()


def responder(answers=None):
    """Answers, mostly, what stops at a loud id with 0 to 9 tokens; `answers` takes down where and what."""

    def respond(index, ids):
        g = np.random.default_rng(sum(ids) + len(ids))
        if ids[-1] not in LOUD or g.random() < 0.2:
            return None
        answer = g.integers(32, 288, g.integers(0, 10)).tolist()
        if answers is not None:
            answers.setdefault(index, []).append((len(ids), answer))
        return answer

    return respond


def decode(cfg, requests, slots=8, answers=None):
    return generate(cfg, params_of(cfg), TOKENIZER, *requests, slots, respond=responder(answers))


def in_order(order, *columns):
    return [[column[i] for i in order] for column in columns]


def test_more_requests_than_slots_give_what_each_gives_alone(cfg):
    """Bit for bit: in another order, so with other neighbors and in other slots, and with none at all."""
    requests = mixed_requests(30, seed=0)
    want = decode(cfg, requests)
    assert len({len(c.ids) for c in want}) > 8 and {c.finish_reason for c in want} == {"stop", "length"}
    assert sum(not all(c.sampled) for c in want) > 5
    order = np.random.default_rng(1).permutation(30).tolist()
    assert decode(cfg, in_order(order, *requests)) == in_order(order, want)[0]
    forced = next(i for i in range(30) if not all(want[i].sampled))
    for i in (0, forced, 29):
        assert decode(cfg, in_order([i], *requests)) == [want[i]]


@pytest.mark.parametrize("slots, respond", [(8, responder()), (32, None)], ids=["refilled", "all at once"])
def test_what_has_ended_is_told_while_others_decode_on_and_changes_nothing(slots, respond):
    requests, told = mixed_requests(30, seed=0), []
    asked = WINDOWED, params_of(WINDOWED), TOKENIZER, *requests, slots
    want = generate(*asked, respond=respond)
    assert generate(*asked, respond=respond, on_done=told.append) == want
    found = [item for done in told for item in done.items()]
    assert len(told) > 1 and 10 < len(found) < 30 and len(dict(found)) == len(found)
    assert all(want[i] == completion for i, completion in found)


def test_a_host_that_looks_in_between_changes_nothing_and_may_leave(monkeypatch):
    requests, told, looks = mixed_requests(30, seed=0), [], []
    asked, options = (WINDOWED, params_of(WINDOWED), TOKENIZER, *requests, 8), {"respond": responder()}
    want = generate(*asked, **options)
    generate(*asked, **options, between=lambda: looks.append("long"))
    monkeypatch.setattr(engine, "LOOK", 2)
    prefills, prefill = [], device.prefill
    monkeypatch.setattr(device, "prefill", lambda *a: prefills.append(None) or prefill(*a))
    generate(*asked, **options)
    alone = len(prefills)
    assert generate(*asked, **options, on_done=told.append, between=lambda: looks.append("short")) == want
    assert len(prefills) == 2 * alone  # it visits as often, with as many rows to fill
    assert looks.count("short") > looks.count("long") > 3 and len(told) > 1

    def leave():
        left.append(None)
        if len(left) == 3:
            raise InterruptedError

    left = []
    with pytest.raises(InterruptedError):
        generate(*asked, **options, between=leave)
    assert len(left) == 3


def test_refills_and_forced_tokens_say_what_full_passes_say(cfg):
    """The logits after a forced token are those of a prompt that holds it from the start."""
    prompts, settings, ids = mixed_requests(24, seed=5)
    settings, answers = [dataclasses.replace(s, top_k=0) for s in settings], {}
    out = decode(cfg, (prompts, settings, ids), answers=answers)
    given = [answer for each in answers.values() for _, answer in each]
    assert len(given) > 12 and max(map(len, given)) > 5  # longer than the windows
    for i, (prompt, s, sample_id, c) in enumerate(zip(prompts, settings, ids, out)):
        sampled = np.ones(len(c.ids), bool)
        for at, answer in answers.get(i, []):
            if at < len(c.ids):  # otherwise it did not fit
                assert c.ids[at : at + len(answer)] == tuple(answer)
                sampled[at : at + len(answer)] = False
        assert tuple(sampled) == c.sampled and sum(c.sampled) <= s.max_tokens
        assert_follows(cfg, params_of(cfg), prompt, s, sample_id, c)


def test_other_slot_counts_and_buckets_agree_within_rounding(monkeypatch):
    """All logits of every token, within 1e-4; greedy tokens may differ only where the two best are within 1e-3."""
    cfg, prompts = WINDOWED, mixed_requests(6, seed=11)[0]
    params, settings = params_of(cfg), [Sampling(temperature=0.0, max_tokens=20)] * 6
    found = watched.logits(monkeypatch)

    def run(slots, length):
        monkeypatch.setattr(engine, "MIN_PROMPT_BUCKET", length)
        monkeypatch.setattr(engine, "MIN_CAPACITY", 4 * length)
        found.clear()
        out = generate(cfg, params, TOKENIZER, prompts, settings, slots=slots)
        jax.effects_barrier()
        return [c.ids for c in out], dict(found)

    want, logits = run(8, 32)
    assert len(logits) == sum(map(len, want)) > 100 and np.ptp([*logits.values()], axis=1).min() > 1
    for slots, length in ((8, 64), (2, 32)):
        got, other = run(slots, length)
        for i, (a, b) in enumerate(zip(want, got)):
            same = next((t for t, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
            for t in range(min(same + 1, len(a))):  # the first that differs was drawn after the same tokens
                np.testing.assert_allclose(other[i, t], logits[i, t], rtol=0, atol=1e-4)
            if same < len(a):
                best = np.sort(logits[i, same])
                assert best[-1] - best[-2] < 1e-3


def test_buffers_are_given_up_to_the_next_call(monkeypatch):
    """There is one cache on the device, however many calls it goes through."""
    calls = []

    def spied(name):
        real = getattr(device, name)

        def call(*arguments):
            out = real(*arguments)
            [state] = [x for x in arguments if isinstance(x, device.Slots)]
            # On a CPU the host may still be looking at these four, and then they are copied.
            kept = state.replace(count_B=None, finished_B=None, ids_BN=None, logprobs_BN=None)
            calls.append((name, [x.is_deleted() for x in jax.tree.leaves(kept)]))
            others = [x for x in arguments[1:] if x is not state]
            assert not any(x.is_deleted() for x in jax.tree.leaves((others, out)) if isinstance(x, jax.Array))
            return out

        return call

    for name in ("place", "decode"):
        monkeypatch.setattr(device, name, spied(name))
    decode(WINDOWED, mixed_requests(12, seed=2), slots=4)
    assert {name for name, _ in calls} == {"place", "decode"}
    assert all(all(deleted) for _, deleted in calls)


def test_the_loop_ends_when_there_is_something_to_do(monkeypatch):
    """A quarter of the slots while something waits, all of them when nothing does; the prefill samples the first."""
    taken = watched.steps(monkeypatch)

    def steps(*lengths, **options):
        taken.clear()
        settings = [Sampling(max_tokens=n, temperature=0.0) for n in lengths]
        params, prompts = automaton({"a": "c", "c": "a"}, LEARNED), [[symbol("a")]] * len(lengths)
        out = generate(LEARNED, params, TOKENIZER, prompts, settings, slots=4, **options)
        assert [len(c.ids) for c in out] == list(lengths)
        jax.effects_barrier()
        return taken[:]

    assert steps(9, 9, 9, 4, 4) == [3, 5]  # the last waits for the one before it, and then nothing does
    assert steps(12, 4, 4, 4) == [11]
    assert steps(6, 4) == [5]  # slots that nothing is in count as finished
    assert steps(9, 4, chunk=3, on_tokens=lambda i, ids: None) == [3, 3, 2]
    assert steps(9, 5, respond=lambda i, ids: None) == [4, 4]  # an answer may have to be asked for


# ------------------------------------------------------------------------------------------------- by scripted models
LEARNED = dataclasses.replace(AUTOMATON, positions=LearnedPositions(40))


def run(table, answer, prompts=("a",), slots=4, **settings):
    settings = Sampling(**{"temperature": 0.0, "stop_ids": (symbol("b"),)} | settings)
    prompts = [TOKENIZER.encode(p) for p in prompts]
    respond = lambda i, ids: answer(ids)  # noqa: E731
    return generate(LEARNED, automaton(table, LEARNED), TOKENIZER, prompts, settings, slots=slots, respond=respond)


def test_what_no_longer_fits_ends_for_its_length():
    def ends(answer, **settings):
        [c] = run(say("a", "b"), lambda ids: answer and TOKENIZER.encode(answer), **settings)
        return TOKENIZER.decode(c.ids), c.finish_reason

    assert ends(None) == ("b", "stop")
    assert ends("a", max_tokens=5) == ("babababab", "length")  # max_tokens counts what was sampled
    assert ends("xxxa", max_tokens=9, max_forced=11) == ("bxxxabxxxab", "length")  # max_forced what was not
    # Learned positions reach 40 tokens, "a" among them, and one more is sampled there.
    assert ends("xxxxxxxa", max_tokens=30) == (("b" + "x" * 7 + "a") * 4 + "b", "length")
    with pytest.raises(UserError, match="outside the vocabulary"):
        run(say("a", "b"), lambda ids: [5000])


def test_stop_strings_are_looked_for_in_what_was_sampled():
    table = {"a": "b", "b": "c", "c": "a", "x": "y", "y": "z"}
    [c] = run(table, lambda ids: TOKENIZER.encode("..ca..x"), stop_strings=("ca", "yz"))
    assert TOKENIZER.decode(c.ids) == "b..ca..xyz" and c.text == "b..ca..x" and c.finish_reason == "stop"


def test_a_finished_slot_takes_the_next_request_while_others_run():
    """No waves: beside a long request nine short ones go through three slots."""
    said = []
    settings = [Sampling(max_tokens=n, temperature=0.0) for n in (30,) + (4,) * 9]
    out = generate(
        LEARNED, automaton({"a": "c", "c": "a"}, LEARNED), TOKENIZER, [[symbol("a")]] * 10, settings, slots=4, chunk=2,
        respond=lambda i, ids: None, on_tokens=lambda i, ids: said.append((i, ids)),
    )  # fmt: skip
    assert [len(c.ids) for c in out] == [30] + [4] * 9
    last = [max(at for at, (i, _) in enumerate(said) if i == request) for request in range(10)]
    assert max(last[1:]) < last[0]
    for i, c in enumerate(out):
        assert c.ids == tuple(t for j, ids in said for t in ids if j == i)


def test_requests_that_stop_together_are_asked_at_once():
    both = threading.Barrier(2)

    def answer(ids):
        if ids[-1] != symbol("b"):
            return None
        both.wait(timeout=30)  # breaks unless two threads are here
        return [symbol("c")]

    out = run(say("a", "b", "c", "<|end|>"), answer, ["a"] * 4)
    assert [(c.text, c.finish_reason) for c in out] == [("bc", "stop")] * 4
