"""The benchmarks run on a corpus of a megabyte and give figures that can be true."""

import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.sizes import SIZES
from jaxlm import sharding
from launch import bench, bench_data, bench_startup, bench_train
from tests.source import ROOT


@pytest.fixture
def few_words(monkeypatch):
    """Some words instead of all of Python's own text, which takes seconds to read."""
    rng = np.random.default_rng(0)
    different = np.array(["".join(w) + " " for w in rng.choice(list("etaoinshrdlu"), (2000, 5))], object)
    words = different[rng.integers(0, 2000, 60_000)]
    monkeypatch.setattr(bench_data, "_words", lambda: words)


def test_curation_finds_what_was_planted(few_words):
    r = bench_data.curation_throughput(2, workers=1, repetitions=2)
    corpus, whole = r["corpus"], r["all steps"]
    assert 2 <= corpus["MB"] < 2.3 and corpus["documents"] > 300
    assert whole["MB per second"] == pytest.approx(corpus["MB"] / whole["seconds"]["median"])
    assert whole["seconds"]["min"] < whole["seconds"]["max"] and whole["CPU seconds"]["min"] > 0
    assert corpus["removed, exact"] == corpus["planted, exact"] > 0
    assert 0.9 * corpus["planted, near"] <= corpus["removed, near"] <= corpus["planted, near"] > 0
    assert 0.01 < whole["GB before"] <= whole["GB at most"] < 1
    assert r["in NearDuplicates"]["seconds of all processes"]["min"] > 0


def test_packing_and_steps(few_words):
    r = bench_data.packing_throughput(1, workers=1, vocab_size=512, context=64)
    packing = r["packing"]
    assert packing["tokens per second"] == pytest.approx(r["corpus"]["tokens"] / packing["seconds"]["median"])
    assert 1 < r["corpus"]["bytes a token"] < 10 and r["tokenizer"]["seconds"]["median"] > 0
    steps = bench_data.step_throughput(1, workers=1, repetitions=2)
    assert {"Length", "Repetition", "NearDuplicates", "Decontaminate"} <= set(steps)
    assert all(s["MB per second"] > 0 and s["seconds"]["min"] < s["seconds"]["max"] for s in steps.values())


def test_starts_come_in_pairs_that_share_their_caches(monkeypatch):
    asked = []

    def start(experiment, settings, cache):
        asked.append((experiment, settings, cache))
        return {"seconds": float(len(asked)), "seconds_after_data": 0.5}

    monkeypatch.setattr(bench_startup, "seconds_to_first_step", start)
    rows = bench_startup.starts("e", ["seed=1"], 2)["e, to the first step"]
    first, second, third, fourth = (cache for *_, cache in asked)
    assert first == second != third == fourth and asked[0][:2] == ("e", ["seed=1"])
    assert rows["empty caches"]["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert rows["full caches"]["seconds"]["max"] == 4.0 and rows["full caches"]["seconds after data"]["min"] == 0.5


def test_a_program_is_compiled_at_each_depth_scanned_and_unrolled(monkeypatch):
    monkeypatch.setattr(bench_startup, "DEPTHS", (1, 2))
    monkeypatch.setitem(bench_train.SHAPES, "1m", bench_train.Shape(64, (1, 8), (1, 8)))
    products: list[int] = []

    def lower(program, *args, lower=sharding.Program.lower):
        lowered = lower(program, *args)
        products.append(lowered.as_text().count("dot_general"))
        return lowered

    monkeypatch.setattr(sharding.Program, "lower", lower)
    rows = bench_startup.by_depth(["1m"], 1, lambda line: None)["1m, compiling an update"]
    assert list(rows) == [f"{n} layers, {how}" for how in ("scanned", "unrolled") for n in (1, 2)]
    flat, flat_too, one, two = products
    assert flat == flat_too and one < two and all(r["seconds"]["min"] > 0 for r in rows.values())


def test_without_a_suite_it_says_which_there_are():
    done = subprocess.run([sys.executable, "-m", "launch.bench"], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr == "error: --suite=NAME is missing; one of: data, startup, train, decode, rl\n"
    )


def test_what_the_script_for_a_gpu_asks_for_can_be_measured(tmp_path):
    script = [ROOT / "launch" / "bench_gpu.sh", f"--folder={tmp_path}"]
    done = subprocess.run(["bash", *script, "--list"], capture_output=True, text=True, check=True)
    asked = [line.split(" -m launch.bench ")[1].split() for line in done.stdout.splitlines() if "launch.bench" in line]
    assert len(asked) > 10
    for options in asked:
        with flagsaver.flagsaver():
            flags.FLAGS(["bench", *options])
            assert bench.OUT.value.startswith(f"{tmp_path}/")
            assert bench.AGAINST.value is None or bench.SUITE.value in bench.PEERS[bench.AGAINST.value]
            sizes = bench.sizes_among(SIZES if bench.SUITE.value == "decode" else bench_train.SHAPES)
            for size in sizes if bench.SUITE.value == "train" else ():
                bench_train.definition(size, 8, bench.CONTEXT.value or 1024, "bfloat16", bench.SET.value)
    unknown = subprocess.run(["bash", *script, "no_such"], capture_output=True, text=True)
    assert unknown.returncode == 2 and "nothing is called no_such" in unknown.stderr
