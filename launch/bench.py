"""Measures this machine: the data pipeline, the time to a first step, training, decoding, learning from rewards.

  python -m launch.bench --suite=data [--megabytes=1000]     curation, then tokenizing and packing
  python -m launch.bench --suite=startup                     launch.train to its first step; compile time against depth
  python -m launch.bench --suite=train [--size=10m]... [--batch=16] [--context=256] [--against=torch] [--at_once=8]
  python -m launch.bench --suite=decode [--size=10m]... [--workdir=RUN] [--batch=1,32] [--against=torch]
  python -m launch.bench --suite=rl [--parent=RUN] [--seeds=0,1,2] [--updates=100] [--against=trl]

train: tokens per second of an update (forward, backward, clipping, AdamW) of GPT-2's shape at each --size from 1m to
1.3b, in float32 and in bfloat16 compute; beside it the share of a large matrix product's rate, which is measured too,
FLOPs counted as 6N + 12LDT (attention not causal), and the memory that it needs. --against=torch takes turns, A B A B,
with PyTorch on the same weights and batches, with SDPA and fused AdamW: transformers' model, a plain script, the script
under torch.compile. Both must first find the same losses. --set=model.scan=false and the like change our run.
--at_once=8 takes turns with eight runs in one program (as launch.sweep --at_once=8): seconds are of an update of all.

decode: prompts of --prompt_tokens continued by --new_tokens, at each size (random weights) or for the model of a run;
then --requests requests of mixed lengths, and as many in groups of eight that share a prompt. --against=torch takes
turns with transformers' generate on the same weights, prompts, dtype and threads, once both have given the same logits:
with its growing cache, a static one, and a static one under torch.compile. --cache_dtype=int8 keeps our keys and values
so; how many bytes they then take, and how far sampled log-probabilities are from those of a pass without a cache, is
told too. Fewer cores: taskset -c 0,1 python -m launch.bench ...

data: what each step of the curation and of the packing does in a second, how much memory it takes, and whether planted
copies are found. startup: seconds from the command to the first step, with empty and with full caches in turn; then
those that an update takes to compile, by the number of layers, scanned and unrolled.

rl: GRPO and DPO on random walks from one parent, a run of walks_sft (made when --parent is not given): the quality that
is reached, beside controls, and the time it takes. --against=trl does the same in TRL (pip install -e '.[trl]').

Prints a table; --out=FILE also writes the figures as JSON, with the machine and the versions they belong to, and a
plot beside it (FILE.png). Nothing else should run meanwhile: the suites take all cores. On an NVIDIA GPU:
bash launch/bench_gpu.sh measures all that docs/results/speed.md aims at there.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import sys

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError, nearest
from jaxlm.data.parallel import cores
from launch import bench_data, bench_rows, common
from launch.cache_flags import CACHE_DTYPE

SUITE = flags.DEFINE_enum("suite", None, ["data", "startup", "train", "decode", "rl"], "What is measured.")
MEGABYTES = flags.DEFINE_integer(
    "megabytes", 200, "Size of the made corpus (data). It needs three times this on disk.", lower_bound=1
)
WORKERS = flags.DEFINE_integer("workers", 0, "Processes (data); 0 takes all cores.", lower_bound=0)
EXPERIMENT = flags.DEFINE_string("experiment", "pretrain_tiny", "What is started (startup).")
SET = flags.DEFINE_multi_string("set", [], "path=value in the definition (startup, train); may be repeated.")
SIZE = flags.DEFINE_multi_string(
    "size", [], "Model (train, decode, startup), of experiments/sizes.py; may be repeated; 1m if unset."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run whose model is measured (decode).")
BATCH = flags.DEFINE_list(
    "batch", None, "Sizes of the batch, with commas between; unset, 1,32 (decode), or what goes with the size (train)."
)
CONTEXT = flags.DEFINE_integer("context", None, "Tokens a row (train); unset, what goes with the size.")
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 128, "Length of the prompts (decode).")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "How many tokens follow them (decode).")
REQUESTS = flags.DEFINE_integer("requests", 128, "Requests of mixed lengths (decode); 0 leaves them out.", 0)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Of weights and computation, unset float32 on a CPU, else bfloat16 (decode); of computation, unset both (train).",
)
AT_ONCE = flags.DEFINE_integer("at_once", 1, "Also as many runs in one program (train).", 1)
REPETITIONS = flags.DEFINE_integer(
    "repetitions", None, "How often each side is timed; unset 5 (train, decode), 3 (data, startup).", 1
)
AGAINST = flags.DEFINE_enum(
    "against",
    None,
    ["torch", "trl"],
    "The other side: torch (train, decode), pip install torch transformers; trl (rl).",
)
PARENT = flags.DEFINE_string("parent", None, "Folder of a run that both sides begin with (rl).")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each training (rl), with commas between.")
UPDATES = flags.DEFINE_integer("updates", 100, "Updates of each training (rl).", 3)
COMPILE_SECONDS = flags.DEFINE_integer(
    "compile_seconds", 300, "Bounds torch.compile (train, decode); 0 leaves it out.", 0
)
GPU_PACKAGES = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
OUT = flags.DEFINE_string("out", None, "File for the figures as JSON.")


def machine() -> dict[str, str | int]:
    """Where the figures were taken."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            model = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), model)
    except OSError:
        pass
    versions = {}
    packages = ("jax", "jaxlib", "flax", "numpy", "sentencepiece", "array_record", "grain", *GPU_PACKAGES)
    for package in packages + {"torch": ("torch", "transformers"), "trl": ("torch", "transformers", "trl")}.get(
        AGAINST.value, ()
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions |= {} if package in GPU_PACKAGES else {package: "absent"}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": cores(),
        **devices(),
        "python": platform.python_version(),
        **versions,
    }


def devices() -> dict[str, str]:
    """What JAX computed on, where this process has used it, and the allocator's and the compiler's settings."""
    found = {k: os.environ[k] for k in ("XLA_FLAGS", "GLIBC_TUNABLES") if os.environ.get(k)}
    if "jax" not in sys.modules:
        return found
    here = sys.modules["jax"].local_devices()
    return {"device": f"{len(here)} x {here[0].device_kind}"} | found


def repetitions(usual: int) -> int:
    return REPETITIONS.value or usual


def data_suite() -> dict[str, dict]:
    """Curation of --megabytes MB, each step alone on at most 20 MB, and packing of at most 100 MB."""
    times, workers = repetitions(3), WORKERS.value
    return {
        "curation": bench_data.curation_throughput(MEGABYTES.value, workers, times),
        "each step alone, one core": bench_data.step_throughput(min(MEGABYTES.value, 20), workers, times),
        "packing": bench_data.packing_throughput(min(MEGABYTES.value, 100), workers, times),
    }


def startup_suite() -> dict[str, dict]:
    """Starts of `launch.train`; see `launch.bench_startup`. Then compilation in this process."""
    from launch import bench_startup, bench_train

    times, sizes = repetitions(3), sizes_among(bench_train.SHAPES)
    starts = bench_startup.starts(EXPERIMENT.value, SET.value, times)
    return starts | bench_startup.by_depth(sizes, times, say)


def sizes_among(known) -> list[str]:
    """The sizes asked for, all of them `known`."""
    for size in SIZE.value:
        if size not in known:
            raise UserError(f"--size={size}: unknown size; {nearest(size, known)}")
    return SIZE.value or ["1m"]


def batches() -> tuple[int, ...] | None:
    """The sizes of the batch asked for."""
    try:
        return None if BATCH.value is None else tuple(int(b) for b in BATCH.value)
    except ValueError:
        raise UserError(f"--batch takes whole numbers with commas between, got {','.join(BATCH.value)!r}") from None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def train_suite() -> dict[str, dict]:
    """Tokens per second of training; see `launch.bench_train`."""
    from launch import bench_torch, bench_train, bench_train_torch

    sizes = sizes_among(bench_train.SHAPES)
    load = bench_train.Load(
        batches(),
        CONTEXT.value,
        bench_train.DTYPES if DTYPE.value is None else (DTYPE.value,),
        tuple(SET.value),
        repetitions(5),
        COMPILE_SECONDS.value,
        AT_ONCE.value,
    )
    if AGAINST.value:
        bench_torch.modules()  # first of all: without them nothing is measured
    return {"load": load.shown()} | bench_train.suite(sizes, load, bench_train_torch if AGAINST.value else None, say)


def decode_suite() -> dict[str, dict]:
    """Tokens per second of sampling; see `launch.bench_decode`."""
    from experiments.sizes import SIZES  # here: the other suites are timed in processes without JAX
    from jaxlm.run.train import use_compilation_cache
    from launch import bench_decode, bench_torch

    if WORKDIR.value is not None and SIZE.value:
        raise UserError("--size names a model with random weights, --workdir the model of a run: give one of them")
    sizes = sizes_among(SIZES)
    load = bench_decode.Load(
        batches() or bench_decode.Load.batches,
        PROMPT_TOKENS.value,
        NEW_TOKENS.value,
        repetitions(bench_decode.Load.repetitions),
        REQUESTS.value,
        COMPILE_SECONDS.value,
    )
    if AGAINST.value:
        bench_torch.modules()  # first of all: without them nothing is measured
    use_compilation_cache()
    dtype, peer = DTYPE.value or bench_decode.usual_dtype(), bench_torch if AGAINST.value else None
    as_asked = {"dtype": dtype, "cache": CACHE_DTYPE.value}
    if WORKDIR.value is not None:
        name = os.path.basename(os.path.abspath(WORKDIR.value))
        models = {name: functools.partial(bench_decode.loaded, WORKDIR.value, **as_asked)}
    else:
        models = {size: functools.partial(bench_decode.made, size, **as_asked) for size in sizes}
    return {"load": dataclasses.asdict(load) | as_asked} | bench_decode.suite(models, load, dtype, peer, say)


def rl_suite() -> dict[str, dict]:
    """GRPO and DPO, alone or beside TRL; see `launch.bench_rl`."""
    from launch import bench_rl

    load = bench_rl.Load(tuple(common.seeds(SEEDS.value)), UPDATES.value)
    return bench_rl.suite(PARENT.value, load, AGAINST.value is not None, say)


SUITES = {
    "data": data_suite, "startup": startup_suite, "train": train_suite, "decode": decode_suite, "rl": rl_suite,
}  # fmt: skip
PEERS = {"torch": ("train", "decode"), "trl": ("rl",)}


def main() -> int:
    if SUITE.value is None:
        raise UserError(f"--suite=NAME is missing; one of: {', '.join(SUITES)}")
    if AGAINST.value is not None and SUITE.value not in PEERS[AGAINST.value]:
        raise UserError(f"--against={AGAINST.value} is the other side of --suite={' or '.join(PEERS[AGAINST.value])}")
    if AGAINST.value or SUITE.value == "rl":  # programs that share a GPU: none takes what it does not need
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results = SUITES[SUITE.value]()
    about = machine()
    print(bench_rows.table(results))
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    if OUT.value:
        storage.write_json(OUT.value, {"schema_version": 1, "suite": SUITE.value, "machine": about, **results})
        bench_rows.plot(results, OUT.value + ".png")
    return 0


if __name__ == "__main__":
    common.run(main)
