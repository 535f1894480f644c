"""From logits to a token: temperature, top-k, top-p, min-p and the draw, as pure functions on float32 logits.

Every parameter is an array with one value per row, so that requests with different settings share one compiled program.
Order: temperature, then top-k, then top-p over what top-k left, then min-p (as Hugging Face transformers does).
Ties at a boundary are all kept.

B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp

REMOVED = float("-inf")


def apply_temperature(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Logits divided by the temperature, float32 [B, V]; at temperature 0 (greedy) they are returned as they are."""
    temperature_B = jnp.asarray(temperature_B, jnp.float32)
    return logits_BV.astype(jnp.float32) / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]


def token_logprobs(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Log-probabilities [B, V] under the temperature in use, before top-k, top-p and min-p; float32 log-softmax.

    At temperature 0 they are those of temperature 1, so that a greedy token still carries the model's own confidence.
    """
    return jax.nn.log_softmax(apply_temperature(logits_BV, temperature_B), axis=-1)


def filter_logits(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """Logits [B, V] with the removed tokens at -inf; what stays is untouched, bit for bit.

    top_k: keep the k likeliest (0 keeps all). top_p: keep the likeliest tokens until their probability reaches p, at
    least one (1 keeps all; Holtzman et al. 2019, "nucleus"). min_p: keep tokens at least min_p times as likely as the
    likeliest (0 keeps all; Nguyen et al. 2024). The likeliest token always stays.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    V = logits_BV.shape[-1]
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)  # values only: a threshold needs no ids, and no scatter back
    rank_V = jnp.arange(V)[None, :]
    k_B1 = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)[:, None]
    in_k_BV = rank_V < k_B1
    probabilities_BV = jax.nn.softmax(jnp.where(in_k_BV, sorted_BV, REMOVED), axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    top_p_B1 = top_p_B.astype(jnp.float32)[:, None]
    # A cumulative sum may round to 1 before the tail: p >= 1 must still keep everything.
    in_p_BV = (before_BV < top_p_B1) | (top_p_B1 >= 1.0) | (rank_V == 0)
    kept_B1 = jnp.sum(in_k_BV & in_p_BV, axis=-1, keepdims=True)
    boundary_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
    min_p_B1 = min_p_B.astype(jnp.float32)[:, None]
    floor_B1 = jnp.where(min_p_B1 > 0, sorted_BV[:, :1] + jnp.log(jnp.maximum(min_p_B1, 1e-38)), REMOVED)
    return jnp.where((logits_BV >= boundary_B1) & (logits_BV >= floor_B1), logits_BV, REMOVED)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The id of each row's greatest logit, the lowest among equals, 0 where one is NaN; int32 [B].

    `argmax` carries pairs through its reduction, which XLA does not vectorise on CPU: there two reductions are faster.
    """
    V = logits_BV.shape[-1]
    greatest_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(greatest_BV, jnp.arange(V, dtype=jnp.int32), V), axis=-1) % V


def adjust(
    logits_BV: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    allowed_BV: jax.Array | None = None,
) -> jax.Array:
    """The logits [B, V] that a token is drawn by: at the temperature, what is not allowed or filtered out at -inf."""
    scaled_BV = apply_temperature(logits_BV, temperature_B)
    if allowed_BV is not None:
        scaled_BV = jnp.where(allowed_BV, scaled_BV, REMOVED)
    # The sort costs more than the rest at a large vocabulary; a row that filters nothing is the same on either branch.
    filters = jnp.any((top_k_B > 0) | (top_p_B < 1) | (min_p_B > 0))
    return jax.lax.cond(filters, lambda x: filter_logits(x, top_k_B, top_p_B, min_p_B), lambda x: x, scaled_BV)


def draw(keys_B: jax.Array, adjusted_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """One token per row by adjusted logits, int32 [B]: drawn with the row's key, or the likeliest at temperature 0."""
    draws_B1 = (temperature_B > 0)[:, None]

    def with_noise(x_BV):  # the likeliest after Gumbel noise is a draw, as in jax.random.categorical
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, x_BV.shape[1:], x_BV.dtype))(keys_B)
        return jnp.where(draws_B1, noise_BV + x_BV, x_BV)

    return likeliest(jax.lax.cond(jnp.any(draws_B1), with_noise, lambda x: x, adjusted_BV))


def probabilities(adjusted_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """What `draw` draws from, [B, V]: at temperature 0 all is on the likeliest token."""
    greedy_BV = jax.nn.one_hot(likeliest(adjusted_BV), adjusted_BV.shape[-1], dtype=adjusted_BV.dtype)
    return jnp.where((temperature_B > 0)[:, None], jax.nn.softmax(adjusted_BV, axis=-1), greedy_BV)


def sample(
    keys_B: jax.Array,
    logits_BV: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    allowed_BV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row: (ids [B] int32, their log-probabilities [B] float32, see `token_logprobs`).

    `keys_B` holds one key per row, so a row's draw is its own whatever else is in the batch. `allowed_BV` removes
    tokens from the draw and from greedy choice, but not from the log-probabilities, which stay the model's.
    Temperature 0 takes the likeliest allowed token (the lowest id among equals).
    """
    logprobs_BV = token_logprobs(logits_BV, temperature_B)
    ids_B = draw(keys_B, adjust(logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, allowed_BV), temperature_B)
    return ids_B, jnp.take_along_axis(logprobs_BV, ids_B[:, None], axis=-1)[:, 0]
