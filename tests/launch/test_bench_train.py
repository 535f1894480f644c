"""The training benchmark: what it times is the update of a run, and the other side makes the same one."""

import dataclasses
import functools
import importlib.util
import math

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm import tree
from jaxlm.config import UserError
from jaxlm.nn.transformer import ModelConfig
from jaxlm.run.log import best_rate
from launch import bench, bench_decode, bench_rows, bench_torch, bench_train, bench_train_torch
from launch.bench_rows import OURS
from launch.bench_train import CHECKED, Load, Shape, check_equal

flags.FLAGS.set_gnu_getopt(True)
ROWS, LENGTH, WIDTH, LAYERS, VOCABULARY = 2, 8, 32, 1, 64
LOAD = Load(repetitions=2, compile_seconds=0)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A size of its own, for which all that the suite does takes a second."""
    model = ModelConfig(layers=LAYERS, width=WIDTH, heads=2, tied=True, scan=False)
    monkeypatch.setitem(bench_train.SIZES, "toy", model)
    monkeypatch.setitem(bench_train.SHAPES, "toy", Shape(VOCABULARY, (ROWS, LENGTH), (ROWS, LENGTH)))
    monkeypatch.setattr(bench_train, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(bench_train, "measured_peak", lambda dtype: {"float32": 1e9, "bfloat16": 2e9}[dtype])


def runs(*settings: str, dtypes=bench_train.DTYPES):
    return {dtype: bench_train.definition("toy", ROWS, LENGTH, dtype, settings) for dtype in dtypes}


def test_our_side_alone(tmp_path):
    r = bench_train.suite(["toy"], LOAD, None, lambda line: None)
    assert list(r) == ["matrix product", *(f"toy, {p}" for p in ("shape", "losses, bfloat16", "float32", "bfloat16"))]
    about = r["toy, shape"]
    kernels = 12 * LAYERS * WIDTH**2 + VOCABULARY * WIDTH
    assert about["MFLOP a token"] == pytest.approx(1e-6 * (6 * kernels + 12 * LAYERS * LENGTH * WIDTH))
    assert about["parameters"] > kernels and (about["rows"], about["tokens a row"]) == (ROWS, LENGTH)
    for dtype, peak in (("float32", 1e9), ("bfloat16", 2e9)):
        mine = r[f"toy, {dtype}"][OURS]
        assert mine["tokens per second"] == pytest.approx(ROWS * LENGTH / mine["seconds"]["median"])
        share = mine["tokens per second"] * about["MFLOP a token"] * 1e6 / peak
        assert mine["model FLOPs utilization"] == pytest.approx(share)
        assert 12 * about["parameters"] < 1e9 * mine["GB at most"] < 100 * about["parameters"]
    assert "toy, float32\n  jaxlm/seconds" in bench_rows.table({"load": LOAD.shown()} | r)
    pytest.importorskip("matplotlib")
    bench_rows.plot(r, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_runs_at_once_are_timed_beside_one_and_the_first_of_them_is_that_one():
    load = dataclasses.replace(LOAD, dtypes=("float32",), at_once=3)
    r = bench_train.suite(["toy"], load, None, lambda line: None)
    one, three = r["toy, float32"][OURS], r["toy, float32"]["3 at once"]
    assert three["tokens per second"] == pytest.approx(3 * ROWS * LENGTH / three["seconds"]["median"])
    assert 2 * one["GB at most"] < three["GB at most"] < 4 * one["GB at most"]
    assert list(r["toy, losses, float32"]) == ["3 at once"]
    assert r["toy, float32"]["times as fast"]["as"] == "3 at once"


def test_an_arm_scores_each_next_token_and_starts_over_from_the_same_weights():
    e = runs(dtypes=("float32",))
    rows = bench_train.made_rows(e["float32"])
    arms, initial = bench_train.ours(e, rows)
    losses = arms["float32"].steps(CHECKED)
    scores = np.asarray(bench_decode._logits(e["float32"].model, initial, rows[0][:, :-1]))
    logprobs = np.asarray(jax.nn.log_softmax(scores))
    by_hand = -np.take_along_axis(logprobs, rows[0][:, 1:, None], axis=-1).mean()
    assert losses[0] == pytest.approx(by_hand, rel=1e-5)
    assert losses[-1] < losses[1]  # the same rows, seen once before
    arms["float32"].restart()
    assert arms["float32"].steps(CHECKED) == losses


def test_losses_that_differ_are_refused():
    shown = check_equal({"a": [2.0, 1.0], "b": [2.0001, 1.0]}, [2.0, 1.0005], "float32")
    assert shown == {"a": "0.0e+00, then 5.0e-04", "b": "5.0e-05, then 5.0e-04"}
    with pytest.raises(UserError, match=r"b in float32 finds a loss that is off by 0\.001 before the first update"):
        check_equal({"a": [2.0, 1.0], "b": [2.002, 1.0]}, [2.0, 1.0], "float32")
    for wrong in (1.1, math.nan):
        with pytest.raises(UserError, match=r"within 1 updates; 0\.01 is allowed"):
            check_equal({"b": [2.0, wrong]}, [2.0, 1.0], "bfloat16")


def test_bad_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["bench"])
    for options, message in (
        ({"size": ["7b"]}, "--size=7b: unknown size; valid: 1m, 10m"),
        ({"batch": ["0"]}, "--batch takes sizes of at least 1"),
        ({"batch": ["x"]}, "--batch takes whole numbers"),
        ({"context": 1}, "--context must be at least 2"),
        ({"set": ["train.batch_size=3"]}, "are --batch and --context here"),
        ({"set": ["optimizer=Lion"]}, "both sides train with AdamW"),
        ({"set": ["model.no_such=1"]}, "no_such"),
    ):
        with flagsaver.flagsaver(suite="train", **options), pytest.raises(UserError, match=message):
            bench.main()


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is there")
def test_without_torch_it_says_how_to_get_it():
    message = "pip install torch transformers"
    with flagsaver.flagsaver(suite="train", against="torch"), pytest.raises(UserError, match=message):
        bench.main()


def test_both_sides_make_the_same_updates(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_torch, "best_rate", functools.partial(best_rate, seconds=1e-3))
    r = bench_train.suite(["toy"], LOAD, bench_train_torch, lambda line: None)
    names = {OURS, "torch, transformers", "torch, script"}
    for dtype in bench_train.DTYPES:
        assert names - set(r[f"toy, losses, {dtype}"]) <= {OURS} and names < set(r[f"toy, {dtype}"])
        assert r[f"toy, {dtype}"]["times as fast"]["as"] in names
        for name in names:
            assert 12 * r["toy, shape"]["parameters"] < 1e9 * r[f"toy, {dtype}"][name]["GB at most"] < 1e7


@pytest.mark.parametrize("setting", ["optimizer.b1=0.5", "optimizer.weight_decay=9.0", "train.clip=0.01"])
def test_another_update_is_seen(setting):
    """A larger step than the default makes the difference show in six updates of so small a model."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    e = runs("optimizer.lr=0.01", "optimizer.eps=0.01", dtypes=("float32",))
    rows = bench_train.made_rows(e["float32"])
    mine, initial = bench_train.ours(e, rows)
    own = mine["float32"].steps(CHECKED)
    for settings, same in ((), True), ((setting,), False):
        theirs = runs("optimizer.lr=0.01", "optimizer.eps=0.01", *settings, dtypes=("float32",))["float32"]
        arms = bench_train_torch.arms(theirs, initial, rows, ("float32",), 0, print)
        losses = {name: arm.steps(CHECKED) for (_, name), arm in list(arms.items())[:1]}
        if same:
            check_equal(losses, own, "float32")
        else:
            with pytest.raises(UserError, match="within 5 updates"):
                check_equal(losses, own, "float32")


def test_what_does_not_decay_is_what_has_one_dim():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    e = runs(dtypes=("float32",))["float32"]
    _, initial = bench_train.ours({"float32": e}, bench_train.made_rows(e))
    made = bench_train_torch.model(e.model, initial, "float32", LENGTH)
    decays, rest = bench_train_torch.optimizer_of(e, made).param_groups
    count = sum(p.numel() for p in decays["params"])
    assert count == VOCABULARY * WIDTH + LENGTH * WIDTH + 12 * LAYERS * WIDTH**2 and decays["weight_decay"] > 0
    assert count + sum(p.numel() for p in rest["params"]) == tree.count(initial) and rest["weight_decay"] == 0


def test_the_shape_follows_the_flags():
    e = bench_train.definition("1m", 3, 16, "bfloat16", ("model.scan=true", "train.clip=none"))
    assert (e.train.batch_size, e.data.context, e.model.positions.length) == (3, 16, 16)
    assert e.model.scan and e.train.clip is None and e.model.precision.compute == "bfloat16"
    assert e.model.precision.params == "float32" and set(bench_train.SHAPES) - {"toy"} <= set(bench_train.SIZES)
    assert dataclasses.replace(e.model, scan=False) == bench_train.definition("1m", 3, 16, "bfloat16").model
