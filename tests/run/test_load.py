"""A run read back, or one step of it that has been taken elsewhere."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from jaxlm import sharding, storage
from jaxlm.config import UserError
from jaxlm.run import checkpoint, load, manifest, objectives
from jaxlm.run.policy import policy_of
from jaxlm.sharding import MeshConfig
from tests import tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    tiny_run.make(workdir)
    return workdir


@pytest.fixture
def alone(trained, tmp_path):
    """The folder of a step by itself."""
    return shutil.copytree(trained / "checkpoints" / "7", tmp_path / "anywhere")


def test_a_step_alone_is_read_as_the_run(trained, alone):
    run, whole = load.load_run(alone), load.load_run(trained)
    jax.tree.map(np.testing.assert_array_equal, run.params, whole.params)
    assert (run.experiment, run.model, run.step, run.sha256) == (whole.experiment, whole.model, 7, whole.sha256)
    assert run.tokenizer.hash == whole.tokenizer.hash and policy_of(run).hash == whole.sha256
    assert load.load_run(alone, "latest").step == load.load_run(alone, 7).step == 7
    with pytest.raises(UserError, match="is the folder of step 7 alone, not of 6"):
        load.load_run(alone, 6)


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json", "manifest.json"])
def test_what_it_carries_is_hashed(alone, name):
    text = (alone / name).read_text()
    (alone / name).write_text(text.replace("1", "2", 1))
    with pytest.raises(UserError, match=f"damaged.*{name}"):
        checkpoint.saved(alone)


def test_a_step_is_hashed_once(trained, monkeypatch):
    seen, problem = [], manifest.problem
    monkeypatch.setattr(manifest, "problem", lambda folder, full=True: seen.append(folder) or problem(folder, full))
    load.load_run(trained)
    load.load_run(trained, 7)
    assert [p.name for p in seen] == ["7", "7"]


def test_what_a_run_begins_with_is_hashed_once_unless_its_files_change(trained, tmp_path, monkeypatch):
    """For lineage, for the parameters and for the reference; a file that is only touched might have been changed."""
    seen, problem = [], manifest.problem
    monkeypatch.setattr(manifest, "problem", lambda folder, *a, **k: seen.append(folder) or problem(folder, *a, **k))
    run = shutil.copytree(trained, tmp_path / "run")
    e, mesh = dataclasses.replace(load.load_bound(run), parent=str(run)), sharding.make_mesh(MeshConfig(fsdp=1))
    records = objectives.origin_records(e)
    first, second = (objectives.read_origin(e, "parent", mesh, records)[1] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert len(seen) == 1
    file = max((run / "checkpoints" / "7").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    os.utime(file, ns=(1, 1))
    objectives.read_origin(e, "parent", mesh, records)
    assert len(seen) == 2
    file.write_bytes(bytes(file.stat().st_size))
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match=f"damaged.*{file.name}"):
        objectives.read_origin(e, "parent", mesh, records)


def test_a_step_that_is_pruned_while_it_is_looked_at_is_a_step_that_is_gone(trained, tmp_path, monkeypatch):
    run, files = shutil.copytree(trained, tmp_path / "run"), storage.files
    e, mesh = dataclasses.replace(load.load_bound(run), parent=str(run)), sharding.make_mesh(MeshConfig(fsdp=1))
    records = objectives.origin_records(e)

    def listed(folder):
        found = files(folder)
        shutil.rmtree(folder)
        return found

    monkeypatch.setattr(storage, "files", listed)
    with pytest.raises(UserError, match="has no checkpoint of step 7; it has none"):
        objectives.read_origin(e, "parent", mesh, records)


def test_steps_of_before_they_carried_anything_are_read(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    step = run / "checkpoints" / "7"
    for name in ("config.json", "tokenizer/tokenizer.json"):
        (step / name).unlink()
    about = json.loads((step / "manifest.json").read_text())
    about["files"] = {k: v for k, v in about["files"].items() if (step / k).exists()}
    del about["metric"], about["best"], about["sha256"]
    (step / "manifest.json").write_text(json.dumps(about | {"sha256": manifest._self_hash(about)}))

    before = load.load_run(trained)
    jax.tree.map(np.testing.assert_array_equal, load.load_run(run).params, before.params)
    with checkpoint.Checkpoints(run, checkpoint.Checkpointing(every=1)) as c:
        c.save(8, {"params": before.params}, metric=2.0)
    assert manifest.read(run / "checkpoints" / "8")["best"] == {"step": 8, "metric": 2.0}
    with pytest.raises(UserError, match="is a checkpoint of before they held their definition: read it in its run"):
        load.load_run(step)
