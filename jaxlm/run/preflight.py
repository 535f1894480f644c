"""Before a run of reinforcement learning: is there something to learn, and does the reward mean what it should?

Everything is read from plain records, so a trainer, a command or a notebook can ask. A sample's record:

    group      what it was sampled for: the samples of one prompt share it
    right      True, False or None, by the verifier
    reward     float or None, what training would see
    formatted  bool: a well-formed message
    truncated  bool: cut off at the token limit

A check has a value, the range that is healthy, and one that is tolerable. Outside the first it warns, outside the
second it says no-go: the run would learn nothing, or something else than was meant.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np

from jaxlm.config import UserError
from jaxlm.feedback.passk import pass_rates
from jaxlm.feedback.scoring import TIMEOUT, Reward, RewardError, scores

Verdict = Literal["ok", "warn", "no-go", "unknown"]
Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)
POSITIVE: Range = (math.ulp(0.0), math.inf)  # above 0


@dataclasses.dataclass(frozen=True)
class Check:
    """value None: it could not be measured, and the verdict is "unknown"."""

    name: str
    value: float | None
    healthy: Range
    verdict: Verdict
    why: str


@dataclasses.dataclass(frozen=True)
class Preflight:
    checks: tuple[Check, ...]

    @property
    def go(self) -> bool:
        """No check says no-go. Warnings and what is unknown are for a person to read."""
        return all(c.verdict != "no-go" for c in self.checks)


def judged(name: str, value: float | None, healthy: Range, tolerable: Range, low: str, high: str) -> Check:
    """A check by its two ranges, ends included; `low` and `high` say what a value below or above means."""
    if value is None:
        return Check(name, None, healthy, "unknown", "nothing to measure it on")
    if healthy[0] <= value <= healthy[1]:
        return Check(name, value, healthy, "ok", "")
    verdict = "warn" if tolerable[0] <= value <= tolerable[1] else "no-go"  # NaN is in no range
    return Check(name, value, healthy, verdict, high if value > healthy[1] else low)


# ----------------------------------------------------------------------------------------------------- the rollouts
def _groups(records: Sequence[Mapping]) -> dict[Hashable, list[Mapping]]:
    found: dict[Hashable, list[Mapping]] = {}
    for r in records:
        found.setdefault(r["group"], []).append(r)
    return found


def _share(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def no_spread(records: Sequence[Mapping]) -> float | None:
    """The share of groups whose rewards are all the same (max = min, not a standard deviation): they teach nothing.

    Samples without a reward are left out, and so are groups with fewer than two others.
    """
    columns = [[r["reward"] for r in g if r["reward"] is not None] for g in _groups(records).values()]
    return _share([max(c) == min(c) for c in columns if len(c) > 1])


def rollout_checks(records: Sequence[Mapping], k: int) -> list[Check]:
    """pass@1, pass@k, format rate, truncation, unscored samples and groups without spread, of the policy as it is.

    k: samples of a group in training. Groups with fewer samples that a verdict stands for are left out of both passes.
    """
    if not records:
        raise UserError("a pre-flight check needs at least one sample")
    if k < 1:
        raise UserError(f"pass@k needs k >= 1, got {k}")
    columns = [[r["right"] for r in g if r["right"] is not None] for g in _groups(records).values()]
    columns = [c for c in columns if len(c) >= k]
    rates = {n: e.value for n, e in pass_rates(columns, (1, k)).items()} if columns else {}
    return [
        judged(
            "pass@1", rates.get(1), (0.02, 0.95), ANY,
            "nearly nothing is right: rewards will be rare, and a demonstration teaches faster",
            "nearly everything is right already: there is little to learn",
        ),
        judged(
            f"pass@{k}", rates.get(k), (0.1, 1.0), (0.01, 1.0),
            "groups hardly ever hold a right answer to reinforce: easier tasks, or fine-tune first", "",
        ),
        judged(
            "format rate", _share([r["formatted"] for r in records]), (0.5, 1.0), (0.05, 1.0),
            "the policy hardly knows the format: fine-tune on it first, or reward it by itself", "",
        ),
        judged(
            "truncated", _share([r["truncated"] for r in records]), (0.0, 0.1), (0.0, 0.5),
            "", "completions run into the token limit: raise it, or the run learns to be short first",
        ),
        judged(
            "unscored", _share([r["reward"] is None for r in records]), (0.0, 0.05), (0.0, 0.5),
            "", "samples have no reward and are left out: look at the truths in the metadata",
        ),
        judged(
            "groups without spread", no_spread(records), (0.0, 0.7), (0.0, 0.95),
            "", "in most groups all rewards are the same, and the rollout is wasted: mix the difficulty",
        ),
    ]  # fmt: skip


def parity_check(certificate: Mapping[str, float], most: float = 1e-3) -> Check:
    """From `sample.parity.certificate`: the largest |logp(sampler) - logp(trainer)|, in nats.

    most: 1e-3 is ample in float32, where 1e-4 is usual; bfloat16 needs some .05. Ten times that is no-go.
    """
    tokens = certificate.get("tokens", 0)
    return judged(
        "sampler/trainer gap", certificate["max"] if tokens else None, (0.0, most), (0.0, 10 * most),
        "", "trainer and sampler disagree on what was sampled, which biases every update (cache, mask?)",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the reward
def _differs(a: float | None, b: float | None) -> bool:
    """Beyond what the order of a sum in single precision does."""
    return (a is None) != (b is None) or (a is not None and not math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


def reward_checks(
    reward: Reward,
    prompts: Sequence,
    completions: Sequence,
    metadata: Sequence[Mapping],
    empty: object = "",
    references: Sequence | None = None,
    seed: int = 0,
    timeout: float | None = TIMEOUT,
) -> list[Check]:
    """Calls a reward function on what it will meet and on what it should refuse, five or six times in all.

    - determinism: the share of samples that score otherwise in a second call, and with the batch in another order: what
      belongs to a sample must not depend on its neighbors.
    - spread: largest minus smallest value; a constant reward teaches nothing.
    - shuffled pairs: the mean of real pairs minus that of the same completions beside other samples' prompts and
      metadata. Not above 0: the reward does not look at what was asked, or none is right anyway.
    - empty completion: the mean of real completions minus that of the empty one. Not above 0: saying nothing pays.
    - references: the mean of completions that are known to be right (`references`) minus that of shuffled pairs. Not
      above 0: the reward does not know a right answer when it sees one.

    empty: a completion of the kind the reward takes, that says nothing. Reward functions that raise, hang or return no
    numbers give one check that says so.
    """
    n = len(prompts)
    if n < 2:
        raise UserError(f"a reward function is tried on at least 2 samples, got {n}")

    def ask(what, order=range(n), others=range(n)):
        # Prompt and metadata by `order`, completions by `others`.
        about = [metadata[i] for i in order]
        return scores(reward, [prompts[i] for i in order], [what[i] for i in others], about, timeout)

    g = np.random.default_rng(seed)
    order = g.permutation(n).tolist()
    turned = order[1:] + order[:1]  # one cycle: nobody keeps a pair
    try:
        first, again = ask(completions), ask(completions)
        permuted = dict(zip(order, ask(completions, order, order)))
        shuffled = ask(completions, turned, order)
        nothing = ask([empty] * n)
        known = None if references is None else ask(references)
    except RewardError as e:
        return [Check("reward function", None, ANY, "no-go", str(e))]
    values = [v for v in first if v is not None]
    changed = _share([_differs(a, b) for a, b in zip(first, again)])
    moved = _share([_differs(v, permuted[i]) for i, v in enumerate(first)])
    spread = max(values) - min(values) if values else None

    def above(name: str, more: Sequence, less: Sequence, why: str) -> Check:
        a, b = _mean(more), _mean(less)
        return judged(name, None if a is None or b is None else a - b, POSITIVE, ANY, why, "")

    checks = [
        judged(
            "reward changes when asked again", changed, (0.0, 0.0), ANY,
            "", "the same sample scores differently in two calls: noise in every advantage",
        ),
        judged(
            "reward depends on the batch", moved, (0.0, 0.0), ANY,
            "", "the same sample scores differently in another order of the batch",
        ),
        judged("reward spread", spread, POSITIVE, POSITIVE, "every sample has the same reward: nothing to learn", ""),
        above(
            "real minus shuffled pairs", first, shuffled,
            "the reward does not look at what was asked, or nothing is right",
        ),
        above("real minus empty", first, nothing, "an empty completion scores as well as the policy's own"),
    ]  # fmt: skip
    if known is not None:
        why = "what is known to be right scores no better than answers to other questions"
        checks.append(above("right minus shuffled pairs", known, shuffled, why))
    return checks


def leak_check(prompts: Sequence[str], truths: Sequence[str]) -> Check:
    """The share of prompts in which the truth stands as a word: copying would pay.

    A short number may stand there by right, as one of the question's own.
    """
    words = [set(p.split()) | {w.strip(".,;:!?()\"'") for w in p.split()} for p in prompts]
    shared = _share([t.strip() in w for t, w in zip(truths, words, strict=True)])
    return judged("truth in the prompt", shared, (0.0, 0.1), ANY, "", "the answer can be copied from the prompt")


# --------------------------------------------------------------------------------------------------------- the table
def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _range(healthy: Range) -> str:
    low, high = healthy
    if high == math.inf:
        return "> 0" if healthy == POSITIVE else "any" if low == -math.inf else f">= {low:g}"
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def table(preflight: Preflight) -> str:
    """Lines for a terminal: verdict, check, value, what is healthy and, where it is not, why that matters."""
    head = ("", "check", "value", "healthy", "why")
    rows = [head] + [(c.verdict, c.name, _shown(c.value), _range(c.healthy), c.why) for c in preflight.checks]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]).rstrip() for row in rows]
    stops = [c.name for c in preflight.checks if c.verdict == "no-go"]
    return "\n".join([*lines, f"no-go: {', '.join(stops)}" if stops else "go"])
