"""What a practitioner looks at in a run of reinforcement learning: figures of a rollout, and what is healthy in each.

`metrics_help.json` in the workdir says the same: {name: {"about", "healthy": [low, high], "in_words"}}.
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence

import jax
import numpy as np

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.feedback import alarms
from jaxlm.feedback.scoring import part_metrics
from jaxlm.run.log import Progress, read_metrics
from jaxlm.run.preflight import no_spread
from jaxlm.steps.policy import PolicyGradient
from jaxlm.steps.rollout import Sample

HELP_FILE = "metrics_help.json"


@dataclasses.dataclass(frozen=True)
class Help:
    """What a metric is, and what is healthy in it: its bounds, or its course where no number holds for every task."""

    about: str
    low: float = -math.inf
    high: float = math.inf
    course: str = ""

    @property
    def healthy(self) -> str:
        if not math.isfinite(self.high):
            return f"at least {self.low:g}" if math.isfinite(self.low) else self.course
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


# Without the prefix `train/`. A name that ends in a slash or an @ stands for all that begin with it.
HELP: dict[str, Help] = {
    "reward": Help("mean of what is maximized, after what a missing stop does to it", course="rises, ever slower"),
    "reward_std": Help("its spread over the samples; 0 teaches nothing", 1e-6),
    "reward/": Help("a part of the reward: its mean, its spread, the share that it could not score",
                    course="rises, or holds where its weight is 0"),
    "reward/process": Help("rewards of right, new steps of the thinking, summed over a response; not part of `reward`",
                           course="rises"),
    "right": Help("the task's own verdict, whatever is maximized", course="rises with the reward"),
    "right_before_dropping": Help("the same of a step's first groups, before dynamic sampling",
                                  course="rises with the reward"),
    "unscored": Help("share of samples without a reward, left out", 0.0, 0.05),
    "no_samples": Help("1 where a step had nothing to learn from", 0.0, 0.0),
    "groups_without_spread": Help("share of prompts whose samples all have one reward: wasted", 0.0, 0.7),
    "dropped_groups": Help("share of prompts that dynamic sampling threw away", 0.0, 0.7),
    "missing_groups": Help("share of a step's prompts that dynamic sampling did not find in its retries", 0.0, 0.25),
    "eos_rate": Help("share of responses that ended by themselves; the others ran into max_tokens", 0.9, 1.0),
    "length/mean": Help("sampled tokens of a response; a drift without a gain in `right` is a reward for length",
                        course="drifts only with a gain in right"),
    "length/max": Help("of the longest response; at max_tokens they are cut", course="below max_tokens"),
    "length/right": Help("of right responses (verdict above a half)", course="near that of the others"),
    "length/wrong": Help("of the others", course="near that of the right ones"),
    "repetition": Help("share of repeated 4-grams in a response; above .3 it babbles", 0.0, 0.3),
    "entropy": Help("nats per token of the policy; falls as it learns, near 0 nothing is explored", 0.01),
    "surprisal": Help("-log p of the samples per token: the entropy as the samples estimate it",
                      course="near the entropy"),
    "kl/reference": Help("nats per response to the parent; what is gained should be read against it", -0.5, 100.0),
    "kl/sqrt": Help("its root, the axis on which over-optimization is drawn", 0.0, 10.0),
    "kl/coefficient": Help("of the KL in the reward", course="fixed, or settles as the KL nears its target"),
    "kl": Help("the KL term of the loss", course="small beside what the reward gains"),
    "loss": Help("the sum of the terms, each by its coefficient; no measure of progress",
                 course="near 0 at first, without jumps"),
    "policy": Help("the policy's term of the loss; its gradient counts, not its value",
                   course="near 0 at first, without jumps"),
    "value": Help("the value head's term of the loss: half the squared error",
                  course="falls at first, then follows the returns"),
    "learning_rate": Help("of the policy, the mean over the step's updates",
                          course="follows its schedule"),
    "approximate_kl": Help("KL(old || new) per token, the mean over a step's updates", 0.0, 0.05),
    "last/approximate_kl": Help("of the step's last update: how far one rollout was taken", 0.0, 0.1),
    "first/ratio_deviation_max": Help("largest |ratio - 1| of the first update: 0, or scoring is wrong", 0.0, 1e-3),
    "ratio_deviation": Help("mean |ratio - 1|", 0.0, 0.2),
    "ratio_deviation_max": Help("largest |ratio - 1|, the mean over updates", 0.0, 10.0),
    "ratio_histogram/": Help("share of tokens with such a ratio", course="most of it around 1"),
    "clip_fraction_low": Help("share of tokens that the lower clip silences; 0 at one update per rollout", 0.0, 0.3),
    "clip_fraction_high": Help("the same of the upper clip", 0.0, 0.3),
    "sampler_gap": Help("mean |log p(trainer) - log p(sampler)|; 1e-6 in float32, .01 in bfloat16", 0.0, 0.02),
    "sampler_gap_max": Help("the largest one; 1e-4 in float32", 0.0, 0.5),
    "importance_weight": Help("mean truncated weight trainer / sampler", 0.9, 1.1),
    "importance_capped": Help("share of tokens whose weight was cut", 0.0, 0.01),
    "advantage_std": Help("spread of the advantages; 0 teaches nothing", 1e-6),
    "value/explained_variance": Help("of the returns by the critic: 1 perfect, below 0 it harms", -0.5, 1.0),
    "value/mean": Help("mean value", course="follows value/return_mean"),
    "value/return_mean": Help("mean return", course="rises with the reward"),
    "value_clip_fraction": Help("share of tokens at which the value clip decides", 0.0, 0.5),
    "critic/value": Help("the critic's loss: half the squared error",
                         course="falls at first, then follows the returns"),
    "critic/clip_fraction": Help("share of tokens at which the value clip decides", 0.0, 0.5),
    "critic/gradient_norm": Help("the critic's, before clipping; a jump by ten times is a bad batch", 0.0, 1e3),
    "critic/learning_rate": Help("of the critic", course="follows its schedule"),
    "critic/updates_skipped": Help("updates of the critic left out: not finite, or spikes", 0.0, 0.0),
    "gradient_norm": Help("before clipping; a jump by ten times is a bad batch", 0.0, 1e3),
    "skipped": Help("steps without a single finite update", 0.0, 0.0),
    "updates_skipped": Help("updates left out: not finite, or spikes", 0.0, 0.0),
    "rows": Help("packed rows that the step's responses take", 1.0),
    "row_fill": Help("share of the packed rows that is no padding", 0.5, 1.0),
    "tools/": Help("calls, failures and seconds of the tools since this start", course="few failures beside the calls"),
    "seconds/": Help("of a step: rollout, reward, old_logprobs, ref_logprobs, values, update, host; and of each phase "
                     "of the run", course="steady"),
    "checkpoint/": Help("seconds of a save behind training's back, hashing among them, and of verifying one",
                        course="steady"),
    "seconds_to_first_step": Help("of this start, compiling and all", course="less with warm caches"),
    "steps_per_second": Help("of the last step", course="steady"),
    "responses_per_second": Help("of the last step, those that could be scored", course="steady"),
    "eval/pass@": Help("share of held-out prompts of which one of k samples is right",
                       course="pass@1 rises, pass@k does not fall"),
    "eval/majority@": Help("share of held-out prompts that the samples' vote gets right", course="rises"),
    "eval/greedy": Help("share of held-out prompts that the likeliest reply gets right",
                        course="rises; pass@1 alone would be sharpening"),
    "eval/score": Help("mean verdict of held-out samples; decides which checkpoint is best where objective.gold names "
                       "no part", course="rises with train/right"),
    "eval/greedy_score": Help("mean verdict of the likeliest replies", course="rises with eval/score"),
    "eval/reward": Help("what is maximized, on held-out prompts; decides which checkpoint is best where neither gold "
                        "nor a verdict is known", course="rises with train/reward"),
    "eval/gold": Help("the part of the reward that objective.gold names, on held-out prompts; decides which "
                      "checkpoint is best", course="rises with eval/reward"),
    "eval/length": Help("sampled tokens of a held-out response", course="drifts only with a gain in eval/score"),
    "eval/eos_rate": Help("share of held-out responses that ended by themselves", 0.9, 1.0),
    "eval/thinking/changed": Help("share of thoughts in which the answer changes on the way",
                                  course="any, where better is above worse"),
    "eval/thinking/better": Help("share of thoughts that begin wrong and end right", course="above worse"),
    "eval/thinking/worse": Help("share of thoughts that begin right and end wrong", course="below better"),
    "eval/thinking/first_right": Help("share of thoughts whose first candidate is right", course="rises"),
    "eval/thinking/last_right": Help("the same of the last candidate", course="rises, above first_right"),
}  # fmt: skip


def key_of(name: str) -> str | None:
    """The entry of `HELP` that a metric has."""
    name = name.removeprefix("train/")
    return name if name in HELP else next((k for k in HELP if k[-1] in "/@" and name.startswith(k)), None)


def write_help(workdir) -> None:
    if jax.process_index() != 0:
        return

    def bound(x: float) -> float | None:
        return x if math.isfinite(x) else None

    table = {
        k if k.startswith("eval/") else f"train/{k}": {
            "about": h.about, "healthy": [bound(h.low), bound(h.high)], "in_words": h.healthy,
        }
        for k, h in HELP.items()
    }  # fmt: skip
    storage.write_json(storage.path(workdir) / HELP_FILE, table)


def healthy(keys: Collection[str]) -> str:
    """A table of what is healthy in these entries, in few lines."""
    cells = [f"{k} {h.healthy}".replace(" ", "\0") for k, h in HELP.items() if k in keys]
    lines = textwrap.wrap("\0| ".join(cells), 118, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"healthy ({HELP_FILE} says more):", *(f"  {x}" for x in lines)]).replace("\0", " ")


def unhealthy(values: Mapping[str, float]) -> dict[str, str]:
    """{name: what is wrong} of the metrics that are out of their bounds."""
    out = {}
    for name, value in values.items():
        h = HELP.get(key_of(name))
        if h is not None and not h.low <= value <= h.high:
            out[name] = f"{name} is {value:.4g}, healthy: {h.healthy} ({h.about})"
    return out


class Watch:
    """A sink of metrics that says what is healthy in each when it first comes, which is at the start of a run, and what
    has just left its bounds, once until it has been back."""

    def __init__(self, progress: Progress):
        self._progress, self._out, self._told = progress, set(), set()

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if new := {k for k in map(key_of, values) if k is not None} - self._told:
            self._progress.say(healthy(new))
            self._told |= new
        found = unhealthy(values)
        for name in found.keys() - self._out:
            self._progress.say(f"step {step}: {found[name]}")
        self._out = (self._out - values.keys()) | found.keys()


class Alarms:
    """A sink of metrics that says once what looks like reward hacking, as soon as the records show it.

    p: the objective, whose `gold` says what is wanted. every: `train.log_every`; a record between is that of a restart,
    an evaluation, a save or the end, and nothing may hang on it. before: the records of the run so far.
    """

    def __init__(self, p: PolicyGradient, every: int, progress: Progress, before: Sequence[dict] = ()):
        gold = "right" if p.gold is None else f"reward/{p.gold}"
        self._checks = (
            functools.partial(alarms.gold_falls, proxy="train/reward", gold=f"train/{gold}"),
            functools.partial(alarms.length_drifts, name="train/length/mean"),
            functools.partial(alarms.repeats, name="train/repetition"),
            functools.partial(alarms.entropy_collapses, name="train/entropy"),
        )
        self._every, self._progress, self._stops = every, progress, p.stop_at_alarm
        self._records = [r for r in before if r["step"] % every == 0]
        self._told: set[str] = set()
        self._back: int | None = None
        self._look(-1)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if step % self._every == 0:
            self._records.append({"step": step} | values)
            self._look(step - 1)

    def _look(self, after: int) -> None:
        for alarm in alarms.alarms(self._records, [functools.partial(c, after=after) for c in self._checks]):
            if alarm.what not in self._told:
                self._told.add(alarm.what)
                self._back = alarm.since if self._back is None else self._back
                ends = f"; the run ends at step {alarm.seen} (objective.stop_at_alarm)" if self._stops else ""
                self._progress.say(f"ALARM: {alarm.what} since step {alarm.since}: {alarm.why}{ends}")

    def ended(self) -> int | None:
        """Where the run is to end here: the step to go back to, since which the first alarm has it. Else None."""
        return self._back if self._stops else None


def records_until(workdir, step: int) -> list[dict]:
    """What the run has logged up to a step; nothing where its metrics are gone."""
    try:
        return [r for r in read_metrics(workdir) if r["step"] <= step]
    except UserError:
        return []


# --------------------------------------------------------------------------------------------------------- a rollout
def groups_without_spread(samples: Sequence[Sample], rewards: Sequence[float | None]) -> float:
    records = [{"group": s.place, "reward": r} for s, r in zip(samples, rewards, strict=True)]
    return no_spread(records) or 0.0


def of_samples(
    samples: Sequence[Sample],
    rewards: Sequence[float | None],
    right: Sequence[float | None],
    seen: Mapping[str, Sequence[float | None]],
) -> dict[str, float]:
    """Figures of scored samples, of what is right only where a verdict is known. seen: of each part of the reward."""
    known = [r for r in rewards if r is not None]
    verdicts = [v for v in right if v is not None]
    lengths = np.array([s.length for s in samples], float)
    good = np.array([v is not None and v > 0.5 for v in right])
    out = {
        "reward": float(np.mean(known)) if known else 0.0,
        "reward_std": float(np.std(known)) if known else 0.0,
        "unscored": 1 - len(known) / len(samples),
        "groups_without_spread": groups_without_spread(samples, rewards),
        "eos_rate": float(np.mean([s.ended for s in samples])),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "repetition": float(np.mean([alarms.repetition(s.reply.completion.ids) for s in samples])),
    }
    out |= {"right": float(np.mean(verdicts))} if verdicts else {}
    for name, which in (("right", good), ("wrong", ~good)) if verdicts else ():
        if which.any():
            out[f"length/{name}"] = float(lengths[which].mean())
    return out | part_metrics(seen)
