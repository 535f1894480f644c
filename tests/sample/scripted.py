"""Models that say what a test wants: real parameters that make the next token depend on the last one alone."""

import itertools

import jax
import numpy as np

from jaxlm import tree
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.nn.transformer import ModelConfig, abstract, padded_vocab

TOKENIZER = BytesTokenizer()
_V = padded_vocab(ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=2, heads=1))
AUTOMATON = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=_V, heads=2, hidden=8)


def symbol(name: str) -> int:
    """The id of a control symbol, or of a single byte."""
    return TOKENIZER.control[name] if name in TOKENIZER.control else TOKENIZER.encode(name)[0]


def automaton(following: dict[str, str | tuple[str, ...]], cfg: ModelConfig = AUTOMATON):
    """Parameters of `AUTOMATON`, or a `cfg` like it, that follow each symbol by one of those given, all equally likely.

    One-hot embeddings, layers that add nothing, and an output kernel that is the table.
    """
    kernel = np.zeros((_V, _V), np.float32)
    for name, successors in following.items():
        for successor in (successors,) if isinstance(successors, str) else successors:
            kernel[symbol(name), symbol(successor)] = 100 / _V**0.5  # the final norm makes a one-hot row sqrt(V) long

    def value(name, x):
        if name.endswith("scale"):
            return np.ones(x.shape, x.dtype)
        if name.endswith("embed/tokens"):
            return np.eye(_V, dtype=x.dtype)
        return kernel if name.endswith("lm/kernel") else np.zeros(x.shape, x.dtype)

    return jax.tree.map(jax.numpy.asarray, tree.map_named(value, abstract(cfg)))


def say(*words: str) -> dict[str, str]:
    """A table that says these symbols one after the other; no symbol may come twice."""
    assert len(set(words)) == len(words)
    return dict(itertools.pairwise(words))
