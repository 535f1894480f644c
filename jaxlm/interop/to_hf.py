"""jaxlm models as Hugging Face folders (config.json and model.safetensors): the inverse of hf.py and hf_config.py.

    config_to_hf(cfg, context) -> (family, config.json)          tensors(cfg, family, params) -> {name: array}

A definition is written in the spelling of the first family that gives it back when it is read; one that none gives back
is refused by the fields that the nearest family has otherwise. So the importer, which is held to the peer's logits, is
what export is held to.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jaxlm import config, tree
from jaxlm.config import UserError
from jaxlm.interop import hf
from jaxlm.interop.hf_config import ACTIVATIONS, ARCHITECTURES, config_from_hf
from jaxlm.nn.definition import ModelConfig
from jaxlm.nn.rope import LearnedPositions, LinearScaling, Llama3Scaling, Rope, YarnScaling

# The activation's name in config.json: the first that reads as ours, which for the tanh form is GPT-2's "gelu_new".
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
_MODEL_TYPES = {"gemma3": "gemma3_text"}
# What a definition says beside the function that the model is: how it starts, runs and is stored.
_NOT_THE_FUNCTION = ("dropout", "attention", "scan", "remat", "init", "precision", "vocab_multiple")


# ------------------------------------------------------------------------------------------------------ config.json
def config_to_hf(cfg: ModelConfig, context: int) -> tuple[str, dict]:
    """(family, config.json) of a model; `context` is what max_position_embeddings is to say of a rotary one.

    `UserError` when no family has an equal, naming the fields that the nearest has otherwise.
    """
    refusals = []
    for architecture, family in ARCHITECTURES.items():
        if architecture == "Gemma3ForConditionalGeneration":  # the text part goes by its own name
            continue
        try:
            found = _gpt2(cfg) if family == "gpt2" else _llama_like(family, cfg, context)
            found = {"architectures": [architecture], "model_type": _MODEL_TYPES.get(family, family)} | found
            differences = config.diff(_function(cfg), _function(config_from_hf(found, cfg.precision)))
        except UserError:  # contradicts itself: no model of this family has these sizes
            continue
        if not differences:
            return family, found
        refusals.append((len(differences), family, differences))
    _, family, differences = min(refusals)
    raise UserError(
        f"the model has no equal among Hugging Face's; the nearest, {family}, would differ (ours -> its): "
        + "; ".join(f"model.{line}" for line in differences if "unset" not in line)  # what a lacking part would hold
    )


def _function(cfg: ModelConfig) -> ModelConfig:
    """The definition with what follows from others written out, and without what makes no other function."""
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in _NOT_THE_FUNCTION}
    kinds = [cfg.kind(i) for i in range(cfg.layers)]
    period = next(p for p in range(1, cfg.layers + 1) if all(kinds[i] == kinds[i % p] for i in range(cfg.layers)))
    windowed, ropes = "window" in kinds, {kind: cfg.rope_of(kind) for kind in kinds}
    positions = cfg.positions if isinstance(cfg.positions, LearnedPositions) else ropes.get("full", ropes.get("window"))
    return dataclasses.replace(
        cfg,
        kv_heads=cfg.key_heads,
        head_width=cfg.head_dim,
        hidden=cfg.hidden_width,
        attention_scale=cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale,
        pattern=tuple(kinds[:period]),
        window=cfg.window if windowed else None,
        positions=positions,
        window_positions=ropes["window"] if windowed and ropes["window"] != positions else None,
        **defaults,
    )


def _gpt2(cfg: ModelConfig) -> dict:
    return {
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.positions.length if isinstance(cfg.positions, LearnedPositions) else 1,
        "n_embd": cfg.width,
        "n_layer": cfg.layers,
        "n_head": cfg.heads,
        "n_inner": cfg.hidden_width,
        "activation_function": _ACTIVATION_NAMES[cfg.activation],
        "layer_norm_epsilon": cfg.norm.eps,
        "scale_attn_weights": cfg.attention_scale != 1.0,
        "tie_word_embeddings": cfg.tied,
    }


def _llama_like(family: str, cfg: ModelConfig, context: int) -> dict:
    same = _function(cfg)
    gemma, kinds = family.startswith("gemma"), [cfg.kind(i) for i in range(cfg.layers)]
    names = {"full": "full_attention", "window": "sliding_attention"}
    activation = "gelu_pytorch_tanh" if cfg.activation == "gelu_tanh" else _ACTIVATION_NAMES[cfg.activation]
    found = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": same.hidden,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": same.kv_heads,
        "head_dim": same.head_width,
        "rms_norm_eps": cfg.norm.eps,
        "max_position_embeddings": context,
        "tie_word_embeddings": cfg.tied,
        "hidden_activation" if gemma else "hidden_act": activation,
    } | _positions(family, same, context)
    if family != "llama":
        found["sliding_window"] = same.window
    if family.startswith("qwen"):
        found |= {"use_sliding_window": same.window is not None, "max_window_layers": cfg.layers}
    if family not in ("llama", "mistral"):
        found["layer_types"] = [names[kind] for kind in kinds]
    if family == "llama":
        found["mlp_bias"] = cfg.mlp_bias
    if family in ("llama", "qwen3") or gemma:
        found["attention_bias"] = cfg.attention_out_bias
    if gemma:
        scalar = same.attention_scale**-2.0
        found |= {
            "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
            "attn_logit_softcapping": cfg.attention_softcap,
            "final_logit_softcapping": cfg.logit_softcap,
        }
    return found


def _positions(family: str, cfg: ModelConfig, context: int) -> dict:
    """Rotary positions in the spelling of transformers 4, which transformers 5 reads too."""
    rope = cfg.positions if isinstance(cfg.positions, Rope) else Rope()
    found = {"rope_theta": rope.theta, "rope_scaling": _scaling(rope)}
    if family == "gemma3":
        found["rope_local_base_freq"] = (cfg.window_positions or rope).theta
    return found


def _scaling(rope: Rope) -> dict | None:
    match rope.scaling:
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as s:
            return {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context,
            }
        case YarnScaling() as s:
            found = {
                "rope_type": "yarn",
                "factor": s.factor,
                "beta_fast": s.beta_fast,
                "beta_slow": s.beta_slow,
                "truncate": s.truncate,
                "original_max_position_embeddings": s.original_context,
            }
            return found | ({} if s.attention_factor is None else {"attention_factor": s.attention_factor})
    return None


# ------------------------------------------------------------------------------------------------------ the tensors
def tensors(cfg: ModelConfig, family: str, params: Mapping) -> dict[str, np.ndarray]:
    """Every tensor by its Hugging Face name, in the parameters' dtype; padded vocabulary rows are left out."""
    places, parts = hf.places(cfg, family), {}
    for name, x in tree.named_leaves(params):
        x = np.asarray(x)
        for i, place in enumerate(places[name]):
            stored = _stored(cfg, name, x[i] if name.startswith("backbone/blocks/") else x, place)
            parts.setdefault(place.name, {})[place.part] = stored
    prefix = "transformer." if family == "gpt2" else "model."
    return {
        name if name == "lm_head.weight" else prefix + name: np.ascontiguousarray(
            np.concatenate([found[i] for i in sorted(found)], axis=-1)
        )
        for name, found in parts.items()
    }


def _stored(cfg: ModelConfig, name: str, x: np.ndarray, place: hf.Place) -> np.ndarray:
    """One layer's parameter as the checkpoint lays it out."""
    if place.layout == "vocab":
        return x[: cfg.vocab_size]
    if place.layout == "vocab_T":
        return x[:, : cfg.vocab_size].T
    shape = hf.stored_shape(cfg, name, x.shape, dataclasses.replace(place, parts=1))
    return x.reshape(shape[::-1]).T if place.layout == "linear" else x.reshape(shape)
