"""Parameters and floating point operations of a model, counted from its definition."""

from jaxlm.nn.definition import ModelConfig, padded_vocab
from jaxlm.nn.layers import LayerNorm
from jaxlm.nn.rope import LearnedPositions


def _kernels(cfg: ModelConfig) -> int:
    """Parameters of one layer's kernels."""
    attention = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.key_heads)
    return attention + cfg.width * cfg.hidden_width * (3 if cfg.gated else 2)


def _filters(cfg: ModelConfig) -> int:
    """Parameters of one layer's short convolutions, each of which is multiplied once a token."""
    return 2 * (cfg.short_conv or 0) * cfg.width


def _small(cfg: ModelConfig) -> int:
    """Parameters of one layer's biases and norms."""
    norm = 2 if isinstance(cfg.norm, LayerNorm) and cfg.norm.bias else 1
    count = norm * cfg.width * (4 if cfg.norm_placement == "sandwich" else 2)
    count += _filters(cfg)
    if cfg.qk_norm:
        count += 2 * norm * cfg.head_dim
    if cfg.qkv_bias:
        count += cfg.head_dim * (cfg.heads + 2 * cfg.key_heads)
    if cfg.attention_out_bias:
        count += cfg.width
    if cfg.mlp_bias:
        count += cfg.width + cfg.hidden_width * (2 if cfg.gated else 1)
    return count


def parameter_count(cfg: ModelConfig) -> int:
    """Scalars in the parameter tree, padded vocabulary rows included."""
    norm = 2 if isinstance(cfg.norm, LayerNorm) and cfg.norm.bias else 1
    count = cfg.layers * (_kernels(cfg) + _small(cfg)) + padded_vocab(cfg) * cfg.width * (1 if cfg.tied else 2)
    if isinstance(cfg.positions, LearnedPositions):
        count += cfg.positions.length * cfg.width
    return count + (0 if cfg.norm_placement == "post" else norm * cfg.width)


def flops_per_token(cfg: ModelConfig, context: int, adapters: int | None = None) -> dict[str, float]:
    """Operations per token at rows of `context` tokens: {"forward", "train"}.

    The 6N + 12LDT convention (nanoGPT, PaLM's appendix B): N counts kernels that are multiplied (the output kernel,
    with its padded columns, and short convolutions yes; looked-up embeddings, biases and norms no), attention is
    counted as if not causal, with D = heads * head width; a window layer sees at most its window. Recomputation is not
    counted. `adapters`: the parameters of those that are trained in the model's place; its own kernels then pass
    gradients on and get none.
    """
    kernels = cfg.layers * (_kernels(cfg) + _filters(cfg)) + padded_vocab(cfg) * cfg.width
    seen = sum(min(context, cfg.window_of(cfg.kind(i)) or context) for i in range(cfg.layers))
    forward = 2.0 * kernels + 4.0 * cfg.heads * cfg.head_dim * seen
    if adapters is None:
        return {"forward": forward, "train": 3 * forward}
    return {"forward": forward + 2.0 * adapters, "train": 3 * (forward + 2.0 * adapters) - 2.0 * kernels}
