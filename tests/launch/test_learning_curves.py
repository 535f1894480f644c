"""The learning curves that a right implementation reaches, by the commands of docs/results/rl.md and at a seed of one's
own choice: JAXLM_TEST_CURVES=7 pytest -n 2 tests/launch/test_learning_curves.py.

Left out unless asked for: a quarter of an hour of one core, by the compiler as users have it.
"""

import json
import os
import subprocess
import sys

import pytest

SEED = os.environ.get("JAXLM_TEST_CURVES")
pytestmark = pytest.mark.skipif(SEED is None, reason="minutes; JAXLM_TEST_CURVES=SEED runs it")


def learned(root, *arguments):
    """The experiment and its control, each with its "curves", "course" and "others" by seed."""
    subprocess.run(
        [sys.executable, "-m", "launch.curves", f"--workdir={root}", f"--seeds={SEED}", *arguments], check=True
    )
    (found,) = json.loads((root / "results.json").read_text())["experiments"].values()
    return found["arms"].values()


def test_ppo_shortens_walks_and_a_coin_does_not(tmp_path):
    ppo, control = learned(tmp_path, "--start=walks_sft", "--experiments=walks_ppo", "--since=25")
    course = ppo["course"][SEED]
    assert course["since"] >= 0.97 and course["lowest since"] >= 0.95
    assert control["course"][SEED]["highest"] <= control["course"][SEED]["start"] + 0.03


def test_grpo_learns_to_add_and_a_coin_teaches_nothing(tmp_path):
    arguments = "--start=addition_sft", "--experiments=addition_grpo", "--metric=eval/pass@1"
    grpo, control = learned(tmp_path, *arguments)
    (voted, _), (before, after) = (grpo["others"][name][SEED] for name in ("eval/majority@8", "eval/pass@8"))
    assert 0.3 < grpo["course"][SEED]["start"] < 0.7
    assert grpo["course"][SEED]["end"] >= max(0.93, voted) and after >= before
    assert control["course"][SEED]["highest"] <= control["course"][SEED]["start"] + 0.03
