"""Rows of ranked answers: from a number for each answer to comparisons within each prompt, and how good they are.

Legend: B rows, S answers that a row holds at most, P = B * (S // 2) prompts, K = S places for the answers of each.
"""

import jax
import jax.numpy as jnp

from jaxlm import masked
from jaxlm.data.trajectory import Trajectory
from jaxlm.losses import preference

BINS = 10  # of the reliability diagram, over confidences from a half to 1


def by_prompt(values_BS, batch: Trajectory):
    """(values, ranks, present), each [P, K], as the losses on rankings take them.

    A group has two answers at least, so a row has at most S // 2 prompts. Each of them has a place for every answer of
    the row, and those of other prompts are absent: no gather, and the pairs of a prompt are all in one element.
    """
    S = values_BS.shape[1]
    numbers_G = jnp.arange(1, S // 2 + 1, dtype=batch.prompt_id.dtype)
    present_BGS = batch.prompt_id[:, None, :] == numbers_G[None, :, None]

    def spread(x_BS):
        return jnp.broadcast_to(x_BS[:, None, :], present_BGS.shape).reshape(-1, S)

    return spread(values_BS), spread(batch.rank), present_BGS.reshape(-1, S)


def evaluation_sums(values_PK, ranks_PK, present_PK, terms, scale=1.0) -> dict:
    """Sums over a batch, to be added up and given to `summarize`.

    terms: of the loss on the same values. scale: the chance that i is better than j is
    sigmoid(scale * (value i - value j)).
    """
    better, share = preference.pairs(ranks_PK, present_PK)
    gap = jnp.where(better, values_PK[:, :, None] - values_PK[:, None, :], 0)
    right = (gap > 0) + 0.5 * (gap == 0)
    confidence = jax.nn.sigmoid(scale * jnp.abs(gap))
    bin_of = jnp.clip(((confidence - 0.5) * 2 * BINS).astype(jnp.int32), 0, BINS - 1)
    in_bin = better[..., None] & (bin_of[..., None] == jnp.arange(BINS)[None, None, None])

    def over_pairs(x):
        return masked.sum(x, better)

    def over_bins(x):
        return masked.sum(x[..., None], in_bin, axis=(0, 1, 2))

    pairs_P = jnp.sum(better, axis=(1, 2))
    ranked_P = share > 0
    agreement_P = 2 * masked.sum(right, better, axis=(1, 2)) / jnp.maximum(pairs_P, 1) - 1
    first = present_PK & ~jnp.any(better, axis=1)  # nobody is ranked before them
    top_PK = present_PK & (values_PK == jnp.max(jnp.where(present_PK, values_PK, -jnp.inf), axis=1, keepdims=True))
    top_is_first_P = masked.mean(first.astype(values_PK.dtype), top_PK, axis=1)
    return {
        "loss": sum(c * total for c, total, _ in terms.values()),
        "weight": sum(weight for *_, weight in terms.values()),
        "pairs": jnp.sum(better).astype(values_PK.dtype),
        "right": over_pairs(right),
        "margin": over_pairs(gap),
        "prompts": jnp.sum(ranked_P).astype(values_PK.dtype),
        "rank_agreement": masked.sum(agreement_P, ranked_P),
        "best_found": masked.sum(top_is_first_P, ranked_P),
        "bin_pairs": over_bins(jnp.ones_like(gap)),
        "bin_right": over_bins(right),
        "bin_confidence": over_bins(confidence),
    }


def summarize(sums: dict) -> dict[str, float]:
    """What the sums over a set say. Of the held-out prompts:

    - accuracy: the share of pairs whose better answer has the higher value, a half for equal values;
    - margin: the mean lead of the better one;
    - rank_agreement: concordant less discordant pairs, over the pairs of a prompt (Goodman and Kruskal's gamma: pairs
      that annotators tied say nothing), the mean over prompts; 1 is the annotators' order, 0 a random one;
    - best_found: the share of prompts whose highest value is that of an answer ranked first;
    - calibration_error: |accuracy - mean confidence| over `BINS` bins of confidence, weighted by their pairs (expected
      calibration error, Guo et al. 2017); reliability/<middle of the bin>: the accuracy there, NaN without a pair.
    """
    s = {k: v.tolist() for k, v in jax.device_get(sums).items()}
    pairs, prompts = max(s["pairs"], 1.0), max(s["prompts"], 1.0)
    bins = list(zip(s["bin_pairs"], s["bin_right"], s["bin_confidence"], strict=True))
    out = {
        "loss": s["loss"] / max(s["weight"], 1.0),
        "accuracy": s["right"] / pairs,
        "margin": s["margin"] / pairs,
        "rank_agreement": s["rank_agreement"] / prompts,
        "best_found": s["best_found"] / prompts,
        "calibration_error": sum(abs(right - confidence) for _, right, confidence in bins) / pairs,
    }
    for i, (n, right, _) in enumerate(bins):
        out[f"reliability/{0.5 + (i + 0.5) / (2 * BINS):.3f}"] = right / n if n else float("nan")
    return out
