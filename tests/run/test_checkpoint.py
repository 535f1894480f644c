import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import storage, tree
from jaxlm.config import UserError
from jaxlm.run import checkpoint, lineage, manifest
from jaxlm.run.checkpoint import Checkpointing, Checkpoints
from jaxlm.run.exits import Diverged


@struct.dataclass
class State:
    params: dict
    opt_state: object
    step: jax.Array


OPTIMIZER = optax.adamw(1e-3)


def make_state(seed=0, width=16):
    k = jax.random.split(jax.random.key(seed), 3)
    params = {
        "backbone": {"w": jax.random.normal(k[0], (8, width)), "half": jax.random.normal(k[1], (3,), jnp.bfloat16)},
        "adapters": {},
    }
    return State(params, OPTIMIZER.init(params), jnp.int32(seed))


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(workdir, upto, cfg=None, metrics=None):
    """Steps 1..upto saved in `workdir`, each with the state of its own seed."""
    with Checkpoints(workdir, cfg or Checkpointing(every=1, keep_latest=10)) as c:
        for step in range(1, upto + 1):
            assert c.save(step, make_state(step), {"tokens": 100 * step}, metric=metrics[step - 1] if metrics else None)
    return workdir / "checkpoints"


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file() and "/d/" in str(p)), key=lambda p: p.stat().st_size)


def test_round_trip_is_bit_equal_and_keeps_the_tree(tmp_path):
    state = make_state(7)
    with Checkpoints(tmp_path, Checkpointing(every=5)) as c:
        assert not c.save(7, state)  # not due
        assert c.save(10, state, {"loader": {"step": 10}}, metric=1.5)
        assert not c.save(10, state, force=True)  # is saved already
        got, metadata = c.restore(abstract(state))
        assert_bit_equal(got, state)
        assert metadata == {"loader": {"step": 10}}
        with pytest.raises(ValueError, match="step 10 is saved already"):
            c.save(5, state)
    with Checkpoints(tmp_path, Checkpointing(every=5)) as c:  # a new program
        assert c.latest() == 10
        assert_bit_equal(c.restore(jax.eval_shape(make_state))[0], state)


def test_what_a_save_and_a_verification_took_is_told_once(tmp_path):
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        assert c.cost() == {}
        c.save(1, make_state(1))
        c.wait()
        took = c.cost()
        assert list(took) == ["checkpoint/hash_seconds", "checkpoint/write_seconds"] and c.cost() == {}
        assert 0 < took["checkpoint/hash_seconds"] < took["checkpoint/write_seconds"]
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        c.latest()
        assert c.cost()["checkpoint/verify_seconds"] > 0


def test_relative_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/a", Checkpointing(every=1)) as c:
        c.save(1, {"params": {"w": jnp.ones(3)}})
    assert (tmp_path / "runs/a/checkpoints/1/manifest.json").exists()
    monkeypatch.chdir("/")
    assert checkpoint.newest(tmp_path / "runs/a") == 1


def test_parameters_alone_and_metadata(tmp_path):
    saved(tmp_path, 2)
    params = make_state(2).params
    assert_bit_equal(checkpoint.restore_params(tmp_path, abstract(params)), params)
    assert_bit_equal(checkpoint.restore_params(tmp_path, abstract(params), step=1), make_state(1).params)
    assert checkpoint.read_metadata(tmp_path) == {"tokens": 200, "step": 2}
    with pytest.raises(UserError, match="no checkpoint of step 9"):
        checkpoint.restore_params(tmp_path, abstract(params), step=9)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.restore_params(tmp_path / "other", abstract(params))


def test_saved_on_eight_devices_restored_on_one_and_on_another_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    other = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jnp.arange(64.0).reshape(8, 8)
    state = {"params": {"w": jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))}}
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        c.save(1, state)
        one = c.restore(abstract(state))[0]["params"]["w"]
        target = NamedSharding(other, PartitionSpec("b", "a"))
        eight = c.restore(abstract(state, target))[0]["params"]["w"]
    assert len(one.sharding.device_set) == 1 and eight.sharding == target
    np.testing.assert_array_equal(one, x)
    np.testing.assert_array_equal(eight, x)


def test_what_is_saved_is_the_state_of_that_step_though_the_next_step_donates_it(tmp_path):
    step = jax.jit(lambda w: w * 1.001 + 1.0, donate_argnums=0)
    w = step(jnp.ones((1024, 1024)))
    want = np.array(w)
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        c.save(1, {"params": {"w": w}})
        for _ in range(30):
            w = step(w)
        w.block_until_ready()
        got = c.restore({"params": {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}})[0]["params"]["w"]
    np.testing.assert_array_equal(got, want)


def test_a_difference_in_shape_dtype_or_name_is_shown(tmp_path):
    saved(tmp_path, 1)
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        with pytest.raises(UserError) as e:
            c.restore(jax.eval_shape(lambda: make_state(width=32)))
        assert "params/backbone/w: the checkpoint has float32[8,16], this run needs float32[8,32]" in str(e.value)
        state = abstract(make_state())
        wrong = dataclasses.replace(state, step=jax.ShapeDtypeStruct((), jnp.float32))
        with pytest.raises(UserError, match=r"step: the checkpoint has int32\[\], this run needs float32\[\]"):
            c.restore(wrong)
        with pytest.raises(UserError, match="this run has no such array"):
            c.restore({"params": state.params})


def flip(p):
    data = bytearray(p.read_bytes())
    data[len(data) // 2] ^= 1
    p.write_bytes(data)


DAMAGE = {
    "flipped bit": lambda folder: flip(largest_file(folder)),
    "truncated file": lambda folder: largest_file(folder).write_bytes(largest_file(folder).read_bytes()[:-5]),
    "missing file": lambda folder: largest_file(folder).unlink(),
    "edited manifest": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace("300", "301")
    ),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "damaged metrics": lambda folder: (folder / "metrics" / "metrics").write_text("{"),
    "empty folder": lambda folder: folder.rename(folder.parent / "quarantined_by_hand") and folder.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_newest_is_set_aside_and_the_one_before_is_used(tmp_path, caplog, damage):
    directory = saved(tmp_path, 3)
    DAMAGE[damage](directory / "3")
    before = {p for p in directory.rglob("*") if p.is_file()}
    params = abstract(make_state().params)
    assert_bit_equal(checkpoint.restore_params(tmp_path, params), make_state(2).params)
    assert {p for p in directory.rglob("*") if p.is_file()} == before  # a reader moves nothing
    with pytest.raises(UserError, match="damaged"):
        checkpoint.restore_params(tmp_path, params, step=3)

    with Checkpoints(tmp_path, Checkpointing(every=1, keep_latest=10)) as c:
        assert c.latest() == 2
        state, metadata = c.restore(abstract(make_state()))
        assert_bit_equal(state, make_state(2))
        assert metadata == {"tokens": 200}
        assert (directory / "quarantine" / "3").is_dir() and not (directory / "3").exists()
        assert "CHECKPOINT 3 IS BAD" in caplog.text
        assert c.save(3, make_state(3))  # the run goes on over the same steps
        assert c.latest() == 3


def test_a_flipped_bit_in_a_large_file_is_found_when_the_newest_is_asked_for(tmp_path, monkeypatch):
    directory = saved(tmp_path, 3)
    flip(largest_file(directory / "3"))
    monkeypatch.setattr(manifest, "SMALL_FILE", 0)
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        assert (directory / "3").exists()  # opening compares sizes only
        assert c.latest() == 2
        assert not (directory / "3").exists()
        assert c.save(3, make_state(3)) and c.latest() == 3


def test_orbax_own_bookkeeping_is_not_needed_to_read(tmp_path):
    directory = saved(tmp_path, 2)
    (directory / "2" / "_CHECKPOINT_METADATA").write_text("garbage")
    (directory / "2" / "commit_success.txt").unlink()
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        assert c.latest() == 2
        assert_bit_equal(c.restore(abstract(make_state()))[0], make_state(2))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_unasked(tmp_path, caplog):
    directory = saved(tmp_path, 2)
    DAMAGE["flipped bit"](directory / "1")
    DAMAGE["no manifest"](directory / "2")
    for _ in range(2):  # also when they are all in quarantine
        with Checkpoints(tmp_path, Checkpointing(every=1)) as c, pytest.raises(UserError) as e:
            c.latest()
    assert "\n" not in str(e.value) and "--allow=restart" in str(e.value)
    for words in (
        "step 1: the content of ",
        "step 2: it has no manifest.json",
        f"they stand in {directory}/quarantine",
    ):
        assert words in str(e.value)

    definition = Checkpointing(every=1)  # any: the name is no path of it
    with Checkpoints(tmp_path, definition) as c, lineage.allowing(tmp_path, [lineage.RESTART], definition):
        assert c.latest() is None
        assert "begins again at step 0" in caplog.text
        assert c.save(1, make_state(1))
    with Checkpoints(tmp_path, definition) as c:
        assert c.latest() == 1


def test_what_was_set_aside_undamaged_is_no_loss(tmp_path):
    directory = saved(tmp_path, 2)
    DAMAGE["flipped bit"](directory / "2")
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        c.latest()
        c.go_back(-1)
        assert c.latest() is None
        with pytest.raises(UserError, match="holds no checkpoint"):
            c.restore(abstract(make_state()))


def test_a_first_save_cut_off_on_object_storage_is_no_loss(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    monkeypatch.setattr(storage, "is_local", lambda p: False)
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        assert c.latest() is None


def test_keeps_the_latest_and_the_best_also_over_a_restart(tmp_path):
    cfg = Checkpointing(every=1, keep_latest=2, keep_best=1)
    directory = saved(tmp_path, 5, cfg, metrics=[3.0, 1.0, 2.0, 5.0, 4.0])
    assert checkpoint.steps(directory) == [2, 4, 5]
    with Checkpoints(tmp_path, cfg) as c:
        c.save(6, make_state(6), metric=3.5)
        c.save(7, make_state(7))  # a step without an evaluation
    assert checkpoint.steps(directory) == [2, 6, 7]


def test_the_best_so_far_is_told_also_when_it_is_no_longer_kept(tmp_path):
    cfg = Checkpointing(every=1, keep_latest=1, keep_best=0)
    directory = saved(tmp_path, 3, cfg, metrics=[3.0, 1.0, 2.0])
    with Checkpoints(tmp_path, cfg) as c:
        c.save(4, make_state(4))  # a step without an evaluation
    about = manifest.read(directory / "4")
    assert (about["metric"], about["best"]) == (None, {"step": 2, "metric": 1.0})


def with_value(state, name, value):
    """`state` with `value` as the first element of the array of this name."""

    return tree.map_named(lambda n, x: x.at[(0,) * x.ndim].set(value) if n == name else x, state)


@pytest.mark.parametrize(
    ("name", "value"),
    [("params/backbone/w", np.nan), ("params/backbone/half", -np.inf), ("opt_state/0/nu/backbone/w", np.inf)],
)
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, name, value):
    bad = with_value(make_state(2), name, value)
    with Checkpoints(tmp_path, Checkpointing(every=2)) as c:
        assert not c.save(1, bad)  # is not due: nobody looks
        with pytest.raises(Diverged, match=f"checkpoint 2 of .* is not saved: {name} has .*; nothing was saved before"):
            c.save(2, bad)
        assert c.latest() is None
        assert c.save(2, make_state(2))


def test_a_state_with_a_metric_that_is_not_finite_is_not_saved(tmp_path):
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        c.save(1, make_state(1), metric=2.0)
        with pytest.raises(Diverged, match="is not saved: its metric is nan; the newest is step 1"):
            c.save(2, make_state(2), metric=float("nan"))
        assert c.latest() == 1


def test_a_save_that_orbax_refuses_is_an_error(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        monkeypatch.setattr(c._manager, "save", lambda *a, **k: False)
        with pytest.raises(RuntimeError, match="refused"):
            c.save(1, make_state())


def test_a_leaf_that_is_no_array(tmp_path):
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        with pytest.raises(TypeError, match="'key'"):
            c.save(1, {"key": jax.random.key(0)})
        with pytest.raises(TypeError):
            c.save(1, {"w": jnp.ones(2)}, {"not": object()})
    with pytest.raises(UserError, match=r"checkpoint\.every"):
        Checkpoints(tmp_path, Checkpointing(every=0))


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    directory = saved(tmp_path, 1)
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        monkeypatch.setattr(storage, "free_bytes", lambda p: 1000)
        with pytest.raises(UserError, match=r"the disk is full: checkpoint 2 needs 1 MiB.*step 1 is safe"):
            c.save(2, make_state(2))
        assert c.latest() == 1
    assert sorted(p.name for p in directory.iterdir()) == ["1"]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0
    if mounted:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True)
        mounted = mounted.returncode == 0
    if not mounted:
        pytest.skip("a small disk can only be mounted by root on Linux")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_while_writing_harms_nothing(small_disk, monkeypatch):
    def big(seed):
        return {"params": {"w": jax.random.normal(jax.random.key(seed), (1 << 19,))}}  # 2 MiB that do not compress

    c = Checkpoints(small_disk, Checkpointing(every=1, keep_latest=5))
    c.save(1, big(1))
    c.wait()
    (small_disk / "filler").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(storage, "free_bytes", lambda p: None)  # as if another program took the room meanwhile
    with pytest.raises(UserError, match=r"the disk is full: checkpoint 2 .* step 1 is safe"):
        c.save(2, big(2))
        c.wait()
    c.close()
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["1"]
    assert_bit_equal(checkpoint.restore_params(small_disk, abstract(big(1)["params"])), big(1)["params"])
    (small_disk / "filler").unlink()
    with Checkpoints(small_disk, Checkpointing(every=1)) as c:  # the same command again
        assert c.latest() == 1
        assert c.save(2, big(2))


KILLED = """
import sys, jax, jax.numpy as jnp, numpy as np
from jaxlm.run.checkpoint import Checkpointing, Checkpoints
c = Checkpoints(sys.argv[1], Checkpointing(every=1))
for step in range(1, 10_000):
    c.save(step, {"params": {"w": np.full(1 << 20, step, np.float32), "r": np.random.rand(1 << 20)}})
    print(step, flush=True)
"""


def test_killed_while_saving_leaves_the_former_step_readable(tmp_path):
    program = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True)
    started = 0
    while started < 4:
        started = int(program.stdout.readline())
    time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    program.wait()
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        last = c.latest()
        assert last is not None and last >= started - 1
        shapes = {
            "w": jax.ShapeDtypeStruct((1 << 20,), jnp.float32),
            "r": jax.ShapeDtypeStruct((1 << 20,), jnp.float64),
        }
        with jax.enable_x64(True):
            state, _ = c.restore({"params": shapes})
        assert (np.asarray(state["params"]["w"]) == last).all()
        assert c.save(last + 1, state)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if "tmp" in p.name or p.name == "quarantine"]


def test_the_time_of_day_may_be_set_while_it_is_written(tmp_path, monkeypatch):
    hours = itertools.cycle([0, 9, -9, 30])
    jumping = types.SimpleNamespace(time=lambda: time.time() + 3600 * next(hours))
    monkeypatch.setattr("orbax.checkpoint._src.futures.future.time", jumping)
    saved(tmp_path, 3)
    monkeypatch.undo()
    with Checkpoints(tmp_path, Checkpointing(every=1)) as c:
        assert_bit_equal(c.restore(abstract(make_state()))[0], make_state(3))
