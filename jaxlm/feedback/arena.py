"""Elo of checkpoints or runs from comparisons of their replies: the Bradley-Terry model by maximum likelihood.

Bradley and Terry 1952: P(i beats j) = sigmoid(t_i - t_j). Elo's scale is 400 / ln 10 points for one unit of t, so that
400 points are odds of 10 to 1. Fitted to all comparisons at once, the order in which they came does not matter
(Chiang et al. 2024, arXiv 2403.04132). A tie is half a win for each. Comparisons of one prompt go together: the
bootstrap draws prompts.

The prior: each player has `prior` ties with a player of average strength. Without it one who always wins has no finite
rating, and players whom no chain of comparisons connects have no common scale; with it, they have one that the
comparisons say nothing about, and the result says so (`bounded_by_prior`, `groups`).

N players, P prompts, S bootstrap draws.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.config import UserError, nearest
from jaxlm.feedback.preferences import latest_rankings
from jaxlm.feedback.records import Response
from jaxlm.feedback.store import Store

SCALE = 400 / math.log(10)
CENTER = 1000.0  # the anchor's rating, or the mean of all without one
PRIOR = 0.1
DRAWS = 1000
_CHUNK = 200  # draws that are fitted at once


class Game(NamedTuple):
    """score: 1 where `a` won, 0 where `b` did, 0.5 a tie; a judge's probability will do."""

    a: str
    b: str
    score: float
    prompt: str


@dataclasses.dataclass(frozen=True)
class Standing:
    """A player's Elo with its 95% interval; `games` and `wins` count ties as half a win."""

    name: str
    elo: float
    low: float
    high: float
    games: int
    wins: float
    bounded_by_prior: bool  # all won or all lost against the others of its group: no finite rating without the prior


@dataclasses.dataclass(frozen=True)
class Arena:
    """Standings, the best first. groups: players that comparisons connect; across groups Elo means nothing."""

    standings: tuple[Standing, ...]
    groups: tuple[tuple[str, ...], ...]
    anchor: str | None
    center: float
    prior: float
    games: int
    prompts: int
    draws: int

    def as_dict(self) -> dict:
        """Plain JSON."""
        return dataclasses.asdict(self) | {"scale": SCALE}


# -------------------------------------------------------------------------------------------------------- the games
def games_of(
    store: Store, annotators: Sequence[str] | None = None, responses: Collection[str] | None = None
) -> list[Game]:
    """Every two responses of different checkpoints that one ranking holds are a game; players are `workdir@step`.

    Responses that were not sampled from a known checkpoint, or are not among these, do not play.
    """
    players = {
        i: r.policy.name
        for i, r in store.records(Response)
        if r.policy is not None and (responses is None or i in responses)
    }
    out = []
    for ranking in latest_rankings(store, annotators):
        placed = [(players[i], rank) for i, rank in zip(ranking.shown, ranking.ranks) if i in players]
        for (a, x), (b, y) in itertools.combinations(placed, 2):
            if a != b:
                out.append(Game(a, b, 0.5 if x == y else float(x < y), ranking.prompt))
    return out


def _components(edges_NN: np.ndarray) -> list[list[int]]:
    """Players that are connected, whatever the direction, in order of their first."""
    left, out = set(range(len(edges_NN))), []
    while left:
        todo, found = [min(left)], set()
        while todo:
            at = todo.pop()
            if at in left:
                left.remove(at)
                found.add(at)
                todo += np.flatnonzero(edges_NN[at] + edges_NN[:, at]).tolist()
        out.append(sorted(found))
    return out


def _reachable(edges_NN: np.ndarray) -> np.ndarray:
    reach_NN = np.eye(len(edges_NN), dtype=bool) | (edges_NN > 0)
    for _ in range(max(1, len(edges_NN).bit_length())):
        reach_NN = reach_NN @ reach_NN
    return reach_NN


# ---------------------------------------------------------------------------------------------------------- the fit
def fit(wins_SNN: np.ndarray, prior: float = PRIOR, tolerance: float = 1e-9) -> np.ndarray:
    """Strengths t, float64 [S,N] with mean 0, that maximize the likelihood of wins_SNN[s, i, j], i's wins over j.

    Newton's method with step halving; the likelihood is concave. Without a prior it has no maximum unless every player
    reaches every other one through wins: `UserError`.
    """
    S, N, _ = wins_SNN.shape
    if prior < 0 or (prior == 0 and not all(_reachable(w).all() for w in wins_SNN)):
        raise UserError("without a prior (above 0) each player must have won, through others, against each other one")
    games_SNN = wins_SNN + wins_SNN.transpose(0, 2, 1)

    def log_likelihood(t_SN):
        gap_SNN = t_SN[:, :, None] - t_SN[:, None, :]
        of_prior = prior * (np.logaddexp(0, t_SN) + np.logaddexp(0, -t_SN)).sum(-1) / 2
        return -(wins_SNN * np.logaddexp(0, -gap_SNN)).sum((1, 2)) - of_prior

    t_SN = np.zeros((S, N))
    value_S = log_likelihood(t_SN)
    for _ in range(100):
        p_SNN = 1 / (1 + np.exp(t_SN[:, None, :] - t_SN[:, :, None]))
        p_SN = 1 / (1 + np.exp(-t_SN))
        gradient_SN = wins_SNN.sum(2) - (games_SNN * p_SNN).sum(2) + prior * (0.5 - p_SN)
        weight_SNN = games_SNN * p_SNN * (1 - p_SNN)
        hessian_SNN = -weight_SNN
        hessian_SNN[:, np.arange(N), np.arange(N)] += weight_SNN.sum(2) + prior * p_SN * (1 - p_SN)
        # The likelihood of the games alone is flat along the ones vector; this fixes that direction, nothing else.
        step_SN = np.linalg.solve(hessian_SNN + (prior == 0) / N, gradient_SN[..., None])[..., 0]
        if np.abs(step_SN).max() < tolerance:
            break
        size_S = np.ones(S)
        for _ in range(40):
            new_SN = t_SN + size_S[:, None] * step_SN
            new_S = log_likelihood(new_SN)
            worse_S = new_S < value_S - 1e-12 * np.abs(value_S)
            if not worse_S.any():
                break
            size_S = np.where(worse_S, size_S / 2, size_S)
        t_SN, value_S = new_SN, new_S
    return t_SN - t_SN.mean(1, keepdims=True)


def arena(
    games: Sequence[Game],
    anchor: str | None = None,
    center: float = CENTER,
    prior: float = PRIOR,
    draws: int = DRAWS,
    seed: int = 0,
) -> Arena:
    """Elo of every player with percentile bootstrap intervals over prompts.

    anchor: the player whose rating is `center`, without an interval of its own; unset, the players' mean is. A player
    who is in none of a draw's prompts has the prior's rating there, which widens its interval. `UserError` without
    games, for scores outside 0..1, and for an anchor that does not play.
    """
    if prior <= 0 or draws < 1:
        raise UserError(f"an arena needs a prior above 0 and at least one draw, got {prior} and {draws}")
    if not games:
        raise UserError("an arena needs at least one comparison between two players")
    if bad := [g for g in games if not 0 <= g.score <= 1 or g.a == g.b]:
        raise UserError(f"a game has two players and a score from 0 to 1, got {bad[0]}")
    names = sorted({p for g in games for p in (g.a, g.b)})
    if anchor is not None and anchor not in names:
        raise UserError(f"the anchor {anchor!r} plays no game; {nearest(anchor, names)}")
    N, at = len(names), {n: i for i, n in enumerate(names)}
    by_prompt: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros((N, N)))
    for g in games:
        by_prompt[g.prompt][at[g.a], at[g.b]] += g.score
        by_prompt[g.prompt][at[g.b], at[g.a]] += 1 - g.score
    wins_PNN = np.stack(list(by_prompt.values()))
    P = len(wins_PNN)
    total_NN = wins_PNN.sum(0)

    def elo(wins_SNN):
        t_SN = fit(wins_SNN, prior)
        return center + SCALE * (t_SN if anchor is None else t_SN - t_SN[:, [at[anchor]]])

    generator = np.random.default_rng(seed)
    counts_SP = generator.multinomial(P, np.full(P, 1 / P), size=draws).astype(float)
    drawn = [
        elo(np.einsum("sp,pij->sij", counts_SP[first : first + _CHUNK], wins_PNN)) for first in range(0, draws, _CHUNK)
    ]
    low_N, high_N = np.percentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
    elo_N = elo(total_NN[None])[0]
    groups = _components(total_NN)
    group_of = {i: group for group in groups for i in group}
    reach_NN = _reachable(total_NN)
    standings = [
        Standing(
            name=name,
            elo=float(elo_N[i]),
            low=float(low_N[i]),
            high=float(high_N[i]),
            games=sum(name in (g.a, g.b) for g in games),
            wins=float(total_NN[i].sum()),
            bounded_by_prior=not all(reach_NN[i, j] and reach_NN[j, i] for j in group_of[i]),
        )
        for i, name in enumerate(names)
    ]
    return Arena(
        standings=tuple(sorted(standings, key=lambda s: (-s.elo, s.name))),
        groups=tuple(tuple(names[i] for i in group) for group in groups),
        anchor=anchor,
        center=center,
        prior=prior,
        games=len(games),
        prompts=P,
        draws=draws,
    )


def table(result: Arena) -> str:
    """The standings as text, with what they rest on."""
    rows = [("player", "Elo", "95% interval", "games", "won %")]
    for s in result.standings:
        mark = " *" if s.bounded_by_prior else ""
        interval = f"{s.low:.0f}..{s.high:.0f}"
        rows.append((s.name + mark, f"{s.elo:.0f}", interval, str(s.games), f"{100 * s.wins / s.games:.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in rows]
    what = "the mean of all" if result.anchor is None else result.anchor
    lines.append(
        f"{result.center:g} is {what}; 400 points are odds of 10 to 1. {result.games} games over {result.prompts} "
        f"prompts; {result.draws} bootstrap draws of prompts; prior: {result.prior:g} ties each with an average player"
    )
    if any(s.bounded_by_prior for s in result.standings):
        lines.append(
            "* some players of its group never lost to the others, or never won: only the prior bounds the gap"
        )
    if len(result.groups) > 1:
        shown = "; ".join(", ".join(g) for g in result.groups)
        lines.append(f"no comparisons connect these groups, so that Elo says nothing across them: {shown}")
    return "\n".join(lines)
