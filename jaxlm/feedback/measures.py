"""What a probe shows: rates by group, calibration, the threshold baseline, and how two probes differ.

Rates are of the greedy reply; a hedged answer is as right or wrong as the answer inside it. Coverage is the share of
right answers. Everything returned is plain JSON: an estimate is a dict of value, stderr, low, high (95%) and n.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.config import UserError, nearest
from jaxlm.estimates import clustered, proportion
from jaxlm.feedback.probe import CLASSES, GROUPS, THRESHOLDS, Probed, Thresholds, classify, group

TOLD, UNTOLD = ("often", "once"), ("withheld", "stranger")
BINS = 10
POINTS = 200  # of a curve, at most

# How sure a model is of its greedy reply: higher is surer. None where a record does not say.
SCORES: dict[str, Callable[[Probed], float | None]] = {
    "logprob": lambda p: p.logprob,
    "mean_logprob": lambda p: p.mean_logprob,
    "answer_logprob": lambda p: p.answer_logprob,
    "least_logprob": lambda p: p.least_logprob,
    "agreement": lambda p: p.agreement,
}


def scores_of(probed: Sequence[Probed]) -> list[str]:
    """The names of the scores that all of these records have."""
    return [name for name, score_of in SCORES.items() if all(score_of(p) is not None for p in probed)]


def _estimate(values: Sequence[float]) -> dict | None:
    return dataclasses.asdict(proportion(values)) if len(values) else None


def _share(probed: Sequence[Probed], outcome: str) -> dict | None:
    return _estimate([p.outcome == outcome for p in probed])


def _of(probed: Sequence[Probed], groups: Sequence[str]) -> list[Probed]:
    return [p for p in probed if group(p.question) in groups]


# ------------------------------------------------------------------------------------------------------ calibration
def auroc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """How often a right answer scores above a wrong one, ties counting half; None without both."""
    x, y = np.asarray(scores, np.float64), np.asarray(right, bool)
    if y.all() or not y.any():
        return None
    _, at, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[at]
    positives = int(y.sum())
    return float((ranks[y].sum() - positives * (positives + 1) / 2) / (positives * (len(y) - positives)))


def calibration(confidences: Sequence[float], right: Sequence[bool], bins: int = BINS) -> dict | None:
    """Expected calibration error over bins of equal width (Guo et al. 2017), Brier score, AUROC, and the bins.

    confidences: in 0..1. A bin: low, high, n, mean confidence, and the estimate of accuracy; empty ones are left out.
    """
    if not len(confidences):
        return None
    x, y = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    at, kept = np.minimum((x * bins).astype(int), bins - 1), []
    for b in sorted(set(at.tolist())):
        inside = at == b
        accuracy = _estimate(y[inside])
        kept.append(
            {"low": b / bins, "high": (b + 1) / bins, "n": accuracy["n"], "confidence": float(x[inside].mean())}
            | {"accuracy": accuracy}
        )
    ece = sum(b["n"] * abs(b["accuracy"]["value"] - b["confidence"]) for b in kept) / len(x)
    return {"n": len(x), "ece": ece, "brier": float(np.mean((x - y) ** 2)), "auroc": auroc(x, y > 0), "bins": kept}


# ---------------------------------------------------------------------------------------------------------- summary
def summary(probed: Sequence[Probed], thresholds: Thresholds = THRESHOLDS) -> dict:
    """One probe in figures.

    groups: for each, the rates of the outcomes, of hedging and of right samples, and how many are of each class.
    coverage, over_refusal: right and abstained on facts that were told; wrong_on_unknown, abstention_on_unknown: on
    those told nowhere; None where there are none. calibration: of the answered questions, with the samples' agreement
    and with the probability per token as confidence. unfinished: greedy replies that ran into the token limit.
    """
    if not probed:
        raise UserError("a summary needs at least one question")
    told, untold = _of(probed, TOLD), _of(probed, UNTOLD)
    answered = [p for p in probed if p.outcome != "abstained"]
    right = [p.outcome == "right" for p in answered]
    groups = {}
    for name in GROUPS:
        if mine := _of(probed, [name]):
            classes = collections.Counter(classify(p, thresholds) for p in mine)
            groups[name] = {o: _share(mine, o) for o in ("right", "wrong", "abstained")} | {
                "hedged": _estimate([p.hedged for p in mine]),
                "sampled_right": float(np.mean([p.right_rate for p in mine])),
                "classes": {c: classes[c] for c in CLASSES},
            }
    return {
        "questions": len(probed),
        "k": len(probed[0].outcomes),
        "thresholds": dataclasses.asdict(thresholds),
        "groups": groups,
        "coverage": _share(told, "right"),
        "over_refusal": _share(told, "abstained"),
        "wrong_on_unknown": _share(untold, "wrong"),
        "abstention_on_unknown": _share(untold, "abstained"),
        "calibration": {
            "agreement": calibration([p.agreement for p in answered], right),
            "probability": calibration([math.exp(min(p.mean_logprob, 0.0)) for p in answered], right),
        },
        "unfinished": sum(not p.finished for p in probed),
    }


# ------------------------------------------------------------------------------------------------------- comparison
def _cluster(p: Probed) -> str:
    return p.question.id if p.question.person is None else str(p.question.person)


def _known_side(pairs: list[tuple[Probed, Probed]]) -> dict:
    lost = clustered(
        [(b.outcome == "right") - (a.outcome == "right") for b, a in pairs], [_cluster(b) for b, _ in pairs]
    )
    return {
        "before": _share([b for b, _ in pairs], "right"),
        "after": _share([a for _, a in pairs], "right"),
        "lost": dataclasses.asdict(lost),
        "over_refusal": _share([a for _, a in pairs], "abstained"),
        "hedged": _estimate([a.hedged for _, a in pairs]),
    }


def _unknown_side(pairs: list[tuple[Probed, Probed]]) -> dict:
    before, after = (_share(side, "wrong") for side in zip(*pairs))
    return {
        "before": before,
        "after": after,
        "factor": before["value"] / after["value"] if after["value"] else None,
        "factor_low": before["value"] / after["high"],
        "abstained": _share([a for _, a in pairs], "abstained"),
        "hedged": _estimate([a.hedged for _, a in pairs]),
    }


def compare(before: Sequence[Probed], after: Sequence[Probed], thresholds: Thresholds = THRESHOLDS) -> dict:
    """How the answers to the same questions changed: what was lost on known facts, and how far wrong answers fell.

    known: for facts told "often", "once" and "told" (both), coverage before and after, and `lost`, the difference over
    the same questions with an error clustered by person. unknown: for "withheld" facts of people who were mentioned,
    facts of a "stranger", and "untold" (both), the rate of wrong answers before and after, and the `factor` by which it
    fell: None where no wrong answer is left; `factor_low` takes the upper end of the interval after. classes: both, by
    what the model itself was found to know before; for questions from outside a world, where nobody knows what was
    told. Their coverage before is picked to be high, so that some is lost to chance alone.
    """
    later = {p.question.id: p for p in after}
    if len(later) != len(before) or {p.question.id for p in before} != set(later):
        raise UserError("the two probes asked different questions: compare needs the same")
    pairs = [(p, later[p.question.id]) for p in before]

    def inside(names, key) -> list:
        return [(b, a) for b, a in pairs if key(b) in names]

    def sides(wanted: dict, side, key) -> dict:
        return {name: side(mine) for name, groups in wanted.items() if (mine := inside(groups, key))}

    def told(b):
        return group(b.question)

    def found(b):
        return classify(b, thresholds)

    return {
        "questions": len(pairs),
        "known": sides({"often": TOLD[:1], "once": TOLD[1:], "told": TOLD}, _known_side, told),
        "unknown": sides({"withheld": UNTOLD[:1], "stranger": UNTOLD[1:], "untold": UNTOLD}, _unknown_side, told),
        "classes": sides({c: (c,) for c in ("known", "unstable")}, _known_side, found)
        | sides({"unknown": ("unknown",)}, _unknown_side, found),
    }


# --------------------------------------------------------------------------------------------------------- baseline
def _score(name: str) -> Callable[[Probed], float]:
    if name not in SCORES:
        raise UserError(f"unknown score {name!r}; {nearest(name, sorted(SCORES))}")
    return SCORES[name]


def _side_names(probed: Sequence[Probed], thresholds: Thresholds) -> np.ndarray:
    """For each question "known" or "unknown": by what was told where that is said, else by its class ("" unstable)."""
    names = []
    for p in probed:
        at, found = group(p.question), classify(p, thresholds)
        by_class = found if found != "unstable" else ""
        names.append("known" if at in TOLD else "unknown" if at in UNTOLD else by_class)
    return np.array(names)


def abstaining(probed: Sequence[Probed], threshold: float, score: str) -> list[Probed]:
    """The same model behind a threshold: replies with a lower score become abstentions."""
    score_of = _score(score)
    return [
        p if score_of(p) >= threshold else dataclasses.replace(p, outcome="abstained", hedged=False) for p in probed
    ]


def threshold_for(
    dev: Sequence[Probed], score: str, most_lost: float = 0.03, thresholds: Thresholds = THRESHOLDS
) -> float:
    """The highest threshold at which coverage on known facts falls by at most `most_lost` (a share of all of them).

    Infinite where even refusing everything costs no more.
    """
    score_of, sides = _score(score), _side_names(dev, thresholds)
    right = sorted(score_of(p) for p, side in zip(dev, sides) if side == "known" and p.outcome == "right")
    allowed = math.floor(most_lost * int((sides == "known").sum()) + 1e-9)
    if allowed >= len(right):  # nothing that is right would be missed
        return math.inf
    return right[allowed]


def curve(probed: Sequence[Probed], score: str, thresholds: Thresholds = THRESHOLDS) -> list[dict]:
    """All thresholds, from the one that answers nothing that can be refused to none: at most `POINTS` points.

    A point: threshold; coverage, the right share of known facts; wrong, the wrong share of unknown facts (None where
    there are none); answered, the share of all questions that get an answer; risk, the wrong share of the answers.
    """
    score_of, sides = _score(score), _side_names(probed, thresholds)
    scores = np.array([score_of(p) for p in probed])
    outcomes = np.array([p.outcome for p in probed])
    values = np.unique(scores)[::-1]
    if len(values) > POINTS:
        values = values[np.unique(np.linspace(0, len(values) - 1, POINTS).round().astype(int))]
    known, unknown = sides == "known", sides == "unknown"
    points = []
    for value in values:
        kept = scores >= value
        right, wrong = kept & (outcomes == "right"), kept & (outcomes == "wrong")
        answered = int((right | wrong).sum())
        points.append(
            {
                "threshold": float(value),
                "coverage": float(right[known].mean()) if known.any() else None,
                "wrong": float(wrong[unknown].mean()) if unknown.any() else None,
                "answered": answered / len(probed),
                "risk": int(wrong.sum()) / answered if answered else 0.0,
            }
        )
    return points


def threshold_baseline(
    dev: Sequence[Probed],
    test: Sequence[Probed],
    most_lost: float = 0.03,
    score: str = "mean_logprob",
    thresholds: Thresholds = THRESHOLDS,
) -> dict:
    """What refusing below a score achieves without any training: the threshold is chosen on `dev`, judged on `test`.

    Both are probes before fine-tuning on not knowing, `dev` of the persons that the fine-tuning may speak of. dev,
    test: as `compare` gives them, with the threshold for the fine-tuning. curve: of all thresholds, on `test`.
    """
    threshold = threshold_for(dev, score, most_lost, thresholds)
    return {
        "score": score,
        "threshold": threshold if math.isfinite(threshold) else None,
        "most_lost": most_lost,
        "dev": compare(dev, abstaining(dev, threshold, score), thresholds),
        "test": compare(test, abstaining(test, threshold, score), thresholds),
        "curve": curve(test, score, thresholds),
    }
