"""Named ablations. Each applies to any experiment that has the paths it touches."""

from dataclasses import replace

from jaxlm.config import UserError, edit, override
from jaxlm.data.tokenizer import SentencePiece
from jaxlm.nn.lora import LoRA
from jaxlm.nn.transformer import FanInInit, LayerNorm, ModelConfig, RMSNorm, Rope, flops_per_token
from jaxlm.optim.optimizers import AdamW, Muon
from jaxlm.optim.schedules import Linear
from jaxlm.run.experiment import Experiment
from jaxlm.sharding import MeshConfig


def _own_model(e: Experiment) -> ModelConfig:
    if e.model is None:
        raise UserError("this edit changes a model, which the definition leaves to its parent")
    return e.model


@edit
def no_rope(e: Experiment) -> Experiment:
    """No positions at all: causal attention alone must tell the order."""
    return override(e, {"model.positions": None, "model.window_positions": None})


@edit
def layernorm(e: Experiment) -> Experiment:
    """LayerNorm with bias in place of the model's norm."""
    return override(e, {"model.norm": LayerNorm()})


@edit
def rmsnorm(e: Experiment) -> Experiment:
    """RMSNorm in place of the model's norm."""
    return override(e, {"model.norm": RMSNorm()})


@edit
def rope(e: Experiment) -> Experiment:
    """Rotary positions in place of the model's."""
    return override(e, {"model.positions": Rope()})


@edit
def qk_norm(e: Experiment) -> Experiment:
    """Queries and keys normalized, head by head."""
    return override(e, {"model.qk_norm": True})


@edit
def relu_squared(e: Experiment) -> Experiment:
    """Squared ReLU in the MLP (arXiv:2109.08668)."""
    return override(e, {"model.activation": "relu_squared"})


@edit
def fan_in_init(e: Experiment) -> Experiment:
    """Kernels start with std 1 / sqrt(fan-in): at small widths GPT-2's 0.02 starts far too low."""
    return override(e, {"model.init": FanInInit()})


@edit
def untied(e: Experiment) -> Experiment:
    """An output kernel of its own."""
    return override(e, {"model.tied": False})


@edit
def short_conv(e: Experiment) -> Experiment:
    """A causal depthwise convolution of 4 taps added to each sublayer's input."""
    return override(e, {"model.short_conv": 4})


@edit
def fsdp(e: Experiment) -> Experiment:
    """Parameters, gradients and optimizer state spread over all devices, which also share the batch (ZeRO-3)."""
    return override(e, {"mesh": MeshConfig()})


@edit
def fsdp_tensor(e: Experiment) -> Experiment:
    """The same, and every layer's heads and hidden width cut over 8 neighboring devices (arXiv:1909.08053)."""
    return override(e, {"mesh": MeshConfig(tensor=8)})


@edit
def context(e: Experiment) -> Experiment:
    """The same as fsdp, and every row's tokens cut over 4 neighboring devices, for long contexts."""
    return override(e, {"mesh": MeshConfig(context=4)})


@edit
def high_lr_to_zero(e: Experiment) -> Experiment:
    """Four times the learning rate, and a straight line down to zero at the last step (arXiv:2502.15938)."""
    schedule = Linear(warmup=e.optimizer.schedule.warmup)
    return override(e, {"optimizer.lr": 4 * e.optimizer.lr, "optimizer.schedule": schedule})


@edit
def lora(e: Experiment) -> Experiment:
    """Adapters of rank 16 on every projection, trained in the model's place (arXiv:2106.09685): set a parent.

    They want about ten times the learning rate that Adam has for whole kernels, and get it.
    """
    faster = {"optimizer.lr": 10 * e.optimizer.lr} if isinstance(e.optimizer, AdamW) else {}
    return override(e, {"lora": LoRA()} | faster)


@edit
def muon(e: Experiment) -> Experiment:
    """Muon for the blocks' matrices; embeddings, head, norms and biases stay with AdamW as it was."""
    rest = e.optimizer if isinstance(e.optimizer, AdamW) else AdamW(schedule=e.optimizer.schedule)
    return override(e, {"optimizer": Muon(lr=0.02, schedule=rest.schedule, rest=rest)})


@edit
def swiglu_to_gelu(e: Experiment) -> Experiment:
    """A plain GELU MLP, 4 times as wide as the model, in place of the gated one: the same matmul work."""
    return override(e, {"model.gated": False, "model.activation": "gelu", "model.hidden": 4 * _own_model(e).width})


@edit
def half_depth_double_width(e: Experiment) -> Experiment:
    """Half the layers, twice the width, heads and hidden width; steps shrink so that training FLOPs stay the same."""
    m = _own_model(e)
    wide = replace(
        m,
        layers=max(1, m.layers // 2),
        width=2 * m.width,
        heads=2 * m.heads,
        kv_heads=None if m.kv_heads is None else 2 * m.kv_heads,
        hidden=None if m.hidden is None else 2 * m.hidden,
    )

    def cost(model):
        # The tokenizer gives the vocabulary only later; characters and bytes have a few hundred at most.
        size = e.data.tokenizer.vocab_size if isinstance(e.data.tokenizer, SentencePiece) else 256
        return flops_per_token(replace(model, vocab_size=model.vocab_size or size), e.data.context)["train"]

    steps = max(1, round(e.train.steps * cost(m) / cost(wide)))
    return override(replace(e, model=wide), {"train.steps": steps})
