"""Learning from rewards and from preferences, measured beside TRL: one task, one model, one table of settings.

The task is random walks (data/tasks/walks.py). GRPO samples walks and is paid for short ones; DPO reads pairs of walks
that the parent sampled once, the shorter valid one preferred. Both sides begin with the parent's weights, handed over
as a Hugging Face folder once its logits have been found equal; both get the same prompts in the same order, or the same
pairs; what both learned is judged by the same program on the same prompts. The controls are the parent itself, and the
same training with a coin for a reward, or pairs with their order tossed.

Each training has a process of its own, its packages imported before the clock starts; the sides take turns, so that
what else the machine does falls on both. The first seed finds the cache of compiled programs empty, the others find
what it left there. CPU seconds are those of all threads: on a shared machine they say more than the clock.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.rl import random_reward, walks_sft
from jaxlm import config, rng, storage
from jaxlm.config import UserError
from jaxlm.data import prompts
from jaxlm.data.prompts import Prompts
from jaxlm.interop import export, hf
from jaxlm.nn import transformer
from jaxlm.run import rl
from jaxlm.run.experiment import Experiment
from jaxlm.run.load import Run, load_run
from jaxlm.run.log import MetricsLog
from jaxlm.run.statistics import paired_difference
from jaxlm.steps import rollout
from jaxlm.steps.preference import Preference
from launch import bench_rl_task as task
from launch import bench_trl
from launch.bench_rl_task import CONTEXT, Load
from launch.bench_rows import MEMORY, OURS, RATIO, peak_here, spread

TOLERANCE = 1e-4  # between the two sides' logits, in float32
THEIRS = "TRL"
CONTROL = {"grpo": "random reward", "dpo": "random labels"}
INSTALL = "pip install -e '.[trl]'"


def check_installed() -> None:
    """`UserError` says what TRL's side lacks and how to install it."""
    if missing := [name for name in ("torch", "transformers", "trl") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--against=trl needs {', '.join(missing)}: {INSTALL}")


@jax.jit(static_argnames="cfg")
def _logits(cfg, params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    hidden_BTD, _, _ = transformer.apply(cfg, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    return transformer.unembed(cfg, params, hidden_BTD)[..., : cfg.vocab_size]


def check_equal(run: Run, logits: Callable[[list], Sequence]) -> float:
    """The largest difference between our logits and theirs (ids [B, T] -> [B, T, V]); `UserError` above TOLERANCE."""
    tokens_BT = np.random.default_rng(0).integers(0, run.model.vocab_size, (8, CONTEXT))
    ours, theirs = np.asarray(_logits(run.model, run.params, tokens_BT)), np.asarray(logits(tokens_BT.tolist()))
    worst = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
    if not worst <= TOLERANCE:
        raise UserError(f"the two sides are not the same model: logits differ by {worst:.2g}, {TOLERANCE:g} is allowed")
    return worst


# ----------------------------------------------------------------------------------------------------- one training
def train_ours(job: Mapping) -> dict:
    """Runs the experiment of the job as launch.train does. Seconds of the whole and of compiling; of each update, the
    first one left out, seconds by the clock, of all threads, and of sampling."""
    compiling: list[tuple[float, float]] = []
    logged: list[tuple[float, Mapping]] = []
    write = MetricsLog.write

    def heard(name: str, seconds: float, **_):
        if name.startswith("/jax/core/compile"):
            compiling.append((time.perf_counter() - seconds, time.perf_counter()))

    def written(log, step, values):
        write(log, step, values)
        if "train/loss" in values:
            logged.append((time.process_time(), values))

    jax.monitoring.register_event_duration_secs_listener(heard)
    e = config.from_json(Experiment, job["experiment"])
    began, cpu = time.perf_counter(), time.process_time()
    with mock.patch.object(MetricsLog, "write", written):
        rl.run(e, job["workdir"])
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    later = [v for _, v in logged[1:]]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "compile_seconds": covered(compiling),
        "updates": [1 / v["train/steps_per_second"] for v in later],
        # A step is written when the next one is under way, and the last one at once after it.
        "cpu_updates": np.diff([at for at, _ in logged])[:-1].tolist(),
        "sampling": [v["train/seconds/rollout"] for v in later if "train/seconds/rollout" in v],
        # What an accelerator held at most, a process on a CPU.
        "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 1e6 * peak_here()),
    }


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals: what is traced inside another function counts once."""
    total, end = 0.0, -float("inf")
    for a, b in sorted(spans):
        total, end = total + max(0.0, b - max(a, end)), max(end, b)
    return total


def in_process(module: str, job: dict, folder: pathlib.Path, name: str) -> dict:
    """What `module` makes of a job, in a process of its own that reaches no network. `UserError` when it fails."""
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    storage.write_json(file, job)
    alone = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1")
    alone |= {"TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(folder / "hf"), "JAXLM_CACHE": str(folder / "cache")}
    with open(log, "w", encoding="utf-8") as said:
        code = subprocess.call(
            [sys.executable, "-m", module, str(file)], env={**os.environ, **alone}, stdout=said, stderr=said
        )
    if code:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["without a word"]
        raise UserError(f"{name} ended with code {code}: {lines[-1]}")
    return storage.read_json(folder / f"{name}.done.json")


# --------------------------------------------------------------------------------------------------------- together
class Bench:
    """One parent with all that both sides need of it; `run` is one training with its judgment."""

    def __init__(self, parent: str | None, load: Load, against: bool, folder: pathlib.Path, say: Callable[[str], None]):
        self.load, self.against, self.folder, self.say = load, against, folder, say
        if parent is None:
            say("the parent: walks_sft")
            parent = str(folder / "parent")
            job = {"experiment": config.to_json(walks_sft()), "workdir": parent}
            in_process("launch.bench_rl", job, folder, "walks_sft")
        self.parent = load_run(parent)
        self.walks = task.task_of(self.parent)
        self.hf, self.about = str(folder / "parent_hf"), {}
        if against:
            export.export_hf(parent, self.hf)
            say("are both the same model?")
            self.about = self._check()
        say("pairs")
        self.pairs = str(folder / "pairs.jsonl"), str(folder / "tossed.jsonl")
        self._sample_pairs()

    def _check(self) -> dict:
        about = {}

        def logits(tokens):
            job = {"kind": "logits", "model": self.hf, "tokens": tokens}
            found = in_process("launch.bench_trl", job, self.folder, "logits")
            about["PPO"] = "not measured here" if found["ppo"] else f"TRL {found['version']} has no PPO trainer"
            return found["logits"]

        return {"largest difference of logits": f"{check_equal(self.parent, logits):.1e}"} | about

    def _sample_pairs(self) -> None:
        asked = prompts.heldout(Prompts(task=self.walks, context=CONTEXT), self.walks.nodes)
        seed = rollout.seed_of(0, rng.SAMPLE, 0)
        found = rollout.sample(task.sampler_of(self.parent), self.parent.params, asked, self.load.walks, 1.0, seed)
        pairs = task.paired_walks(self.walks, found)
        for path, chosen in zip(self.pairs, (pairs, task.tossed(pairs))):
            storage.write_text(path, "".join(json.dumps(p) + "\n" for p in chosen))
        self.about |= {"pairs": len(pairs)}

    def definition(self, method: str, seed: int, control: bool) -> Experiment:
        if method == "dpo":
            return task.dpo(self.parent.workdir, self.pairs[control], self.load, seed)
        e = task.grpo(self.parent.workdir, self.walks, self.load, seed)
        return random_reward(e) if control else e

    def run(self, side: str, method: str, seed: int, control: bool = False) -> dict:
        """The figures of one training, and how good it has made the policy."""
        e = self.definition(method, seed, control)
        name = "_".join([side.lower(), method, str(seed), *(["control"] if control else [])])
        self.say(name.replace("_", " "))
        out = str(self.folder / f"{name}.out")
        if side == OURS:
            figures = in_process("launch.bench_rl", self._ours(e, out), self.folder, name)
            learned = load_run(out).params
        else:
            figures = in_process("launch.bench_trl", self._theirs(e, out, control), self.folder, name)
            learned = hf.load_hf(out, self.parent.model.precision)[1]
            # In the parent's own shape: rows of the embedding are padded otherwise by another definition.
            learned = jax.tree.map(lambda x, like: x[tuple(map(slice, like.shape))], learned, self.parent.params)
        return figures | task.judged(self.parent, learned, self.walks, self.load)

    def _ours(self, e: Experiment, out: str) -> dict:
        return {"experiment": config.to_json(e), "workdir": out}

    def _theirs(self, e: Experiment, out: str, control: bool) -> dict:
        is_dpo = isinstance(e.objective, Preference)
        return {
            "kind": "dpo" if is_dpo else "grpo",
            "model": self.hf,
            "out": out,
            "arguments": task.arguments(e),
            "records": task.training_pairs(e) if is_dpo else [{"prompt": p} for p in task.prompts_in_order(e)],
            "task": config.to_dict(self.walks),
            "random_reward": control,
            "cpu": jax.default_backend() == "cpu",
        }


def timing(runs: Mapping[str, Sequence[Mapping]]) -> dict[str, dict]:
    """Figures over seeds by side, and how many times as fast ours is, seed by seed. The first seed's run is cold: it
    has to compile everything. Milliseconds are medians of a run's updates without the first one."""
    out: dict[str, dict] = {}
    for side, found in runs.items():
        columns: dict[str, list[float]] = {}
        for name, some in (("cold", found[:1]), ("warm", found[1:])):
            columns[f"seconds, {name}"] = [r["seconds"] for r in some]
            columns[f"of them compiling, {name}"] = [r["compile_seconds"] for r in some]
            columns[f"CPU seconds, {name}"] = [r["cpu_seconds"] for r in some]
        columns["seconds without compiling"] = [r["seconds"] - r["compile_seconds"] for r in found]
        columns["ms an update"] = [1e3 * statistics.median(r["updates"]) for r in found]
        columns["CPU ms an update"] = [1e3 * statistics.median(r["cpu_updates"]) for r in found]
        if all(r["sampling"] for r in found):
            columns["ms of it sampling"] = [1e3 * statistics.median(r["sampling"]) for r in found]
        columns[MEMORY] = [r["peak_bytes"] / 1e9 for r in found]
        out[side] = {name: values for name, values in columns.items() if any(values)}
    if THEIRS in out:
        ours, theirs = out[OURS], out[THEIRS]
        both = [n for n in theirs if n in ours and n not in ("ms of it sampling", MEMORY)]
        out[RATIO] = {n: [t / o for t, o in zip(theirs[n], ours[n])] for n in both}
    return {side: {name: spread(v) for name, v in columns.items()} for side, columns in out.items()}


def quality(
    parent: Mapping[str, float], runs: Mapping[str, Sequence[Mapping]], controls: Mapping[str, Mapping]
) -> dict:
    """Scores by side over seeds, beside the parent's and the controls'; the difference of the sides, paired by seed."""
    out: dict[str, dict] = {"parent": dict(parent)}
    for side, found in runs.items():
        out[side] = {name: spread([r[name] for r in found]) for name in ("score", "greedy")}
    for name, r in controls.items():
        out[name] = {"score": r["score"], "greedy": r["greedy"]}
    if THEIRS in runs:
        by_seed = {side: {i: r["score"] for i, r in enumerate(found)} for side, found in runs.items()}
        d = paired_difference(by_seed[OURS], by_seed[THEIRS])
        interval = "one seed" if d.low is None else f"{d.low:+.4f} to {d.high:+.4f}"
        out["jaxlm - TRL"] = {"score": f"{d.mean:+.4f}", "95% interval": interval}
    return out


def settings(e: Experiment, seen: Mapping) -> dict[str, str]:
    """What both sides were given, by TRL's names, and what TRL says that it ran with where that is another value."""
    ours = task.arguments(e)
    rows = {k: f"{v}" if seen[k] == v else f"{v} (TRL {seen[k]})" for k, v in ours.items()}
    return rows | {f"{k} (TRL's own)": str(v) for k, v in seen.items() if k not in ours}


def suite(parent: str | None, load: Load, against: bool, say: Callable[[str], None]) -> dict[str, dict]:
    """Results by part. parent: a run of walks_sft, or None to train one. against: TRL too."""
    sides = (OURS, THEIRS) if against else (OURS,)
    if against:
        check_installed()  # first of all: without it nothing is measured
    with tempfile.TemporaryDirectory(prefix="jaxlm-bench-") as folder:
        bench = Bench(parent, load, against, pathlib.Path(folder), say)
        start = task.judged(bench.parent, bench.parent.params, bench.walks, load)
        about = dataclasses.asdict(load) | {"seeds": ",".join(map(str, load.seeds))} | bench.about
        results: dict[str, dict] = {"load": about}
        for method, control in CONTROL.items():
            runs: dict[str, list[dict]] = {side: [] for side in sides}
            for i, seed in enumerate(load.seeds):
                for side in sides[:: -1 if i % 2 else 1]:
                    runs[side].append(bench.run(side, method, seed))
            controls = {f"{side}, {control}": bench.run(side, method, load.seeds[0], control=True) for side in sides}
            results[f"{method}, quality"] = quality(start, runs, controls)
            results[f"{method}, time"] = timing(runs)
            if against:
                e = bench.definition(method, 0, False)
                results[f"{method}, settings"] = settings(e, runs[THEIRS][0]["settings"])
                results[f"{method}, what differs"] = task.DIFFERS[method]
    return results


if __name__ == "__main__":
    bench_trl.child(train_ours)
