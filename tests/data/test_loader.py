"""One global order whatever the hosts and devices; every row of every epoch; batches a function of the step alone."""

import collections
import dataclasses
import time

import jax
import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.data import loader, packing, shards
from jaxlm.data.sources import Document
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.trajectory import Trajectory
from jaxlm.sharding import MeshConfig, make_mesh

FIELDS = ("tokens", "positions", "segments", "loss_mask", "source")


def packed_set(folder, rows, letter):
    """Rows of 4 + 1 tokens, no two alike."""
    text = "".join(f"{letter}{i:03d}" for i in range(rows)) + letter
    p = packing.pack([Document(text, "s", "0")], BytesTokenizer(), folder, context=4, add_bos_eos=False)
    assert p.rows == rows
    return p


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {"a": packed_set(folder / "a", 21, "a"), "b": packed_set(folder / "b", 7, "b")}


@pytest.fixture(scope="module")
def mesh8():
    return make_mesh(MeshConfig(replica=2, fsdp=4))


def assert_same(a: Trajectory, b: Trajectory):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_a_described_batch_is_like_a_real_one(sets, mesh8):
    with loader.Loader(sets, 8, 0, mesh8) as one:
        real = one.batch(0)
    described = loader.described(8, 5, 0, mesh8)
    facts = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
    assert jax.tree.map(facts, described) == jax.tree.map(facts, real)


def places(order, count):
    return [order[i] for i in range(count)]


def test_every_epoch_has_each_row_once_in_another_order(sets):
    order = loader.global_order([sets["a"]], seed=0)
    epochs = [places(order, 63)[i : i + 21] for i in (0, 21, 42)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, row) for row in range(21)]
    assert epochs[0] != epochs[1] != epochs[2]
    # Seeds are apart: the second epoch of one is not the first of the next.
    first = [places(loader.global_order([sets["a"]], seed), 42) for seed in range(5)]
    assert len({tuple(e) for run in first for e in (run[:21], run[21:])}) == 10


def test_sets_are_mixed_by_weight(sets):
    a, b = dataclasses.replace(sets["a"], weight=3.0), sets["b"]
    mixed = places(loader.global_order([a, b], seed=1), 400)
    assert collections.Counter(s for s, _ in mixed) == {0: 300, 1: 100}
    for i in range(0, 400, 8):  # every batch has its share
        assert sum(s for s, _ in mixed[i : i + 8]) == 2
    alone = places(loader.global_order([a, b], seed=1), 28 * 4)
    assert sorted(r for s, r in alone if s == 1)[:: 28 // 7] == list(range(7))  # b's 28 rows are four epochs


def test_batches_are_a_function_of_the_step_alone(sets):
    with loader.Loader(sets, 6, seed=3) as one:
        in_turn = [one.batch(step) for step in range(6)]
        assert_same(one.batch(1), in_turn[1])  # back
        assert_same(one.batch(5), in_turn[5])  # and ahead
    with loader.Loader(sets, 6, seed=3, first=4) as resumed:
        assert_same(resumed.batch(4), in_turn[4])
        assert_same(resumed.batch(5), in_turn[5])
    with loader.Loader(sets, 6, seed=4) as other:
        assert not np.array_equal(other.batch(0).tokens, in_turn[0].tokens)


def test_batches_hold_the_rows_of_the_order(sets):
    order = loader.global_order(list(sets.values()), seed=3)
    readers = [packing.Reader(p.directory) for p in sets.values()]
    with loader.Loader(sets, 6, seed=3) as one:
        batch = one.batch(2)
    for i in range(6):
        s, row = order[12 + i]
        assert batch.source[i] == s
        for name, values in readers[s].read([row]).items():
            np.testing.assert_array_equal(getattr(batch, name)[i], values[0])
    assert batch.tokens.dtype == batch.segments.dtype == batch.positions.dtype == np.int32
    assert batch.loss_mask.dtype == bool and isinstance(batch.tokens, jax.Array)


def test_several_seeds_give_the_batches_of_each_one_after_another(sets, mesh8):
    with loader.Loader(sets, 8, seed=[3, 4], mesh=mesh8) as both:
        batch = both.batch(2)
    for i, seed in enumerate((3, 4)):
        with loader.Loader(sets, 4, seed) as one:
            assert_same(jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch), one.batch(2))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_disjoint_rows_of_the_same_batch(sets, mesh8, hosts):
    """A host's rows come from the slices that its devices hold, here those of every second, fourth, ... device."""
    with loader.Loader(sets, 16, seed=5) as one:
        whole = one.batch(1)
        indices = loader._batch_sharding(mesh8, 16).devices_indices_map((16,))
        devices = sorted(indices, key=lambda d: d.id)
        got = {}
        for host in range(hosts):
            mine = devices[host * 8 // hosts : (host + 1) * 8 // hosts]
            rows = loader.rows_of([indices[d][0] for d in mine], 16)
            assert len(rows) == 16 // hosts and not set(rows) & set(got)
            local = one.rows(1, rows)
            got |= {int(row): (local, i) for i, row in enumerate(rows)}
    for name in FIELDS:
        together = np.stack([getattr(got[row][0], name)[got[row][1]] for row in range(16)])
        np.testing.assert_array_equal(together, getattr(whole, name))


@pytest.mark.parametrize(
    "mesh", [{"replica": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 2, "context": 2}, {"tensor": 8}], ids=str
)
def test_any_mesh_has_the_same_batches(sets, mesh):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1} | mesh))
    with loader.Loader(sets, 8, seed=5) as one, loader.Loader(sets, 8, seed=5, mesh=mesh) as many:
        a, b = one.batch(3), many.batch(3)
    assert_same(a, b)
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    assert b.tokens.sharding.shard_shape(b.tokens.shape) == (8 // ways, 5)
    assert b.source.sharding.shard_shape((8,)) == (8 // ways,)


def test_two_runs_of_one_step_feed_the_same_step(sets, mesh8):
    total = jax.jit(lambda batch: (batch.tokens * batch.loss_mask).sum())
    with loader.Loader(sets, 8, 0) as one, loader.Loader(sets, 8, 0, mesh8) as many:
        assert [int(total(one.batch(s))) for s in range(3)] == [int(total(many.batch(s))) for s in range(3)]


def test_evaluation_sees_every_row_once(sets, mesh8):
    batches = list(loader.evaluation_batches(sets["a"], 8, mesh8))
    assert [b.tokens.shape for b in batches] == [(8, 5)] * 3
    tokens = np.concatenate([b.tokens for b in batches])
    everything = packing.Reader(sets["a"].directory).read(range(21))
    np.testing.assert_array_equal(tokens[:21], everything["tokens"])
    last = jax.tree.map(lambda x: np.asarray(x)[5:], batches[-1])
    assert not last.loss_mask.any() and not last.segments.any() and (last.source == loader.PADDING).all()
    assert sum(int(b.loss_mask.sum()) for b in batches) == sets["a"].scored


def test_fewer_evaluation_batches_cover_the_whole_set(sets):
    (batch,) = loader.evaluation_batches(sets["a"], 7, max_batches=1)
    everything = packing.Reader(sets["a"].directory).read(range(21))["tokens"]
    np.testing.assert_array_equal(batch.tokens, everything[::3])
    assert len(list(loader.evaluation_batches(sets["a"], 7, max_batches=99))) == 3


def test_the_thread_reads_ahead_and_ends(sets):
    with loader.Loader(sets, 4, 0, ahead=2) as one:
        one.batch(0)
        deadline = time.monotonic() + 5
        while not one._queue.full() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert one._queue.qsize() == 2
        thread = one._thread
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda s, m: loader.Loader(s, 12, 0, m),
            r"batch of 12 rows cannot be spread evenly over the mesh .*'replica': 2",
        ),
        (lambda s, m: loader.Loader(s, 0, 0), "at least one row, got 0"),
        (lambda s, m: loader.Loader({}, 4, 0), "no packed data"),
        (lambda s, m: loader.Loader({"a": dataclasses.replace(s["a"], weight=0.0)}, 4, 0), "weight of source"),
        (lambda s, m: loader.Loader({**s, "c": dataclasses.replace(s["a"], context=9)}, 4, 0), "differ in context"),
        (lambda s, m: next(loader.evaluation_batches(s["a"], 8, m, 0)), "at least one batch, got 0"),
    ],
)
def test_bad_input_is_one_line(sets, mesh8, make, message):
    with pytest.raises(UserError, match=message):
        make(sets, mesh8)


def test_a_file_that_changes_under_the_reader_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "VERIFY_BYTES", 0)
    p = packed_set(tmp_path / "p", 30, "c")
    path = tmp_path / "p" / "rows-00000.array_record"
    content = bytearray(path.read_bytes())
    content[content.index(bytes([ord("c") + 32, 0, ord("0") + 32, 0]))] ^= 1
    path.write_bytes(content)
    with loader.Loader({"p": p}, 4, 0) as one:
        for _ in range(2):  # and it stays one
            with pytest.raises(UserError, match="is damaged"):
                for step in range(8):
                    one.batch(step)
