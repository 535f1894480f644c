"""Where a run's time goes, over restarts; what ends a run that hangs or has too little memory."""

import json
import threading
import time

import jax
import pytest

from jaxlm.config import UserError
from jaxlm.run import goodput, loop
from jaxlm.run.exits import Abandoned
from jaxlm.run.goodput import Clock
from jaxlm.run.watchdog import EXIT_HUNG, Watchdog


def test_every_second_belongs_to_one_phase():
    now = iter([0.0, 2.0, 3.0, 7.0, 8.0, 8.5, 10.0, 10.0, 10.0]).__next__
    clock = Clock(now)  # 0
    with clock.phase("step"):  # 2: two seconds of initialising
        with clock.phase("data"):  # 3: one of training
            pass  # 7: four of waiting
        with pytest.raises(ValueError), clock.phase("save"):  # 8: one of training
            raise ValueError  # 8.5
        assert clock.take() == {  # 10
            "seconds/initialise": 2.0, "seconds/step": 1.0 + 1.0 + 1.5, "seconds/data": 4.0, "seconds/save": 0.5,
        }  # fmt: skip
        assert clock.take() == {}


def test_what_is_abandoned_was_lost():
    now = iter([0.0, 2.0, 3.0, 7.0, 8.0, 8.0, 10.0, 10.0]).__next__
    clock = Clock(now)
    with clock.phase("step"):  # 2
        with pytest.raises(Abandoned), clock.phase("step"):  # 3
            clock.alive()  # 7
            raise Abandoned  # 8
        clock.beside({"checkpoint/hash_seconds": 0.5})
        found = clock.take()  # 10
    assert found == {
        "seconds/initialise": 2.0, "seconds/step": 1.0 + 2.0, "seconds/lost": 5.0, "checkpoint/hash_seconds": 0.5,
    }  # fmt: skip


def write(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def times(at: int, **phases: float) -> dict:
    return {"step": at} | {f"seconds/{k}": v for k, v in phases.items()}


def test_steps_taken_again_are_lost_and_everything_adds_up(tmp_path):
    write(
        tmp_path,
        times(1, initialise=3.0, compile=5.0),
        times(10, step=9.0, data=1.0),
        {"step": 10, "eval/all/loss": 1.0},
        times(20, step=10.0, evaluate=2.0, save=1.0),
        times(30, step=10.0, data=0.5, evaluate=2.0),
        times(21, initialise=3.0, restore=1.0, compile=0.5),  # killed after 30 and gone on with from 20
        times(30, step=9.0),
        times(30, save=0.5, lost=2.0),
    )
    found = goodput.account(tmp_path)
    assert found == {
        "initialise": 6.0, "restore": 1.0, "compile": 5.5, "data": 1.0, "step": 28.0, "evaluate": 4.0, "save": 1.5,
        "lost": 12.5,
    }  # fmt: skip
    assert sum(found.values()) == 59.5
    assert goodput.text(found).startswith("60 s: step 47.1%, lost 21.0%, initialise 10.1%")


def test_a_restart_from_the_very_step_that_was_logged_last_loses_nothing(tmp_path):
    write(tmp_path, times(5, initialise=1.0, step=4.0), times(6, initialise=1.0, step=1.0))
    assert goodput.account(tmp_path) == {"initialise": 2.0, "step": 5.0}


def test_a_process_that_takes_no_step_loses_none(tmp_path):
    """It came for an evaluation alone that was owed."""
    write(tmp_path, times(5, initialise=1.0, compile=4.0), times(9, step=8.0), times(9, initialise=1.0, evaluate=2.0))
    assert goodput.account(tmp_path) == {"initialise": 2.0, "compile": 4.0, "step": 8.0, "evaluate": 2.0}


def test_a_run_without_times_has_no_account(tmp_path):
    write(tmp_path, {"step": 1, "train/loss": 1.0})
    assert goodput.account(tmp_path) == {}


# ------------------------------------------------------------------------------------------------------------ a hang
def test_a_hang_ends_the_process_and_leaves_the_stacks(tmp_path, capfd):
    clock, ended = Clock(), threading.Event()
    codes = []

    def end(code):
        codes.append(code)
        ended.set()

    def stuck_in_a_collective():
        assert ended.wait(30)

    with Watchdog(clock, 0.05, tmp_path, end):
        stuck_in_a_collective()
    assert codes == [EXIT_HUNG]
    assert "stuck_in_a_collective" in (tmp_path / "stacks-0.txt").read_text()
    assert "hung: nothing has ended for" in capfd.readouterr().err


@pytest.mark.parametrize("limit", [None, 3600.0])
def test_no_hang_is_seen_where_phases_end_or_no_limit_is_set(tmp_path, limit):
    clock = Clock()
    with Watchdog(clock, limit, tmp_path, lambda code: pytest.fail("ended")), clock.phase("step"):
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- memory
def test_too_little_memory_says_what_to_change():
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB"
    said = r"out of memory on cpu \(asked for 12.50GiB\): set train.accumulation"
    with pytest.raises(UserError, match=said), loop.memory_advice():
        raise jax.errors.JaxRuntimeError(text)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), loop.memory_advice():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
