"""Small models with large random weights, and what full passes without a cache say of a completion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import rng
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.nn.transformer import ModelConfig, abstract, apply, unembed
from jaxlm.sample import engine

TOKENIZER = BytesTokenizer()
SMALL = {"vocab_size": TOKENIZER.vocab_size, "layers": 2, "width": 32, "heads": 4}
# Grouped queries and a window shorter than the prompts, so that the ring has to turn.
WINDOWED = ModelConfig(**SMALL, kv_heads=2, pattern=("window", "full"), window=5)
CONVOLVED = ModelConfig(**SMALL, pattern=("full", "window"), window=3, short_conv=3)


LOUD = (100, 101, 102)  # ids that random models say often, where asked to: to stop at


@functools.cache
def random_params(cfg, seed=1, loud=False):
    """Larger values than those of `init`, whose distributions are too flat for a wrong token to show."""
    generator = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(generator.normal(size=x.shape) * 0.6, x.dtype)  # noqa: E731
    params = jax.tree.map(draw, abstract(cfg))
    if loud:
        kernel = params["heads"]["lm"]["kernel"]
        params["heads"]["lm"]["kernel"] = kernel.at[:, list(LOUD)].multiply(2)
    return params


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg, params, tokens_1T):
    positions = jnp.arange(tokens_1T.shape[1])[None]
    return unembed(cfg, params, apply(cfg, params, tokens_1T, positions, jnp.ones_like(tokens_1T))[0])[0]


def full_logits(cfg, params, tokens, length=128):
    """float32 [len(tokens), V] by one full pass; row t is what comes after tokens[: t + 1]."""
    padded = jnp.asarray([list(tokens) + [0] * (length - len(tokens))])  # causal: what follows does not reach back
    return np.asarray(_logits(cfg, params, padded))[: len(tokens)]


@jax.jit
def _draws(seed, sample_id, logits_NV):
    keys = jax.vmap(lambda i: rng.stream_key(jax.random.key(seed), rng.SAMPLE, sample_id, i))
    return jax.vmap(jax.random.categorical)(keys(jnp.arange(logits_NV.shape[0])), logits_NV)


def assert_follows(cfg, params, prompt, sampling, sample_id, completion):
    """Every sampled token is the one that its published key draws from the full pass's logits, or the likeliest."""
    logits = full_logits(cfg, params, [*prompt, *completion.ids])[len(prompt) - 1 : -1]
    scaled = logits / (sampling.temperature or 1.0)
    logprobs = np.asarray(jax.nn.log_softmax(scaled))
    scaled = np.where(engine.allowed_tokens(cfg, TOKENIZER, sampling), scaled, -np.inf)
    spare = np.zeros((128 - len(scaled), scaled.shape[1]), np.float32)
    drawn = _draws(np.uint32(sampling.seed), sample_id, np.concatenate([scaled, spare]))
    want = drawn if sampling.temperature else scaled.argmax(-1)
    for i, (got, logprob, sampled) in enumerate(zip(completion.ids, completion.logprobs, completion.sampled)):
        if sampled:
            assert got == want[i], (i, completion)
            assert abs(logprob - logprobs[i, got]) < 1e-4
        else:
            assert logprob == 0
