"""Best-of-n against all of its subsets, the curves of Gao et al. found again, and alarms that come once and in time."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from jaxlm.config import UserError
from jaxlm.feedback import alarms as al
from jaxlm.feedback import overoptimization as oo
from jaxlm.run.overoptimization_plots import overoptimization


# ------------------------------------------------------------------------------------------------------- best-of-n
def test_kl_of_best_of_n():
    found = [oo.best_of_n_kl(n) for n in (1, 4, 16, 64, 256)]
    np.testing.assert_allclose(found, [0.0, 0.63629, 1.83509, 3.17451, 4.54908], atol=5e-6)
    with pytest.raises(UserError, match="n >= 1"):
        oo.best_of_n_kl(0)


def test_the_kl_is_that_of_the_distribution_it_is_said_of():
    """Of many values the best of n is the i-th lowest with probability (i/M)^n - ((i-1)/M)^n."""
    M, n = 20_000, 16
    p = np.diff((np.arange(M + 1) / M) ** n)
    p = p[p > 0]
    assert np.sum(p * np.log(p * M)) == pytest.approx(oo.best_of_n_kl(n), abs=1e-3)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.data())
def test_best_of_n_is_the_mean_over_all_subsets(N, data):
    n = data.draw(st.integers(1, N))
    proxy = data.draw(arrays(np.int64, (2, N), elements=st.integers(0, 3)))  # with ties
    gold = data.draw(arrays(np.float64, (2, N), elements=st.floats(-9, 9)))
    expected = []
    for p, g in zip(proxy, gold):
        means = []
        for chosen in itertools.combinations(range(N), n):
            most = max(p[i] for i in chosen)
            means.append(np.mean([g[i] for i in chosen if p[i] == most]))
        expected.append(np.mean(means))
    np.testing.assert_allclose(oo.best_of_n(proxy, gold, n), expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, (3, 8), elements=st.floats(-5, 5)))
def test_the_best_is_at_least_the_pool_and_rises_with_n(proxy):
    best = np.array([oo.best_of_n(proxy, proxy, n) for n in range(1, 9)])
    np.testing.assert_allclose(best[0], proxy.mean(1), atol=1e-12)
    np.testing.assert_allclose(best[-1], proxy.max(1), atol=1e-12)
    assert (np.diff(best, axis=0) >= -1e-12).all()


@pytest.mark.parametrize("N, n", [(1, 1), (10, 3), (512, 1), (512, 512), (1024, 300)])
def test_order_weights_are_a_distribution(N, n):
    w = oo.order_weights(N, n)
    exact = [math.comb(i - 1, n - 1) / math.comb(N, n) for i in range(1, N + 1)]
    np.testing.assert_allclose(w, exact, rtol=1e-9, atol=1e-300)
    assert w.sum() == pytest.approx(1)


def test_what_is_chosen_follows_the_order_statistics():
    proxy = np.array([[3.0, 1.0, 2.0, 0.0, 4.0, 4.0]] * 30_000)
    best, control = oo.choose(proxy, 3, seed=1)
    w = oo.order_weights(6, 3)
    shares = np.bincount(best, minlength=6) / len(best)
    tie = (w[4] + w[5]) / 2
    np.testing.assert_allclose(shares, [w[3], w[1], w[2], w[0], tie, tie], atol=0.01)
    np.testing.assert_allclose(np.bincount(control, minlength=6) / len(control), 1 / 6, atol=0.01)
    same = oo.choose(proxy, 3, seed=1)
    assert (same[0] == best).all() and (oo.choose(proxy, 3, seed=2)[0] != best).any()
    assert (oo.choose(proxy, 6, seed=0)[0] >= 4).all()


def test_a_curve_has_its_control():
    g = np.random.default_rng(0)
    gold = g.normal(size=(200, 32))
    noisy, nothing = gold + g.normal(size=gold.shape), g.normal(size=gold.shape)
    clusters = [i // 2 for i in range(200)]
    curve = oo.best_of_n_curve(noisy, {"proxy": noisy, "gold": gold}, [1, 4, 32], clusters)
    assert [p["n"] for p in curve] == [1, 4, 32] and curve[1]["d"] == pytest.approx(math.sqrt(0.63629), abs=1e-5)
    assert curve[0]["gold/gain"].value == pytest.approx(0, abs=1e-12)
    for p in curve[1:]:
        assert p["gold/gain"].low > 0 and p["gold"].value == pytest.approx(
            p["gold/random"].value + p["gold/gain"].value
        )
        assert p["gold"].value < p["proxy"].value and p["gold"].n == 200
    # Half of the proxy's variance is gold: so is the gain.
    assert curve[2]["gold/gain"].value == pytest.approx(curve[2]["proxy/gain"].value / 2, rel=0.1)
    chance = oo.best_of_n_curve(nothing, {"gold": gold}, [32])[0]["gold/gain"]
    assert chance.low < 0 < chance.high


def test_best_of_n_refuses():
    x = np.zeros((2, 4))
    for proxy, value, n in [(x, x, 5), (x, x, 0), (x, x[:1], 2), (x[0], x[0], 2), (x, x + np.nan, 2)]:
        with pytest.raises(UserError, match="best-of-"):
            oo.best_of_n(proxy, value, n)
    with pytest.raises(UserError, match="best-of-5"):
        oo.choose(x, 5, 0)


# ------------------------------------------------------------------------------------------------------------ fits
D = np.sqrt([oo.best_of_n_kl(2**i) for i in range(1, 11)])


def curve_of(form, alpha, beta, d):
    return d * (alpha - beta * (d if form == "best-of-n" else np.log(d)))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["best-of-n", "rl"]), st.floats(-3, 3), st.floats(-1, 1))
@example("rl", 1.0, 0.5)
def test_fits_recover_their_parameters(form, alpha, beta):
    found = oo.fit(form, D, curve_of(form, alpha, beta, D), resamples=20)
    np.testing.assert_allclose([found.alpha, found.beta], [alpha, beta], atol=1e-9)
    np.testing.assert_allclose(found(D), curve_of(form, alpha, beta, D), atol=1e-9)
    assert found.residual < 1e-9 and float(found(0.0)) == 0.0


@pytest.mark.parametrize("form, turns", [("best-of-n", 1.2 / 0.8), ("rl", math.exp(1.2 / 0.4 - 1))])
def test_the_turnover_is_the_maximum(form, turns):
    assert oo.turnover(form, 1.2, 0.4) == pytest.approx(turns)
    d = np.linspace(0.01, 2 * turns, 4001)
    found = oo.fit(form, d, curve_of(form, 1.2, 0.4, d), resamples=20)
    assert found.turnover == pytest.approx(turns) and d[found(d).argmax()] == pytest.approx(turns, abs=0.01)
    assert found.peak == pytest.approx(found(d).max(), abs=1e-4)
    assert oo.turnover(form, 1.2, 0.0) == oo.turnover(form, 1.2, -0.4) == math.inf
    rising = oo.fit(form, d, 1.2 * d, resamples=20)
    assert rising.turnover is None or rising.turnover > 100 * turns  # by rounding alone


@pytest.mark.parametrize("rows", [None, 100])
def test_intervals_hold_the_truth_about_as_often_as_they_say(rows):
    held = 0
    for seed in range(60):
        g = np.random.default_rng(seed)
        d = np.tile(D, 4) if rows is None else D
        noise = g.normal(0, 0.05, d.shape) if rows is None else g.normal(0, 0.5, (rows, len(d)))
        found = oo.fit("rl", d, curve_of("rl", 1.1, 0.5, d) + noise, seed, resamples=200)
        held += found.beta_interval[0] <= 0.5 <= found.beta_interval[1]
        assert found.turnover_low <= found.turnover <= found.turnover_high
    assert 50 <= held <= 60


def test_fits_refuse():
    for d, gain, match in [
        ([0.0, 1.0], [0.0, 1.0], "two different"),
        ([1.0, 1.0], [0.0, 1.0], "two different"),
        ([1.0, 2.0], [0.0], r"\[K\]"),
        ([1.0, -2.0], [0.0, 1.0], "not negative"),
        ([1.0, 2.0], [0.0, math.nan], "finite"),
    ]:
        with pytest.raises(UserError, match=match):
            oo.fit("rl", d, gain)
    with pytest.raises(UserError, match="unknown form"):
        oo.fit("ppo", [1.0, 2.0], [0.0, 1.0])


def test_gains_of_records():
    points = [{"kl": -0.01, "gold": 1.0}, {"kl": 4.0, "gold": 1.5}, {"gold": 2.0}, {"kl": 9.0, "gold": None}]
    assert oo.gains(points, "gold", 1.0) == ([0.0, 2.0], [0.0, 0.5])


# ---------------------------------------------------------------------------------------------------------- alarms
def records(**columns):
    size = len(next(iter(columns.values())))
    return [{"step": 10 * i} | {k: float(v[i]) for k, v in columns.items()} for i in range(size)]


X = np.arange(60)
HACKED = 1 - (X - 30.0) ** 2 / 900  # gold: rises to 1 at step 300, falls to 0


def noisy(values, scale, seed):
    return np.asarray(values) + np.random.default_rng(seed).normal(0, scale, len(values))


@pytest.mark.parametrize("proxy", [X / 60, np.minimum(X / 30, 1.0)], ids=["rising", "holding"])
def test_gold_falling_is_seen_and_stopping_keeps_the_peak(proxy):
    for seed in range(20):
        run = records(proxy=noisy(proxy, 0.02, seed), gold=noisy(HACKED, 0.05, seed + 100))
        alarm = al.gold_falls(run)
        assert alarm.what == "gold falls" and 300 < alarm.seen <= 560 and alarm.amount > 0.05
        step, raised = al.early_stop(run)
        assert step == alarm.since <= alarm.seen and raised == alarm
        assert HACKED[step // 10] >= 0.9


def test_since_is_the_peak():
    alarm = al.gold_falls(records(proxy=X / 60, gold=HACKED))
    assert alarm.since == 300 and alarm.amount == pytest.approx(HACKED[29:32].mean() - gold_mean(alarm.seen))


def gold_mean(step):
    return HACKED[step // 10 - 2 : step // 10 + 1].mean()


def test_what_is_no_over_optimization_is_silent():
    learned = records(proxy=X / 60, gold=1 - np.exp(-X / 10))
    broken = records(proxy=1 - X / 60, gold=1 - X / 60)
    flat = records(proxy=X / 60, gold=np.full(60, 0.1), length=np.full(60, 0.3), entropy=np.full(60, 0.7))
    assert all(al.gold_falls(run) is None for run in (learned, broken, flat))
    assert al.alarms(flat) == [] and al.early_stop(learned) == (590, None)
    false = 0
    for seed in range(60):
        names = ("gold", "length", "repetition", "entropy")
        means = dict(zip(names, (0.0, 100.0, 0.1, 1.0)))
        columns = {n: noisy(np.full(60, m), 0.1, 7 * seed + i) for i, (n, m) in enumerate(means.items())}
        false += bool(al.alarms(records(proxy=X / 60, **columns)))
    assert false <= 6


def test_other_alarms_say_what_since_when_and_how_much():
    base = {"proxy": X / 60, "gold": X / 60}
    step = lambda before, after: np.where(X < 40, before, after)  # noqa: E731
    for column, values, what, change in [
        ("length", step(100.0, 200.0), "length drifts", 100.0),
        ("length", step(100.0, 50.0), "length drifts", -50.0),
        ("repetition", step(0.0, 0.5), "repetition", 0.5),
        ("entropy", step(2.0, 0.1), "entropy collapse", -1.9),
    ]:
        run = records(**base, **{column: values})
        [alarm] = al.alarms(run)
        assert alarm.what == what and column in alarm.why
        # The window that first leaves what is healthy has some records from before.
        assert 290 <= alarm.since < 400 <= alarm.seen < 490
        assert 0 < alarm.amount / change <= 1
        assert al.early_stop(run) == (alarm.since, alarm)
    assert al.length_drifts(records(length=step(100.0, 140.0))) is None
    assert al.length_drifts(records(length=step(100.0, 140.0)), factor=1.2) is not None
    assert al.entropy_collapses(records(entropy=np.linspace(2.0, 1.0, 60))) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 59))
def test_an_alarm_never_changes_with_what_comes_later(seed, cut):
    gold = noisy(HACKED, 0.05, seed)
    run = records(proxy=X / 60, gold=gold, length=100 + 3 * X, entropy=np.exp(-X / 15))
    for check in al.CHECKS:
        whole, early = check(run), check(run[: cut + 1])
        if early is not None:
            assert early == whole
        elif whole is not None:
            assert whole.seen > run[cut]["step"]
            assert check(run, after=run[cut]["step"]) == whole
        later = check(run, after=run[cut]["step"])
        assert later is None or later.seen > run[cut]["step"]


def test_records_without_a_value_are_passed_over():
    run = records(proxy=X / 60, gold=HACKED)
    sparse = []
    for r in run:
        sparse += [r, {"step": r["step"] + 1, "proxy": 0.5}, {"step": r["step"] + 2, "proxy": 0.5, "gold": math.nan}]
    assert al.gold_falls(sparse) == al.gold_falls(run)
    with pytest.raises(UserError, match="in order"):
        al.gold_falls(run[::-1])
    with pytest.raises(UserError, match="at least one record"):
        al.early_stop([])


def test_trend_is_the_t_test_of_a_slope():
    y = noisy(X / 100, 0.3, 0)
    ours, theirs = al.trend(y), stats.linregress(X, y, alternative="greater")
    np.testing.assert_allclose(ours, [theirs.slope, theirs.pvalue])
    assert al.trend([1.0, 2.0, 3.0]) == (1.0, pytest.approx(0.0, abs=1e-8)) and al.trend([0.1] * 9) == (0.0, 0.5)


def test_repetition():
    assert al.repetition([1, 2, 3, 4, 5]) == 0 and al.repetition([1, 2, 3]) == 0 and al.repetition([]) == 0
    assert al.repetition([1] * 13) == pytest.approx(0.9) and al.repetition("abab", n=2) == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------------------ plot
def test_the_plot_draws_all_that_there_is(tmp_path):
    g = np.random.default_rng(0)
    gold = g.normal(size=(40, 16))
    curve = oo.best_of_n_curve(gold, {"proxy": gold, "gold": gold}, [1, 2, 4, 8, 16])
    run = [{"step": i, "d": i / 10, "proxy": i / 20, "gold": HACKED[i], "verifier": None} for i in range(60)]
    fits = {"RL": {"gold": oo.fit("rl", [p["d"] for p in run], HACKED, resamples=20)}}
    path = tmp_path / "plot.png"
    alarm = functools.partial(al.gold_falls, window=10)(run)
    overoptimization({"best-of-n": curve, "RL": run}, path, fits, {"RL": alarm})
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    with pytest.raises(UserError, match="nothing to draw"):
        overoptimization({"RL": []}, path)
