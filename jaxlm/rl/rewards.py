"""From what a reward function says to a reward per token.

Legend: B rows, T positions. A sequence's score is carried by all its tokens until `token_rewards` puts it on the last
one. Where a response ends is the decoder's matter (sample/requests.py). Host functions are plain numpy, others may be
traced.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxlm import masked
from jaxlm.config import UserError


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
