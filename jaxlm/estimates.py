"""A mean over items with what it needs to be believed: standard error, interval, chance."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964  # two-sided 95% of the normal distribution


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over items with its standard error, a 95% interval and what chance would give."""

    value: float
    stderr: float
    low: float
    high: float
    chance: float | None
    n: int


def proportion(values: Sequence[float], chance: float | None = None) -> Estimate:
    """Mean of scores in 0..1. The interval is Wilson's, which holds up near 0 and 1 and for few items."""
    n, p = len(values), float(np.mean(values))
    center, spread = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n), Z95 / (1 + Z95**2 / n)
    half = spread * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Estimate(p, math.sqrt(p * (1 - p) / n), max(0.0, center - half), min(1.0, center + half), chance, n)


def clustered(values: Sequence[float], clusters: Sequence) -> Estimate:
    """Mean of values whose errors go together within a cluster, such as the questions about one person.

    The standard error is the sandwich estimator for clusters (Miller 2024, arXiv 2411.00640); the interval is normal.
    """
    v = np.asarray(values, np.float64)
    n, value = len(v), float(v.mean())
    _, at = np.unique(np.asarray(clusters), return_inverse=True)
    stderr = float(np.sqrt(np.sum(np.bincount(at, weights=v - value) ** 2)) / n)
    return Estimate(value, stderr, value - Z95 * stderr, value + Z95 * stderr, None, n)


def ratio(numerators: Sequence[float], denominators: Sequence[float], chance: float | None) -> Estimate:
    """Sum over sum, such as nats per byte, with the delta method's error over items (rows) and a normal interval."""
    a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    n, value = len(a), float(a.sum() / b.sum())
    stderr = float(np.sqrt(np.sum((a - value * b) ** 2) * n / max(n - 1, 1)) / b.sum())
    return Estimate(value, stderr, value - Z95 * stderr, value + Z95 * stderr, chance, n)
