"""launch.goodput on runs whose seconds are known."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from launch import goodput

flags.FLAGS.set_gnu_getopt(True)


@pytest.fixture
def call(capsys):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])

    def run(*workdirs) -> list[list[str]]:
        with flagsaver.flagsaver(workdir=[str(w) for w in workdirs]):
            assert goodput.main() == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    return run


def write(folder, *records):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_runs_side_by_side(call, tmp_path):
    again = {"step": 1, "seconds/initialise": 1.0}
    a = write(tmp_path / "a", again | {"seconds/step": 3.0}, again | {"seconds/step": 4.0})
    b = write(tmp_path / "b", {"step": 1, "seconds/step": 1.0})
    head, *rows = call(a, b)
    assert head == ["initialise", "restore", "compile", "data", "step", "evaluate", "save", "lost", "goodput"]
    assert rows[0] == [str(a), "2.0", "0.0", "0.0", "0.0", "4.0", "0.0", "0.0", "3.0", "44.4%"]
    assert rows[1][-1] == "100.0%"


def test_a_run_without_times_is_refused(call, tmp_path):
    with pytest.raises(UserError, match="before its phases were timed"):
        call(write(tmp_path / "old", {"step": 1, "train/loss": 1.0}))
    with pytest.raises(UserError, match="--workdir=RUN is missing"):
        call()
