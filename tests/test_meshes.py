"""Two and four real processes on loopback train as one device does: the same batches, losses and gradients.

A sample of `python -m tests.meshes`, which has every stage and every scheme.
"""

import itertools
import json
import subprocess
import sys

import pytest

from tests.source import ROOT

SAMPLE = tuple(itertools.product(("pretrain", "sft", "ppo"), (2, 4)))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By stage and processes. In one process of its own, whose children are its forks: it must not have started a
    device."""
    out = tmp_path_factory.mktemp("meshes") / "out.json"
    stages = [f"--stage={stage}" for stage in dict.fromkeys(stage for stage, _ in SAMPLE)]
    command = [sys.executable, "-m", "tests.meshes", "--scheme=replica_fsdp", "--process_counts=2,4", "--limit=600"]
    done = subprocess.run([*command, *stages, f"--out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert out.exists(), done.stdout + done.stderr
    return {(r["stage"], r["processes"]): r for r in json.loads(out.read_text())}


@pytest.mark.parametrize("stage, processes", SAMPLE)
def test_processes_train_as_one_device_does(found, stage, processes):
    assert found[stage, processes]["ok"], found[stage, processes]
