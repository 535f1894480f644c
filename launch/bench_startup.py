"""How long until a run is under way: from the command to its first step, and what an update takes to compile."""

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from jaxlm.config import UserError
from launch.bench_rows import in_turn, max_resident, row, spread

DEPTHS = (2, 4, 8, 16)
EMPTY, FULL = "empty caches", "full caches"


# ---------------------------------------------------------------------------------------------------- the first step
def seconds_to_first_step(experiment: str, settings: Sequence[str], cache: str) -> dict[str, float]:
    """Starts `launch.train` for two steps with its caches in `cache`.

    Returns seconds from the start of the process to the record of its first step, and the part of them that is after
    the data was ready (state, compilation, one step).
    """
    with tempfile.TemporaryDirectory(prefix="jaxlm-bench-") as workdir:
        settings = [*settings, "train.steps=2", "train.log_every=1", "evaluation.max_batches=1"]
        command = [sys.executable, "-m", "launch.train", f"--experiment={experiment}", f"--workdir={workdir}/run"]
        begin = time.perf_counter()
        process = subprocess.Popen(
            command + [f"--set={s}" for s in settings],
            env={**os.environ, "JAXLM_CACHE": cache},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        metrics, first = os.path.join(workdir, "run", "metrics.jsonl"), None
        while first is None and process.poll() is None:
            time.sleep(0.02)
            if os.path.exists(metrics):
                with open(metrics, encoding="utf-8") as f:
                    line = f.readline()
                if line.endswith("\n"):
                    first = json.loads(line)
        seconds = time.perf_counter() - begin
        _, said = process.communicate()
        if process.returncode or first is None:
            last = said.strip().splitlines()[-1] if said.strip() else f"exit code {process.returncode}"
            raise UserError(f"launch.train --experiment={experiment} did not reach its first step: {last}")
    return {"seconds": seconds, "seconds_after_data": first["train/seconds_to_first_step"]}


def starts(experiment: str, settings: Sequence[str], repetitions: int) -> dict[str, dict]:
    """Starts in pairs that share their caches: the first of each pair finds them empty."""
    found: dict[str, list[dict]] = {EMPTY: [], FULL: []}
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory(prefix="jaxlm-bench-") as cache:
            for each in found.values():
                each.append(seconds_to_first_step(experiment, settings, cache))
    memory = max_resident(resource.RUSAGE_CHILDREN) * 1e6
    rows = {
        name: row([one["seconds"] for one in each], memory=memory)
        | {"seconds after data": spread([one["seconds_after_data"] for one in each])}
        for name, each in found.items()
    }
    return {f"{experiment}, to the first step": rows}


# ----------------------------------------------------------------------------------------------- the program of a step
def compiled(size: str, layers: int, scan: bool) -> None:
    """Traces and compiles an update of a size at its usual rows, with another number of layers; no cache is asked."""
    from jaxlm import sharding
    from jaxlm.data import loader
    from jaxlm.run import train
    from jaxlm.steps import state
    from launch import bench_train

    e = bench_train.definition(
        size, *bench_train.usual_rows(size), "float32", (f"model.layers={layers}", f"model.scan={str(scan).lower()}")
    )
    mesh = sharding.make_mesh(e.mesh)
    batch = loader.described(e.train.batch_size, e.data.context + 1, 0, mesh)
    train.step_function(e, mesh).lower(state.abstract(e.model, e.optimizer, mesh), batch).compile()


def by_depth(sizes: Sequence[str], repetitions: int, say: Callable[[str], None]) -> dict[str, dict]:
    """Seconds of tracing and compiling an update, by the number of its layers: flat where these are scanned."""
    results = {}
    for size in sizes:
        say(f"{size}, compiling")
        arms = {
            f"{layers} layers, {'scanned' if scan else 'unrolled'}": functools.partial(compiled, size, layers, scan)
            for scan in (True, False)
            for layers in DEPTHS
        }
        times = in_turn(arms, repetitions, warm=False)
        results[f"{size}, compiling an update"] = {name: row(seconds) for name, seconds in times.items()}
    return results
