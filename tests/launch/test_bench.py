"""The benchmarks run on a corpus of a megabyte and give figures that can be true."""

import subprocess
import sys

import numpy as np
import pytest

from launch import bench_data


@pytest.fixture
def few_words(monkeypatch):
    """Some words instead of all of Python's own text, which takes seconds to read."""
    rng = np.random.default_rng(0)
    different = np.array(["".join(w) + " " for w in rng.choice(list("etaoinshrdlu"), (2000, 5))], object)
    words = different[rng.integers(0, 2000, 60_000)]
    monkeypatch.setattr(bench_data, "_words", lambda: words)


def test_curation_finds_what_was_planted(few_words):
    r = bench_data.curation_throughput(2, workers=1)
    assert 2 <= r["megabytes"] < 2.3 and r["documents"] > 300
    assert r["megabytes_per_second"] == pytest.approx(r["megabytes"] / r["seconds"]) and r["cpu_seconds"] > 0
    assert r["removed_exact"] == r["planted_exact"] > 0
    assert 0.9 * r["planted_near"] <= r["removed_near"] <= r["planted_near"] > 0
    assert 10 < r["megabytes_peak_main_before"] <= r["megabytes_peak_main"] < 1000


def test_packing_and_steps(few_words):
    r = bench_data.packing_throughput(1, workers=1, vocab_size=512, context=64)
    assert r["tokens_per_second"] == pytest.approx(r["tokens"] / r["seconds"])
    assert 1 < r["bytes_per_token"] < 10
    rates = bench_data.step_throughput(1, workers=1)
    assert {"Length", "Repetition", "NearDuplicates", "Decontaminate"} <= set(rates) and min(rates.values()) > 0


def test_without_a_suite_it_says_which_there_are():
    done = subprocess.run([sys.executable, "-m", "launch.bench"], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr == "error: --suite=NAME is missing; one of: data, startup, train, decode, rl\n"
    )
