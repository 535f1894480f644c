"""Rows cut over devices (mesh axis `context`): the same values and gradients, and each device its part of the work."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.losses.lm import token_logprobs
from jaxlm.nn import attention
from jaxlm.nn.attention import Rule
from jaxlm.nn.transformer import abstract, apply, padded_vocab, specs
from jaxlm.run import hlo
from jaxlm.sharding import MeshConfig, cuts, make_mesh, mesh_here, sharding_for, tree_shardings
from tests.nn.tiny import FAMILIES, doubled, lively, rows

T = 512
PACKED = rows([[200, 300], [512], [31, 1, 400]], T)
QUARTERS = MeshConfig(fsdp=2, context=4)


@dataclasses.dataclass(frozen=True)
class Case:
    mesh: MeshConfig
    rule: Rule = Rule(0.5)
    block: int = 64
    rows: int = 2
    heads: int = 4
    key_heads: int = 2


CASES = {
    "window, softcap": Case(QUARTERS, Rule(0.5, softcap=2.0, window=100)),
    "blocks divide nothing, nor rows": Case(QUARTERS, block=48, rows=3),
    "heads cut as well": Case(MeshConfig(fsdp=1, tensor=2, context=4), Rule(0.5, window=150), block=128),
    "fewer key heads than devices": Case(MeshConfig(fsdp=1, tensor=4, context=2), block=512),
    "heads not to be cut": Case(MeshConfig(fsdp=1, tensor=2, context=4), heads=3, key_heads=1),
}


def placed(mesh, x, *axes):
    return jax.device_put(x, sharding_for(mesh, axes, x.shape))


def inputs(case: Case):
    rng = np.random.default_rng(0)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    return [jnp.asarray(rng.normal(size=(case.rows, T, n, 8))) for n in heads]


def attended(f, rule, q, k, v, weight, *tokens):
    """(output, its gradients), outside of padding."""

    def scored(q, k, v):
        out = jnp.where(tokens[1][:, :, None, None] > 0, f(q, k, v, tokens, tokens, rule), 0)
        return jnp.sum(out * weight), out

    grads, out = jax.grad(scored, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


@functools.cache
def compiled_attention(case: Case):
    """The program on the mesh, in float64, and its arguments."""
    mesh, f = make_mesh(case.mesh), functools.partial(attention.blockwise, block=case.block)
    with jax.set_mesh(mesh):
        cut = ("heads", "kv_heads", "kv_heads", "heads")
        args = [placed(mesh, x, "batch", "length", n, None) for x, n in zip(inputs(case), cut)]
        args += [placed(mesh, x[: case.rows], "batch") for x in PACKED[1:]]
        return jax.jit(functools.partial(attended, f, case.rule)).lower(*args).compile(), args


@pytest.mark.parametrize("name", CASES)
def test_attention_has_the_values_and_gradients_of_whole_rows(name):
    case = CASES[name]
    with doubled():
        plain = jax.jit(functools.partial(attended, attention.plain, case.rule))
        wants = plain(*inputs(case), *(x[: case.rows] for x in PACKED[1:]))
        program, args = compiled_attention(case)
        for got, want in zip(program(*args), wants, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def dots(text: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(shape of the result, turns of the loops around it) of a program's matrix products on one device."""
    return [
        (tuple(int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n), loops)
        for shape, loops in hlo.instructions(text, "dot")
    ]


def test_attention_walks_its_own_queries_and_gathers_keys_and_values_alone():
    case = CASES["window, softcap"]
    with doubled():
        text = compiled_attention(case)[0].as_text()
    found = dots(text)
    assert len(found) >= 7  # 2 in the forward pass, 5 in the backward pass
    assert {loops[0] for _, loops in found} == {T // 4 // case.block}
    received = {}
    for c in hlo.collectives(text, 8):
        assert c.group == (0, 1, 2, 3) and c.loops == ()
        received[c.op] = received.get(c.op, 0) + c.bytes
    keys = 2 * (T * case.key_heads * 8 * 8) * 3 / 4  # of one row, a device's share being there already
    assert received.pop("all-gather") in (keys, 2 * keys)  # what both passes gather may be one, with nothing between
    assert received == {"reduce-scatter": keys}


def test_unordered_keys_are_read_where_they_are():
    """As in a prefill of several tokens at once, whose keys come out of a cache that every device has."""
    case, rule = Case(QUARTERS), Rule(0.5, window=100, ordered=False)
    order = np.random.default_rng(0).permutation(T)
    with doubled():
        q, k, v, _ = inputs(case)
        positions, segments = (jnp.asarray(x[:2]) for x in PACKED[1:])
        args = (q, k[:, order], v[:, order], positions, segments, positions[:, order], segments[:, order])

        def f(implementation, q, k, v, *tokens):
            return attention.attend(q, k, v, tokens[:2], tokens[2:], rule, implementation)

        want = jax.jit(functools.partial(f, "plain"))(*args)
        with jax.set_mesh(make_mesh(QUARTERS)):
            np.testing.assert_allclose(jax.jit(functools.partial(f, "blockwise"))(*args), want, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("mesh", [QUARTERS, MeshConfig(fsdp=1, tensor=2, context=4)], ids=["fsdp", "tensor"])
def test_chunks_of_the_loss_are_cut_over_devices(mesh):
    """Whole rows give the same, and of the logits no device makes more than its part, nor gathers what they are of."""
    cfg, mesh, chunk = FAMILIES["gemma2"], make_mesh(mesh), 160  # 40 a device: 128 is no multiple of it
    with doubled():
        rng = np.random.default_rng(0)
        params = {"backbone": {"embed": lively(cfg)["backbone"]["embed"]}}
        hidden = jnp.asarray(rng.normal(size=(2, T, cfg.width)))
        temperature = jnp.asarray(rng.uniform(0.5, 2, (2, T)))

        def outcome(params, hidden, temperature, targets):
            def loss(params, hidden):
                outs = token_logprobs(cfg, params, hidden, targets, chunk, temperature, entropy=True)
                return sum(jnp.sum(jnp.sin(x)) for x in outs), outs

            return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, hidden)

        want = jax.jit(outcome)(params, hidden, temperature, PACKED[0][:2])
        with jax.set_mesh(mesh):
            table = placed(mesh, params["backbone"]["embed"]["tokens"], "vocab", "embed")
            columns = [placed(mesh, x, "batch", "length") for x in (hidden, temperature, PACKED[0][:2])]
            args = ({"backbone": {"embed": {"tokens": table}}}, *columns)
            program = jax.jit(outcome).lower(*args).compile()
        for a, b in zip(jax.tree.leaves(program(*args)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    text = program.as_text()
    vocab = padded_vocab(cfg) // mesh.shape["tensor"]
    at_once = 40 * 2 // mesh.shape["fsdp"]  # places of a chunk on a device
    logits = [(s, loops) for s, loops in dots(text) if s[-1] == vocab and math.prod(s[:-1]) == at_once]
    assert [loops for _, loops in logits] == [(4,), (4,)]  # there, and again on the way back
    assert all(math.prod(s) < T * cfg.width / 4 for s, _ in dots(text) if s not in dict(logits))
    assert max(c.bytes for c in hlo.collectives(text, 8)) <= 2 * padded_vocab(cfg) * cfg.width * 8 < T * cfg.width * 8


# -------------------------------------------------------------------------------------------------- the whole model
def test_a_model_with_short_convolutions_and_windows_is_the_same_on_packed_rows():
    """Through `auto`, which takes blocks at this length; and nothing as large as a row's activations is sent."""
    cfg = dataclasses.replace(FAMILIES["canon"], layers=1, pattern=("window",), kv_heads=1)
    mesh = make_mesh(QUARTERS)

    def outcome(params, tokens, positions, segments):
        def loss(params):
            hidden, _, _ = apply(cfg, params, tokens, positions, segments)
            logprobs, _ = token_logprobs(cfg, params, hidden, jnp.roll(tokens, -1, 1), 128)
            return jnp.sum(jnp.where(segments > 0, logprobs, 0))

        return jax.value_and_grad(loss)(params)

    with doubled():
        params, row = lively(cfg), [x[:2] for x in PACKED]
        want = jax.jit(outcome)(params, *row)
        with jax.set_mesh(mesh):
            args = (jax.device_put(params, tree_shardings(mesh, specs(cfg), abstract(cfg))),)
            args += tuple(placed(mesh, x, "batch") for x in row)
            program = jax.jit(outcome).lower(*args).compile()
        for a, b in zip(jax.tree.leaves(program(*args)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    sent = {op: [shape for shape, _ in hlo.instructions(program.as_text(), op)] for op in hlo.OPS}
    assert sent["all-gather"] and sent["collective-permute"]
    arrays = [dims for shapes in sent.values() for shape in shapes for dims in re.findall(r"\[([\d,]+)\]", shape)]
    assert max(math.prod(int(n) for n in dims.split(",")) for dims in arrays) < T * cfg.width / 2


# ------------------------------------------------------------------------------------------------------- the choice
def test_choice_on_a_mesh(monkeypatch):
    class Client:
        platform_version = "PJRT cuda 13"

    class Device:
        platform, compute_capability, client = "gpu", "9.0", Client()

    def shaped(batch, length, heads=8):
        return jax.ShapeDtypeStruct((batch, length, heads, 64), jnp.bfloat16)

    whole, quarters, eighths, heads = (
        make_mesh(m) for m in (MeshConfig(), QUARTERS, MeshConfig(tensor=8), MeshConfig(tensor=4))
    )
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    with jax.set_mesh(whole):
        assert attention.choose(shaped(8, 8192), shaped(8, 8192), Rule(1.0)) == "plain"  # 2 GiB of scores a device
        # Of one row, which cannot be cut, every device has as much as there is in all.
        assert attention.choose(shaped(1, 16384), shaped(1, 16384), Rule(1.0)) == "blockwise"
    with jax.set_mesh(quarters):
        assert attention.choose(shaped(1, 16384), shaped(1, 16384), Rule(1.0)) == "plain"
    monkeypatch.setattr(jax, "devices", lambda *a: [Device()])
    q = shaped(8, 8192)
    for mesh in (whole, eighths):
        with jax.set_mesh(mesh):
            assert attention.choose(q, q, Rule(1.0)) == "cudnn"
    with jax.set_mesh(quarters):
        assert attention.choose(q, q, Rule(1.0)) == "plain"
        with pytest.raises(UserError, match=r"mesh\.context cuts them into 4"):
            attention.choose(q, q, Rule(1.0), "cudnn")
    with jax.set_mesh(heads):
        assert "2 key heads" in attention.cudnn_refuses(q, shaped(8, 8192, heads=2), Rule(1.0))


def test_an_array_is_cut_by_the_axes_that_divide_it():
    assert mesh_here().empty and cuts(("batch", "length")) == 1
    with jax.set_mesh(make_mesh(QUARTERS)):
        assert cuts(("batch", "length")) == 8
        assert cuts(("batch", "length", None), (3, 512, 5)) == 4
        assert cuts(("length",), (6,)) == cuts(("embed",), (3,)) == 1
