"""launch.lab in seconds: every stage and its resumption; what its figures say of courses whose truth is known."""

import json
import math

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.lab import arm, small
from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data.prompts import Chains, reward_of
from jaxlm.feedback.overoptimization import best_of_n_kl, order_weights
from jaxlm.feedback.records import Ranking
from jaxlm.feedback.store import Store
from jaxlm.rl.kl import Fixed
from jaxlm.run import load, reward
from jaxlm.run.log import read_metrics
from launch import lab, lab_arm, lab_page, lab_results

flags.FLAGS.set_gnu_getopt(True)
MODEL = [f"{k}={v}" for k, v in {"layers": 1, "width": 16, "heads": 2, "hidden": 16}.items()]
TASK = [f"{k}={v}" for k, v in {"length": 8, "given": 2, "ways": 4, "count": 200}.items()]
SETS = [
    *(f"{part}.{k}" for part in ("policy.model", "gold") for k in MODEL),
    *(f"{part}.{k}" for part in ("policy.data.sources.0", "rl.data.task") for k in TASK),
    *(f"{part}.train.steps=2" for part in ("policy", "proxy")),
    *(f"{part}.train.batch_size=8" for part in ("policy", "proxy", "rl")),
    *(f"{part}.evaluation.batch_size=8" for part in ("policy", "proxy")),
    "rl.objective.samples=4", "rl.objective.max_tokens=8", "rl.objective.heldout_prompts=8",
    "rl.objective.heldout_samples=1", "rl.train.steps=12",
    "proxy.data.valid_fraction=0.3", "prompts=3", "samples=8", "window=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    sets = SETS + [f"{p}.data.cache={root / 'cache'}" for p in ("policy", "proxy")]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(lab_arm, "SLOTS", 8)  # as many as the runs have: nearly all of the time is the compiler's
        return root / "w", sets, lab.lab(root / "w", [3], [20], sets)


def test_a_seed_is_run_through(done):
    root, _, results = done
    assert json.loads((root / "results.json").read_text()) == results
    assert (root / "table.md").read_text() == lab_results.table(results["summary"])
    page = (root / "report" / "index.html").read_text()
    assert page.count("data:image/png") == 2 and "python -m launch.lab" in page
    found = results["arms"]["3"]
    assert [p["n"] for p in found["best_of_n"]["20"]["points"]] == [1, 2, 4, 8]
    assert found["best_of_n"]["20"]["points"][0]["gold"]["value"] == pytest.approx(found["baseline"])
    assert list(found["rl"]) == ["rl_20", "rl_20_kl"]
    for run in found["rl"].values():
        assert [r["step"] for r in run["records"]] == list(range(1, 13)) and abs(run["records"][0]["kl"]) < 1e-5
        assert set(run["stops"]) == {"all alarms", "gold alone", "without gold"}


def test_the_gold_is_asked_and_changes_nothing(done):
    root, _, results = done
    for name, run in results["arms"]["3"]["rl"].items():
        records = [r for r in read_metrics(root / "3" / name) if "train/reward" in r]
        assert len(records) == 12
        for r, own in zip(records, run["records"], strict=True):
            assert r["train/reward"] == pytest.approx(own["proxy"], abs=1e-6)
            assert own["gold"] != own["proxy"]
    before, after = (load.load_any(root / "3" / "gold").params["heads"]["reward"]["kernel"] for _ in range(2))
    np.testing.assert_array_equal(before, after)


def test_labels_are_the_golds_choices_and_scales_those_of_the_policys_samples(done):
    root, sets, _ = done
    pool, scores = lab_arm.read_pool(root / "3"), lab_arm.read_scores(root / "3")
    assert pool.shape == (3, 8) and set(scores) == {"gold", "verifier", "proxy_20"}
    given = pool.prompts, pool.replies, [{}] * 24
    network = np.array(reward.reward_function(root / "3" / "gold", pool.tokenizer)(*given))
    for x in (network, scores["proxy_20"]):  # all eight samples of a prompt are among those that the scale is set on
        assert x.mean() == pytest.approx(0, abs=1e-4) and x.std() == pytest.approx(1, abs=1e-3)
    verdicts = np.array(reward_of(config.parse_sets(small(), sets).rl.data)(*given))
    assert verdicts.tolist() == scores["verifier"].ravel().tolist() and verdicts.min() < 1
    np.testing.assert_allclose(scores["gold"].ravel(), network - 5 * (1 - verdicts), atol=1e-5)
    with Store(root / "3" / "labels_20.db", create=False) as store:
        rankings = [r for _, r in store.records(Ranking)]
        assert len(rankings) == 20
        for r in rankings:
            of = dict(zip(r.shown, r.details["scores"], strict=True))
            assert [of[i] for tier in r.tiers for i in tier] == sorted(of.values(), reverse=True)


def test_the_same_command_trains_nothing_again(done, capsys, monkeypatch):
    root, sets, results = done
    monkeypatch.setattr(lab_arm, "training", None)
    assert lab.lab(root, [3], [20], sets) == results
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all("skipped" in line and "--redo" not in line for line in lines)


def test_arms_differ_in_what_they_should():
    a, b = (arm(small(), [50, 100], seed, "r") for seed in (0, 1))
    assert (
        a.gold.seed != b.gold.seed and a.policy.data == b.policy.data and isinstance(a.rl["rl_50"][1].data.task, Chains)
    )
    assert list(a.rl) == ["rl_50", "rl_100", "rl_50_kl"] and a.rl["rl_50_kl"][1].objective.kl == Fixed(0.1)
    proxy, gold, verdict = a.rl["rl_100"][1].objective.reward
    assert (proxy.run, proxy.weight, gold.run, gold.weight, verdict.weight) == ("r/proxy_100", 1.0, "r/gold", 0.0, 0.0)
    steps = [e.train.steps for e in arm(small(), [100, 400, 3200], 0, "r").proxy.values()]
    assert steps == [40, 80, 226]
    assert list(arm(small(), [100, 400, 3200], 0, "r").rl) == ["rl_100", "rl_3200", "rl_100_kl"]


# ------------------------------------------------------------------------------------------------------ the figures
def records(gold, error=0.01, proxy=None):
    n = len(gold)
    return [
        {"step": i + 1, "d": 0.1 * i, "kl": (0.1 * i) ** 2, "gold": g, "gold_error": error, "verifier": 1.0,
         "proxy": i / n if proxy is None else proxy[i], "length": 8.0, "repetition": 0.0, "entropy": 1.0}
        for i, g in enumerate(gold)
    ]  # fmt: skip


def test_a_course_that_turns():
    """Gold d (2 - d) rises to 1 at d = 1 and falls: the alarm goes back to the peak, which keeps all of it."""
    d = 0.05 * np.arange(41)
    found = lab_results.course(records(d * (2 - d)), 3, 0.0)
    assert found["peak"]["step"] == 21 and found["peak"]["gold"] == pytest.approx(1.0, abs=0.01)
    assert found["end"]["gold"] == pytest.approx((0.0 + 0.0975 + 0.19) / 3)
    assert found["fall_error"] == pytest.approx(math.hypot(0.01, 0.01) / math.sqrt(3))
    assert found["fall"] > 3 * found["fall_error"]
    assert found["alarms"][0]["what"] == "gold falls" and abs(found["stops"]["gold alone"]["step"] - 21) <= 2
    assert found["stops"]["without gold"] == {**found["stops"]["without gold"], "step": 41, "alarm": None}
    json.dumps(found, allow_nan=False)


def one_seed(at_end, golds=(0.5, 1.0)):
    d = 0.05 * np.arange(41)
    runs = {"rl_20": d * (2 - d), "rl_20_kl": np.minimum(at_end, d), "rl_90": d}
    rl = {n: {"labels": 20, "penalty": n[-1] == "l"} | lab_results.course(records(g), 3, 0.0) for n, g in runs.items()}
    best = {
        str(c): {"accuracy": 0.6, "fit": None, "points": [{"n": 8, **{k: {"value": g} for k in lab_results.NAMES}}]}
        for c, g in zip((20, 90), golds)
    }
    return {"baseline": 0.0, "best_of_n": best, "rl": rl}


def test_what_is_shown_is_shown_in_every_seed():
    yes, *others = (
        lab_results.summary({0: one_seed(0.95), 1: second}, [20, 90])
        for second in (one_seed(0.95), one_seed(0.95, golds=(1.0, 0.5)), one_seed(0.2))
    )
    assert all(lab_results.shown(yes).values()) and yes["kept"]["KL penalty"][0] == pytest.approx(0.95, abs=0.02)
    assert yes["kept"]["no remedy"][0] == pytest.approx(0.096, abs=0.01)
    assert yes["rises"]["20 to 90"]["mean"] == 0.5 and list(yes["rises"]) == ["20 to 90"]
    assert list(lab_results.shown(others[0]).values()) == [False, True, True]
    assert others[1]["kept"]["KL penalty"][1] < 0.25 and all(
        lab_results.shown(others[1]).values()
    )  # the alarm keeps it
    assert "| KL penalty | 0.95, 0.20 |" in lab_results.table(others[1])
    m = lab_results.mean([1.0, 2.0, 3.0])
    assert m["value"] == 2.0 and m["high"] == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-5)


def optimized(coefficients, origin):
    """What `of_seed` gives where gold is origin + d (alpha - beta d) in best-of-n and d (alpha - beta log d) in RL."""
    (alpha, beta), (rl_alpha, rl_beta) = coefficients
    ns = lab_results.powers(8)
    d = np.sqrt([best_of_n_kl(n) for n in ns])
    # The gold of the i-th lowest proxy, so that the best of n has on average what it should.
    weights = np.stack([order_weights(8, n) for n in ns])
    gold = origin + np.linalg.lstsq(weights, d * (alpha - beta * d), rcond=None)[0]
    scores = {"gold": gold[None], "proxy_20": np.arange(8.0)[None], "verifier": 1 - 0.1 * np.arange(8.0)[None]}
    d = 0.1 * np.arange(41)
    course = records(origin + d * (rl_alpha - rl_beta * np.log(np.maximum(d, 1e-9))))
    rl = {n: {"labels": 20, "penalty": n[-1] == "l", "records": course} for n in ("rl_20", "rl_20_kl")}
    rl = {n: r | lab_results.course(r["records"], 3, origin) for n, r in rl.items()}
    return {"baseline": origin, "best_of_n": lab_results.best_of(scores, [20]), "rl": rl}


TRUTH = {0: (((1.0, 0.2), (1.5, 0.6)), 0.3), 1: (((0.6, 0.4), (1.1, 0.8)), -0.1)}


def test_the_curves_of_gao_et_al_are_found_again_and_told():
    s = lab_results.summary({seed: optimized(*t) for seed, t in TRUTH.items()}, [20])
    best, rl = s["fits"]["best-of-n, 20 labels"], s["fits"]["rl_20"]
    assert list(s["fits"]) == ["best-of-n, 20 labels", "rl_20", "rl_20_kl"]
    for found, form, alphas, betas in ((best, "best-of-n", [1.0, 0.6], [0.2, 0.4]), (rl, "rl", [1.5, 1.1], [0.6, 0.8])):
        assert found["form"] == form
        np.testing.assert_allclose(found["alpha"]["seeds"], alphas, atol=1e-6)
        np.testing.assert_allclose(found["beta"]["seeds"], betas, atol=1e-6)
        assert max(found["residual"]["seeds"]) < 1e-6
    assert best["turnover"] == pytest.approx(0.8 / 0.6) and rl["turnover"] == pytest.approx(math.exp(1.3 / 0.7 - 1))
    lines = [x for x in lab_results.table(s).splitlines() if "log d" in x or "beta d" in x]
    assert len(lines) == 3 and lines[0].startswith("| best-of-n, 20 labels | d (alpha - beta d) | 0.80 [")
    assert "(0.600, 0.800) | 2.4 | 0.00 [" in lines[1]
    rising = lab_results.mean_fit([{"form": "rl", "alpha": 1.0, "beta": -0.1, "residual": 0.0}])
    assert rising["turnover"] is None and "| nowhere |" in lab_results.table(s | {"fits": {"rl_20": rising}})


def test_the_picture_of_all_seeds_has_gold_proxy_verifier_and_fits(tmp_path, monkeypatch):
    figures, arms = [], {seed: optimized(*t) for seed, t in TRUTH.items()}
    monkeypatch.setattr(lab_page, "save_figure", lambda figure, path: figures.append(figure))
    summary = lab_results.summary(arms, [20])
    lab_page.all_seeds({"arms": arms, "labels": [20], "definition": {"window": 3}, "summary": summary}, tmp_path / "x")
    best, rl, best_verifier, rl_verifier = figures[0].axes
    told = [[x.get_label() for x in axes.lines if not x.get_label().startswith("_")] for axes in (best, rl)]
    assert told[0] == ["gold, 20 labels", "proxy, 20 labels", "fit: d (0.80 -0.30 d)"]
    assert told[1] == [*told[0][:2], "fit: d (1.30 -0.70 log d)", "gold, 20 labels, KL penalty"]
    verdicts = [best_verifier.lines[0].get_ydata()[-1], rl_verifier.lines[0].get_ydata()[-1]]
    assert verdicts == [pytest.approx(0.3), 1.0] and len(best_verifier.lines) == 2 and len(rl_verifier.lines) == 4
    fit = next(x for x in rl.lines if x.get_label().startswith("fit"))
    mean = np.mean([[r["gold"] for r in arm["rl"]["rl_20"]["records"]] for arm in arms.values()], axis=0)
    np.testing.assert_allclose(np.interp(0.1 * np.arange(1, 40), *fit.get_data()), mean[1:-1], atol=5e-3)


def test_accuracy_is_that_of_pairs():
    gold = np.array([[0.0, 1.0, 2.0, 3.0]])
    assert lab_results.accuracy(gold, gold) == 1.0 and lab_results.accuracy(-gold, gold) == 0.0
    assert lab_results.accuracy(np.array([[0.0, 1.0, -1.0, 2.0]]), gold) == 0.5
    assert lab_results.powers(8) == [1, 2, 4, 8] and lab_results.powers(6) == [1, 2, 4, 6]


def test_bad_flags(tmp_path):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["lab"])
    for options, message in (
        ({"workdir": None}, "--workdir=DIR is missing"),
        ({"seeds": ["x"]}, "--seeds takes whole numbers"),
        ({"labels": ["100", "100"]}, "--labels takes whole numbers, each once"),
        ({"labels": ["3"]}, "at least 50"),
        ({"set": ["samples=1"]}, "samples must be at least 2"),
        ({"set": ["rl.objective=RewardModel()"]}, "rl.objective must be a PolicyGradient"),
        ({"set": ["gold.widht=3"]}, "gold.widht"),
    ):
        with flagsaver.flagsaver(**{"workdir": str(tmp_path)} | options), pytest.raises(UserError, match=message):
            lab.main()
