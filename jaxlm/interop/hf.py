"""Hugging Face folders (config.json and safetensors) as jaxlm models: GPT-2, Llama, Mistral, Qwen 2/3, Gemma 2/3.

    config_from_hf(config) -> ModelConfig          load_hf(folder) -> (ModelConfig, params)

Nothing here needs torch or transformers, and nothing is unpickled.

Legend: D model width, H query heads, K key/value heads, C head width, F hidden width, V vocabulary, L layers.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxlm import storage, tree
from jaxlm.config import UserError
from jaxlm.interop.hf_config import FLOAT32, config_from_hf, family_of
from jaxlm.nn.definition import ModelConfig, Precision
from jaxlm.nn.transformer import abstract

__all__ = ["arrange", "config_from_hf", "family_of", "load_hf", "read_config"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter lies in a checkpoint: the tensor's name, the part of a fused one, and its layout.

    `layout`: "linear" [out, in] as torch keeps it, "conv" [in, out] as GPT-2 does, "plain" in our own shape up to a
    reshape, "vocab" [V, D], "vocab_T" [V, D] that we keep as [D, V].
    """

    name: str
    layout: str
    part: int = 0
    parts: int = 1  # equal parts along the output dim


_GPT2_BLOCK = {
    "attention_norm/scale": Place("ln_1.weight", "plain"),
    "attention_norm/bias": Place("ln_1.bias", "plain"),
    "mlp_norm/scale": Place("ln_2.weight", "plain"),
    "mlp_norm/bias": Place("ln_2.bias", "plain"),
    **{f"attention/{x}/kernel": Place("attn.c_attn.weight", "conv", i, 3) for i, x in enumerate("qkv")},
    **{f"attention/{x}/bias": Place("attn.c_attn.bias", "plain", i, 3) for i, x in enumerate("qkv")},
    "attention/out/kernel": Place("attn.c_proj.weight", "conv"),
    "attention/out/bias": Place("attn.c_proj.bias", "plain"),
    "mlp/up/kernel": Place("mlp.c_fc.weight", "conv"),
    "mlp/up/bias": Place("mlp.c_fc.bias", "plain"),
    "mlp/down/kernel": Place("mlp.c_proj.weight", "conv"),
    "mlp/down/bias": Place("mlp.c_proj.bias", "plain"),
}
_LLAMA_BLOCK = {
    **{
        f"attention/{ours}/{leaf}": Place(f"self_attn.{theirs}_proj.{suffix}", layout)
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
        for leaf, suffix, layout in (("kernel", "weight", "linear"), ("bias", "bias", "plain"))
    },
    **{
        f"mlp/{x}/{leaf}": Place(f"mlp.{x}_proj.{suffix}", layout)
        for x in ("gate", "up", "down")
        for leaf, suffix, layout in (("kernel", "weight", "linear"), ("bias", "bias", "plain"))
    },
    **{f"attention/{x}_norm/scale": Place(f"self_attn.{x}_norm.weight", "plain") for x in "qk"},
    "attention_norm/scale": Place("input_layernorm.weight", "plain"),
}
_PRE = {"mlp_norm/scale": Place("post_attention_layernorm.weight", "plain")}
_SANDWICH = {
    "attention_post_norm/scale": Place("post_attention_layernorm.weight", "plain"),
    "mlp_norm/scale": Place("pre_feedforward_layernorm.weight", "plain"),
    "mlp_post_norm/scale": Place("post_feedforward_layernorm.weight", "plain"),
}
_GPT2_OUTER = {
    "backbone/embed/tokens": Place("wte.weight", "vocab"),
    "backbone/embed/positions": Place("wpe.weight", "plain"),
    "backbone/final_norm/scale": Place("ln_f.weight", "plain"),
    "backbone/final_norm/bias": Place("ln_f.bias", "plain"),
    "heads/lm/kernel": Place("lm_head.weight", "vocab_T"),
}
_LLAMA_OUTER = {
    "backbone/embed/tokens": Place("embed_tokens.weight", "vocab"),
    "backbone/final_norm/scale": Place("norm.weight", "plain"),
    "heads/lm/kernel": Place("lm_head.weight", "vocab_T"),
}
# Tensors that carry nothing: rotary tables, causal masks, the second name of a tied embedding
_EMPTY = re.compile(r"(.*\.)?rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias")
_PICTURES = re.compile(r"(vision_tower|multi_modal_projector)\..*")


def places(cfg: ModelConfig, family: str) -> dict[str, list[Place]]:
    """Parameter name -> its place, or for a stacked one the place of each layer."""
    outer, block, layer_name = _LLAMA_OUTER, _LLAMA_BLOCK, "layers"
    if family == "gpt2":
        outer, block, layer_name = _GPT2_OUTER, _GPT2_BLOCK, "h"
    else:
        block = block | (_SANDWICH if cfg.norm_placement == "sandwich" else _PRE)
    found = {}
    for name, _ in tree.named_leaves(abstract(cfg)):
        if match := re.fullmatch(r"backbone/blocks/(\d+)/(.*)", name):
            place, layers = block[match[2]], range(int(match[1]), cfg.layers, len(cfg.pattern))
            found[name] = [dataclasses.replace(place, name=f"{layer_name}.{i}.{place.name}") for i in layers]
        else:
            found[name] = [outer[name]]
    return found


def stored_shape(cfg: ModelConfig, name: str, shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """The shape that the checkpoint must have for one layer's parameter of our `shape`."""
    if place.layout in ("vocab", "vocab_T"):
        return cfg.vocab_size, cfg.width
    if place.layout == "plain":
        if len(shape) == 2 and "bias" not in name:
            return shape
        return (math.prod(shape) * place.parts,)
    inputs = 2 if "attention/out/" in name else 1
    stored = math.prod(shape[:inputs]), math.prod(shape[inputs:]) * place.parts
    return stored if place.layout == "conv" else stored[::-1]


def _fill(target: np.ndarray, stored: np.ndarray, place: Place) -> None:
    """Writes a stored tensor into our array of one layer, which starts as zeros: padded rows stay zero."""
    stored = np.split(stored, place.parts, axis=-1)[place.part] if place.parts > 1 else stored
    if place.layout == "vocab":
        target[: stored.shape[0]] = stored
    elif place.layout == "vocab_T":
        target[:, : stored.shape[0]] = stored.T
    else:
        target[...] = (stored.T if place.layout == "linear" else stored).reshape(target.shape)


def arrange(cfg: ModelConfig, family: str, shapes: Mapping[str, tuple], read: Callable[[str], np.ndarray]):
    """The parameter tree, as numpy arrays, out of tensors by their Hugging Face names (without `model.` in front).

    shapes: of every tensor there is; read: its content by name. `UserError` names what is missing, is there and has
    no place, or has another shape than `cfg` says.
    """
    found, ours = places(cfg, family), abstract(cfg)
    wanted = {place.name for each in found.values() for place in each}
    left = {
        n for n in shapes if n not in wanted and not _EMPTY.fullmatch(n) and not (cfg.tied and n == "lm_head.weight")
    }
    for names, what in ((wanted - set(shapes), "are missing"), (left, "have no place in this architecture")):
        if names:
            shown = ", ".join(sorted(names)[:6]) + (", ..." if len(names) > 6 else "")
            raise UserError(f"the checkpoint does not fit its config.json: {len(names)} tensors {what}: {shown}")

    def leaf(name, x):
        stacked = name.startswith("backbone/blocks/")
        for place in found[name]:
            expected = stored_shape(cfg, name, x.shape[1:] if stacked else x.shape, place)
            if tuple(shapes[place.name]) != expected:
                raise UserError(
                    f"the checkpoint does not fit its config.json: {place.name} has the shape "
                    f"{tuple(shapes[place.name])}, expected {expected}"
                )
        return x

    tree.map_named(leaf, ours)  # everything is checked before anything large is read

    def build(name, x):
        out = np.zeros(x.shape, x.dtype)
        for i, place in enumerate(found[name]):
            _fill(out[i] if name.startswith("backbone/blocks/") else out, read(place.name), place)
        return out

    return tree.map_named(build, ours)


def load_hf(folder, precision: Precision = FLOAT32):
    """(ModelConfig, params) of a Hugging Face folder with safetensors in one file or in shards.

    Parameters are numpy arrays in `precision.params`, on the host. `UserError` for a folder that is none, an
    unsupported architecture or setting, missing, surplus or wrongly shaped tensors, and damaged files; weights in
    pickles (pytorch_model.bin) are refused, as opening one runs what it holds.
    """
    folder = os.fspath(folder)
    config = read_config(folder)
    cfg = config_from_hf(config, precision)
    with contextlib.ExitStack() as stack:
        files = {}
        for file in weight_files(folder):
            try:
                opened = stack.enter_context(safetensors.safe_open(os.path.join(folder, file), framework="numpy"))
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(f"{os.path.join(folder, file)} is damaged or no safetensors file: {e}") from None
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                short = re.sub(r"^((model|language_model|transformer)\.)+", "", name)
                if "text_config" in config and _PICTURES.fullmatch(short):
                    continue
                if short in files:
                    raise UserError(f"{folder}: tensor {name} is there twice")
                files[short] = (opened, name)

        def read(short):
            opened, name = files[short]
            stored = opened.get_tensor(name)
            if not jnp.issubdtype(stored.dtype, jnp.floating):
                raise UserError(f"{folder}: tensor {name} is {stored.dtype}; quantized weights are not supported")
            return stored

        shapes = {short: opened.get_slice(name).get_shape() for short, (opened, name) in files.items()}
        return cfg, arrange(cfg, family_of(config), shapes, read)


def read_config(folder) -> dict:
    """config.json of a Hugging Face folder."""
    if not os.path.isdir(folder):
        raise UserError(f"no such folder: {folder}; give a Hugging Face folder with config.json and safetensors")
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise UserError(f"{folder} has no config.json, so it is no Hugging Face model folder")
    config = storage.read_json(os.path.join(folder, "config.json"))
    if not isinstance(config, dict):
        raise UserError(f"{os.path.join(folder, 'config.json')} does not hold a JSON object")
    return config


def weight_files(folder: str) -> list[str]:
    names = sorted(os.listdir(folder))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if "model.safetensors.index.json" in names:
        index = storage.read_json(os.path.join(folder, "model.safetensors.index.json"))
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{folder}/model.safetensors.index.json has no weight_map")
        shards = sorted(set(map(str, shards.values())))
        for shard in shards:
            if os.path.basename(shard) != shard:
                raise UserError(f"{folder}/model.safetensors.index.json points outside its folder: {shard}")
            if shard not in names:
                raise UserError(f"{folder} lacks the shard {shard} that its index names")
        return shards
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        raise UserError(
            f"{folder} has its weights in pickles, which run code when opened; convert them to safetensors first "
            "(transformers: from_pretrained, then save_pretrained)"
        )
    raise UserError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
