"""Statistics of a few seeds: spread, paired differences with Student's t interval, and the noise floor.

Runs are paired by seed: the same seed gives two variants the same data order, so that their difference varies less
than either does. All functions are pure; values are floats in the metric's own unit.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """`std` is the sample standard deviation (n - 1 in the denominator), None for a single value."""

    n: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline over `n` pairs; `low` and `high` bound the mean, None for a single pair."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True)
class NoiseFloor:
    """`std`: the seeds' standard deviation, pooled over variants with `df` degrees of freedom; `detectable`: the
    smallest difference of two means over `n` unpaired seeds each that would leave the interval around zero."""

    std: float
    df: int
    n: int
    detectable: float


def summarize(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation; raises ValueError without values."""
    values = [float(v) for v in values]
    if not values:
        raise ValueError("no values to summarize")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Summary(1, mean, None)
    return Summary(len(values), mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)))


def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """Half width, in standard errors, of the two-sided interval with `df` degrees of freedom."""
    return float(stdtrit(df, 0.5 + confidence / 2))


def half_width(s: Summary, confidence: float = CONFIDENCE) -> float | None:
    """Half of Student's t interval of the mean; None for a single value."""
    return None if s.std is None else t_quantile(s.n - 1, confidence) * s.std / math.sqrt(s.n)


def paired_difference(
    variant: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Student's paired t interval of variant - baseline over the seeds (keys) that both have; None without any."""
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        return None
    s = summarize(variant[seed] - baseline[seed] for seed in seeds)
    if s.std is None:
        return Difference(1, s.mean, None, None, None, None)
    error = s.std / math.sqrt(s.n)
    half = half_width(s, confidence)
    p = 2 * float(stdtr(s.n - 1, -abs(s.mean) / error)) if error else float(s.mean == 0)
    return Difference(s.n, s.mean, s.std, s.mean - half, s.mean + half, p)


def noise_floor(groups: Iterable[Iterable[float]], confidence: float = CONFIDENCE) -> NoiseFloor | None:
    """Pools the variance of each group of seeds; None when no group has two values."""
    summaries = [summarize(g) for g in map(list, groups) if len(g) > 1]
    if not summaries:
        return None
    df = sum(s.n - 1 for s in summaries)
    std = math.sqrt(sum((s.n - 1) * s.std**2 for s in summaries) / df)
    n = min(s.n for s in summaries)
    return NoiseFloor(std, df, n, t_quantile(df, confidence) * std * math.sqrt(2 / n))


def verdict(difference: Difference | None, lower_is_better: bool = True) -> str:
    """`better`, `worse`, `within noise` (the interval holds zero) or `unknown` (fewer than two pairs)."""
    if difference is None or difference.low is None:
        return "unknown"
    if difference.low <= 0 <= difference.high:
        return "within noise"
    return "better" if (difference.mean < 0) == lower_is_better else "worse"
