"""Rollouts: a sample hangs on its own address alone; rows hold every sequence once; rewards come as they are given."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.prompts import Prompt
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.trajectory import Trajectory
from jaxlm.feedback import parts
from jaxlm.nn.transformer import ModelConfig
from jaxlm.steps import rollout
from jaxlm.steps.rollout import Sampler
from jaxlm.tools import Tool
from tests.tiny_run import random_params

TOKENIZER = BytesTokenizer()
MODEL = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2)
SAMPLER = Sampler(MODEL, TOKENIZER, context=64, max_tokens=6, slots=4)
PARAMS = random_params(MODEL, scale=0.2)


def texts(*asked):
    return [Prompt(text, {"answer": "x"}, str(i)) for i, text in enumerate(asked)]


@pytest.fixture(scope="module")
def four():
    return rollout.sample(SAMPLER, PARAMS, texts("abc", "de"), 2, 0.7, seed=3)


def said(samples):
    return [(s.place, s.rank, s.reply.completion.ids, s.reply.completion.logprobs) for s in samples]


# ----------------------------------------------------------------------------------------------------- the sampling
def test_samples_of_a_prompt_stand_together_and_differ(four):
    assert [(s.place, s.rank) for s in four] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({s.reply.completion.ids for s in four}) == 4
    assert all(0 < s.length <= 6 and s.temperature == 0.7 for s in four)
    assert four[0].prompt_ids == (TOKENIZER.bos, *TOKENIZER.encode("abc"))


def test_the_same_seed_gives_the_same_and_another_another(four):
    again = rollout.sample(SAMPLER, PARAMS, texts("abc", "de"), 2, 0.7, seed=3)
    assert said(again) == said(four)
    other = rollout.sample(SAMPLER, PARAMS, texts("abc", "de"), 2, 0.7, seed=4)
    assert all(a.reply.completion.ids != b.reply.completion.ids for a, b in zip(other, four))


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_what_has_ended_is_told_as_the_samples_that_are_given(chat):
    asked = texts("abc", "de", "f", "gh")
    if chat:
        asked = [dataclasses.replace(p, asked=Conversation((Message("user", p.asked),))) for p in asked]
    told = []
    found = rollout.sample(SAMPLER, PARAMS, asked, 2, 1.3, seed=3, on_done=told.extend)
    assert 0 < len(told) < len(found) and all(x in found for x in told)


def test_a_sample_hangs_on_its_place_and_rank_not_on_the_others(four):
    """The second prompt alone, at its place: the same replies."""
    alone = rollout.sample(SAMPLER, PARAMS, texts("abc", "de")[1:], 2, 0.7, seed=3, first=1)
    assert [(s.place, s.rank, s.reply.completion.ids) for s in alone] == [x[:3] for x in said(four)[2:]]


def test_steps_and_streams_have_seeds_of_their_own():
    seeds = {rollout.seed_of(s, stream, n) for s in (0, 1, -1) for stream in (3, 4) for n in range(50)}
    assert len(seeds) == 300 and all(0 <= s < 2**32 for s in seeds)


def test_a_prompt_without_room_is_refused():
    with pytest.raises(
        UserError, match=r"prompt 0: it has 60 tokens, and 58 fit: data.context=64 less objective.max_tokens=6"
    ):
        rollout.sample(SAMPLER, PARAMS, texts("x" * 59), 1, 1.0, seed=0)
    asked = Prompt(Conversation((Message("user", "x" * 59),)), {}, "a:7")
    with pytest.raises(
        UserError, match=r"prompt a:7: the prompt has \d+ tokens even.*and 58 fit: data.context=64 less"
    ):
        rollout.sample(SAMPLER, PARAMS, [asked], 1, 1.0, seed=0)


def test_conversations_are_answered_with_tools_whose_tokens_are_not_the_policys():
    """The model cannot be made to call, so the call is put into its mouth: what counts is what becomes of it."""
    prompt = Prompt(Conversation((Message("user", "hi"),)), {}, "0")
    sampler = dataclasses.replace(SAMPLER, context=128, tools={"t": Tool("t", "", lambda text: "r")})
    (s,) = rollout.sample(sampler, PARAMS, [prompt], 1, 1.0, seed=0)
    c = s.reply.completion
    forced = dataclasses.replace(c, ids=(40, 41, 42), logprobs=(-1.0, 0.0, -2.0), sampled=(True, False, True))
    s = dataclasses.replace(s, reply=dataclasses.replace(s.reply, completion=forced))
    columns = rollout.columns(s)
    assert s.length == 2 and len(columns["tokens"]) == len(s.prompt_ids) + 3
    assert columns["sampled_by_policy"].tolist() == [False] * len(s.prompt_ids) + [True, False, True]
    assert columns["rollout_logprobs"].tolist()[-3:] == [-1.0, 0.0, -2.0]
    assert set(columns["temperature"]) == {1.0}


# --------------------------------------------------------------------------------------------------------- rewards
def test_a_reward_function_is_told_what_it_may_need(four):
    def reward(prompts, completions, metadata):
        assert prompts == ["abc", "abc", "de", "de"] and all(m["answer"] == "x" for m in metadata)
        assert [m[parts.ADDRESS] for m in metadata] == ["7/0/0", "7/0/1", "7/1/0", "7/1/1"]
        assert [m["tokens"] for m in metadata] == [s.length for s in four]
        assert {m["finish_reason"] for m in metadata} <= {"stop", "length"}
        return [0.7, -0.3, None, 1]

    assert rollout.score(reward, four, 7, None, "r") == [0.7, -0.3, None, 1.0]
    with pytest.raises(UserError, match="'r', sample 2 of 4: it gave nan"):
        rollout.score(lambda *_: [0.0, 0.0, float("nan"), 0.0], four, 7, None, "r")


# ------------------------------------------------------------------------------------------------------------ rows
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), spare=st.integers(0, 3))
def test_rows_hold_every_sequence_once_and_whole(lengths, spare):
    rng = np.random.default_rng(lengths)
    sequences = [{"tokens": rng.integers(1, 99, n).astype(np.int32), "rewards": rng.normal(size=n)} for n in lengths]
    rows = rollout.layout(lengths, 20)
    batch = rollout.arrange(sequences, rows, len(rows) + spare, 20)
    assert isinstance(batch, Trajectory) and batch.tokens.shape == (len(rows) + spare, 20)
    assert (batch.segments > 0).sum() == sum(lengths) and not batch.tokens[batch.segments == 0].any()
    for s, tokens, rewards, positions in zip(
        sequences, *(rollout.gathered(x, sequences, rows) for x in (batch.tokens, batch.rewards, batch.positions))
    ):
        np.testing.assert_array_equal(tokens, s["tokens"])
        np.testing.assert_array_equal(rewards, s["rewards"])
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
    changes = np.diff(batch.segments, axis=1)
    assert ((changes >= 0) | (batch.segments[:, 1:] == 0)).all() and (changes <= 1).all()


def test_padding_has_a_temperature_that_divides():
    batch = rollout.arrange([{"tokens": np.ones(2, np.int32), "temperature": np.full(2, 0.5, np.float32)}], [[0]], 2, 4)
    assert batch.temperature.tolist() == [[0.5, 0.5, 1.0, 1.0], [1.0] * 4]


def test_row_counts_are_few_and_near():
    counts = {rollout.row_count(n, 4) for n in range(1, 1000)}
    assert len(counts) < 40 and all(c % 4 == 0 for c in counts)
    assert all(n <= rollout.row_count(n, 1) <= max(n, 1.25 * n) for n in range(1, 1000))
