"""The other side of the decoding benchmark: transformers' `generate` on the same weights, called as its users would.

torch and transformers are imported here alone, and only when they are asked for.
"""

import contextlib
import copy
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxlm.config import UserError
from jaxlm.data.parallel import cores
from jaxlm.interop import to_hf
from jaxlm.nn.definition import ModelConfig
from jaxlm.run.log import best_rate
from launch.bench_decode import Arm, Load, capacity


def modules():
    """(torch, transformers); `UserError` says how to install them."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise UserError(
            f"--against=torch needs torch and transformers ({e}): pip install torch transformers, or -e '.[bench]'"
        ) from None
    return torch, transformers


def device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def wait() -> None:
    torch, _ = modules()
    if device() == "cuda":
        torch.cuda.synchronize()


def peak(dtype: str) -> float:
    """FLOP/s of the best square matrix product, found as ours is."""
    torch, _ = modules()
    torch.set_float32_matmul_precision("high")  # as JAX: TF32 where the device has it

    def product(n: int) -> Callable[[], None]:
        a = torch.randn(n, n, device=device()).to(getattr(torch, dtype))

        def multiply():
            a @ a
            wait()

        return multiply

    return best_rate(product)


def peak_bytes(step: Callable, kept: int) -> int:
    """Memory that PyTorch has allocated at most during a step, the `kept` bytes that it begins with included."""
    torch, _ = modules()
    if device() == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        wait()
        return kept + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = [x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]
    return kept + int(max(np.cumsum(changes), default=0))


def generation_bytes(made, arm: Arm, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> int:
    """Memory at most of what an arm generates, the weights included."""
    kept = sum(p.numel() * p.element_size() for p in made.parameters())
    return peak_bytes(lambda: arm(prompts, limits), kept)


def model(cfg: ModelConfig, params, dtype: str, context: int, **changes):
    """The same model as a transformers one, on the device that JAX uses, with as many threads as this process may.

    changes: of its config, how it computes what it computes.
    """
    torch, transformers = modules()
    if device() == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "JAX runs on a GPU that this torch does not see: install its CUDA build, or JAX_PLATFORMS=cpu"
            )
        torch.set_float32_matmul_precision("high")  # as JAX: TF32 where the device has it
    torch.set_num_threads(cores())
    family, about = to_hf.config_to_hf(cfg, context)
    arrays = to_hf.tensors(cfg, family, jax.device_get(params))
    name, kind = about.pop("model_type"), getattr(torch, dtype)
    about |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0} | changes
    with torch.device(
        device()
    ):  # where it will run, at once in its dtype: 7 B parameters fill a host's memory otherwise
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(name, **about), dtype=kind
        )
    state = {name: torch.from_numpy(np.array(x, np.float32)).to(kind) for name, x in arrays.items()}
    missing, unexpected = made.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if cfg.tied else set()):
        raise UserError(f"transformers' {family} has other weights: missing {missing}, unexpected {unexpected}")
    made.generation_config.eos_token_id = None  # nothing ends early
    return made.eval()


def _generate(made, **settings) -> Arm:
    torch, _ = modules()

    def run(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        tokens, mask = np.zeros((2, len(prompts), width), np.int64)
        for row, on, prompt in zip(tokens, mask, prompts):  # padded at the left, as generate wants it
            row[width - len(prompt) :], on[width - len(prompt) :] = prompt, 1
        with torch.inference_mode():
            ids = made.generate(
                torch.from_numpy(tokens).to(made.device),
                attention_mask=torch.from_numpy(mask).to(made.device),
                do_sample=False,
                max_new_tokens=max(limits),
                pad_token_id=0,
                **settings,
            )
        return [row[:n] for row, n in zip(ids[:, width:].tolist(), limits, strict=True)]

    return run


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after so many seconds of what is done in the block."""

    def late(*_):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _continuous(made, load: Load, slots: int) -> Iterator[Arm]:
    """transformers' own continuous batching, as a server keeps it: started once, with `slots` requests at a time."""
    _, transformers = modules()
    pages = -(-capacity(load) // 256)
    how = transformers.ContinuousBatchingConfig(
        num_blocks=2 * slots * pages, max_batch_tokens=4 * load.prompt + slots, max_requests_per_batch=slots
    )
    settings = transformers.GenerationConfig(max_new_tokens=load.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # A copy: paged attention takes the place of the model's own.
    manager = copy.deepcopy(made).init_continuous_batching(settings, how)
    manager.start()

    def run(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        # The longest first, as our side takes them.
        order = sorted(range(len(limits)), key=lambda i: -limits[i])
        place = {manager.add_request(list(prompts[i]), max_new_tokens=limits[i]): i for i in order}
        done: list = [None] * len(limits)
        while place:
            found = manager.get_result(timeout=1)
            if found is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped")
            if found is not None and found.is_finished():
                done[place.pop(found.request_id)] = list(found.generated_tokens)
        return done

    try:
        yield run
    finally:
        manager.stop(block=True, timeout=60)


@contextlib.contextmanager
def continuous(made, load: Load, slots: int, say: Callable[[str], None]) -> Iterator[dict[str, Arm]]:
    """An arm for requests of mixed lengths, or none where this transformers cannot do it, or not on this device."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Arm] = {}
        try:
            arm = stack.enter_context(_continuous(made, load, slots))
            ids = arm([[1, 2], [3] * load.prompt], [2, load.new])
            if [len(i) for i in ids] == [2, load.new]:
                found = {"torch, continuous": arm}
        except Exception as e:
            say(f"without transformers' continuous batching: {line(e)}")
        yield found


def line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


def arms(cfg: ModelConfig, params, dtype: str, load: Load, say: Callable[[str], None]) -> tuple[dict, Callable, object]:
    """({arm: generate}, logits of ids [B, T] as float32 [B, T, V], the model).

    Arms: the growing cache that is the default, a static cache, and a static cache under torch.compile where that is
    done within `load.compile_seconds` for every batch size.
    """
    torch, transformers = modules()
    made = model(cfg, params, dtype, capacity(load))

    def logits(tokens_BT: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return made(torch.from_numpy(tokens_BT.astype(np.int64)).to(made.device)).logits.float().cpu().numpy()

    found = {
        "torch, dynamic": _generate(made),
        "torch, static": _generate(made, cache_implementation="static", disable_compile=True),
    }
    if load.compile_seconds:
        how = transformers.CompileConfig(dynamic=False)
        how._compile_all_devices = True  # generate compiles by itself on a GPU only
        arm = _generate(made, cache_implementation="static", compile_config=how)
        begin = time.perf_counter()
        try:
            with at_most(load.compile_seconds):
                for batch in (2, *load.batches):
                    arm([[1] * load.prompt] * batch, [load.new] * batch)
            found["torch, compiled"] = arm
            say(f"compiled in {time.perf_counter() - begin:.0f} s")
        except TimeoutError:
            say(f"without torch.compile: not done within --compile_seconds={load.compile_seconds}")
        except Exception as e:  # whatever the compiler lacks on this machine
            say(f"without torch.compile: {line(e)}")
    return found, logits, made
