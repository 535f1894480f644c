"""One decoder layer: attention and MLP with their norms, as Flax Linen modules.

Legend: B batch, T length, S key length, D model width, H query heads, K key/value heads, C head width.
"""

import dataclasses

import jax
from flax import linen as nn

from jaxlm.nn import attention
from jaxlm.nn import cache as kv
from jaxlm.nn.definition import ModelConfig
from jaxlm.nn.layers import Linear, Mlp, Norm, ShortConv, dropout
from jaxlm.nn.rope import rotate
from jaxlm.sharding import constrain


class Attention(nn.Module):
    """Self-attention of one layer; `kind` is its entry in the pattern."""

    cfg: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, segments_BT, angles, cache=None):
        """(output [B, T, D], the layer's new cache). `angles` is (cosine, sine), or None without rotary positions."""
        cfg = self.cfg
        q_BTHC = self.project("q", x_BTD, cfg.heads, "heads")
        k_BTKC = self.project("k", x_BTD, cfg.key_heads, "kv_heads")
        v_BTKC = self.project("v", x_BTD, cfg.key_heads, "kv_heads")
        if cfg.qk_norm:
            q_BTHC = Norm(cfg, "head_width", name="q_norm")(q_BTHC)
            k_BTKC = Norm(cfg, "head_width", name="k_norm")(k_BTKC)
        if angles is not None:
            q_BTHC, k_BTKC = rotate(q_BTHC, *angles), rotate(k_BTKC, *angles)
        q_BTHC = constrain(q_BTHC, ("batch", "length", "heads", None))

        rule = attention.Rule(
            scale=cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale,
            softcap=cfg.attention_softcap,
            window=cfg.window_of(self.kind),
        )
        new = (positions_BT, segments_BT)
        keys, k, v = new, k_BTKC, v_BTKC
        if cache is not None:
            rule = dataclasses.replace(rule, ordered=False)
            entries = kv.entries(cache, k_BTKC, v_BTKC, *new)
            written = kv.write(cache, entries)
            keys, k, v = self.cached_keys(cache, written, entries)
            cache = written
        if self.is_mutable_collection("intermediates"):
            mask = attention.mask_BTS(new, keys, rule)
            self.sow("intermediates", "weights", attention.weights_BHTS(q_BTHC, k, mask, rule))
        out_BTHC = attention.attend(q_BTHC, k, v, new, keys, rule, cfg.attention)
        out = Linear(
            cfg, (cfg.heads, cfg.head_dim), (cfg.width,), ("heads", "head_width", "embed"),
            cfg.attention_out_bias, residual=True, name="out",
        )  # fmt: skip
        return out(out_BTHC), cache

    def cached_keys(self, old, written, new):
        """What the queries may attend: the cache with the new tokens in it.

        Several tokens at once may overwrite, in a ring, what the first of them still see: there the old entries and
        the new tokens stand side by side.
        """
        one_token = new["key_positions"].shape[1] == 1
        entries = written if one_token or self.cfg.window_of(self.kind) is None else kv.beside(old, new)
        k_BSKC, v_BSKC = (jax.tree.map(lambda x: x.swapaxes(1, 2), entries[n]) for n in ("k", "v"))
        return (entries["key_positions"], entries["key_segments"]), k_BSKC, v_BSKC

    def project(self, name, x_BTD, heads, axis):
        cfg, axes = self.cfg, ("embed", axis, "head_width")
        return Linear(cfg, (cfg.width,), (heads, cfg.head_dim), axes, cfg.qkv_bias, name=name)(x_BTD)


class Block(nn.Module):
    """A decoder layer with the norms where `cfg.norm_placement` puts them."""

    cfg: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, segments_BT, angles, cache=None, key=None):
        """(x [B, T, D], the layer's new cache). `key` is for dropout."""
        cfg = self.cfg

        def shift(name, x):
            nonlocal cache
            if cfg.short_conv is None:
                return x
            recent = None if cache is None else cache[f"recent_{name}"]
            x, recent = ShortConv(cfg, name=f"{name}_conv")(x, positions_BT, segments_BT, recent)
            if cache is not None:
                cache = cache | {f"recent_{name}": recent}
            return x

        def attend(x):
            nonlocal cache
            x = shift("attention", x)
            out, cache = Attention(cfg, self.kind, name="attention")(x, positions_BT, segments_BT, angles, cache)
            return out

        def mlp(x):
            return Mlp(cfg, name="mlp")(shift("mlp", x))

        x_BTD = self.sublayer("attention", attend, x_BTD, None if key is None else jax.random.fold_in(key, 0))
        x_BTD = self.sublayer("mlp", mlp, x_BTD, None if key is None else jax.random.fold_in(key, 1))
        return constrain(x_BTD, ("batch", "length", None)), cache

    def sublayer(self, name, f, x, key):
        cfg = self.cfg

        def norm(suffix, x):
            return Norm(cfg, "embed", name=f"{name}_{suffix}")(x)

        if cfg.norm_placement == "post":
            return norm("norm", x + dropout(f(x), cfg.dropout, key))
        y = f(norm("norm", x))
        if cfg.norm_placement == "sandwich":
            y = norm("post_norm", y)
        return x + dropout(y, cfg.dropout, key)
