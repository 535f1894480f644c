"""Heads: the branch of the parameter tree that reads the backbone's hidden states.

`lm` is the output kernel of an untied model (a tied one has the name and no array). `reward` and `value` give a number
at every position, in float32: `params["heads"]["reward"]` is {"kernel" [D], "bias" []}. A tree has the heads that its
run trains: a language model ("lm",), a reward model ("reward",), a critic ("value",).

Legend: B batch, T length, D model width.
"""

import math

import jax
import jax.numpy as jnp

from jaxlm.nn import lora as adapters
from jaxlm.nn import transformer
from jaxlm.nn.definition import ModelConfig
from jaxlm.nn.lora import LoRA
from jaxlm.sharding import constrain

LM = ("lm",)
SCALAR = ("reward", "value")


def _with_heads(tree, names: tuple[str, ...], scalar):
    """A tree like the parameters with these heads: `scalar(name)` in place of each that gives a number."""
    own = {name: scalar(name) for name in names if name in SCALAR}
    return tree | {"heads": {name: x for name, x in tree["heads"].items() if name in names} | own}


def init_scalar(name: str, cfg: ModelConfig, key):
    """A reward head is normal with std 1 / sqrt(D + 1), a value head zero, so that values start at 0 (Ziegler et al.
    2019; the details after arXiv:2403.17031)."""
    dtype = jnp.dtype(cfg.precision.params)
    kernel = jnp.zeros((cfg.width,), dtype)
    if name == "reward":
        kernel = jax.random.normal(key, (cfg.width,), dtype) / math.sqrt(cfg.width + 1)
    return {"kernel": kernel, "bias": jnp.zeros((), dtype)}


def init(cfg: ModelConfig, lora: LoRA | None, key, names: tuple[str, ...] = LM):
    """Fresh parameters with adapters, if any, and these heads; the rest does not depend on which heads there are."""
    keys = {name: jax.random.fold_in(key, 5 + i) for i, name in enumerate(SCALAR)}
    return _with_heads(adapters.init(cfg, lora, key), names, lambda name: init_scalar(name, cfg, keys[name]))


def specs(cfg: ModelConfig, lora: LoRA | None, names: tuple[str, ...] = LM):
    """The logical axes of the same tree. What has one dim does not decay."""
    return _with_heads(adapters.specs(cfg, lora), names, lambda name: {"kernel": ("embed",), "bias": ()})


def abstract(cfg: ModelConfig, lora: LoRA | None, names: tuple[str, ...] = LM):
    """The same tree as `jax.ShapeDtypeStruct`s."""
    dtype = jnp.dtype(cfg.precision.params)
    leaf = {"kernel": jax.ShapeDtypeStruct((cfg.width,), dtype), "bias": jax.ShapeDtypeStruct((), dtype)}
    return _with_heads(adapters.abstract(cfg, lora), names, lambda name: leaf)


def apply(head, hidden_BTD):
    """[B, T], float32 or wider whatever the compute dtype: a head's number at every position."""
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    # Like the embedding: spread over the axis that also spreads the batch, it is gathered first.
    kernel_D = constrain(head["kernel"], (None,)).astype(wide)
    product = jnp.einsum("btd,d->bt", hidden_BTD.astype(wide), kernel_D, precision=jax.lax.Precision.HIGHEST)
    return product + head["bias"].astype(wide)


def scalars(cfg: ModelConfig, params, name: str, tokens_BT, positions_BT, segments_BT, key=None):
    """[B, T]: the number that the head `name` gives at every position of packed rows; `key` turns dropout on."""
    hidden_BTD, _, _ = transformer.apply(cfg, params, tokens_BT, positions_BT, segments_BT, key=key)
    return apply(params["heads"][name], hidden_BTD)


def describe(names: tuple[str, ...]) -> str:
    """What a model with these heads is, in words."""
    return "a language model" if "lm" in names else f"a {names[0]} model"
