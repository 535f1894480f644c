"""A sample of the faults, each class among them; all of them: python -m tests.faults.run --help."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.config import UserError
from tests.faults import tally
from tests.faults.faults import CLASSES, FAULTS, Fault
from tests.faults.trial import (
    End,
    Start,
    Trial,
    Wrong,
    adds_up,
    near_history,
    same_batches,
    same_history,
    same_state,
)
from tests.source import ROOT

SAMPLE = (
    "pretrain/kill while saving/1",
    "pretrain/full disk/2",
    "pretrain/other devices/0",
    "pretrain/data changed/0",
    "sft/SIGTERM/1",
    "sft/poisoned and interrupted/0",
    "grpo/kill/1",
    "grpo/flipped bit/1",
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """In one process of its own, whose children are its forks: it must not have started a device."""
    folder = tmp_path_factory.mktemp("faults")
    only = [f"--only={one}" for one in SAMPLE]
    command = [sys.executable, "-m", "tests.faults.run", *only, f"--out={folder / 'out.jsonl'}"]
    done = subprocess.run([*command, f"--folder={folder}"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len(found) == len(SAMPLE), done.stdout + done.stderr
    assert done.returncode == int(any(r["ok"] is False for r in found))
    return found


@pytest.mark.parametrize("n", range(len(SAMPLE)), ids=SAMPLE)
def test_comes_out_as_it_must(records, n):
    if records[n]["ok"] is None:
        pytest.skip(records[n]["outcome"])
    assert records[n]["ok"], records[n]


def test_the_sample_has_every_class():
    kinds = {f.name: f.kind for f in FAULTS}
    assert {kinds[one.split("/")[1]] for one in SAMPLE} == {f.kind for f in FAULTS} == set(CLASSES)


END = End(
    workdir=Path("run"),
    step=2,
    state={"params/w": "a", "opt_state/mu": "b"},
    finite=True,
    history=[{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": float("nan")}],
    batches={0: ["x"], 1: ["y", "y"]},
)


def changed(**values) -> End:
    return dataclasses.replace(END, **values)


@pytest.mark.parametrize(("other", "check", "words"), [
    (changed(step=1), same_state, "ended at step 1, not 2"),
    (changed(state=END.state | {"opt_state/mu": "c"}), same_state, "1 of 2 arrays differ, the first opt_state/mu"),
    (changed(state={"params/w": "a"}), same_state, "the first opt_state/mu"),
    (changed(state=END.state | {"more": "c"}), same_state, "the first more"),
    (changed(batches=END.batches | {1: ["y", "z"]}), same_batches, "another batch at step 1"),
    (changed(batches={0: ["x"]}), same_batches, r"batches of steps \[0\], not of \[0, 1\]"),
    (changed(history=END.history[:1]), same_history, r"the steps \[1\], not of \[1, 2\]"),
    (changed(history=[END.history[0], {"step": 2, "train/loss": 0.5}]), same_history, "step 2 differ in train/loss"),
    (changed(history=[{"step": 1, "train/loss": 1.01}, END.history[1]]), near_history, "is 1.01, not 1"),
])  # fmt: skip
def test_what_differs_is_noticed(other, check, words):
    tolerance = (1e-4,) if check is near_history else ()
    with pytest.raises(Wrong, match=words):
        check(other, END, *tolerance)
    if check is not near_history:
        check(END, END)


WHOLE = Start(code=0, seconds=60.0, logged=57.0, closed=57.0, struck=())
KILLED = Start(code=137, seconds=60.0, logged=20.0, closed=None, struck=({"struck": "SIGKILL"},))


@pytest.mark.parametrize(("starts", "accounted", "words"), [
    ([KILLED, WHOLE], 1.0, "1.00 s are accounted for, of 77.00 s"),
    ([KILLED, WHOLE], 78.0, "78.00 s are accounted for"),
    ([KILLED, dataclasses.replace(WHOLE, logged=50.0)], 70.0, "start 2 logged 50.00 s of the 57.00 s"),
    ([dataclasses.replace(KILLED, logged=61.0), WHOLE], 118.0, "start 1 took 60.00 s, and logged 61.00 s"),
    ([dataclasses.replace(WHOLE, logged=62.0, closed=62.0)], 62.0, "start 1 took 60.00 s"),
])  # fmt: skip
def test_seconds_that_do_not_add_up_are_noticed(starts, accounted, words):
    with pytest.raises(Wrong, match=words):
        adds_up(starts, accounted)
    adds_up([KILLED, WHOLE], 77.0)


def test_a_fault_that_never_came_is_no_pass(tmp_path):
    def script(t: Trial) -> None:
        t.starts.append(KILLED)
        t.struck("SIGKILL")
        t.starts.append(WHOLE)
        t.struck("SIGKILL")

    record = tally.trial("pretrain", Fault("x", "interrupted", script), 0, "save", tmp_path)
    assert record["ok"] is None and record["outcome"] == "not struck: start 2 was over before SIGKILL came"
    last = tally.table([record, record | {"ok": True, "outcome": "as expected"}]).splitlines()[-1]
    assert last.split() == ["all", "2", "1", "0", "1", "0"]


def test_a_trial_by_name():
    kill = FAULTS[0]
    assert tally.one("sft/kill/3") == ("sft", kill, 3, None) and tally.one("sft/kill/3/save") == (
        "sft",
        kill,
        3,
        "save",
    )
    for wrong in (
        "sft/kill",
        "sft/kill/x",
        "sft/kill/3/lunch",
        "sft/spike/3/save",
        "sft/kill/3/save/1",
        "lunch/kill/3",
    ):
        with pytest.raises(UserError, match=f"--only={wrong} is not STAGE/FAULT/SEED"):
            tally.one(wrong)
