"""The model's definition: every knob, and the sizes that follow from them."""

import dataclasses
import typing
from typing import Literal

from jaxlm.config import UserError
from jaxlm.nn.layers import Activation, FanInInit, GPT2Init, LayerNorm, RMSNorm
from jaxlm.nn.rope import LearnedPositions, Rope

CacheDtype = Literal["float32", "bfloat16", "int8"]
CACHE_DTYPES: tuple[str, ...] = typing.get_args(CacheDtype)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes by role, as jax names them (float32, bfloat16, float64 with x64 enabled).

    Norms, rotary positions, softmax, logits and log-probabilities are in float32 (or wider) whatever stands here.
    """

    params: str = "float32"  # parameters as stored and updated
    compute: str = "float32"  # activations and matmul inputs
    accumulation: str = "float32"  # gradients summed over microbatches
    moments: str = "float32"  # optimizer state
    cache: CacheDtype | None = None  # keys and values kept while decoding; unset: as compute; int8: nn/quantized.py


@dataclasses.dataclass(frozen=True)
class MoE:
    """Mixture of experts in place of the MLP. The seat only: a model with it cannot be initialized yet."""

    experts: int
    experts_per_token: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer.

    `norm_placement`: "pre" x + f(norm(x)); "post" norm(x + f(x)), with no final norm (the original transformer);
    "sandwich" x + norm(f(norm(x))) (Gemma 2 and 3).
    """

    vocab_size: int | None = None  # bound from the tokenizer
    vocab_multiple: int = 64  # embedding rows are padded up to a multiple of this
    layers: int
    width: int
    heads: int
    kv_heads: int | None = None  # unset: as heads; 1 is multi-query, between is grouped-query
    head_width: int | None = None  # unset: width / heads
    hidden: int | None = None  # unset: 4 * width, or gated 8/3 * width rounded up to a multiple of 64
    positions: Rope | LearnedPositions | None = Rope()
    window_positions: Rope | None = None  # rotary positions of window layers where they differ
    norm: RMSNorm | LayerNorm = RMSNorm()
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    qk_norm: bool = False  # the same kind of norm over each head's query and key, before rotation
    pattern: tuple[Literal["full", "window"], ...] = ("full",)  # kinds of attention, repeated over the layers
    window: int | None = None  # a window layer attends keys with position > query position - window
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    logit_softcap: float | None = None  # the same on the final logits
    attention_scale: float | None = None  # unset: head_width ** -0.5
    activation: Activation = "silu"
    gated: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False  # the output kernel is the token embedding
    embed_scale: float | None = None  # factor on token embeddings (Gemma: sqrt(width))
    init: GPT2Init | FanInInit = GPT2Init()
    moe: MoE | None = None
    short_conv: int | None = None  # taps of a causal depthwise convolution added to each sublayer's input
    dropout: float = 0.0  # on the embedding and on what each sublayer adds, when `apply` gets a key
    attention: Literal["auto", "plain", "blockwise", "cudnn"] = "auto"  # auto: the best that the device supports
    scan: bool = True  # scan over layers (compiles fast) or unroll them; parameters are the same
    remat: Literal["none", "full", "dots"] = "none"  # kept for the backward pass: all, block inputs, matmul outputs
    precision: Precision = Precision()

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim(self) -> int:
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def hidden_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return -(-self.width * 8 // (3 * 64)) * 64 if self.gated else 4 * self.width

    @property
    def slots(self) -> tuple[str, ...]:
        """The pattern's period; slot i holds layers i, i + period, ..."""
        return self.pattern[: self.layers]

    def kind(self, layer: int) -> str:
        return self.pattern[layer % len(self.pattern)]

    def window_of(self, kind: str) -> int | None:
        return self.window if kind == "window" else None

    def rope_of(self, kind: str) -> Rope | None:
        if kind == "window" and self.window_positions is not None:
            return self.window_positions
        return self.positions if isinstance(self.positions, Rope) else None


def padded_vocab(cfg: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up to `vocab_multiple`."""
    if cfg.vocab_size is None:
        raise UserError("model.vocab_size is unset: bind it to the tokenizer's size")
    return -(-cfg.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple


def validate(cfg: ModelConfig) -> None:
    """Raises `UserError` for sizes and choices that contradict each other."""
    padded_vocab(cfg)
    for name in ("vocab_size", "vocab_multiple", "layers", "width", "heads", "key_heads", "head_dim", "hidden_width"):
        if getattr(cfg, name) < 1:
            raise UserError(f"model.{name} must be at least 1, got {getattr(cfg, name)}")
    if cfg.head_width is None and cfg.width % cfg.heads:
        raise UserError(f"model.width {cfg.width} is no multiple of model.heads {cfg.heads}; or set model.head_width")
    if cfg.heads % cfg.key_heads:
        raise UserError(f"model.heads {cfg.heads} is no multiple of model.kv_heads {cfg.kv_heads}")
    if not cfg.pattern:
        raise UserError('model.pattern is empty; ("full",) is the plain choice')
    if cfg.short_conv is not None and cfg.short_conv < 2:
        raise UserError(f"model.short_conv must be at least 2 taps, got {cfg.short_conv}; none leaves it out")
    if "window" in cfg.pattern and (cfg.window is None or cfg.window < 1):
        raise UserError(f"model.pattern has window layers: model.window must be at least 1, got {cfg.window}")
    if "window" not in cfg.pattern and (cfg.window is not None or cfg.window_positions is not None):
        raise UserError("model.window and model.window_positions need a window layer in model.pattern; unset them")
    if not 0 <= cfg.dropout < 1:
        raise UserError(f"model.dropout must be in [0, 1), got {cfg.dropout}")
    if cfg.moe is not None:
        asked = f"{cfg.moe.experts} experts, {cfg.moe.experts_per_token} per token"
        raise UserError(f"model.moe ({asked}): mixture of experts is not implemented; leave model.moe unset")
