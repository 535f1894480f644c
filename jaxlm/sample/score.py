"""Log-probabilities of given tokens: what the sampler would have said of them, by full passes without a cache.

B rows, T length (a bucket).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import UserError
from jaxlm.losses import lm
from jaxlm.nn.transformer import ModelConfig, apply
from jaxlm.sample.engine import MIN_PROMPT_BUCKET, bucket, max_new_tokens
from jaxlm.sample.slots import layout

CHUNK = 1024  # positions whose logits exist at once


@functools.partial(jax.jit, static_argnames=("cfg",))
def _score(cfg, params, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    positions_BT, segments_BT = layout(tokens_BT, lengths_B)
    hidden_BTD, _, _ = apply(cfg, params, tokens_BT[:, :-1], positions_BT[:, :-1], segments_BT[:, :-1])
    return lm.token_logprobs(cfg, params, hidden_BTD, tokens_BT[:, 1:], CHUNK)[0]


def score(cfg: ModelConfig, params, sequences: Sequence[Sequence[int]], rows: int = 16) -> list[np.ndarray]:
    """Log-probability of each token of each sequence given those before it, float32, at temperature 1.

    `result[i][t]` scores `sequences[i][t + 1]`: the first token is given, so n tokens have n - 1 values. Sequences run
    in batches of `rows` of one length bucket. Raises `UserError` for one longer than learned positions reach.
    """
    results: list[np.ndarray | None] = [None] * len(sequences)
    groups: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        room = max_new_tokens(cfg, len(sequence))
        if len(sequence) == 0 or (room is not None and room < 0):
            raise UserError(f"cannot score a sequence of {len(sequence)} tokens with {cfg.positions}")
        groups.setdefault(bucket(len(sequence), MIN_PROMPT_BUCKET), []).append(i)
    for T, members in sorted(groups.items()):
        for start in range(0, len(members), rows):
            batch = members[start : start + rows]
            tokens = np.zeros((rows, T + 1), np.int32)  # one more: the model is then fed T, an even shape
            lengths = np.zeros(rows, np.int32)
            for b, i in enumerate(batch):
                lengths[b] = len(sequences[i])
                tokens[b, : lengths[b]] = sequences[i]
            logprobs = np.asarray(_score(cfg, params, jnp.asarray(tokens), jnp.asarray(lengths)))
            for b, i in enumerate(batch):
                results[i] = logprobs[b, : lengths[b] - 1]
    return results
