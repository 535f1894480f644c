"""Over-optimization: what best-of-n gives for its KL, unbiased for every n, and the curves of Gao et al. fitted.

A proxy reward is what is optimized, the gold reward what is wanted; d = sqrt(KL) to the initial policy, in sqrt(nats).
Gao, Schulman and Hilton 2022 (arXiv 2210.10760) found gold gained R = d (alpha - beta d) for best-of-n and
R = d (alpha - beta log d) for RL. R is 0 at d = 0: give gains over the initial policy, not rewards. Alarms on a run
are in `alarms.py`.

P prompts, N samples of each, K points of a curve, R repetitions (prompts, seeds), B resamples.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import numpy as np
from scipy.special import gammaln

from jaxlm.config import UserError
from jaxlm.estimates import Estimate, clustered

Form = Literal["best-of-n", "rl"]
RESAMPLES = 1000


# -------------------------------------------------------------------------------------------------------- best-of-n
def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: exact where no two samples tie, else an upper bound (Beirami et al. 2024,
    arXiv 2401.01879)."""
    if n < 1:
        raise UserError(f"best-of-n needs n >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def order_weights(N: int, n: int) -> np.ndarray:
    """float64 [N]: the probability that the i-th lowest of N values is the highest of n drawn without replacement.

    C(i - 1, n - 1) / C(N, n) for i = 1..N: with them the mean over all subsets of n is one sum.
    """
    if not 1 <= n <= N:
        raise UserError(f"best-of-{n} needs 1 <= n <= {N} samples")
    below = np.arange(N)
    log = np.full(N, -np.inf)
    b = below[n - 1 :]
    log[n - 1 :] = gammaln(b + 1) - gammaln(b - n + 2) - gammaln(n)
    weights = np.exp(log - (gammaln(N + 1) - gammaln(n + 1) - gammaln(N - n + 1)))
    return weights / weights.sum()


def best_of_n(proxy_PN: np.ndarray, value_PN: np.ndarray, n: int) -> np.ndarray:
    """float64 [P]: the expected value of the sample with the highest proxy out of n of a prompt's N.

    Unbiased, with the least variance that N samples allow. Of samples with the same proxy each is as likely chosen.
    value_PN: the proxy itself, gold, or a verifier's verdict.
    """
    proxy_PN, value_PN = (np.asarray(x, np.float64) for x in (proxy_PN, value_PN))
    if proxy_PN.ndim != 2 or proxy_PN.shape != value_PN.shape or not proxy_PN.size:
        raise UserError(f"best-of-n needs two arrays [P, N], got {proxy_PN.shape} and {value_PN.shape}")
    if not (np.isfinite(proxy_PN).all() and np.isfinite(value_PN).all()):
        raise UserError("best-of-n needs finite values: leave out prompts with a sample that cannot be scored")
    weights_N = order_weights(proxy_PN.shape[1], n)
    out = np.empty(len(proxy_PN))
    for p, (proxy_N, value_N) in enumerate(zip(proxy_PN, value_PN)):
        order = np.argsort(proxy_N, kind="stable")
        _, tied = np.unique(proxy_N[order], return_inverse=True)
        shared = np.bincount(tied, weights=weights_N) / np.bincount(tied)
        out[p] = shared[tied] @ value_N[order]
    return out


def best_of_n_curve(
    proxy_PN: np.ndarray,
    values: dict[str, np.ndarray],
    ns: Sequence[int],
    clusters: Sequence[Hashable] | None = None,
) -> list[dict]:
    """For each n: n, kl, d = sqrt(kl), and for each named [P, N] array in `values` (proxy, gold, verifier)

    - the estimate of its best-of-n mean over prompts,
    - "<name>/random", of the matched control: as many samples, the chosen one drawn at random (for every n the mean
      of the N),
    - "<name>/gain", of the difference of the two on the same prompts.

    clusters: which prompts' errors go together; None: each its own.
    """
    clusters = range(len(proxy_PN)) if clusters is None else clusters
    curve = []
    for n in ns:
        kl = best_of_n_kl(n)
        point = {"n": n, "kl": kl, "d": math.sqrt(kl)}
        for name, value_PN in values.items():
            best_P, pool_P = best_of_n(proxy_PN, value_PN, n), np.mean(np.asarray(value_PN, np.float64), 1)
            for suffix, x in (("", best_P), ("/random", pool_P), ("/gain", best_P - pool_P)):
                point[name + suffix] = clustered(x, clusters)
        curve.append(point)
    return curve


def choose(proxy_PN: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(best [P], control [P]): of n samples drawn from each prompt's N, the index of the best and of a random one.

    For rejection sampling: the control has seen the same samples and the same number of them. Ties fall at random.
    """
    proxy_PN = np.asarray(proxy_PN, np.float64)
    P, N = proxy_PN.shape
    if not 1 <= n <= N:
        raise UserError(f"best-of-{n} needs 1 <= n <= {N} samples")
    g = np.random.default_rng(seed)
    drawn_Pn = np.argsort(g.random((P, N)), axis=1)[:, :n]  # in random order, so the first of equals is a random one
    best_P = np.argmax(np.take_along_axis(proxy_PN, drawn_Pn, 1), axis=1)
    return drawn_Pn[np.arange(P), best_P], drawn_Pn[np.arange(P), g.integers(0, n, P)]


# ------------------------------------------------------------------------------------------------------------- fits
_FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "best-of-n": lambda d: np.stack([d, -d * d], -1),
    "rl": lambda d: np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], -1),
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """R(d) of one form. alpha, beta: with bootstrap intervals (95%, percentiles), of which `n` is the number of points.

    turnover: the d at which gold is highest, and `peak` what it is there; None where the curve has no maximum
    (beta <= 0). turnover_low, turnover_high: over the resamples; the upper end is infinite where more than 2.5% of them
    have none. residual: root mean square of the points about the curve.
    """

    form: Form
    alpha: float
    beta: float
    alpha_interval: tuple[float, float]
    beta_interval: tuple[float, float]
    turnover: float | None
    turnover_low: float
    turnover_high: float
    peak: float | None
    residual: float
    n: int

    def __call__(self, d) -> np.ndarray:
        return curve(self.form, self.alpha, self.beta, d)


def curve(form: Form, alpha: float, beta: float, d) -> np.ndarray:
    """R(d) of one form, of d's shape."""
    return _FORMS[form](np.asarray(d, np.float64)) @ np.array([alpha, beta])


def turnover(form: Form, alpha: float, beta: float) -> float:
    """The d > 0 at which R is highest: infinite where it never turns, 0 where it only falls."""
    if form == "best-of-n":
        return max(0.0, alpha / (2 * beta)) if beta > 0 else math.inf if alpha > 0 or beta < 0 else 0.0
    if beta > 0:
        return math.exp(min(alpha / beta - 1.0, 700.0))
    return math.inf if alpha > 0 or beta < 0 else 0.0


def fit(form: Form, d_K: Sequence[float], gain: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Fit:
    """Least squares of alpha and beta, and a bootstrap over what was repeated.

    Args:
      d_K: sqrt(KL) of each point, at least two different positive ones. A fit sees no further than its largest.
      gain: [K], and points are resampled; or [R, K], a row for each prompt or seed, whose mean is fitted and which are
        resampled whole: neighboring points of one curve are not independent, so give rows where there are any.
    """
    if form not in _FORMS:
        raise UserError(f"unknown form {form!r}: best-of-n or rl")
    d_K, gain = np.asarray(d_K, np.float64), np.asarray(gain, np.float64)
    if d_K.ndim != 1 or gain.ndim not in (1, 2) or gain.shape[-1:] != d_K.shape or not gain.size:
        raise UserError(f"a fit needs d [K] and gains [K] or [R, K], got {d_K.shape} and {gain.shape}")
    if not (np.isfinite(d_K).all() and (d_K >= 0).all() and np.isfinite(gain).all()):
        raise UserError("a fit needs finite gains, and sqrt(KL) that is finite and not negative")
    if len(np.unique(d_K[d_K > 0])) < 2:
        raise UserError("a fit of two parameters needs points at two different sqrt(KL) above 0")
    features_K2 = _FORMS[form](d_K)
    mean_K = gain if gain.ndim == 1 else gain.mean(0)
    alpha, beta = _solve(features_K2, mean_K).tolist()
    g = np.random.default_rng(seed)
    if gain.ndim == 1:
        at_BK = g.integers(0, len(d_K), (resamples, len(d_K)))
        drawn_B2 = _solve(features_K2[at_BK], gain[at_BK])
    else:
        counts_BR = g.multinomial(len(gain), np.full(len(gain), 1 / len(gain)), resamples)
        drawn_B2 = _solve(features_K2, counts_BR @ gain / len(gain))
    low_2, high_2 = np.quantile(drawn_B2, [0.025, 0.975], axis=0).tolist()
    turns_B = sorted(turnover(form, a, b) for a, b in drawn_B2.tolist())
    at = turnover(form, alpha, beta)
    turns = math.isfinite(at)
    found = Fit(
        form, alpha, beta, (low_2[0], high_2[0]), (low_2[1], high_2[1]), at if turns else None,
        turns_B[int(0.025 * (resamples - 1))], turns_B[math.ceil(0.975 * (resamples - 1))], None, 0.0, len(d_K),
    )  # fmt: skip
    residual = float(np.sqrt(np.mean((found(d_K) - mean_K) ** 2)))
    return dataclasses.replace(found, peak=float(found(at)) if turns else None, residual=residual)


def _solve(features: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Least squares [..., 2] for features [..., K, 2] and gains [..., K], of least norm where that leaves a choice."""
    return (np.linalg.pinv(features) @ gains[..., None])[..., 0]


def gains(points: Sequence[dict], name: str, baseline: float) -> tuple[list[float], list[float]]:
    """(sqrt(KL), gain over the initial policy) of an RL run's records that hold "kl" and `name`; see `fit`.

    A KL below 0, as estimates near the start have, counts as 0.
    """
    kept = [p for p in points if p.get("kl") is not None and p.get(name) is not None]
    return [math.sqrt(max(p["kl"], 0.0)) for p in kept], [float(_value(p[name])) - baseline for p in kept]


def _value(x) -> float:
    return x.value if isinstance(x, Estimate) else x
