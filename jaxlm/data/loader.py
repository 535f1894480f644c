"""Batches from packed rows: one global shuffled order, of which each process reads the rows that its shards need.

`batch(step)` depends on nothing but the definition and the step, so the whole state of the data is the step: a run
resumes anywhere, on any number of hosts, with the same global batches. Legend: B batch, T = context + 1.
"""

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jaxlm.config import UserError
from jaxlm.data.packing import PackedSet, Reader
from jaxlm.data.trajectory import Trajectory
from jaxlm.rng import DATA
from jaxlm.sharding import sharding_for

PADDING = -1  # the source of a row that only fills up a batch


class _Places:
    """The (set, row) pairs of one set, as a source that Grain can shuffle without reading a row."""

    def __init__(self, number: int, rows: int):
        self._number, self._rows = number, rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> tuple[int, int]:
        return self._number, int(row)


def global_order(packed: Sequence[PackedSet], seed: int) -> grain.MapDataset:
    """Endless sequence of (set, row) with random access; every epoch of a set is shuffled anew.

    Sets are interleaved by weight as evenly as can be, so that each batch has its share of each. Row n of a batch at
    step s is element s * B + n.
    """
    for one in packed:
        if not 0 < one.weight < float("inf"):
            raise UserError(f"the weight of source {one.name} must be above 0, got {one.weight}")
    sets = []
    for i, one in enumerate(packed):
        own_seed = int(np.random.SeedSequence([seed % 2**64, DATA, i]).generate_state(1)[0])
        sets.append(grain.MapDataset.source(_Places(i, one.rows)).shuffle(seed=own_seed).repeat())
    return grain.MapDataset.mix(sets, weights=[one.weight for one in packed]) if len(sets) > 1 else sets[0]


def rows_of(slices: Iterable[slice], batch_size: int) -> np.ndarray:
    """The rows of a batch, sorted, that these slices of its first dim cover: what one process has to read."""
    return np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices]))


class _Sets:
    """The rows of several packed sets, by (set, row)."""

    def __init__(self, packed: Sequence[PackedSet]):
        if not packed:
            raise UserError("there is no packed data to read")
        for one in packed[1:]:
            for field in ("context", "tokenizer_hash", "answers"):
                if getattr(one, field) != getattr(packed[0], field):
                    raise UserError(f"{one.directory} and {packed[0].directory} differ in {field}: pack them alike")
        self._width, self._answers = packed[0].context + 1, packed[0].answers
        self._readers = [Reader(one.directory) for one in packed]

    def read(self, where: Sequence[tuple[int, int]]) -> Trajectory:
        """Numpy rows [n,T]; the set `PADDING` gives a row without tokens."""
        sets = np.array([s for s, _ in where], np.int32)
        out = {name: np.zeros((len(where), self._width), np.int32) for name in ("tokens", "positions", "segments")}
        out["loss_mask"] = np.zeros((len(where), self._width), bool)
        if self._answers:
            out |= {name: np.zeros((len(where), self._answers), np.int32) for name in ("prompt_id", "rank")}
        for i, reader in enumerate(self._readers):
            mine = np.flatnonzero(sets == i)
            if len(mine):
                for name, values in reader.read([where[n][1] for n in mine]).items():
                    out[name][mine] = values
        return Trajectory(**out, source=sets)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def _batch_sharding(mesh: Mesh | None, batch_size: int) -> Sharding:
    if batch_size < 1:
        raise UserError(f"a batch needs at least one row, got {batch_size}")
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    sharding = sharding_for(mesh, ("batch",))
    try:
        sharding.shard_shape((batch_size,))
    except ValueError:
        raise UserError(
            f"a batch of {batch_size} rows cannot be spread evenly over the mesh {dict(mesh.shape)}"
        ) from None
    return sharding


def _needed_rows(sharding: Sharding, batch_size: int) -> np.ndarray:
    return rows_of((index[0] for index in sharding.addressable_devices_indices_map((batch_size,)).values()), batch_size)


def _global(local: Trajectory, rows: np.ndarray, batch_size: int, sharding: Sharding) -> Trajectory:
    """Global arrays of which `local` holds the `rows` that this process's devices need."""

    def make(values):
        def shard(index):
            return values[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, shard)

    return jax.tree.map(make, local)


def described(batch_size: int, width: int, answers: int, mesh: Mesh) -> Trajectory:
    """Shapes, dtypes and shardings of a global batch. width: tokens of a row; answers: that a row holds at most, or 0
    where rows are no ranked answers."""
    where = _batch_sharding(mesh, batch_size)

    def one(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=where)

    out = {name: one(np.int32, width) for name in ("tokens", "positions", "segments")} | {"source": one(np.int32)}
    out["loss_mask"] = one(np.bool_, width)
    if answers:
        out |= {name: one(np.int32, answers) for name in ("prompt_id", "rank")}
    return Trajectory(**out)


class Loader:
    """Training batches, read ahead by a thread.

    Args:
      packed: name -> set; mixed by their weights.
      batch_size: rows of the global batch.
      seed: of the order of rows. Several: the batch has as many equal parts, one after another, each as with that
        seed alone.
      mesh: spreads rows over its batch axes; None is one device.
      first: the step that will be asked for first.
      ahead: batches kept ready.
    """

    def __init__(
        self,
        packed: Mapping[str, PackedSet],
        batch_size: int,
        seed: int | Sequence[int],
        mesh: Mesh | None = None,
        first: int = 0,
        ahead: int = 2,
    ):
        self._sharding = _batch_sharding(mesh, batch_size)
        self._sets = _Sets(list(packed.values()))
        seeds = [seed] if isinstance(seed, int) else seed
        self._orders = [global_order(list(packed.values()), s) for s in seeds]
        self._part = batch_size // len(seeds)
        self._batch_size, self._ahead = batch_size, ahead
        self._rows = _needed_rows(self._sharding, batch_size)
        self._start(first)

    def rows(self, step: int, rows: np.ndarray) -> Trajectory:
        """Numpy: these rows of the global batch of a step, whoever asks."""
        parts = [divmod(int(row), self._part) for row in rows]
        return self._sets.read([self._orders[part][step * self._part + row] for part, row in parts])

    def batch(self, step: int) -> Trajectory:
        """The global batch [B,T] of a step, a function of the step alone; asking in sequence finds it ready."""
        if step != self._next:
            self._stop()
            self._start(step)
        found = self._queue.get()
        if isinstance(found, BaseException):
            self._start(step)
            raise found
        self._next = step + 1
        return found

    def _make(self, step: int) -> Trajectory:
        return _global(self.rows(step, self._rows), self._rows, self._batch_size, self._sharding)

    def _start(self, step: int) -> None:
        self._next, self._queue, self._stopping = step, queue.Queue(self._ahead), threading.Event()

        def fill(step: int, ready: queue.Queue, stopping: threading.Event) -> None:
            while not stopping.is_set():
                try:
                    made = self._make(step)
                except BaseException as e:  # raised again where the batch is asked for
                    made = e
                while not stopping.is_set():
                    try:
                        ready.put(made, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if isinstance(made, BaseException):
                    return
                step += 1

        arguments = (step, self._queue, self._stopping)
        self._thread = threading.Thread(target=fill, args=arguments, name="loader", daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def close(self) -> None:
        self._stop()
        self._sets.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def evaluation_batches(
    packed: PackedSet, batch_size: int, mesh: Mesh | None = None, max_batches: int | None = None
) -> Iterator[Trajectory]:
    """Every row of a set once, in order, in batches [B,T] of one shape; the last is filled up with rows of padding.

    With `max_batches` below what there is, as many rows are taken evenly from the whole set.
    """
    sharding = _batch_sharding(mesh, batch_size)
    rows = _needed_rows(sharding, batch_size)
    count = packed.rows if max_batches is None else min(packed.rows, max_batches * batch_size)
    if count < 1:
        raise UserError(f"evaluation needs at least one batch, got {max_batches}")
    chosen = [(0, i * packed.rows // count) for i in range(count)]
    chosen += [(PADDING, 0)] * (-count % batch_size)
    sets = _Sets([packed])
    try:
        for first in range(0, len(chosen), batch_size):
            local = sets.read([chosen[first + int(row)] for row in rows])
            yield _global(local, rows, batch_size, sharding)
    finally:
        sets.close()
