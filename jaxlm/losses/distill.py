"""Distillation from a teacher's logits, token by token. Distillation by sequence, from what a teacher has written, is
plain supervised fine-tuning on it (arXiv:1606.07947) and needs nothing here.

Legend: B rows, T positions (any chunk of them), V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm import masked


@dataclasses.dataclass(frozen=True)
class Forward:
    """KL(teacher || student): the student covers what the teacher may say (Hinton et al. 2015)."""


@dataclasses.dataclass(frozen=True)
class Reverse:
    """KL(student || teacher): the student keeps to what the teacher says most (MiniLLM, arXiv:2306.08543)."""


@dataclasses.dataclass(frozen=True)
class JensenShannon:
    """mix * KL(teacher || M) + (1 - mix) * KL(student || M), M = mix * teacher + (1 - mix) * student (GKD,
    arXiv:2306.13649)."""

    mix: float = 0.5


Divergence = Forward | Reverse | JensenShannon


def _log_softmax(logits_BTV, mask_BT, temperature):
    logits = jnp.where(mask_BT[..., None], masked.wide(logits_BTV), 0)
    # Finite where a column is masked out, so that 0 * log 0 is 0, in the gradient too.
    return jnp.maximum(jax.nn.log_softmax(logits / temperature, axis=-1), -1e30)


def _kl(p, q):
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def divergence(kind: Divergence, student_logits_BTV, teacher_logits_BTV, mask_BT, temperature=1.0):
    """[B, T] in nats, 0 outside the mask, float32 or wider, with gradients to the student alone.

    Give it the positions whose logits exist; the results of chunks, side by side, are that of all. Both logits are
    divided by `temperature`; to keep the gradient's size, the caller multiplies by its square (Hinton et al. 2015).
    """
    student = _log_softmax(student_logits_BTV, mask_BT, temperature)
    teacher = _log_softmax(jax.lax.stop_gradient(teacher_logits_BTV), mask_BT, temperature)
    match kind:
        case Forward():
            out = _kl(teacher, student)
        case Reverse():
            out = _kl(student, teacher)
        case JensenShannon(mix=mix):
            mixture = jnp.logaddexp(teacher + jnp.log(mix), student + jnp.log1p(-mix))
            out = mix * _kl(teacher, mixture) + (1 - mix) * _kl(student, mixture)
        case _:
            raise ValueError(f"{type(kind).__name__} is no divergence")
    return jnp.where(mask_BT, out, 0)


def distill_loss(divergence_BT, mask_BT, coefficient=1.0):
    """Terms: the mean over the tokens under the mask."""
    weight = jnp.sum(mask_BT).astype(divergence_BT.dtype)
    return {"distill": (coefficient, masked.sum(divergence_BT, mask_BT), weight)}
