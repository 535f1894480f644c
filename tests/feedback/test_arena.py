"""Elo and agreement, against values by hand, published ones and scipy's."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import optimize, stats

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.feedback import agreement
from jaxlm.feedback import arena as arenas
from jaxlm.feedback.agreement import alpha, of_rankings, of_ratings, same_direction, tau_b
from jaxlm.feedback.arena import Game, arena, fit, games_of
from jaxlm.feedback.records import Policy, Prompt, Ranking, Rating, Response
from jaxlm.feedback.store import Store
from jaxlm.run import arena_plot


def played(strengths: dict[str, float], prompts: int, seed: int = 0, each: int = 1, same: bool = False) -> list[Game]:
    """Every two players meet once a prompt (`each` times, with the same outcome if `same`), by Bradley-Terry."""
    generator, names, out = np.random.default_rng(seed), list(strengths), []
    for p in range(prompts):
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                odds = 1 / (1 + math.exp(strengths[b] - strengths[a]))
                scores = [float(generator.random() < odds)] * each if same else generator.random(each) < odds
                out += [Game(a, b, float(s), str(p)) for s in scores]
    return out


# ---------------------------------------------------------------------------------------------------------------- Elo
def test_two_players_by_hand():
    games = [Game("a", "b", float(n % 4 > 0), str(n)) for n in range(400)]
    result = arena(games, anchor="b", prior=1e-6, draws=400)
    a, b = result.standings
    assert a.name == "a" and a.elo - 1000 == pytest.approx(400 * math.log10(3), abs=0.01)  # 75% is odds of 3 to 1
    assert (b.elo, b.low, b.high) == (1000, 1000, 1000) and (a.games, a.wins, b.wins) == (400, 300, 100)
    stderr = 400 / math.log(10) / math.sqrt(400 * 0.75 * 0.25)  # of a logit
    assert (a.high - a.low) / (2 * 1.96 * stderr) == pytest.approx(1, abs=0.1) and a.low < 1190 < a.high


def test_the_fit_is_the_maximum_that_scipy_finds():
    generator = np.random.default_rng(1)
    wins = generator.integers(0, 9, (5, 5)) * (1 - np.eye(5)) + 0.5 * np.triu(np.ones((5, 5)), 1)
    for prior in (0.0, 0.1, 3.0):

        def loss(t, prior=prior):
            gap = t[:, None] - t[None, :]
            return (wins * np.logaddexp(0, -gap)).sum() + prior * (np.logaddexp(0, t) + np.logaddexp(0, -t)).sum() / 2

        best = optimize.minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-9}).x
        (t,) = fit(wins[None], prior)
        assert t == pytest.approx(best - best.mean(), abs=1e-5) and loss(t + best.mean()) <= loss(best) + 1e-9
    far = np.array([[0, 1e6, 1e6], [1, 0, 5], [1e-3, 1e6, 0]])
    (t,) = fit(far[None], 0.1)  # lopsided: no step overshoots for good
    expected = (far - (far + far.T) / (1 + np.exp(t[None] - t[:, None]))).sum(1)
    assert np.isfinite(t).all() and np.abs(expected + 0.1 * (0.5 - 1 / (1 + np.exp(-t)))).max() < 0.1


def test_known_strengths_are_found_and_the_order_of_games_does_not_matter():
    true = {"weak": -1.0, "middle": 0.0, "strong": 1.2}
    games = played(true, 300)
    result = arena(games, draws=200)
    mean = sum(true.values()) / 3
    for s in result.standings:
        assert s.low < 1000 + arenas.SCALE * (true[s.name] - mean) < s.high and s.high - s.low < 120
    assert [s.name for s in result.standings] == ["strong", "middle", "weak"]
    flipped = [Game(g.b, g.a, 1 - g.score, g.prompt) for g in reversed(games)]
    assert [s.elo for s in arena(flipped, draws=1).standings] == pytest.approx([s.elo for s in result.standings])
    assert result == arena(games, draws=200) != arena(games, draws=200, seed=1)


def test_intervals_go_by_prompts_not_by_games():
    def interval(games):
        s = arena(games, draws=300).standings[0]
        return s.high - s.low

    once = played({"a": 0.5, "b": 0.0}, 100)
    repeated = played({"a": 0.5, "b": 0.0}, 100, each=9, same=True)  # nine times the games, and not one bit more
    assert interval(repeated) == pytest.approx(interval(once), rel=0.05)
    assert interval(played({"a": 0.5, "b": 0.0}, 100, each=9)) < 0.5 * interval(once)


def test_who_always_wins_and_who_meets_nobody():
    games = [Game("champion", "a", 1.0, str(n)) for n in range(20)] + [Game("a", "b", n % 2, str(n)) for n in range(20)]
    apart = [Game("x", "y", 0.5, f"other {n}") for n in range(10)]
    result = arena(games + apart, draws=50)
    by = {s.name: s for s in result.standings}
    assert result.groups == (("a", "b", "champion"), ("x", "y"))
    assert {n for n, s in by.items() if s.bounded_by_prior} == {"a", "b", "champion"}
    assert all(math.isfinite(v) for s in by.values() for v in (s.elo, s.low, s.high))
    assert by["champion"].elo > by["a"].elo + 400 and by["x"].elo == pytest.approx(by["y"].elo)
    text = arenas.table(result)
    assert "champion *" in text and "only the prior bounds" in text and "a, b, champion; x, y" in text
    assert "only the prior" not in arenas.table(arena(apart, draws=5))
    with pytest.raises(UserError, match="without a prior"):
        fit(np.array([[[0.0, 5.0], [0.0, 0.0]]]), 0.0)
    with pytest.raises(UserError, match="a prior above 0"):
        arena(games, prior=0)


def test_bad_games_are_refused():
    game = Game("run@1", "run@2", 1.0, "p")
    for games, options, message in (
        ([], {}, "at least one comparison"),
        ([game._replace(score=1.5)], {}, "a score from 0 to 1"),
        ([game._replace(score=math.nan)], {}, "a score from 0 to 1"),
        ([game._replace(b="run@1")], {}, "two players"),
        ([game], {"anchor": "run@3"}, "plays no game; nearest: run@"),
    ):
        with pytest.raises(UserError, match=message):
            arena(games, **options)


@pytest.fixture
def store():
    """Ten prompts with two responses of each of two checkpoints, and one of a person; ada and bob ranked all."""
    with Store(":memory:") as s:
        for n in range(10):
            (pid,) = s.add(Prompt(Conversation((Message("user", f"prompt {n}"),))))
            said = [
                Response(pid, Message("assistant", f"{n} {k}"), policy=Policy("runs/a", k // 2, "h")) for k in range(4)
            ]
            rs = s.add(*said, Response(pid, Message("assistant", "by hand")))
            s.add(Ranking(pid, tuple(rs), ((rs[4],), (rs[2], rs[3]), (rs[0],), (rs[1],)), "ada"))
            swapped = (rs[0], rs[4]) if n < 5 else (rs[4], rs[0])
            s.add(Ranking(pid, tuple(rs), ((swapped[0],), (rs[2], rs[3]), (swapped[1],), (rs[1],)), "bob"))
            for i, r in enumerate(rs):
                s.add(Rating(r, "helpful", i + 1, (1, 7), "ada"), Rating(r, "helpful", i + 1 + (n == 0), (1, 7), "bob"))
        yield s


def test_games_of_rankings_a_table_and_a_plot(store, tmp_path):
    games = games_of(store, ["ada"])
    assert len(games) == 10 * 4 and {(g.a, g.b, g.score) for g in games} == {("runs/a@0", "runs/a@1", 0.0)}
    both = games_of(store)
    result = arena(both, anchor="runs/a@0", draws=20)
    assert (result.games, result.prompts, result.anchor) == (80, 10, "runs/a@0")
    assert [s.name for s in result.standings] == ["runs/a@1", "runs/a@0"] and result.standings[0].wins == 70
    text = arenas.table(result)
    assert text.splitlines()[1].startswith("runs/a@1 ") and "1000 is runs/a@0" in text and "87.5" in text
    assert result.as_dict()["scale"] == pytest.approx(173.7178)
    arena_plot.standings(result, tmp_path / "elo.png")
    assert (tmp_path / "elo.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------- agreement
def test_tau_b_is_scipys():
    generator = np.random.default_rng(2)
    for _ in range(50):
        a, b = generator.integers(0, 4, (2, 5)).tolist()
        found = tau_b(a, b)
        if len(set(a)) == 1 or len(set(b)) == 1:
            assert found is None
        else:
            assert found == pytest.approx(stats.kendalltau(a, b).statistic)
    assert tau_b([0, 1, 2], [0, 1, 2]) == 1 == -tau_b([0, 1, 2], [2, 1, 0])


def test_directions_by_hand():
    assert same_direction([0, 1, 1], [0, 1, 2]) == [1, 1, 0.5] and same_direction([0, 1], [1, 0]) == [0]
    assert same_direction([0, 0], [3, 3]) == [1]


# Krippendorff 2011, Computing Krippendorff's alpha-reliability, example with missing data: alpha .743, .815.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)


def test_alpha_is_krippendorffs():
    units = [
        (str(i), {str(o): float(v) for o, v in enumerate(values) if v is not None})
        for i, values in enumerate(zip(*OBSERVERS))
    ]
    nominal, ordinal = alpha(units, "nominal"), alpha(units)
    assert nominal.value == pytest.approx(0.743, abs=5e-4) and ordinal.value == pytest.approx(0.815, abs=5e-4)
    assert ordinal.n == 11 and ordinal.low < 0.815 < ordinal.high <= 1 and ordinal.chance == 0
    # The jackknife by hand: leave each cluster out, the unit that nobody else judged not being one.
    left_out = [alpha([u for u in units if u[0] != str(i)]).value for i in range(11)]
    stderr = math.sqrt(10 / 11 * sum((x - sum(left_out) / 11) ** 2 for x in left_out))
    assert ordinal.stderr == pytest.approx(stderr)
    assert alpha([("p", {"a": 1.0, "b": 1.0}), ("q", {"a": 1.0, "b": 1.0})]) is None  # nothing to disagree about
    assert alpha([("p", {"a": 1.0, "b": 2.0}), ("p", {"a": 2.0, "b": 1.0})]) is None  # one cluster has no error
    generator = np.random.default_rng(3)
    noise = [(str(i), dict(zip("abc", generator.integers(1, 6, 3).astype(float)))) for i in range(400)]
    chance = alpha(noise)
    assert chance.low < 0 < chance.high and chance.high - chance.low < 0.15


def test_agreement_of_rankings_and_ratings(store):
    found = of_rankings(store)
    (pair,) = found["pairs"]
    assert pair["annotators"] == ["ada", "bob"] and pair["prompts"] == 10
    # For the first five prompts bob swaps the first with the fourth of five, with a tie of two between them.
    swapped = same_direction([2, 3, 1, 1, 0], [0, 3, 1, 1, 2])
    assert pair["agreement"]["value"] == pytest.approx((10 * 5 + 5 * sum(swapped)) / 100) and sum(swapped) == 5
    assert pair["agreement"]["n"] == 100 and pair["agreement"]["stderr"] == pytest.approx(0.25 / math.sqrt(10))
    tau = stats.kendalltau([2, 3, 1, 1, 0], [0, 3, 1, 1, 2]).statistic
    assert pair["tau_b"]["value"] == pytest.approx((1 + tau) / 2) and pair["tau_b_undefined"] == 0
    assert {k: v for k, v in found["all"].items() if k != "alpha"} == {
        k: v for k, v in pair.items() if k != "annotators"
    }
    assert 0 < found["all"]["alpha"]["value"] < 1
    rated = of_ratings(store)
    assert list(rated) == ["helpful 1..7"] and rated["helpful 1..7"]["responses"] == 50
    assert 0.9 < rated["helpful 1..7"]["alpha"]["value"] < 1
    text = agreement.table(found, rated)
    assert "ada and bob" in text and "helpful 1..7" in text and "0.750 (" in text and len(text.splitlines()) == 5
    with pytest.raises(UserError, match="two prompts that two annotators"):
        of_rankings(store, ["ada"])
    assert agreement.table(None, {}) == ""


def test_only_what_both_have_ranked_is_compared(store):
    for pid in list(store.prompts())[:3]:
        rs = list(store.responses(pid))
        store.add(Ranking(pid, tuple(rs[:2]), ((rs[0],), (rs[1],)), "carl"))
    found = of_rankings(store, ["ada", "carl"])
    assert found["all"]["prompts"] == 3 and found["all"]["agreement"]["n"] == 3
    assert found["all"]["agreement"]["value"] == 1 == found["all"]["tau_b"]["value"]
    assert dataclasses.asdict(alpha([(str(i), {"a": j, "c": j}) for i in range(3) for j in (1.5, 2.5)]))["value"] == 1
