"""The ladder of model sizes, from a laptop to a pod, all of one family: RMSNorm, rotary positions, gated SiLU.

The names count parameters at the vocabulary that the rung is meant for; up to 1.3 B the shapes are GPT-2's and GPT-3's
(arXiv:2005.14165, table 2.1), 0.6 B is Qwen3's (arXiv:2505.09388), the largest three are Llama's (arXiv:2302.13971,
arXiv:2407.21783).
"""

from dataclasses import replace

from jaxlm.nn.transformer import FanInInit, LayerNorm, LearnedPositions, ModelConfig, Precision, Rope

BF16 = Precision(compute="bfloat16")

# Few layers are unrolled: they compile as fast as a scan over them, and a step takes less.
SIZES = {
    "1m": ModelConfig(layers=4, width=128, heads=4, tied=True, scan=False),
    "10m": ModelConfig(layers=6, width=384, heads=6, tied=True, scan=False),
    "30m": ModelConfig(layers=8, width=512, heads=8, tied=True, scan=False),
    "124m": ModelConfig(layers=12, width=768, heads=12, tied=True, precision=BF16),
    "350m": ModelConfig(layers=24, width=1024, heads=16, tied=True, precision=BF16),
    "0.6b": ModelConfig(
        layers=28,
        width=1024,
        heads=16,
        kv_heads=8,
        head_width=128,
        hidden=3072,
        positions=Rope(theta=1e6),
        qk_norm=True,
        tied=True,
        precision=BF16,
        remat="dots",
    ),
    "1.3b": ModelConfig(layers=24, width=2048, heads=16, tied=True, precision=BF16, remat="dots"),
    "7b": ModelConfig(layers=32, width=4096, heads=32, hidden=11008, precision=BF16, remat="full"),
    "8b": ModelConfig(
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        hidden=14336,
        positions=Rope(theta=5e5),
        precision=BF16,
        remat="full",
    ),
    "70b": ModelConfig(
        layers=80,
        width=8192,
        heads=64,
        kv_heads=8,
        hidden=28672,
        positions=Rope(theta=5e5),
        precision=BF16,
        remat="full",
    ),
}
SIZES = {name: replace(m, init=FanInInit()) if name in ("7b", "8b", "70b") else m for name, m in SIZES.items()}


def gpt2(model: ModelConfig, context: int, bias: bool = True) -> ModelConfig:
    """The same shape as GPT-2 has it: LayerNorm, learned positions, a plain GELU MLP four times as wide, tied."""
    return replace(
        model,
        norm=LayerNorm(bias=bias),
        positions=LearnedPositions(context),
        activation="gelu_tanh",
        gated=False,
        hidden=None,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        tied=True,
    )
