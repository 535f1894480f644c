"""Two and four real processes on loopback train as one device does: the same batches, losses and gradients.

A sample of `python -m tests.meshes`, which has every stage and every scheme.
"""

import pytest

from tests import meshes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one_device_does(root, stage, processes):
    found = meshes.compared(root, stage, "replica_fsdp", processes)  # compares the batches itself
    assert found["logged"] <= meshes.WITHIN
    assert found["gradients"] <= meshes.WITHIN, found["worst"]
