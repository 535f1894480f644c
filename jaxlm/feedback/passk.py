"""How often at least one, or most, of several samples are right: pass@k and majority vote.

P prompts, each with its own number n of samples. Estimates are means over prompts, with the error clustered by prompt
unless `clusters` says what belongs together (prompts of one template, runs of one seed).
"""

import collections
import math
from collections.abc import Hashable, Sequence

from jaxlm.config import UserError
from jaxlm.estimates import Estimate, clustered


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that k of n samples, drawn without replacement, hold one of the c that are right.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374); 1 - (1 - c/n)^k, which
    looks like it, is biased low.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise UserError(f"pass@{k} needs 1 <= k <= n samples of which 0 <= c <= n are right, got n={n}, c={c}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _estimate(values: Sequence[float], clusters: Sequence[Hashable] | None) -> Estimate:
    if not len(values):
        raise UserError("an estimate over prompts needs at least one prompt")
    if clusters is not None and len(clusters) != len(values):
        raise UserError(f"{len(values)} prompts and {len(clusters)} clusters")
    return clustered(values, range(len(values)) if clusters is None else clusters)


def pass_rates(
    right: Sequence[Sequence[bool]], ks: Sequence[int], clusters: Sequence[Hashable] | None = None
) -> dict[int, Estimate]:
    """pass@k for each k, over prompts; right: of each prompt's samples. Every prompt needs at least max(ks) samples."""
    counts = [(len(r), sum(map(bool, r))) for r in right]
    return {k: _estimate([pass_at_k(n, c, k) for n, c in counts], clusters) for k in ks}


def majority(answers: Sequence[Hashable | None]) -> list[Hashable]:
    """The most frequent answers, several when they tie, in order of appearance; None has no vote."""
    counts = collections.Counter(a for a in answers if a is not None)
    most = max(counts.values(), default=0)
    return [a for a, count in counts.items() if count == most]


def majority_right(answers: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """Whether the majority's answer is right: of tied answers the share that is, as one of them drawn at random is.

    0 where no sample has an answer. The same answer must be as right each time it comes.
    """
    if len(answers) != len(right):
        raise UserError(f"{len(answers)} answers and {len(right)} verdicts")
    found: dict[Hashable, bool] = {}
    for answer, verdict in zip(answers, right):
        if found.setdefault(answer, bool(verdict)) != bool(verdict):
            raise UserError(f"the answer {answer!r} is right in one sample and wrong in another of the same prompt")
    winners = majority(answers)
    return sum(found[w] for w in winners) / len(winners) if winners else 0.0


def majority_rate(
    answers: Sequence[Sequence[Hashable | None]],
    right: Sequence[Sequence[bool]],
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """The share of prompts whose majority is right, each by all of its samples.

    Answers are compared as they are: give values, not texts, where 7 and 7.0 are one answer.
    """
    return _estimate([majority_right(a, r) for a, r in zip(answers, right, strict=True)], clusters)
