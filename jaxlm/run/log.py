"""What a run says while it runs: metrics.jsonl, optional sinks, one live line, and what the hardware could do.

`metrics.jsonl` is a history, one object a line: `step`, `seconds` (that the run has been at work, over restarts) and
slash-separated names. Going back is part of a history: a record of step s forgets every earlier record of a later step,
so a run resumed from a checkpoint supersedes what it had logged beyond it, and a reader sees each step once. A number
that is not finite is written as null. On object storage, where files cannot be appended to, the lines stand in numbered
parts `metrics-000001.jsonl`, a new one every minute.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxlm import storage
from jaxlm.config import UserError

FILE = "metrics.jsonl"
PART_SECONDS = 60.0
PLAIN_SECONDS = 10.0  # between two lines when the output is no terminal


# -------------------------------------------------------------------------------------------------------------- metrics
def _set_torn_line_aside(p) -> None:
    """A program killed in mid-write leaves half a line: it goes, or the next record would be glued to it."""
    data = p.read_bytes() if p.exists() else b""
    if data and not data.endswith(b"\n"):
        whole = data[: data.rfind(b"\n") + 1]
        logging.warning("%s ended in a torn line, which was cut off: %r", p, data[len(whole) :][:80])
        storage.write_bytes(p, whole)


def _parts(workdir) -> list:
    root = storage.path(workdir)
    return [root / FILE] if storage.is_local(workdir) else sorted(root.glob("metrics-*.jsonl"))


def raw_metrics(workdir) -> Iterator[dict]:
    """Every record in the order in which they were written, superseded ones too; a null reads as NaN.

    `UserError` when the workdir has no metrics. A line that is not JSON, such as one being written at this moment, is
    left out.
    """
    files = [p for p in _parts(workdir) if p.exists()]
    if not files:
        raise UserError(f"{workdir} has no {FILE}: nothing has been trained there")
    for line in (line for p in files for line in p.read_text().splitlines()):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            if line.strip():
                logging.warning("%s: a line that is no metrics record is left out: %.80s", workdir, line)
            continue
        yield {k: math.nan if v is None else v for k, v in record.items()}


def read_metrics(workdir) -> list[dict]:
    """One dict per step, in order of steps: every record of the step joined, superseded ones left out.

    Otherwise as `raw_metrics`.
    """
    kept: dict[int, dict] = {}
    for record in raw_metrics(workdir):
        while kept and next(reversed(kept)) > record["step"]:
            kept.popitem()
        kept.setdefault(record["step"], {}).update(record)
    return list(kept.values())


class MetricsLog:
    """Appends to the metrics of a workdir, on process 0 only; the others' calls do nothing.

    tensorboard: also write event files to `tensorboard/`, with tensorboardX (`UserError` when it is not installed).
    """

    def __init__(self, workdir, tensorboard: bool = False):
        self._workdir, self._writes = storage.path(workdir), jax.process_index() == 0
        self._board, self._lines, self._flushed = None, [], time.monotonic()
        if not self._writes:
            return
        if storage.is_local(workdir):
            storage.make_dir(workdir)
            _set_torn_line_aside(self._workdir / FILE)
        before = read_metrics(workdir) if any(p.exists() for p in _parts(workdir)) else []
        self._began = time.monotonic() - (before[-1].get("seconds", 0.0) if before else 0.0)
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError("TensorBoard files need tensorboardX: pip install -e '.[report]'") from None
            self._board = SummaryWriter(str(self._workdir / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """`values` are numbers on the host: nothing here waits for a device."""
        if not self._writes:
            return
        numbers = {k: float(v) for k, v in values.items()}
        record = {"step": int(step), "seconds": round(time.monotonic() - self._began, 3)}
        record |= {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        if storage.is_local(self._workdir):
            storage.append_jsonl(self._workdir / FILE, record)
        else:
            self._lines.append(json.dumps(record) + "\n")
            if time.monotonic() - self._flushed > PART_SECONDS:
                self._flush()
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, int(step))

    def _flush(self) -> None:
        if self._lines:
            parts = _parts(self._workdir)
            number = int(parts[-1].name[len("metrics-") : -len(".jsonl")]) + 1 if parts else 1
            storage.write_text(self._workdir / f"metrics-{number:06d}.jsonl", "".join(self._lines))
        self._lines, self._flushed = [], time.monotonic()

    def close(self) -> None:
        self._flush()
        if self._board is not None:
            self._board.close()


# ------------------------------------------------------------------------------------------------------------- progress
def short(x: float) -> str:
    """12345 -> 12.3k."""
    for unit, name in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")]:
        if abs(x) >= unit:
            return f"{x / unit:.3g}{name}"
    return f"{x:.3g}"


def clock(seconds: float) -> str:
    """4000 -> 1:06:40, 75 -> 1:15."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Progress:
    """One live line on a terminal; elsewhere a plain line every few seconds. On process 0 only, to stderr."""

    def __init__(self, total: int, first: int = 0, head: str = "", stream=None):
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._total, self._said, self._width = total, -math.inf, 0
        self._speed_from: tuple[float, int] | None = None  # after the step that compiled
        self._on = jax.process_index() == 0
        if self._on and head:
            self._print(f"from step {first} to {total}; {head}")

    def _print(self, text: str) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._stream.write(text + "\n")
        self._stream.flush()

    def update(self, step: int, values: dict[str, float]) -> None:
        """A step's training metrics: loss, tokens per second, utilization; the time left comes from the clock."""
        if not self._on:
            return
        now = time.monotonic()
        parts = [f"step {step}/{self._total}"]
        if "train/reward" in values:  # the loss of a policy gradient says nothing
            known = [name for name in ("reward", "right") if f"train/{name}" in values]
            parts += [f"{name} {values[f'train/{name}']:.3f}" for name in known]
        elif "train/loss" in values:
            parts.append(f"loss {values['train/loss']:.4f}")
        if "train/tokens_per_second" in values:
            parts.append(f"{short(values['train/tokens_per_second'])} tokens/s")
        if "train/model_flops_utilization" in values:
            parts.append(f"MFU {values['train/model_flops_utilization']:.1%}")
        if self._speed_from is None:
            self._speed_from = (now, step)
        elif step > self._speed_from[1]:
            rate = (now - self._speed_from[0]) / (step - self._speed_from[1])
            parts.append(f"ETA {clock(rate * (self._total - step))}")
        line = "  ".join(parts)
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._stream.flush()
            self._width = len(line)
        elif now - self._said >= PLAIN_SECONDS or step >= self._total:
            self._said = now
            self._print(line)

    def say(self, text: str) -> None:
        """A line of words that stays."""
        if self._on:
            self._print(text)

    def note(self, step: int, values: dict[str, float]) -> None:
        """A line of its own that stays, such as an evaluation's."""
        if self._on:
            self._print(f"step {step}/{self._total}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def close(self) -> None:
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


# ----------------------------------------------------------------------------------------------------- what is possible
# FLOP/s of dense matrix products from the makers' datasheets: (part of the device kind, bfloat16, float32). At JAX's
# default precision a float32 product runs as bfloat16 on a TPU and as TF32 on an NVIDIA GPU since Ampere.
DATASHEET = (
    ("TPU v3", 61.5e12, 61.5e12),  # a core
    ("TPU v4", 275e12, 275e12),
    ("TPU v5 lite", 197e12, 197e12),
    ("TPU v5e", 197e12, 197e12),
    ("TPU v5", 459e12, 459e12),
    ("TPU v6", 918e12, 918e12),
    ("B200", 2250e12, 1125e12),
    ("H200", 989e12, 494e12),
    ("H100 PCIe", 756e12, 378e12),
    ("H100", 989e12, 494e12),
    ("A100", 312e12, 156e12),
    ("A10G", 70e12, 35e12),
    ("L40S", 362e12, 183e12),
    ("L40", 181e12, 90.5e12),
    ("L4", 121e12, 60e12),
    ("RTX 4090", 165e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)


def datasheet_peak(kind: str, dtype: str) -> float | None:
    """Dense FLOP/s of a device kind as JAX names it, for "bfloat16" or "float32"; None when it is not in the table."""
    for name, bfloat16, float32 in DATASHEET:
        if name in kind and dtype in ("bfloat16", "float32"):
            return bfloat16 if dtype == "bfloat16" else float32
    return None


def best_rate(product: Callable[[int], Callable[[], object]], seconds: float = 0.25) -> float:
    """FLOP/s of the best square matrix product found in so many seconds of them.

    product: n -> a function that multiplies [n, n] by [n, n] and returns when that is done. Its first call, which may
    compile and choose among kernels for longer than all others take, is not counted.
    """
    best, left, n = 0.0, seconds, 512
    multiply = product(n)
    multiply()
    while left > 0:
        began = time.perf_counter()
        multiply()
        spent = time.perf_counter() - began
        best, left = max(best, 2 * n**3 / spent), left - spent
        if 2 * (2 * n) ** 3 / best < 0.2 * seconds:  # else the next size would take longer than is left
            n *= 2
            multiply = product(n)
            multiply()
    return best


@functools.cache
def measured_peak(dtype: str) -> float:
    """FLOP/s of the best square matrix product found in about half a second on the first local device.

    Of random numbers: with few bits that change an accelerator draws less power, and may run faster than it ever will.
    """
    multiply = jax.jit(lambda a: a @ a)
    block = np.random.default_rng(0).standard_normal((512, 512))

    def product(n: int):
        a = jnp.tile(jnp.asarray(block, dtype), (n // 512, n // 512))
        return lambda: multiply(a).block_until_ready()

    with jax.default_device(jax.local_devices()[0]):
        return best_rate(product)


def peak_flops(dtype: str) -> tuple[float, str]:
    """(FLOP/s of one device for matrix products in `dtype`, how that is known): the datasheet's, or measured here.

    Forced host devices share the machine's cores, so each gets its part of what was measured.
    """
    device = jax.local_devices()[0]
    known = datasheet_peak(device.device_kind, dtype)
    if known is not None:
        return known, f"datasheet of {device.device_kind}, {dtype}"
    shared = jax.local_device_count() if device.platform == "cpu" else 1
    how = f"measured with a {dtype} matrix product on {device.device_kind}"
    return measured_peak(dtype) / shared, how + (f", shared by {shared} host devices" if shared > 1 else "")
