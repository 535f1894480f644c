"""A reward model: a number for each answer, read at its last token, learned from rankings.

Legend: B rows, T positions (a row holds T + 1 tokens, the last one padding), S answers that a row holds at most.
"""

import dataclasses

import jax.numpy as jnp

from jaxlm import masked
from jaxlm.data.trajectory import Trajectory
from jaxlm.losses import preference
from jaxlm.nn import heads
from jaxlm.steps import ranked


@dataclasses.dataclass(frozen=True)
class BradleyTerry:
    """All pairs of a prompt's answers in one batch element (InstructGPT, arXiv:2203.02155)."""

    margin: float = 0.0  # by how much the better answer should at least lead


@dataclasses.dataclass(frozen=True)
class PlackettLuce:
    """The chance of the whole ranking, best drawn first (Plackett 1975)."""


@dataclasses.dataclass(frozen=True)
class BestOfK:
    """The chance of drawing the best one, whatever the order of the rest (Ziegler et al. 2019, of four)."""


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward head on the parent's backbone, or on that of a smaller run with the same tokenizer. Trained whole, or,
    with `lora`, the adapters and the head."""

    loss: BradleyTerry | PlackettLuce | BestOfK = BradleyTerry()


def scores(model, params, batch: Trajectory, key=None):
    """Float32 [B, S]: the raw reward of each answer of packed rows, 0 where there is none."""
    tokens, positions, segments = (x[:, :-1] for x in (batch.tokens, batch.positions, batch.segments))
    rewards_BT = heads.scalars(model, params, "reward", tokens, positions, segments, key)
    return masked.at_last(rewards_BT, segments > 0, segments, batch.rank.shape[1])


def loss_of(objective: RewardModel, rewards_PK, ranks_PK, present_PK):
    """(terms, metrics) of the objective's loss on the rewards of each prompt's answers."""
    ranking = (rewards_PK, ranks_PK, present_PK)
    terms, metrics = preference.bradley_terry(*ranking)  # whose metrics are those of every loss
    match objective.loss:
        case BradleyTerry(margin=margin):
            terms, _ = preference.bradley_terry(*ranking, margin)
        case PlackettLuce():
            terms = preference.plackett_luce(*ranking)
        case BestOfK():
            terms = preference.best_of_k(*ranking)
    return terms, metrics


def make_loss(objective: RewardModel, model):
    """The loss of the update contract."""

    def loss(params, batch: Trajectory, key):
        rewards_BS = scores(model, params, batch, key if model.dropout > 0 else None)
        return loss_of(objective, *ranked.by_prompt(rewards_BS, batch))

    return loss


def evaluation_sums(objective: RewardModel, model, params, batch: Trajectory) -> dict:
    """What `ranked.summarize` takes."""
    ranking = ranked.by_prompt(scores(model, params, batch), batch)
    return ranked.evaluation_sums(*ranking, loss_of(objective, *ranking)[0])


def present(batch: Trajectory):
    """Bool [B, S]: whether there is an answer."""
    return jnp.asarray(batch.prompt_id) > 0
