import io
import json
import math
import time

import jax
import jax.numpy as jnp
import pytest

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.run import log


def write(workdir, *records):
    m = log.MetricsLog(workdir)
    for step, values in records:
        m.write(step, values)
    m.close()


def column(workdir, name):
    return [(r["step"], r[name]) for r in log.read_metrics(workdir) if name in r]


def test_records_of_a_step_are_joined(tmp_path):
    write(tmp_path, (1, {"train/loss": 3.0}), (2, {"train/loss": 2.0}), (2, {"eval/a/loss": 2.5}))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [1, 2, 2]
    read = log.read_metrics(tmp_path)
    assert [r["step"] for r in read] == [1, 2]
    assert read[1]["train/loss"] == 2.0 and read[1]["eval/a/loss"] == 2.5 and read[1]["seconds"] >= 0


def test_a_resumed_run_supersedes_what_it_had_logged_beyond_its_checkpoint(tmp_path):
    write(tmp_path, *((s, {"train/loss": float(s)}) for s in (1, 10, 20, 30)))
    write(tmp_path, (16, {"train/loss": 16.5}), (20, {"train/loss": 20.5}))  # resumed from step 15
    assert column(tmp_path, "train/loss") == [(1, 1.0), (10, 10.0), (16, 16.5), (20, 20.5)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6  # the history is kept


def test_a_torn_last_line_is_cut_off_and_said(tmp_path, caplog):
    write(tmp_path, (1, {"train/loss": 3.0}))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2, "train/lo')
    assert column(tmp_path, "train/loss") == [(1, 3.0)]  # also while it is being written
    write(tmp_path, (2, {"train/loss": 2.0}))
    assert "torn line" in caplog.text
    assert column(tmp_path, "train/loss") == [(1, 3.0), (2, 2.0)]
    assert all(json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_not_finite_is_null_in_the_file_and_nan_for_the_reader(tmp_path):
    write(tmp_path, (1, {"a": math.nan, "b": math.inf}))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    read = log.read_metrics(tmp_path)[0]
    assert math.isnan(read["a"]) and math.isnan(read["b"])


def test_seconds_go_on_over_a_restart(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 100.0}\n')
    write(tmp_path, (2, {"a": 1.0}))
    assert 100 <= log.read_metrics(tmp_path)[-1]["seconds"] < 130


def test_no_metrics(tmp_path):
    with pytest.raises(UserError, match="has no metrics"):
        log.read_metrics(tmp_path)


def test_numbered_parts_where_nothing_can_be_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "is_local", lambda p: False)
    write(tmp_path, (1, {"a": 1.0}), (2, {"a": 2.0}))
    write(tmp_path, (2, {"a": 2.5}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics-000001.jsonl", "metrics-000002.jsonl"]
    assert column(tmp_path, "a") == [(1, 1.0), (2, 2.5)]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    m = log.MetricsLog(tmp_path, tensorboard=True)
    m.write(1, {"train/loss": 2.0})
    m.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


VALUES = {"train/loss": 3.25, "train/tokens_per_second": 12345.0, "train/model_flops_utilization": 0.417}


def test_live_line_on_a_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    out = Terminal()
    p = log.Progress(100, 0, "peak 1 TFLOP/s", stream=out)
    p.update(10, VALUES)
    now[0] = 30.0
    p.update(20, VALUES)
    p.note(20, {"eval/all/loss": 3.1})
    p.close()
    text = out.getvalue()
    assert text.startswith("from step 0 to 100; peak 1 TFLOP/s\n")
    assert "\rstep 20/100  loss 3.2500  12.3k tokens/s  MFU 41.7%  ETA 4:00" in text
    assert text.endswith("step 20/100  eval/all/loss 3.1000\n")


def test_plain_lines_elsewhere(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    p = log.Progress(100, stream=out)
    for step in range(1, 101):
        now[0] += 1.0
        p.update(step, VALUES)
    p.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 11 and lines[-1].startswith("step 100/100") and "\r" not in out.getvalue()


def test_units():
    assert [log.short(x) for x in (12.34, 12345, 5e6, 2.5e13)] == ["12.3", "12.3k", "5M", "25T"]
    assert [log.clock(x) for x in (5, 75, 4000)] == ["0:05", "1:15", "1:06:40"]


def test_datasheet():
    assert log.datasheet_peak("NVIDIA H200", "bfloat16") == 989e12
    assert log.datasheet_peak("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert log.datasheet_peak("TPU v5 lite", "bfloat16") == 197e12
    assert log.datasheet_peak("TPU v5p", "bfloat16") == 459e12
    assert log.datasheet_peak("cpu", "float32") is None
    assert log.datasheet_peak("NVIDIA H100", "float16") is None


def test_what_compiling_takes_is_not_counted_to_the_peak(monkeypatch):
    now, called = [0.0], []
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])

    def product(n):
        def multiply():
            now[0] += 60.0 if n not in called else 1e-5 + 2 * n**3 / 5e14  # a call takes 10 microseconds besides
            called.append(n)

        return multiply

    assert log.best_rate(product) == pytest.approx(5e14, rel=0.01)
    assert called[-1] == max(called) == 16384


def test_measured_peak_is_quick_and_plausible():
    began = time.perf_counter()
    value, how = log.peak_flops("float32")
    assert time.perf_counter() - began < 5  # half a second on a machine of its own
    assert "measured" in how and "shared by 8 host devices" in how
    a = jnp.ones((256, 256))
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    began = time.perf_counter()
    for _ in range(10):
        multiply(a).block_until_ready()
    one = 10 * 2 * 256**3 / (time.perf_counter() - began)
    assert value * 8 > 0.3 * one
    assert log.peak_flops("float32") == (value, how)  # measured once
