"""Distillation from a teacher run, token by token, on the rows that the student would otherwise be trained on.

Legend: B rows, T positions (a row holds T + 1 tokens), D model width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm import masked
from jaxlm.data.trajectory import Trajectory
from jaxlm.losses import distill, lm
from jaxlm.losses.distill import Forward, JensenShannon, Reverse
from jaxlm.nn import transformer
from jaxlm.steps import pretrain


@dataclasses.dataclass(frozen=True)
class Distill:
    """The student's distribution at every token under the loss mask is brought to the teacher's.

    `teacher` is the workdir of a run with the same tokenizer, of any size; its logits are made on the way.
    """

    teacher: str
    divergence: Forward | Reverse | JensenShannon = Forward()
    temperature: float = 1.0  # divides both logits; the loss is multiplied by its square (Hinton et al. 2015)


def token_divergences(objective: Distill, model, params, reference, batch: Trajectory, chunk=None, key=None):
    """Float32 [B, T], 0 outside the loss mask: the divergence at tokens[:, 1:]. reference: (model, parameters).

    `chunk` positions of every row have their logits at a time, those of both models, as in `lm.token_logprobs`.
    """
    inputs = [x[:, :-1] for x in (batch.tokens, batch.positions, batch.segments)]
    mask_BT = batch.loss_mask[:, 1:]
    teacher, their_params = reference
    ours_BTD, _, _ = transformer.apply(model, params, *inputs, key=key)
    theirs_BTD = jax.lax.stop_gradient(transformer.apply(teacher, their_params, *inputs)[0])

    def score(ours, theirs, mask):
        student, wise = transformer.unembed(model, params, ours), transformer.unembed(teacher, their_params, theirs)
        if student.shape[-1] != wise.shape[-1]:  # padded to different multiples
            student, wise = student[..., : model.vocab_size], wise[..., : model.vocab_size]
        return distill.divergence(objective.divergence, student, wise, mask, objective.temperature)

    return lm.by_chunks(score, (ours_BTD, theirs_BTD, mask_BT), chunk)


def make_loss(objective: Distill, model, train, reference):
    """The loss of the update contract."""

    def loss(params, batch: Trajectory, key):
        key = key if model.dropout > 0 else None
        each = token_divergences(objective, model, params, reference, batch, train.loss_chunk, key)
        return distill.distill_loss(each, batch.loss_mask[:, 1:], jnp.square(objective.temperature)), {}

    return loss


def evaluation_sums(objective: Distill, model, chunk, reference, params, batch: Trajectory, token_bytes_V) -> dict:
    """The sums of `pretrain.evaluation_sums`, and the divergence's."""
    each = token_divergences(objective, model, params, reference, batch, chunk)
    divergence = masked.sum(each, batch.loss_mask[:, 1:])
    return pretrain.evaluation_sums(model, chunk, params, batch, token_bytes_V) | {"divergence": divergence}


def summarize(sums: dict) -> dict[str, float]:
    """loss: the divergence in nats per token; cross_entropy and bits_per_byte: of the student alone, on the text."""
    own = pretrain.summarize(sums)
    divergence = float(sums["divergence"]) / max(float(sums["tokens"]), 1.0)
    return {"loss": divergence, "cross_entropy": own["loss"], "bits_per_byte": own["bits_per_byte"]}
