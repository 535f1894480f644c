"""Rejection sampling: the best of what was drawn, the matched control, what cannot be scored, and what is written."""

import json
import math

import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.data.chat_sources import Messages, conversations
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.feedback.records import Policy, Prompt, Response
from jaxlm.feedback.scoring import RewardError, each
from jaxlm.feedback.store import Store
from jaxlm.run import best_of_n
from jaxlm.run.best_of_n import Group, groups, select, write

P, K = 60, 8
value = each(lambda prompt, completion, metadata: float(completion.text), "value")


def group(i: int, values) -> Group:
    prompt = Prompt(Conversation((Message("user", f"question {i}"),)))
    return Group(prompt, tuple(Response("p", Message("assistant", repr(float(v)))) for v in values))


def made(seed: int = 0) -> list[Group]:
    return [group(i, row) for i, row in enumerate(np.random.default_rng(seed).normal(size=(P, K)))]


def test_the_best_are_chosen_and_the_control_is_random_among_the_same():
    found = select(made(), value, n=4, seed=0)
    assert len(found.chosen) == len(found.control) == P and found.left_out == 0
    assert found.best.value >= found.pool.value and found.gain.low > 0.5
    assert found.gain.value == pytest.approx(found.best.value - found.random.value)
    assert abs(found.random.value - found.pool.value) < 3 * found.random.stderr
    assert found.kl == pytest.approx(0.63629, abs=1e-5)
    for a, b in zip(found.chosen, found.control, strict=True):
        assert a.conversation.messages[:-1] == b.conversation.messages[:-1]
        assert float(a.conversation.messages[-1].text) >= float(b.conversation.messages[-1].text)
        assert not a.conversation.messages[0].trained and a.source["kind"] == "best" and b.source["kind"] == "random"


def test_the_chosen_are_distributed_as_order_statistics():
    """The mean of the highest of 4 standard normal draws is 1.0294."""
    means = [select(made(seed), value, n=4, seed=seed).best.value for seed in range(10)]
    assert np.mean(means) == pytest.approx(1.0294, abs=4 * 0.7012 / math.sqrt(10 * P))
    same = select(made(), value, n=1, seed=0)
    assert [x.conversation for x in same.chosen] == [x.conversation for x in same.control]


def test_what_is_drawn_does_not_depend_on_the_other_prompts():
    whole = select(made(), value, n=3, seed=2)
    part = select(made()[20:30], value, n=3, seed=2)
    assert part.chosen == whole.chosen[20:30] and part.control == whole.control[20:30]
    assert select(made(), value, n=3, seed=3).control != whole.control


def test_what_cannot_be_scored_is_not_drawn():
    reward = each(lambda p, c, m: None if float(c.text) < 0 else float(c.text), "positive")
    found = select([group(0, [1, -1, 2, 3]), group(1, [-1, -2, -3, 4])], reward, n=3)
    assert found.left_out == 1 and [float(x.conversation.messages[-1].text) for x in found.chosen] == [3]
    with pytest.raises(UserError, match="none of 1 prompts has 3 answers that could be scored"):
        select([group(1, [-1, -2, -3, 4])], reward, n=3)
    with pytest.raises(RewardError, match="nan"):
        select(made()[:1], each(lambda *a: math.nan, "broken"), n=2)


def test_from_the_store_to_two_files_to_fine_tune_on(tmp_path):
    ids = tuple(BytesTokenizer().encode("9"))
    with Store(":memory:") as store:
        for i in range(3):
            (pid,) = store.add(Prompt(Conversation((Message("user", f"q{i}"),)), {"answer": "4"}))
            for v in range(4):
                about = {"policy": Policy("run", 5, "h"), "finish_reason": "stop"}
                sampled = {"tokens": ids, "logprobs": (-1.0,), "sampled": (True,), "tokenizer": "t"}
                store.add(Response(pid, Message("assistant", f"{v}{i}"), **about, **sampled))
            store.add(Response(pid, Message("assistant", "99"), policy=None))  # a data set's, not the policy's
        found = groups(store)
        assert [len(g.responses) for g in found] == [4, 4, 4]
        seen = []
        reward = each(lambda p, c, m: seen.append((c.completion.ids, m)) or float(c.message.text), "value")
        selected = select(found, reward, n=4)
        assert seen[0] == (ids, {"answer": "4", "finish_reason": "stop"})
        store.add(Response(pid, Message("assistant", "1"), policy=Policy("run", 6, "other")))
        with pytest.raises(UserError, match=r"several checkpoints, run@5, run@6"):
            groups(store)
        assert len(groups(store, "h")) == 3 and len(groups(store, "other")) == 1
    write(selected, tmp_path / "best.jsonl", tmp_path / "random.jsonl")
    read = list(conversations(Messages(str(tmp_path / "best.jsonl"))))
    assert [c.messages[-1].text for c in read] == ["30", "31", "32"]
    assert all(not m.trained for c in read for m in c.messages[:-1])
    lines = [json.loads(x) for x in (tmp_path / "random.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and {x["source"]["kind"] for x in lines} == {"random"}
    assert best_of_n.name_of(reward) == lines[0]["source"]["reward"] == "value"
