"""A reward function's every fault becomes one clear error; values come out as finite floats or None."""

import doctest
import functools
import io
import math
import re
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.feedback.scoring import RewardError, each, name_of, part_metrics, scores, weighted_sum
from tests.source import ROOT

BATCH = (["p"] * 3, ["a", "bb", "ccc"], [{}] * 3)


def size(prompts, completions, metadata):
    return [len(c) for c in completions]


def giving(values):
    def constant(prompts, completions, metadata):
        return values

    return constant


def failing(reward, match, timeout=5.0, batch=BATCH):
    with pytest.raises(RewardError, match=match) as e:
        scores(reward, *batch, timeout)
    assert "\n" not in str(e.value) and isinstance(e.value, UserError)
    return str(e.value)


@pytest.mark.parametrize("timeout", [5.0, None])
def test_numbers_become_floats_and_none_stays(timeout):
    given = [True, None, 3, 0.7, -0.3, Fraction(1, 4), np.float32(0.5), np.int64(2), np.bool_(False), np.array(1.5)]
    found = scores(giving(given), [0] * 10, [0] * 10, [{}] * 10, timeout)
    assert found == [1.0, None, 3.0, 0.7, -0.3, 0.25, 0.5, 2.0, 0.0, 1.5]
    assert all(v is None or type(v) is float for v in found)
    assert scores(giving(np.array([1, 2, 3])), *BATCH, timeout) == scores(giving((1, 2, 3)), *BATCH, timeout)
    assert scores(size, [], [], [], timeout) == []


@pytest.mark.parametrize("timeout", [5.0, None])
@pytest.mark.parametrize(
    "values, match",
    [
        ([1.0, 2.0], "'constant', 3 samples: it returned 2 values"),
        ([1.0] * 4, "returned 4 values"),
        ([1.0, math.nan, 2.0], "sample 1 of 3: it gave nan; a finite number"),
        ([1.0, 2.0, -math.inf], "sample 2 of 3: it gave -inf"),
        ([10**400, 0, 0], "sample 0 of 3: it gave inf"),
        ([0, 1e39, 0], "sample 1 of 3: it gave 1e\\+39; a finite number"),  # no float32 is as large
        ([0.0, "1.0", 0.0], r"sample 1 of 3: it gave '1.0' \(str\)"),
        ([0.0, [1.0], 0.0], r"sample 1 of 3: it gave \[1.0\] \(list\)"),
        ([0.0, 1j, 0.0], "sample 1"),
        (1.0, "it returned float; a list of 3"),
        (None, "it returned NoneType"),
        ("abc", "it returned str"),
        ({0: 1, 1: 1, 2: 1}, "it returned dict"),
        (np.ones((3, 1)), "it returned ndarray"),
        (iter([1, 2, 3]), "it returned list_iterator"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(values, match, timeout):
    failing(giving(values), match, timeout)


@pytest.mark.parametrize("timeout", [5.0, None])
def test_an_exception_is_named_with_its_sample_and_line(timeout):
    def inverse(prompt, completion, metadata):
        return 1 / (len(completion) - 2)

    text = failing(each(inverse), "'inverse', sample 1 of 3: it raised ZeroDivisionError", timeout)
    assert "test_scoring.py:" in text and "division by zero" in text

    def leaves(prompts, completions, metadata):
        raise SystemExit(0)

    failing(leaves, "SystemExit", timeout)


def test_a_batch_function_is_asked_for_each_sample_to_find_the_one_that_it_fails_on():
    calls = []

    def whole(prompts, completions, metadata):
        calls.append(len(completions))
        if "ccc" in completions:
            raise ValueError("three\nlines\nhere")
        return [0.0] * len(completions)

    failing(whole, "sample 2 of 3: it raised ValueError .*: three lines here")
    assert calls == [3, 1, 1, 1]

    def together(prompts, completions, metadata):
        if len(completions) > 1:
            raise ValueError
        return [0.0]

    failing(together, "'together', 3 samples: it raised ValueError")


def test_a_hang_ends_at_the_time_limit_and_says_where():
    over = threading.Event()

    def slow(prompt, completion, metadata):
        if completion == "bb":
            over.wait(30)
        return 0.0

    began = time.monotonic()
    text = failing(each(slow), "'slow', sample 1 of 3: no answer within 0.2 s; it stands at test_scoring.py", 0.2)
    assert time.monotonic() - began < 5 and "in slow" in text
    nested = weighted_sum({"size": (1.0, size), "slow": (1.0, each(slow))})
    failing(nested, "'weighted_sum', part 'slow', sample 1 of 3: no answer", 0.2)
    over.set()


def test_the_caller_is_told_what_is_wrong_with_the_call():
    with pytest.raises(UserError, match="3 prompts, 2 completions, 3 metadata"):
        scores(size, ["p"] * 3, ["a", "b"], [{}] * 3)
    with pytest.raises(UserError, match="positive seconds"):
        scores(size, *BATCH, timeout=0)


def test_a_reward_changes_nothing_of_the_callers():
    def greedy(prompts, completions, metadata):
        metadata[0]["answer"] = completions.pop()
        return [0.0] * 3

    batch = (["p"] * 3, ["a", "b", "c"], [{"answer": 1}, {}, {}])
    scores(greedy, *batch)
    assert batch == (["p"] * 3, ["a", "b", "c"], [{"answer": 1}, {}, {}])


def test_names():
    assert name_of(size) == "size" and name_of(functools.partial(size)) == "size"
    assert name_of(Counting()) == "Counting" and each(lambda p, c, m: 0.0, "zero").__name__ == "zero"


class Counting:
    def __call__(self, prompts, completions, metadata):
        return [0.0] * len(prompts)


# ---------------------------------------------------------------------------------------------------- several parts
def test_parts_are_weighed_and_logged():
    logged = []
    some = giving([1.0, None, 0.0])
    reward = weighted_sum({"size": (0.5, size), "some": (2, some), "unused": (0.0, giving([None] * 3))}, logged.append)
    assert scores(reward, *BATCH) == [2.5, None, 1.5]
    assert logged == [
        {"size": [1.0, 2.0, 3.0], "some": [1.0, None, 0.0], "unused": [None] * 3, "total": [2.5, None, 1.5]}
    ]
    metrics = part_metrics(logged[0])
    assert metrics["reward/some"] == 0.5 and metrics["reward/some/std"] == 0.5
    assert metrics["reward/some/unscored"] == pytest.approx(1 / 3) and metrics["reward/total"] == 2.0
    assert "reward/unused" not in metrics and metrics["reward/unused/unscored"] == 1.0


def test_a_fault_names_its_part():
    for timeout in (5.0, None):
        reward = weighted_sum({"size": (1.0, size), "short": (1.0, giving([1.0]))}, name="sum")
        failing(reward, "reward 'sum', part 'short', 3 samples: it returned 1 values", timeout)
    with pytest.raises(UserError, match="at least one part"):
        weighted_sum({})
    with pytest.raises(UserError, match="'total'"):
        weighted_sum({"total": (1.0, size)})
    with pytest.raises(UserError, match="'size': the weight must be finite"):
        weighted_sum({"size": (math.nan, size)})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.none() | st.floats(-9, 9), min_size=1, max_size=6), st.floats(-3, 3), st.floats(-3, 3))
def test_the_sum_is_linear(values, a, b):
    n = len(values)
    reward = weighted_sum({"x": (a, giving(values)), "y": (b, giving([1.0] * n))})
    for value, total in zip(values, scores(reward, [0] * n, [0] * n, [{}] * n, None), strict=True):
        if value is None and a:
            assert total is None
        else:
            assert total == pytest.approx((a * value if a else 0.0) + b)


# ------------------------------------------------------------------------------------------------------------ guide
def test_the_guides_examples_hold():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(blocks, {}, "docs/rewards.md", None, 0)
    out = io.StringIO()
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=out.write).attempted > 10
    assert not out.getvalue(), out.getvalue()
