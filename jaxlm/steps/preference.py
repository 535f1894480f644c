"""A policy from rankings without a reward model: DPO and its family, on packed groups of answers.

The reference is the frozen parent, run again on each batch: no values to keep in step with the rows, and the first
loss is that of equal models. Its parameters are an argument of the step that is never donated; with adapters they are
the state's own backbone, which training leaves alone.

Legend: B rows, T positions (a row holds T + 1 tokens), S answers that a row holds at most.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm import masked
from jaxlm.data.trajectory import Trajectory
from jaxlm.losses import preference
from jaxlm.losses.preference import Dpo, Hinge, Ipo, SimPo
from jaxlm.steps import pretrain, ranked


@dataclasses.dataclass(frozen=True)
class Preference:
    """Raises the better answers of each prompt above the worse ones, in all pairs at once."""

    loss: Dpo | Ipo | Hinge | SimPo = Dpo()


def needs_reference(objective: Preference) -> bool:
    return not isinstance(objective.loss, SimPo)


def response_logprobs(model, params, batch: Trajectory, chunk: int | None, key=None):
    """Float32 [B, S]: the log-probability of each answer, the sum over the tokens that a policy wrote in it."""
    logprobs, _, mask = pretrain.token_logprobs(model, params, batch, chunk, key)
    return preference.sequence_logprobs(logprobs, mask, batch.segments[:, 1:], batch.rank.shape[1])


def _values(objective: Preference, model, chunk, reference, params, batch: Trajectory, key=None):
    """(log-probabilities, those of the reference or None, lengths, ranks, present), each [P, K]."""
    mask, segments = batch.loss_mask[:, 1:], batch.segments[:, 1:]
    lengths_BS = masked.segment_sum(jnp.ones(mask.shape, jnp.float32), mask, segments, batch.rank.shape[1])
    policy, ranks, present = ranked.by_prompt(response_logprobs(model, params, batch, chunk, key), batch)
    theirs = None
    if needs_reference(objective):
        theirs = jax.lax.stop_gradient(response_logprobs(*reference, batch, chunk))
        theirs = ranked.by_prompt(theirs, batch)[0]
    return policy, theirs, ranked.by_prompt(lengths_BS, batch)[0], ranks, present


def make_loss(objective: Preference, model, train, reference):
    """The loss of the update contract. reference: (model, parameters); SimPo reads none."""

    def loss(params, batch: Trajectory, key):
        key = key if model.dropout > 0 else None
        values = _values(objective, model, train.loss_chunk, reference, params, batch, key)
        return preference.preference_loss(objective.loss, *values)

    return loss


def evaluation_sums(objective: Preference, model, chunk, reference, params, batch: Trajectory) -> dict:
    """What `ranked.summarize` takes: of the implicit reward, log p / p_ref, or log p per token for SimPo.

    Times beta it is the reward whose Bradley-Terry model the policy is (arXiv:2305.18290), so calibration is of that.
    """
    policy, theirs, lengths, ranks, present = _values(objective, model, chunk, reference, params, batch)
    terms, _ = preference.preference_loss(objective.loss, policy, theirs, lengths, ranks, present)
    values = policy / jnp.maximum(lengths, 1) if theirs is None else policy - theirs
    return ranked.evaluation_sums(values, ranks, present, terms, objective.loss.beta)
