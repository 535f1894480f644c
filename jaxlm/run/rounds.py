"""What a round of sample, rank, retrain, PPO is measured by: gold, KL and best-of-n on the same held-out prompts.

Best-of-n's KL counts ties. The chosen response has, given its level of reward r, the policy's own distribution, so that
only the levels count: with p_r their probabilities and F_r those of at most r, best-of-n takes a level with
q_r = F_r^n - F_(r-1)^n, and its KL is sum q log(q / p), at most log n - (n - 1) / n (Beirami et al. 2024, arXiv
2401.01879). The p_r here are shares among N samples, which makes the KL a little less than it is, and a comparison at
equal KL a little harder for the policy that is compared.

P held-out prompts, N samples of the first policy to each, S of a later one, K values of n, B resamples.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message, prompt_ids
from jaxlm.estimates import Estimate, clustered
from jaxlm.feedback.collect import collect
from jaxlm.feedback.journal import Journal
from jaxlm.feedback.overoptimization import best_of_n, best_of_n_kl
from jaxlm.feedback.pairwise import AnswerScores, completion_of, journaled, scores_of
from jaxlm.feedback.preferences import Answer
from jaxlm.feedback.records import Prompt, Response, record_id
from jaxlm.feedback.scoring import Reward, scores
from jaxlm.feedback.store import Store
from jaxlm.run.load import Run
from jaxlm.run.policy import policy_of
from jaxlm.sample.chat import Reply, reply
from jaxlm.sample.engine import Completion, Sampling
from jaxlm.sample.score import score
from jaxlm.tools import Tool

SLOTS = 64  # replies that are decoded at once
RESAMPLES = 2000


# ------------------------------------------------------------------------------------------------------- the samples
def respond(
    store: Store, run: Run, prompts: Sequence[Prompt], k: int, sampling: Sampling, tools: Mapping[str, Tool] | None
) -> list[list[Response]]:
    """k responses of a run to each prompt, [P][k], from the store where they are there, sampled into it where not."""
    policy, limit = policy_of(run), run.experiment.data.context
    ask = functools.partial(reply, run.model, run.params, run.tokenizer, slots=SLOTS, tools=tools, limit=limit)
    collect(store, ask, prompts, policy, run.tokenizer.hash, k, sampling)

    def mine(r: Response) -> bool:
        same = ("temperature", "seed", "max_tokens")
        return r.policy.hash == policy.hash and all(r.sampling[f] == getattr(sampling, f) for f in same)

    found = []
    for prompt in prompts:
        responses = [r for r in store.responses(record_id(prompt)).values() if mine(r)]
        found.append(sorted(responses, key=lambda r: r.sampling["sample_id"])[:k])
    return found


def judge(run: Run, journal: Journal) -> AnswerScores:
    """A run's model as a judge, whose answers are journaled under the hash of its checkpoint."""
    scores = scores_of(run.model, run.params, run.tokenizer, run.experiment.data.context)
    return journaled(journal, policy_of(run).hash, scores)


def scored(reward: Reward, prompts: Sequence[Prompt], found: Sequence[Sequence[Response]]) -> np.ndarray:
    """Float64 [P, N]: what the reward gives each response. `UserError` for one that cannot be scored."""
    flat = [(p, r) for p, responses in zip(prompts, found, strict=True) for r in responses]
    values = scores(
        reward,
        [p.conversation for p, _ in flat],
        [completion_of(r) for _, r in flat],
        [p.metadata | {"finish_reason": r.finish_reason} for p, r in flat],
        None,
    )
    if None in values:
        raise UserError(
            f"{values.count(None)} of {len(values)} responses cannot be scored: do they fit the reward model?"
        )
    return np.array(values).reshape(len(prompts), -1)


def log_ratios(run: Run, reference: Run, prompts: Sequence[Prompt], found: Sequence[Sequence[Response]]) -> np.ndarray:
    """Float64 [P, S]: log-probability of each response under `run` less that under `reference`, in nats, of the tokens
    that were sampled. Its mean over samples of `run` is the KL of a whole response."""
    sequences, masks = [], []
    for prompt, responses in zip(prompts, found, strict=True):
        before = prompt_ids(prompt.conversation, run.tokenizer)
        sequences += [[*before, *r.tokens] for r in responses]
        masks += [np.array([*[False] * (len(before) - 1), *r.sampled]) for r in responses]
    both = [score(x.model, x.params, sequences) for x in (run, reference)]
    sums = [float((a - b)[m].sum(dtype=np.float64)) for a, b, m in zip(*both, masks, strict=True)]
    return np.array(sums).reshape(len(prompts), -1)


# ------------------------------------------------------------------------------------------------------ the measures
def tied_kl(proxy_PN: np.ndarray, n: int) -> np.ndarray:
    """Float64 [P]: best-of-n's KL to the policy that the N samples are of, in nats, ties counted."""
    out = np.empty(len(proxy_PN))
    for i, proxy_N in enumerate(proxy_PN):
        _, counts = np.unique(proxy_N, return_counts=True)
        p, top = counts / counts.sum(), np.cumsum(counts) / counts.sum()
        q = top**n - (top - p) ** n
        out[i] = np.sum(q[q > 0] * np.log(q[q > 0] / p[q > 0]))
    return out


def powers(N: int) -> list[int]:
    """1, 2, 4 .. up to half of N, beyond which N samples say little of the best of n."""
    return [2**i for i in range(max(1, (N // 2).bit_length()))]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Best-of-n against the policy that it draws from, for each n: what it gains, and its KL, by prompt."""

    ns: list[int]
    gain_KP: np.ndarray
    kl_KP: np.ndarray


def curve(proxy_PN: np.ndarray, gold_PN: np.ndarray) -> Curve:
    ns, mean_P = powers(proxy_PN.shape[1]), gold_PN.mean(1)
    gain = np.stack([best_of_n(proxy_PN, gold_PN, n) - mean_P for n in ns])
    return Curve(ns, gain, np.stack([tied_kl(proxy_PN, n) for n in ns]))


def at_equal_kl(c: Curve, kl: float, weights_P: np.ndarray | None = None) -> tuple[float, bool]:
    """(best-of-n's gain at this KL, whether the KL lies beyond the curve's end, whose gain is then given).

    Linear in sqrt(KL) between neighboring n. weights_P: of the prompts, 1 each if unset.
    """
    weights = np.ones(c.gain_KP.shape[1]) if weights_P is None else weights_P
    d_K = np.sqrt(np.maximum(c.kl_KP @ weights / weights.sum(), 0))
    gain_K, d = c.gain_KP @ weights / weights.sum(), max(kl, 0.0) ** 0.5
    return float(np.interp(d, d_K, gain_K)), bool(d > d_K[-1])


def share(c: Curve, kl_PS: np.ndarray, gain_P: np.ndarray, seed: int = 0) -> dict:
    """{"value", "low", "high", "best_of_n", "kl", "beyond"}: a policy's gain over best-of-n's at the policy's KL, with
    the bootstrap's 95% interval over prompts; infinite where best-of-n gains nothing. gain_P: over the first policy."""
    kl_P, P = kl_PS.mean(1), len(gain_P)
    best, beyond = at_equal_kl(c, kl_P.mean())
    drawn = []
    for weights in np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), size=RESAMPLES).astype(float):
        gain, _ = at_equal_kl(c, float(kl_P @ weights) / P, weights)
        drawn.append(float(gain_P @ weights) / P / gain if gain > 0 else np.inf)
    # By ranks, since some may be infinite.
    low, high = (float(x) for x in np.percentile(drawn, [2.5, 97.5], method="inverted_cdf"))
    value = float(gain_P.mean()) / best if best > 0 else math.inf
    return {"value": value, "low": low, "high": high, "best_of_n": best, "kl": float(kl_P.mean()),
            "beyond": beyond}  # fmt: skip


def estimate(values_P: np.ndarray) -> dict:
    """Mean over prompts with its 95% interval, as plain JSON."""
    found: Estimate = clustered(values_P, range(len(values_P)))
    return {k: v for k, v in dataclasses.asdict(found).items() if k != "chance"}


def points(c: Curve, proxy_PN: np.ndarray, gold_PN: np.ndarray) -> list[dict]:
    """The curve as JSON: for each n its KL with ties, the bound on it, gold, proxy, and the gold gained."""
    return [
        {"n": n, "kl": float(c.kl_KP[i].mean()), "kl_bound": best_of_n_kl(n), "gain": estimate(c.gain_KP[i]),
         "gold": estimate(best_of_n(proxy_PN, gold_PN, n)), "proxy": estimate(best_of_n(proxy_PN, proxy_PN, n))}
        for i, n in enumerate(c.ns)
    ]  # fmt: skip


def by_kind(kinds: Sequence[str], values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """{kind: {name: mean of values[name] [P] over the prompts of this kind}}."""
    at = np.array(kinds)
    return {k: {name: float(v[at == k].mean()) for name, v in values.items()} for k in dict.fromkeys(kinds)}


# -------------------------------------------------------------------------------------------------------- small parts
def shown(prompt: Conversation, reply: Message) -> Conversation:
    """A conversation to train on, of which the reply alone is trained on."""
    return Conversation((*(dataclasses.replace(m, trained=False) for m in prompt.messages), reply))


def completion(answer: Answer) -> Message | Reply:
    """What a reward function is given: the reply as it was sampled, where that is known."""
    if answer.tokens is None:
        return answer.message
    nothing = (0.0,) * len(answer.tokens)  # log-probabilities are no part of a reward
    return Reply(answer.message, Completion(answer.tokens, nothing, answer.text, "stop", answer.sampled))
