"""Go where there is something to learn from a reward that means it, and no-go, with the reason, where there is not."""

import itertools
import math

import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.data.conversation import Message, Part
from jaxlm.feedback.scoring import each, weighted_sum
from jaxlm.feedback.shaping import format_reward
from jaxlm.feedback.verifiers import numeric, verified
from jaxlm.run.preflight import (
    Preflight,
    judged,
    leak_check,
    no_spread,
    parity_check,
    reward_checks,
    rollout_checks,
    table,
)


def rollout(groups, **common):
    """Records of groups given by their rewards; right where it is 1."""
    base = {"formatted": True, "truncated": False} | common
    return [
        {"group": i, "reward": r, "right": None if r is None else r == 1} | base
        for i, rewards in enumerate(groups)
        for r in rewards
    ]


def by_name(checks):
    return {c.name: c for c in checks}


def test_a_healthy_rollout_goes():
    found = by_name(rollout_checks(rollout([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]), k=4))
    assert {c.verdict for c in found.values()} == {"ok"} and Preflight(tuple(found.values())).go
    assert found["pass@1"].value == pytest.approx(0.25) and found["pass@4"].value == pytest.approx(2 / 3)
    assert found["groups without spread"].value == pytest.approx(1 / 3)
    assert found["format rate"].value == 1 and found["truncated"].value == found["unscored"].value == 0


@pytest.mark.parametrize(
    "records, name, verdict, why",
    [
        (rollout([[0] * 4] * 9), "pass@4", "no-go", "right answer to reinforce"),
        (rollout([[0] * 4] * 30 + [[1, 0, 0, 0]]), "pass@4", "warn", "right answer to reinforce"),
        (rollout([[1] * 4] * 9), "pass@1", "warn", "little to learn"),
        (rollout([[1] * 4] * 9), "groups without spread", "no-go", "wasted"),
        (rollout([[1, 0, 0, 0]] + [[0] * 4] * 4), "groups without spread", "warn", "wasted"),
        (rollout([[1, 0, 0, 0]] * 9, formatted=False), "format rate", "no-go", "hardly knows the format"),
        (rollout([[1, 0, 0, 0]] * 9, truncated=True), "truncated", "no-go", "token limit"),
        (rollout([[1, 0, 0, 0], [None] * 4, [None] * 4]), "unscored", "no-go", "no reward"),
        (rollout([[1, 0, 0, None]] * 4), "unscored", "warn", "no reward"),
    ],
)
def test_what_is_wrong_with_a_rollout_is_said(records, name, verdict, why):
    checks = rollout_checks(records, k=4)
    found = by_name(checks)[name]
    assert found.verdict == verdict and why in found.why
    assert Preflight(tuple(checks)).go == all(c.verdict != "no-go" for c in checks)


def test_spread_is_of_the_rewards_themselves():
    assert no_spread(rollout([[10.1] * 9])) == 1.0  # whose standard deviation in float32 is not 0
    assert no_spread(rollout([[0.0, 1e-9]])) == 0.0
    assert no_spread(rollout([[1, None, 1], [None, 0, 1], [None, 1]])) == 0.5
    assert no_spread(rollout([[1], [None, None]])) is None


def test_what_cannot_be_measured_is_unknown_and_stops_nothing():
    found = by_name(rollout_checks(rollout([[1, 0], [1, None, None, None]]), k=4))
    assert found["pass@1"].verdict == found["pass@4"].verdict == "unknown" and found["pass@4"].value is None
    with pytest.raises(UserError, match="at least one sample"):
        rollout_checks([], 4)
    with pytest.raises(UserError, match="k >= 1"):
        rollout_checks(rollout([[1]]), 0)


def test_parity():
    for gap, most, verdict in [(1e-5, 1e-3, "ok"), (5e-3, 1e-3, "warn"), (0.02, 1e-3, "no-go"), (0.02, 0.05, "ok")]:
        assert parity_check({"max": gap, "mean": gap / 2, "tokens": 9.0}, most).verdict == verdict
    assert parity_check({"max": math.nan, "mean": 0.0, "tokens": 9.0}).verdict == "no-go"
    assert parity_check({"max": 0.0, "mean": 0.0, "tokens": 0.0}).verdict == "unknown"


# ------------------------------------------------------------------------------------------------------- the reward
PROMPTS = [f"What is {n} + {n}?" for n in range(2, 10)]
TRUTHS = [str(2 * n) for n in range(2, 10)]
COMPLETIONS = [t if i % 2 else "0" for i, t in enumerate(TRUTHS)]
METADATA = [{"answer": t} for t in TRUTHS]


def tried(reward, completions=COMPLETIONS, **kwargs):
    return by_name(reward_checks(reward, PROMPTS, completions, METADATA, **kwargs))


def test_a_verifier_is_a_sane_reward():
    found = tried(verified(numeric), references=TRUTHS)
    assert {c.verdict for c in found.values()} == {"ok"} and len(found) == 6
    assert found["real minus shuffled pairs"].value == 0.5 and found["right minus shuffled pairs"].value == 1.0
    messages = [Message("assistant", (Part("so", "thinking"), Part(c))) for c in COMPLETIONS]
    both = weighted_sum({"right": (1.0, verified(numeric)), "format": (0.1, format_reward())})
    assert {c.verdict for c in tried(both, messages, empty=Message("assistant", "")).values()} == {"ok"}


def test_what_is_wrong_with_a_reward_is_said():
    calls = itertools.count()

    def moody(prompts, completions, metadata):
        return [float(next(calls)) for _ in prompts]

    def relative(prompts, completions, metadata):
        return [float(i) for i in range(len(prompts))]

    contains = each(lambda p, c, m: m["answer"] in c or not c, "contains")
    for reward, name, verdict in [
        (moody, "reward changes when asked again", "warn"),
        (relative, "reward depends on the batch", "warn"),
        (each(lambda p, c, m: 0.5), "reward spread", "no-go"),
        (each(lambda p, c, m: None), "reward spread", "unknown"),
        (each(lambda p, c, m: float(c != "0")), "real minus shuffled pairs", "warn"),
        (contains, "real minus empty", "warn"),
        (each(lambda p, c, m: c == "0"), "right minus shuffled pairs", "warn"),
    ]:
        found = tried(reward, references=TRUTHS)[name]
        assert found.verdict == verdict and (found.why or verdict == "ok")
    assert tried(relative)["reward changes when asked again"].verdict == "ok"


def test_a_reward_that_fails_is_one_check():
    [check] = tried(each(lambda p, c, m: 1 / len(c), "inverse")).values()
    assert check.verdict == "no-go" and "reward 'inverse', sample 0 of 8: it raised ZeroDivisionError" in check.why
    assert not Preflight((check,)).go
    with pytest.raises(UserError, match="at least 2"):
        reward_checks(verified(numeric), PROMPTS[:1], COMPLETIONS[:1], METADATA[:1])


def test_rounding_is_no_change():
    g = np.random.default_rng(0)
    jitter = each(lambda p, c, m: len(p + c) * (1 + g.uniform(-1e-7, 1e-7)))
    assert tried(jitter)["reward changes when asked again"].verdict == "ok"


def test_leaks():
    assert leak_check(["2 + 2?", "The answer (4): what is 2 + 2?"], ["4", "4"]).value == 0.5
    assert leak_check(["What is 44 + 2?"], ["4"]).verdict == "ok"
    assert leak_check(["Say Paris. Where?"], [" Paris "]).verdict == "warn"


# -------------------------------------------------------------------------------------------------------- the table
def test_ranges_and_table():
    ranges = ((0.2, 0.8), (0.1, 0.9), "low", "high")
    verdicts = [judged("x", v, *ranges).verdict for v in (0.2, 0.8, 0.15, 0.85, 0.05, 0.95, math.nan, None)]
    assert verdicts == ["ok", "ok", "warn", "warn", "no-go", "no-go", "no-go", "unknown"]
    assert judged("x", 0.1, *ranges).why == "low" and judged("x", 0.9, *ranges).why == "high"
    checks = (*rollout_checks(rollout([[0] * 4] * 3), 4), *tried(verified(numeric)).values())
    text = table(Preflight(checks))
    assert len(text.splitlines()) == len(checks) + 2 and max(map(len, text.splitlines())) < 150
    assert text.endswith("\nno-go: pass@4, groups without spread") and "> 0" in text and "0.02 to 0.95" in text
    assert table(Preflight(checks[-5:])).endswith("\ngo")
