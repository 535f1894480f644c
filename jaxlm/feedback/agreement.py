"""How far annotators agree on the same prompts, with 95% intervals whose errors go together within a prompt.

P prompts, V values that a category can have.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jaxlm.config import UserError
from jaxlm.estimates import Z95, Estimate, clustered
from jaxlm.feedback.preferences import latest_rankings, latest_ratings
from jaxlm.feedback.records import Response
from jaxlm.feedback.store import Store

# One unit is what several annotators put a value to, such as a response: (its cluster, annotator -> value).
Unit = tuple[str, Mapping[str, float]]


# ----------------------------------------------------------------------------------------------------------- measures
def same_direction(a: Sequence[int], b: Sequence[int]) -> list[float]:
    """For each pair of items: 1 where two rankings order it the same way or both tie it, 0 where they are opposed, and
    half where one of them ties it."""
    out = []
    for i, j in itertools.combinations(range(len(a)), 2):
        x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
        out.append(1 - abs(int(x) - int(y)) / 2)
    return out


def tau_b(a: Sequence[int], b: Sequence[int]) -> float | None:
    """Kendall's tau-b (Kendall 1945) of two rankings, -1 to 1; None where one of them ties everything."""
    places = list(itertools.combinations(range(len(a)), 2))
    x, y = (np.sign([r[i] - r[j] for i, j in places]) for r in (np.asarray(a), np.asarray(b)))
    norm = math.sqrt(np.count_nonzero(x) * np.count_nonzero(y))
    return float(np.sum(x * y)) / norm if norm else None


def _alpha(coincidences_VV: np.ndarray, level: str) -> float | None:
    """None where every value is the same: there is nothing to disagree about."""
    n_V = coincidences_VV.sum(0)
    n = n_V.sum()
    if level == "nominal":
        distance_VV = 1.0 - np.eye(len(n_V))
    else:
        below_V = np.cumsum(n_V) - n_V / 2  # between two values lie the ranks of all values between, half of their own
        distance_VV = (below_V[:, None] - below_V[None, :]) ** 2
    expected = np.sum(distance_VV * np.outer(n_V, n_V)) / (n - 1) if n > 1 else 0.0
    return None if expected == 0 else float(1 - np.sum(distance_VV * coincidences_VV) / expected)


def alpha(units: Sequence[Unit], level: Literal["nominal", "ordinal"] = "ordinal") -> Estimate | None:
    """Krippendorff's alpha: 1 is agreement, 0 is chance. Units that fewer than two annotators judged do not count.

    Krippendorff 2011, Computing Krippendorff's alpha-reliability. The error is the jackknife's over clusters, and the
    interval normal. n: units. None with fewer than two clusters, and where all values are the same.
    """
    units = [(cluster, list(values.values())) for cluster, values in units if len(values) >= 2]
    known = sorted({v for _, values in units for v in values})
    place = {v: i for i, v in enumerate(known)}
    by_cluster: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros((len(known), len(known))))
    for cluster, values in units:
        for a, b in itertools.permutations(range(len(values)), 2):
            by_cluster[cluster][place[values[a]], place[values[b]]] += 1 / (len(values) - 1)
    P = len(by_cluster)
    total_VV = sum(by_cluster.values())
    if P < 2 or (value := _alpha(total_VV, level)) is None:
        return None
    without = [_alpha(total_VV - c, level) for c in by_cluster.values()]
    without = np.array([value if w is None else w for w in without])
    stderr = float(np.sqrt((P - 1) / P * np.sum((without - without.mean()) ** 2)))
    return Estimate(value, stderr, value - Z95 * stderr, min(1.0, value + Z95 * stderr), 0.0, len(units))


# ------------------------------------------------------------------------------------------------------------- reports
def _estimate(values: Sequence[float], clusters: Sequence[str], low: float, chance: float) -> dict:
    """A mean in low..1 as plain JSON."""
    e = clustered(values, clusters)
    return dataclasses.asdict(dataclasses.replace(e, low=max(low, e.low), high=min(1.0, e.high), chance=chance))


def _midranks(ranks: Sequence[int]) -> list[float]:
    return [sum(r < x for r in ranks) + (ranks.count(x) + 1) / 2 for x in ranks]


def of_rankings(store: Store, annotators: Sequence[str] | None = None) -> dict:
    """Agreement of rankings, of each two annotators and of all, on the responses that both have ranked.

    agreement: the mean over pairs of responses, see `same_direction`. tau_b: the mean over prompts of what is defined.
    alpha: ordinal, over the places of the responses that all annotators of a prompt have ranked. All in plain JSON,
    each estimate a dict, or None where it cannot be told. `UserError` without two prompts that two annotators ranked.
    """
    given: dict[str, dict[str, dict[str, int]]] = collections.defaultdict(dict)
    for r in latest_rankings(store, annotators):
        given[r.prompt][r.annotator] = dict(zip(r.shown, r.ranks))  # the last one where several sets were shown
    rows: dict[tuple[str, str], list[tuple[str, list[float], float | None]]] = collections.defaultdict(list)
    units: list[Unit] = []
    for prompt, rankings in given.items():
        for one, other in itertools.combinations(sorted(rankings), 2):
            both = [i for i in rankings[one] if i in rankings[other]]
            if len(both) >= 2:
                a, b = ([rankings[who][i] for i in both] for who in (one, other))
                rows[one, other].append((prompt, same_direction(a, b), tau_b(a, b)))
        common = set.intersection(*map(set, rankings.values()))
        if len(rankings) >= 2 and len(common) >= 2:
            ids = sorted(common)
            places = {who: _midranks([ranks[i] for i in ids]) for who, ranks in rankings.items()}
            units += [(prompt, {who: p[n] for who, p in places.items()}) for n in range(len(ids))]

    def figures(mine) -> dict:
        pairs = [(x, prompt) for prompt, same, _ in mine for x in same]
        taus = [(t, prompt) for prompt, _, t in mine if t is not None]
        return {
            "prompts": len({prompt for prompt, _, _ in mine}),
            "agreement": _estimate(*zip(*pairs), low=0.0, chance=0.5),
            "tau_b": _estimate(*zip(*taus), low=-1.0, chance=0.0) if len({p for _, p in taus}) >= 2 else None,
            "tau_b_undefined": len(mine) - len(taus),
        }

    everything = [row for mine in rows.values() for row in mine]
    if len({prompt for prompt, _, _ in everything}) < 2:
        raise UserError("agreement needs at least two prompts that two annotators have ranked")
    found = alpha(units)
    enough = {pair: mine for pair, mine in rows.items() if len({prompt for prompt, _, _ in mine}) >= 2}
    return {
        "all": figures(everything) | {"alpha": None if found is None else dataclasses.asdict(found)},
        "pairs": [{"annotators": list(pair)} | figures(mine) for pair, mine in sorted(enough.items())],
    }


def of_ratings(store: Store, annotators: Sequence[str] | None = None) -> dict[str, dict]:
    """Ordinal alpha of the ratings by each criterion that two annotators used, as plain JSON; None as in `alpha`.

    Ratings on different scales are not compared: the scale is part of the name, as in "helpful 1..7".
    """
    prompts = {i: r.prompt for i, r in store.records(Response)}
    values: dict[str, dict[str, dict[str, float]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for r in latest_ratings(store, annotators):
        values[f"{r.criterion} {r.scale[0]:g}..{r.scale[1]:g}"][r.response][r.annotator] = r.value
    out = {}
    for name, responses in sorted(values.items()):
        units = [(prompts[i], by) for i, by in responses.items() if len(by) >= 2]
        if units:
            found = alpha(units)
            out[name] = {"responses": len(units), "alpha": None if found is None else dataclasses.asdict(found)}
    return out


def _shown(estimate: dict | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.3f} ({estimate['low']:.3f}..{estimate['high']:.3f})"


def table(rankings: dict | None, ratings: dict[str, dict]) -> str:
    """Both reports as text, with 95% intervals."""
    rows = []
    if rankings is not None:
        rows.append(("ranked by", "prompts", "agreement", "tau-b", "alpha"))
        for f in [*rankings["pairs"], {"annotators": ["all"]} | rankings["all"]]:
            name = " and ".join(f["annotators"])
            rows.append((name, str(f["prompts"]), _shown(f["agreement"]), _shown(f["tau_b"]), _shown(f.get("alpha"))))
    if ratings:
        rows.append(("rated by", "responses", "", "", "alpha"))
        rows += [(name, str(f["responses"]), "", "", _shown(f["alpha"])) for name, f in ratings.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(5)] if rows else []
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)
