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

    def run(*workdirs, out=None) -> list[list[str]]:
        with flagsaver.flagsaver((goodput.WORKDIR, [str(w) for w in workdirs]), (goodput.OUT, out)):
            assert goodput.main() == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    return run


def write(folder, *records):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_runs_side_by_side(call, tmp_path):
    again = {"step": 1, "seconds/initialise": 1.0, "seconds/compile": 1.0}
    a = write(tmp_path / "a", again | {"seconds/step": 3.0}, again | {"seconds/step": 4.0})
    b = write(tmp_path / "b", {"step": 1, "seconds/step": 1.0})
    head, *rows = call(a, b)
    assert head == ["initialise", "restore", "compile", "data", "step", "evaluate", "save", "lost", "goodput"]
    assert rows[0] == [str(a), "2.0", "0.0", "2.0", "0.0", "4.0", "0.0", "0.0", "3.0", "36.4%"]
    assert rows[1][-1] == "100.0%"


def test_a_run_without_times_is_refused(call, tmp_path):
    with pytest.raises(UserError, match="before its phases were timed"):
        call(write(tmp_path / "old", {"step": 1, "train/loss": 1.0}))
    with pytest.raises(UserError, match="--workdir=RUN is missing"):
        call()
    with pytest.raises(UserError, match=r"--out takes the name of a .png file, got 'x\.jpg'"):
        call(tmp_path / "old", out="x.jpg")


def step(at: int, first: bool = False, **parts: float) -> dict:
    """A record of a step of reinforcement learning, seconds by part."""
    about = {"train/seconds_to_first_step": 9.0} if first else {}
    return {"step": at, "seconds/step": 1.0} | about | {f"train/seconds/{k}": v for k, v in parts.items()}


def test_the_parts_of_a_step_add_up_in_the_table_and_are_drawn(call, tmp_path):
    """Of four steps the middle two count: neither the shortest, nor the one that was held up, nor a first one."""
    ppo = dict(reward=0.1, old_logprobs=0.2, ref_logprobs=0.2, values=0.1, update=0.4, host=0.2)
    rollouts = enumerate((0.7, 0.9, 60.0, 0.1), 2)
    a = write(tmp_path / "a", step(1, True, rollout=30.0), *(step(n, rollout=s, **ppo) for n, s in rollouts))
    b = write(tmp_path / "b", step(1, True, rollout=1.0), step(2, rollout=0.3, reward=0.1, update=0.1))
    other = write(tmp_path / "other", {"step": 1, "seconds/step": 3.0})
    _, *phases, head, ppo, shares, grpo, _ = call(a, b, other, out=str(tmp_path / "parts.png"))
    assert [row[0] for row in phases if row] == [str(a), str(b), str(other)]
    parts = ["rollout", "reward", "old_logprobs", "ref_logprobs", "values", "update", "host"]
    assert head == ["a", "step,", "ms", *parts, "all", "of", "steps"]
    assert ppo == [str(a), "800.0", "100.0", "200.0", "200.0", "100.0", "400.0", "200.0", "2000.0", "2"]
    assert shares == ["40.0%", "5.0%", "10.0%", "10.0%", "5.0%", "20.0%", "10.0%", "100.0%"]
    assert grpo == [str(b), "300.0", "100.0", "0.0", "0.0", "0.0", "100.0", "0.0", "500.0", "1"]
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")


def test_there_is_nothing_to_draw_of_other_trainings(call, tmp_path):
    other = write(tmp_path / "other", {"step": 1, "seconds/step": 3.0})
    assert len(call(other)) == 2
    with pytest.raises(UserError, match="--out draws steps of reinforcement learning"):
        call(other, out=str(tmp_path / "parts.png"))
