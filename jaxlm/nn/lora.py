"""Low-rank adapters (LoRA, arXiv:2106.09685): a kernel W is used as W + (alpha / rank) A B, and only A, B are trained.

They live in the branch `adapters` of the parameter tree, a pair "a", "b" for each adapted projection, under its path in
the blocks: `adapters["0"]["attention"]["q"]`. The model function knows none of that. It takes a tree that went through

    attach(lora, params)    A and B beside their kernels, used as x W + (x A) B: what training differentiates
    merge(lora, params)     kernels with their product added: what sampling, export and child runs start from

`attach` costs 2 rank (inputs + outputs) multiplications a token and projection and keeps x A for the backward pass; in
return no gradient of a kernel is ever made, which saves their memory and about a third of a step's work. Both leave the
branch empty: what is in it without having gone through either is refused by `transformer.apply`.

Legend of shapes: L layers of a slot, R rank, the inputs and the outputs of a projection.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlm import tree
from jaxlm.config import UserError, nearest
from jaxlm.nn import flops, transformer
from jaxlm.nn.definition import ModelConfig
from jaxlm.optim.optimizers import matrix_dims


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters of `rank`, their product scaled by alpha / rank.

    `targets` names projections (q, k, v, out, gate, up, down); unset: every one that the blocks have.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


# ------------------------------------------------------------------------------------------------------ parameters
def _projections(cfg: ModelConfig) -> dict[str, tuple]:
    """Path of each projection in the blocks -> (shape, logical axes, dims) of its stacked kernel."""
    blocks = transformer.specs(cfg)["backbone"]["blocks"]
    shapes = dict(tree.named_leaves(transformer.abstract(cfg)["backbone"]["blocks"]))
    found = {}
    for name, axes in tree.named_leaves(blocks, is_leaf=lambda x: isinstance(x, tuple)):
        if (dims := matrix_dims(axes)) is not None:
            found[name.rpartition("/")[0]] = shapes[name].shape, axes, dims
    return found


def _described(cfg: ModelConfig, lora: LoRA) -> dict[str, tuple]:
    """Path of each adapter in its branch -> (shape, logical axes)."""
    found = {}
    for path, (shape, axes, dims) in _projections(cfg).items():
        if lora.targets is None or path.rpartition("/")[2] in lora.targets:
            ins, outs = ([(shape[i], axes[i]) for i in of] for of in (dims.reduction_axis, dims.output_axis))
            layers, rank = (shape[0], axes[0]), (lora.rank, "rank")
            found[f"{path}/a"] = tuple(zip(layers, *ins, rank))
            found[f"{path}/b"] = tuple(zip(layers, rank, *outs))
    return found


def _branch(leaves: dict) -> dict:
    return {"adapters": traverse_util.unflatten_dict(leaves, sep="/")}


def validate(cfg: ModelConfig, lora: LoRA | None) -> None:
    """Raises `UserError` for a rank below 1, no target, or a target that the model does not have."""
    if lora is None:
        return
    if lora.rank < 1:
        raise UserError(f"lora.rank must be at least 1, got {lora.rank}")
    if lora.targets is not None:
        names = sorted({path.rpartition("/")[2] for path in _projections(cfg)})
        if not lora.targets:
            raise UserError("lora.targets is empty; none adapts every projection")
        for target in lora.targets:
            if target not in names:
                raise UserError(f"lora.targets: the model has no projection {target!r}; {nearest(target, names)}")


def specs(cfg: ModelConfig, lora: LoRA | None):
    """The logical axes of the parameter tree with its adapters, if any."""
    if lora is None:
        return transformer.specs(cfg)
    return transformer.specs(cfg) | _branch({path: axes for path, (_, axes) in _described(cfg, lora).items()})


def abstract(cfg: ModelConfig, lora: LoRA | None):
    """The same tree as `jax.ShapeDtypeStruct`s."""
    if lora is None:
        return transformer.abstract(cfg)
    dtype = jnp.dtype(cfg.precision.params)
    described = _described(cfg, lora).items()
    return transformer.abstract(cfg) | _branch({p: jax.ShapeDtypeStruct(shape, dtype) for p, (shape, _) in described})


def init(cfg: ModelConfig, lora: LoRA | None, key):
    """Fresh parameters; the model's own are those without adapters. A is normal with std 1 / sqrt(inputs), B zero, so
    that the first step starts from the model as it is."""
    params = transformer.init(cfg, key)
    if lora is None:
        return params
    validate(cfg, lora)
    dtype, leaves = jnp.dtype(cfg.precision.params), {}
    for i, (path, (shape, _)) in enumerate(_described(cfg, lora).items()):
        if path.endswith("/b"):
            leaves[path] = jnp.zeros(shape, dtype)
        else:
            std = 1 / math.sqrt(math.prod(shape[1:-1]))
            leaves[path] = std * jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 4), i), shape, dtype)
    return params | _branch(leaves)


# ------------------------------------------------------------------------------------------------------ their use
def _joined(blocks, adapters, join):
    """The blocks with `join(projection, a, b)` in place of each projection that has a pair."""
    if "a" in adapters:
        return join(blocks, adapters["a"], adapters["b"])
    return {k: _joined(x, adapters[k], join) if k in adapters else x for k, x in blocks.items()}


def _applied(params, join):
    blocks = _joined(params["backbone"]["blocks"], params["adapters"], join)
    return params | {"backbone": params["backbone"] | {"blocks": blocks}, "adapters": {}}


def attach(lora: LoRA | None, params):
    """The tree for `transformer.apply` with the adapters in use and nothing multiplied out; differentiable in them."""
    if lora is None:
        return params
    return _applied(params, lambda projection, a, b: projection | {"lora_a": a, "lora_b": b * lora.scale})


def merge(lora: LoRA | None, params):
    """The plain parameter tree of the adapted model: W + (alpha / rank) A B, summed in float32 or wider.

    With bfloat16 parameters the sum is rounded to them, which `attach` does not do: outputs then differ by as much.
    """
    if lora is None:
        return params

    def join(projection, a, b):
        kernel = projection["kernel"]
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        layers, rank = b.shape[:2]
        a, b = a.astype(wide).reshape(layers, -1, rank), b.astype(wide).reshape(layers, rank, -1)
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(kernel.shape)
        return projection | {"kernel": (kernel.astype(wide) + lora.scale * product).astype(kernel.dtype)}

    return _applied(params, join)


def flops_per_token(cfg: ModelConfig, lora: LoRA | None, context: int) -> dict[str, float]:
    """`flops.flops_per_token`; with adapters the kernels' own gradients are not made and not counted."""
    if lora is None:
        return flops.flops_per_token(cfg, context)
    return flops.flops_per_token(cfg, context, tree.count(abstract(cfg, lora)["adapters"]))
