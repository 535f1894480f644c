"""The one batch type from pretraining to PPO: a stage fills the fields it has, the others stay None.

`logprobs[t]` scores `tokens[t]`. Legend: B batch, T row length (context + 1), S segments that a row holds at most (what
is about segment s stands in column s - 1), all fields global arrays or numpy.
"""

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Trajectory:
    """A pytree of rows; `tokens`, `positions`, `segments` and `loss_mask` are all that pretraining needs."""

    tokens: Array | None = None  # int32 [B,T]
    positions: Array | None = None  # int32 [B,T], from 0 at the start of each segment
    segments: Array | None = None  # int32 [B,T], from 1 within a row; 0 is padding
    loss_mask: Array | None = None  # bool [B,T]: tokens[t] is scored, given those before it in its segment
    sampled_by_policy: Array | None = None  # bool [B,T]
    rollout_logprobs: Array | None = None  # float32 [B,T], by the sampler
    old_logprobs: Array | None = None  # float32 [B,T], by the policy at the start of the update
    ref_logprobs: Array | None = None  # float32 [B,T], by the reference policy
    rewards: Array | None = None  # float32 [B,T]
    values: Array | None = None  # float32 [B,T]
    advantages: Array | None = None  # float32 [B,T]
    returns: Array | None = None  # float32 [B,T]
    temperature: Array | None = None  # float32 [B]
    policy_step: Array | None = None  # int32 [B], of the parameters that sampled
    finish_reason: Array | None = None  # int32 [B]
    source: Array | None = None  # int32 [B], which data set the row is from
    sequence_id: Array | None = None  # int32 [B]
    prompt_id: Array | None = None  # int32 [B]; where a row packs answers [B,S], from 1 within the row, 0 is no answer
    rank: Array | None = None  # int32 [B] or [B,S], place among the answers to the same prompt, 0 the best
