"""From what a reward function says to a reward per token.

Legend: B rows, T positions, N sequences, K process rewards. A sequence's score is carried by all its tokens
(`masked.spread`) until `token_rewards` puts it on the last one. Host functions are plain numpy, others may be traced.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxlm import masked
from jaxlm.config import UserError

LARGEST = float(np.finfo(np.float32).max)


def as_scores(rewards: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [N], bool [N]): scores, and whether there is one. None cannot be scored, and stands as 0 under the mask.

    Host. Integers and booleans become floats, so that no buffer made like them cuts .7 to 0. `UserError` for what is no
    finite number: a NaN among the rewards would spoil a whole batch's statistics.
    """
    for i, r in enumerate(rewards):
        number = isinstance(r, bool | int | float) or getattr(r, "shape", None) == ()
        if r is not None and not (number and abs(float(r)) <= LARGEST):  # which a NaN is not
            raise UserError(f"reward {i} is {r!r}; a reward is a finite number, or None for what cannot be scored")
    valid = np.asarray([r is not None for r in rewards], bool)
    return np.asarray([0.0 if r is None else float(r) for r in rewards], np.float32), valid


def until_stop(tokens_BT, mask_BT, segments_BT, stops: tuple[int, ...]):
    """`mask_BT` (a response's tokens) up to and with the first stop token in it; what follows is no part of the sample.

    A stop token in the prompt does not count, being outside the mask. For single-turn responses.
    """
    stop = jnp.isin(tokens_BT, jnp.asarray(stops))
    return mask_BT & masked.up_to_first(mask_BT & stop, segments_BT)


def ended(tokens_BT, mask_BT, segments_BT, stops: tuple[int, ...]):
    """Bool [B, T], the same for a whole segment: the last token under the mask (of the response) is a stop token."""
    last = masked.last_of_segments(mask_BT, segments_BT)
    stop = jnp.isin(tokens_BT, jnp.asarray(stops)).astype(jnp.int32)
    return masked.over_segment(stop, last, segments_BT) > 0


@dataclasses.dataclass(frozen=True)
class Replace:
    """A response without its stop token scores `score`, whatever it said (summarize_from_feedback_details)."""

    score: float = -1.0


@dataclasses.dataclass(frozen=True)
class Subtract:
    """A response without its stop token loses `penalty` (TRL)."""

    penalty: float = 1.0


def for_missing_stop(scores, has_ended, choice: Replace | Subtract | None):
    """Scores, of any shape, after the choice of what a response without its stop token gets; None: its score."""
    if choice is None:
        return scores
    other = choice.score if isinstance(choice, Replace) else scores - choice.penalty
    return jnp.where(has_ended, scores, other)


def soft_length_penalty(lengths, limit, buffer):
    """0 up to limit - buffer tokens, then a line down to -1 at `limit`, -1 beyond (DAPO, arXiv:2503.14476, eq. 13)."""
    return jnp.clip((limit - buffer - masked.wide(lengths)) / buffer, -1.0, 0.0)


def token_rewards(kl_BT, scores_BT, mask_BT, segments_BT, coefficient):
    """-coefficient * KL at every token under the mask, and the score added at each segment's last one; else 0.

    kl_BT: `kl.estimate` of the sampled tokens. scores_BT: the same for a whole segment. Float32 or wider, so a
    segment's rewards sum to its score - coefficient * its sum of KL (Ziegler et al. 2019). A segment with nothing under
    the mask gets nothing.
    """
    last = masked.last_of_segments(mask_BT, segments_BT)
    kl, scores = masked.wide(jnp.where(mask_BT, kl_BT, 0)), masked.wide(jnp.where(last, scores_BT, 0))
    return scores - coefficient * kl


def step_rewards(values: Sequence[float | None], rows: Sequence[int], columns: Sequence[int], mask_BT) -> np.ndarray:
    """Float32 [B, T]: process reward k, unless None, added at token (rows[k], columns[k]); 0 elsewhere.

    Host. `UserError` where that is no token of the policy (mask_BT): no advantage would ever see the reward.
    """
    mask = np.asarray(mask_BT)
    out = np.zeros(mask.shape, np.float32)
    scores, valid = as_scores(values)
    for value, row, column in zip(scores[valid], np.asarray(rows)[valid], np.asarray(columns)[valid], strict=True):
        if not (0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column]):
            raise UserError(f"process reward {value} at row {row}, token {column}: the policy sampled no such token")
        out[row, column] += value
    return out


def gain_and_bias(scores: Sequence[float], mean: float = 0.0, std: float = 1.0) -> tuple[float, float]:
    """gain, bias such that gain * scores + bias have this mean and standard deviation (ddof 0; Ziegler et al. 2019).

    Host. `scores` are the raw ones of reference responses; `UserError` where they do not differ.
    """
    x = np.asarray(scores, np.float64)
    spread = float(x.std()) if x.size else 0.0
    if not (math.isfinite(spread) and spread > 0 and x.max() > x.min()):
        raise UserError(f"{x.size} reference scores with standard deviation {spread}: they must be finite and differ")
    gain = std / spread
    return gain, mean - gain * float(x.mean())
