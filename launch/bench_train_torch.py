"""The other side of the training benchmark: PyTorch's step on the same weights, written as its users write it.

Arms, in each dtype: `transformers`' model; the same network as a plain script, its weights read as they are and its
attention PyTorch's own (scaled_dot_product_attention); and that script under torch.compile. All have fused AdamW, and
compute in bfloat16 by autocast. The best of them counts. torch is imported here and in `bench_torch` alone.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.config import UserError
from jaxlm.nn.definition import ModelConfig
from jaxlm.run.experiment import Experiment
from launch.bench_torch import at_most, device, line, model, modules, peak, peak_bytes, wait
from launch.bench_train import Arm

__all__ = ["arms", "optimizer_of", "peak", "script"]
NAMES = {"model": "torch, transformers", "script": "torch, script", "compiled": "torch, script, compiled"}


def script(cfg: ModelConfig, made) -> Callable:
    """GPT-2 as a function, ids [B, T] -> logits [B, T, V], of the parameters that the model of transformers holds."""
    torch, _ = modules()
    functional, p = torch.nn.functional, dict(made.named_parameters())

    def norm(x, name):
        name = f"transformer.{name}"
        return functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], cfg.norm.eps)

    def linear(x, name):  # kernels lie as [inputs, outputs] there
        name = f"transformer.{name}"
        return torch.addmm(p[f"{name}.bias"], x.flatten(0, 1), p[f"{name}.weight"]).unflatten(0, x.shape[:2])

    def forward(tokens):
        x = functional.embedding(tokens, p["transformer.wte.weight"])
        x = x + p["transformer.wpe.weight"][: tokens.shape[1]]
        for i in range(cfg.layers):
            heads = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (cfg.heads, cfg.head_dim)).transpose(1, 2) for y in heads)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(y.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
            y = functional.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
            x = x + linear(y, f"h.{i}.mlp.c_proj")
        return functional.linear(norm(x, "ln_f"), p["transformer.wte.weight"])

    return forward


def optimizer_of(e: Experiment, made):
    """Fused AdamW with the run's settings; what has one dim does not decay, as in ours."""
    torch, _ = modules()
    o, both = e.optimizer, ([], [])
    for p in made.parameters():
        both[p.ndim < 2].append(p)
    groups = [{"params": both[0], "weight_decay": o.weight_decay}, {"params": both[1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, fused=True)


def arms(
    e: Experiment,
    params,
    rows: Sequence[np.ndarray],
    dtypes: Sequence[str],
    compile_seconds: int,
    say: Callable[[str], None],
) -> dict[tuple[str, str], Arm]:
    """Arms by (dtype, name). params: the initial ones; rows: the batches, int32 [B, T + 1].

    All train one set of weights. What torch.compile cannot do, or not within `compile_seconds`, is said and left out.
    """
    torch, _ = modules()
    torch.set_float32_matmul_precision("high")
    # GPT-2's GELU from one kernel: the one that its name stands for is written out, and slow.
    made = model(e.model, params, "float32", e.data.context, activation_function="gelu_pytorch_tanh")
    if made.config.model_type != "gpt2":
        raise UserError(
            f"--against=torch trains GPT-2's shape; with these settings the model is a {made.config.model_type}"
        )
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = e.model.dropout
    made.train()
    initial = {name: p.detach().clone() for name, p in made.named_parameters()}
    batches = [torch.from_numpy(tokens.astype(np.int64)).to(device()) for tokens in rows]
    optimizer, held = optimizer_of(e, made), {"done": 0}

    def restart():
        held["done"] = 0
        optimizer.state.clear()
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.copy_(initial[name])

    def step(loss_of: Callable, dtype: str):
        tokens = batches[held["done"] % len(batches)]
        held["done"] += 1
        low = torch.autocast(device(), torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
        with low:
            loss = loss_of(tokens)
        loss.backward()
        if e.train.clip is not None:
            torch.nn.utils.clip_grad_norm_(made.parameters(), e.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def steps(loss_of: Callable, dtype: str, count: int) -> list[float]:
        losses = [step(loss_of, dtype) for _ in range(count)]
        wait()
        return [float(x) for x in losses]

    def loss_with(logits: Callable) -> Callable:
        def loss_of(tokens):
            found = logits(tokens[:, :-1]).float()
            return torch.nn.functional.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten())

        return loss_of

    ways = {
        "model": loss_with(lambda tokens: made(input_ids=tokens, use_cache=False).logits),
        "script": loss_with(script(e.model, made)),
    }
    kept = 3 * sum(p.numel() * p.element_size() for p in made.parameters())  # with two moments each
    found: dict[tuple[str, str], Arm] = {}

    def add(dtype: str, way: str, loss_of: Callable) -> None:
        memory = functools.partial(peak_bytes, functools.partial(step, loss_of, dtype), kept)
        found[dtype, NAMES[way]] = Arm(restart, functools.partial(steps, loss_of, dtype), memory)

    for dtype in dtypes:
        for way, loss_of in ways.items():
            add(dtype, way, loss_of)
        if not compile_seconds:
            continue
        compiled, began = torch.compile(ways["script"], dynamic=False), time.perf_counter()
        try:
            with at_most(compile_seconds):
                steps(compiled, dtype, 2)
            add(dtype, "compiled", compiled)
            say(f"torch.compile, {dtype}: {time.perf_counter() - began:.0f} s")
        except TimeoutError:
            say(f"without torch.compile in {dtype}: not done within --compile_seconds={compile_seconds}")
        except Exception as error:  # whatever the compiler lacks on this machine
            say(f"without torch.compile in {dtype}: {line(error)}")
    return found
