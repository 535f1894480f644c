"""Candidate answers in a trace and what became of them; pass@k and majority vote."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.feedback.passk import majority, majority_rate, majority_right, pass_at_k, pass_rates
from jaxlm.feedback.reasoning import attempts, candidates, last_number, lengths, lines, self_correction, traced
from jaxlm.feedback.verifiers import numeric


# ------------------------------------------------------------------------------------------------------ candidates
@pytest.mark.parametrize(
    "trace, values",
    [
        ("3 + 4 = 7\n7 * 2 = 15\nwait, 7 * 2 = 14", [15, 14]),  # results on the way are no candidates
        ("3 + 4 = 7\n7 * 2 = 14", [14]),
        ("It is 5. No, 6.\nActually 6 again", [5, 6, 6]),
        ("5\nHold on. Let me check: 2 + 3 = 5", [5, 5]),
        ("5; but wait, 6", [5, 6]),
        ("It is 5! Hmm... 7", [5, 7]),
        ("There is no wait of 5 minutes", [5]),  # a word of doubt inside a sentence is none
        ("5\nNo apples are left: 0", [0]),
        ("5\nno\n6", [5, 6]),
        ("waiting for 5. Nothing, 6", [6]),
        ("Wait. Nothing here. Wait, 1,000.", [1000]),
        ("about 3/4 or 50%", [Fraction(1, 2)]),
        ("nothing", []),
        ("", []),
    ],
)
def test_candidates(trace, values):
    assert candidates(trace) == values
    assert "".join(attempts(trace)) == (trace if trace.strip() else "")


def test_other_rules():
    trace = "so 3\n\nno: 4\nthen 4"
    assert lines(trace) == ["so 3", "no: 4", "then 4"] and candidates(trace, lines) == [3, 4, 4]
    city = lambda text: "Rome" if "Rome" in text else None  # noqa: E731
    assert candidates("Rome. Wait, Paris. Actually Rome", read=city) == ["Rome", "Rome"]
    assert last_number("x5 5x a_5 \u0665") is None and last_number("it is 7, or 8.") == 8
    assert last_number("1.5kg, 1,234kg, 3/4ths, 12.50each, 50%s") is None
    assert [last_number(f"it is {n}") for n in ("7,so", "1,234,", "7.", "3/4.")] == [7, 1234, 7, Fraction(3, 4)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from(["wait, ", "No, ", "Actually ", "Oops: "]))
def test_what_is_written_is_read(values, doubt):
    assert candidates(f". {doubt}".join(map(str, values)) + ".") == values
    assert candidates(f"\n{doubt}".join(f"1 + 1 = {v}" for v in values)) == values


# -------------------------------------------------------------------------------------------------- self-correction
def trace_of(*values, answer=None):
    text = "\nwait, ".join(map(str, values))
    return traced(text, lambda v: numeric(str(v), "7"), values[-1] if values and answer is None else answer)


def test_changes_for_better_and_worse():
    samples = [
        trace_of(5, 7), trace_of(7, 5), trace_of(5, 6), trace_of(7, 7), trace_of(7), trace_of(5, 6, 7),
        trace_of(5, 7, 5), trace_of(5, answer=7), trace_of(),
    ]  # fmt: skip
    assert samples[5].changes == [(False, False), (False, True)] and samples[3].changes == []
    found = self_correction(samples, [0, 0, 1, 1, 2, 2, 3, 3, 4])
    value = {name: e["value"] for name, e in found.items() if isinstance(e, dict) and "value" in e}
    assert found["traces"] == 9 and value["unsaid"] == pytest.approx(1 / 9)
    assert value["reconsidered"] == 6 / 8 and value["changed"] == 5 / 8
    assert value["better"] == 2 / 8 and value["worse"] == 1 / 8 and value["sideways"] == 1 / 8
    assert value["first_right"] == 3 / 8 and value["last_right"] == 4 / 8 and value["gain"] == 1 / 8
    assert value["kept"] == 7 / 8
    single = found["of_changes"]
    assert single["n"] == 7
    assert [single[k]["value"] for k in ("better", "worse", "sideways")] == pytest.approx([3 / 7, 2 / 7, 2 / 7])
    assert found["better"]["n"] == 8 and found["better"]["low"] < 0.25 < found["better"]["high"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([5, 6, 7]), max_size=4), min_size=1, max_size=8))
def test_gain_is_better_minus_worse(all_values):
    found = self_correction([trace_of(*v) for v in all_values], range(len(all_values)))
    if found["gain"] is None:
        assert not any(all_values) and found["unsaid"]["value"] == 1.0
    else:
        value = {k: found[k]["value"] for k in ("gain", "better", "worse", "first_right", "last_right")}
        assert value["gain"] == pytest.approx(value["better"] - value["worse"])
        assert value["gain"] == pytest.approx(value["last_right"] - value["first_right"])


def test_errors_go_together_within_a_prompt():
    samples = [trace_of(5, 7)] * 8 + [trace_of(7)] * 8
    alone = self_correction(samples, range(16))["better"]["stderr"]
    together = self_correction(samples, [0] * 8 + [1] * 8)["better"]["stderr"]
    assert together == pytest.approx(alone * np.sqrt(8))
    with pytest.raises(UserError, match="1 traces and 2 prompts"):
        self_correction(samples[:1], [0, 1])
    with pytest.raises(UserError, match="at least one"):
        self_correction([], [])


def test_lengths_of_traces():
    samples = [traced("x" * n, bool, tokens=t) for n, t in [(4, None), (9, 10), (0, None), (5, 20)]]
    found = lengths(samples, [True, True, False, False], range(4))
    assert found["mean"]["value"] == 8.5 and found["empty"]["value"] == 0.25
    assert found["of_right"]["value"] == 7.0 and found["of_wrong"]["value"] == 10.0
    assert found["quantiles"] == {10: pytest.approx(1.2), 50: 7.0, 90: pytest.approx(17.0), 100: 20.0}
    assert lengths(samples[:1], [True], [0])["of_wrong"] is None
    with pytest.raises(UserError, match="1 traces, 2 verdicts"):
        lengths(samples[:1], [True, False], [0])


# ---------------------------------------------------------------------------------------------------------- pass@k
def test_pass_at_k_of_three_in_ten():
    assert [round(pass_at_k(10, 3, k), 4) for k in (1, 5, 8)] == [0.3, 0.9167, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_all_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    hits = [any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)]
    assert pass_at_k(n, c, k) == pytest.approx(np.mean(hits))
    if k > 1:
        assert pass_at_k(n, c, k) >= pass_at_k(n, c, k - 1)


def test_pass_at_k_is_exact_for_many_samples_and_refuses_what_it_cannot_say():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-9)
    for n, c, k in [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)]:
        with pytest.raises(UserError, match="needs 1 <= k <= n"):
            pass_at_k(n, c, k)


def test_pass_rates_over_prompts():
    right = [[True] * 3 + [False] * 7, [False] * 4, [True, True, False, False]]
    found = pass_rates(right, (1, 4), clusters=["a", "a", "b"])
    assert found[1].value == pytest.approx((0.3 + 0 + 0.5) / 3) and found[1].n == 3
    assert found[4].value == pytest.approx((1 - 35 / 210 + 0 + 1) / 3)
    by_prompt = pass_rates(right, (1,))[1]
    spread = np.array([0.3, 0.0, 0.5]) - by_prompt.value
    assert by_prompt.stderr == pytest.approx(np.sqrt((spread**2).sum()) / 3)
    assert found[1].stderr == pytest.approx(np.sqrt((spread[0] + spread[1]) ** 2 + spread[2] ** 2) / 3)
    with pytest.raises(UserError, match="pass@5"):
        pass_rates(right, (5,))
    with pytest.raises(UserError, match="at least one prompt"):
        pass_rates([], (1,))


# -------------------------------------------------------------------------------------------------------- majority
def test_majority_and_its_ties():
    assert majority([7, 8, 7, None, None, None]) == [7] and majority(["b", "a"]) == ["b", "a"]
    assert majority([None]) == [] and majority([]) == []
    assert majority_right([7, 7, 8], [True, True, False]) == 1.0
    assert majority_right([7, 8, 8], [True, False, False]) == 0.0
    assert majority_right([7, 8], [True, False]) == 0.5
    assert majority_right([7, 8, 9], [True, False, False]) == pytest.approx(1 / 3)
    assert majority_right([None, None, 7], [False, False, True]) == 1.0
    assert majority_right([None], [False]) == 0.0
    with pytest.raises(UserError, match="right in one sample and wrong in another"):
        majority_right([7, 7], [True, False])
    with pytest.raises(UserError, match="2 answers and 1 verdicts"):
        majority_right([7, 7], [True])
    found = majority_rate([[7, 8], [7, 7]], [[True, False], [True, True]])
    assert found.value == 0.75 and found.n == 2
