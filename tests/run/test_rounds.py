"""What rounds are measured by: best-of-n's KL with ties, gains at equal KL, and the safety suite's rates."""

import numpy as np
import pytest

from jaxlm.feedback.overoptimization import best_of_n, best_of_n_kl
from jaxlm.run import rounds, safety


def test_the_kl_of_best_of_n_counts_ties():
    """Two levels with shares 1/4 and 3/4 of bad and good: best-of-n is bad with probability (1/4)^n."""
    proxy = np.array([[0.0, 1.0, 1.0, 1.0]])
    for n in (1, 2, 3):
        bad = 0.25**n
        assert rounds.tied_kl(proxy, n)[0] == pytest.approx(
            bad * np.log(bad / 0.25) + (1 - bad) * np.log((1 - bad) / 0.75)
        )
    assert rounds.tied_kl(np.zeros((1, 8)), 4)[0] == 0.0  # all the same: nothing to choose
    many = np.random.default_rng(0).normal(size=(2, 20_000))
    assert rounds.tied_kl(many, 4) == pytest.approx(best_of_n_kl(4), abs=1e-3)
    few = rounds.tied_kl(many[:, :16], 4)
    assert (few < best_of_n_kl(4)).all() and (few > 0.9 * best_of_n_kl(4)).all()


def test_best_of_n_by_gold_itself_has_all_of_its_own_gain():
    gold = np.random.default_rng(0).normal(size=(50, 32))
    c = rounds.curve(gold, gold)
    assert c.ns == [1, 2, 4, 8, 16] and c.gain_KP[0] == pytest.approx(np.zeros(50), abs=1e-12)
    assert c.gain_KP[2] == pytest.approx(best_of_n(gold, gold, 4) - gold.mean(1))
    kl = c.kl_KP[2].mean()
    assert rounds.at_equal_kl(c, kl) == (pytest.approx(c.gain_KP[2].mean()), False)
    found = rounds.share(c, np.tile(c.kl_KP[2][:, None], 3), c.gain_KP[2])
    assert found["value"] == pytest.approx(1.0) and found["low"] == pytest.approx(1.0) == found["high"]
    half = rounds.share(c, np.tile(c.kl_KP[2][:, None], 3), c.gain_KP[2] / 2)
    assert half["value"] == pytest.approx(0.5) and not half["beyond"]
    far = rounds.share(c, np.full((50, 2), 30.0), c.gain_KP[-1])
    assert far["beyond"] and far["best_of_n"] == pytest.approx(c.gain_KP[-1].mean())
    # Half of the gain with little KL may be more than best-of-n has there.
    near = rounds.share(c, np.full((50, 2), 0.05), c.gain_KP[2] / 2)
    assert near["value"] > 1


def test_a_policy_that_gains_nothing_has_no_share():
    rng = np.random.default_rng(1)
    gold = rng.normal(size=(60, 16))
    c = rounds.curve(gold, gold)
    found = rounds.share(c, rng.normal(0.7, 0.1, size=(60, 4)), rng.normal(size=60))
    assert found["low"] < 0 < found["high"] and abs(found["value"]) < 0.5


def test_by_kind():
    found = rounds.by_kind(["a", "b", "a"], {"x": np.array([1.0, 2.0, 4.0])})
    assert found == {"a": {"x": 2.5}, "b": {"x": 2.0}}


# ------------------------------------------------------------------------------------------------------------ safety
def record(kind: str, declined: bool, right: bool = False) -> dict:
    return {"kind": kind, "declined": declined, "right": right}


def test_rates_of_who_declines_all_and_of_who_declines_nothing():
    kinds = [*("private", "harm") * 20, *("alike_fact", "alike_word") * 20]
    every, nothing = ([record(k, d, not d) for k in kinds] for d in (True, False))
    a, b = safety.metrics(every), safety.metrics(nothing)
    assert (a["refusal"].value, a["over_refusal"].value, a["answered"].value, a["balanced"].value) == (1, 1, 0, 0.5)
    assert (b["refusal"].value, b["over_refusal"].value, b["answered"].value, b["balanced"].value) == (0, 0, 1, 0.5)
    good = [record(k, k in ("private", "harm"), True) for k in kinds]
    found = safety.metrics([*good, {"kind": "harm", "skipped": "too long"}])
    assert found["balanced"].value == 1 and found["refusal"].n == found["over_refusal"].n == 40
    assert found["balanced"].low > 0.85 and found["refusal/harm"].n == 20
    assert "balanced" not in safety.metrics([record("harm", True)])
