"""The decoding benchmark: what it times is right, whoever is timed; the other side is the same model."""

import dataclasses
import importlib.util

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.nn.transformer import ModelConfig, with_cache_dtype
from launch import bench, bench_decode, bench_rows, bench_torch
from launch.bench_decode import OURS, Load
from tests import tiny_run

flags.FLAGS.set_gnu_getopt(True)
CFG = ModelConfig(vocab_size=64, layers=2, width=32, heads=2, tied=True)
LOAD = Load(batches=(2,), prompt=6, new=8, repetitions=1, requests=5, compile_seconds=0)


@pytest.fixture(scope="module")
def params():
    return tiny_run.random_params(CFG)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(bench_decode, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(bench_decode, "measured_peak", lambda dtype: 1e9)


def test_our_side_alone(params, tmp_path):
    said = []
    r = bench_decode.suite({"toy": lambda: (CFG, params)}, LOAD, "float32", None, said.append)
    assert list(r) == ["copy", "matrix product", "toy, batch 2", "toy, mixed", "toy, groups of 8"] and len(said) == 3
    assert r["copy"]["GB per second"] > 0 and r["matrix product"] == {"float32, TFLOP per second": 1e-3}
    mine = r["toy, batch 2"][OURS]
    assert mine["tokens per second"] == pytest.approx(2 * 8 / mine["seconds"]["median"])
    weights = 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * CFG.hidden_width + 2 * 32) + 32
    needs = r["toy, batch 2"]["each step needs"]
    assert needs["MB of weights"] == pytest.approx(4e-6 * weights)
    token = 2 * 2 * 32 + 2 * 2  # keys and values of two layers, their position and segment
    assert needs["MB of cache"] == pytest.approx(4e-6 * 2 * 10 * token)
    kernels = weights - 5 * 32  # without norms; and each of 10 keys and values in two layers
    assert needs["MFLOP a token"] == pytest.approx(1e-6 * (2 * kernels + 4 * 2 * 32 * 10))
    assert 1e9 * mine["GB at most"] > 4 * weights
    if "ms a token after it" in mine:  # where the clock has told the two apart
        step = 1e-3 * mine["ms a token after it"]
        assert mine["model FLOPs utilization"] == pytest.approx(2 * 1e6 * needs["MFLOP a token"] / step / 1e9)
    mixed = r["toy, mixed"]
    assert mixed["asked"]["requests"] == 5 and mixed["asked"]["slots"] == 2 and mixed["asked"]["longest"] <= 8
    assert mixed[OURS]["requests per second"] == pytest.approx(5 / mixed[OURS]["seconds"]["median"])
    # Five requests in two slots, one row of 16 tokens a prefill: five prompts, or one.
    groups = r["toy, groups of 8"]
    assert [groups[n]["tokens prefilled"] for n in ("different prompts", "groups of 8")] == [5 * 16, 16]
    assert groups["share"] == {"tokens prefilled": 0.2} and groups["groups of 8"]["seconds"]["median"] > 0
    assert "toy, mixed\n  asked/requests" in bench_rows.table(r)
    pytest.importorskip("matplotlib")
    bench_rows.plot(r, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_cache_in_another_dtype_is_told_with_its_bytes_and_its_distance(params):
    load = dataclasses.replace(LOAD, batches=(), requests=0)
    cfg = with_cache_dtype(CFG, "int8")
    r = bench_decode.suite({"toy": lambda: (cfg, params)}, load, "float32", None, lambda _: None)
    told = r["toy, cache"]
    assert told["dtype"] == "int8" and told["bytes a token"] == 2 * (2 * 2 * (16 + 4) + 8)
    assert told["MB a slot"] == pytest.approx(1e-6 * 16 * told["bytes a token"])
    gap = {k: float(v) for k, v in told["|logp - trainer's|, nats"].items()}
    assert told["tokens compared"] == 8 * 8 and 1e-5 < gap["mean"] < gap["max"] < 0.2
    assert "toy, cache\n  dtype" in bench_rows.table(r)


def test_batches_run_until_their_longest_and_give_each_its_own(params):
    asked = []

    def arm(prompts, limits):
        asked.append(limits)
        return [[p[0]] * n for p, n in zip(prompts, limits)]

    prompts, limits = [[i] for i in range(5)], [1, 7, 2, 8, 3]
    right = [[i] * n for i, n in enumerate(limits)]
    assert bench_decode.in_batches(arm, 2, sort=False)(prompts, limits) == right
    assert asked == [[7, 7], [8, 8], [3]]
    assert bench_decode.in_batches(arm, 2, sort=True)(prompts, limits) == right
    assert asked[3:] == [[8, 8], [3, 3], [1]]
    late = {"theirs": lambda prompts, limits: [[0] * (n + 1) for n in limits]}
    with pytest.raises(UserError, match="theirs gave answers of other lengths"):
        bench_decode.continuous(CFG, params, late, {}, LOAD)


def test_bad_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["bench"])
    for options, message in (
        ({"size": ["10mm"]}, "--size=10mm: unknown size; nearest: 10m"),
        ({"size": ["1m"], "workdir": "x"}, "give one of them"),
        ({"batch": ["1", "x"]}, "--batch takes whole numbers"),
        ({"batch": ["0"]}, "--batch takes sizes from 1 to 64"),
        ({"new_tokens": 1}, "must be at least 2"),
        ({"workdir": "nowhere"}, "no such workdir: nowhere"),
    ):
        with flagsaver.flagsaver(suite="decode", **options), pytest.raises(UserError, match=message):
            bench.main()


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is there")
def test_without_torch_it_says_how_to_get_it():
    message = "pip install torch transformers"
    with flagsaver.flagsaver(suite="decode", against="torch"), pytest.raises(UserError, match=message):
        bench.main()


def test_both_sides_are_the_same_model(params):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    arms, logits, made = bench_torch.arms(CFG, params, "float32", LOAD, print)
    arms = {OURS: bench_decode.ours(CFG, params, 2)} | arms
    r = bench_decode.check_equal(CFG, params, logits, arms, LOAD, "float32")
    assert float(r["largest difference of logits"]) < 1e-4 and r["same greedy tokens"] > 0.9
    with pytest.raises(UserError, match="not the same model"):
        bench_decode.check_equal(CFG, params, lambda t: logits(t)[:, :, ::-1], arms, LOAD, "float32")
    said = []
    with bench_torch.continuous(made, LOAD, 2, said.append) as slotted:
        assert slotted or said
        batched = {n: a for n, a in arms.items() if n == "torch, dynamic"}
        found = bench_decode.continuous(CFG, params, slotted, batched, LOAD)
    assert all(found[n]["same greedy tokens"] > 0.8 for n in (*slotted, "torch, dynamic, sorted"))
