"""Checkpoints: Orbax writes them in the background, a manifest of hashes says which of them may be trusted.

Orbax does not verify what it reads. So each step's folder carries `manifest.json`, written into the folder before it
gets its final name: the sha256 of every file, the shape and dtype of every array, the metric and the best one so far,
the caller's metadata, and a hash of itself. A folder without a manifest that holds was never a saved step. At the start
of a run bad folders are moved to `checkpoints/quarantine/`, never deleted, and the newest good one is used. Several
processes share the hashing and the verifying of a run's own (`together`); of another run each verifies all it reads.

What says what the arrays are (`CARRIED`) is copied into each folder and hashed with it: a folder that is taken out of
its run can be read as if it were one, by whatever reads the parameters of a run.

The state is any pytree of arrays; on disk an array is known by its slash-joined name, so optax's named tuples and
dataclasses may be redefined as long as the names stay. Randomness is derived from the seed and the step, which are in
the definition and the manifest; there is no other state of it.
"""

import contextlib
import dataclasses
import json
import math
import re
import time

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from jaxlm import broadcast, storage, tree
from jaxlm.config import UserError
from jaxlm.run import arrays, lineage, manifest, quarantine, together
from jaxlm.run.exits import Diverged

# Seconds after which Orbax gives up a save. It counts by the time of day, which may be set while it waits; what really
# hangs, the run's own watch finds by a clock that is never set.
ANY_JUMP = 10 * 365 * 24 * 3600
CARRIED = ("config.json", "lineage.json", "tokenizer")  # of the workdir, where they are there
CHOSEN = "chosen.json"  # in the workdir of a run that was ended to go back: which step, and at which it ended


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    every: int  # steps between two saves
    keep_latest: int = 2
    keep_best: int = 1  # by the lowest metric, in addition to the latest


# --------------------------------------------------------------------------------------------------------- reading back
def steps(directory) -> list[int]:
    """Steps that have a folder, oldest first, good or bad."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.is_dir())


def _directory(workdir) -> epath.Path:
    text = str(workdir)
    return epath.Path(workdir if "://" in text else epath.Path(text).absolute()) / "checkpoints"


def steps_saved(workdir) -> list[int]:
    """`steps` of a run."""
    return steps(_directory(workdir))


def _read(folder: epath.Path, abstract, prefix: str = ""):
    """Reads the arrays of `abstract` (whose names follow `prefix`) with its shardings; strict about shape and dtype."""
    saved = manifest.read(folder)["arrays"]
    wanted = {prefix + n: x for n, x in arrays.named(abstract).items()}
    saved = {n: s for n, s in saved.items() if n.startswith(prefix)}
    lines = [f"{n}: the checkpoint has {saved.get(n, 'nothing')}, this run needs {arrays.describe(x)}"
             for n, x in wanted.items() if saved.get(n) != arrays.describe(x)]  # fmt: skip
    lines += [f"{n}: the checkpoint has {s}, this run has no such array" for n, s in saved.items() if n not in wanted]
    if lines:
        more = f"\n  ... and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise UserError(
            f"{folder} is of another model or optimizer ({len(lines)} arrays differ):\n  "
            + "\n  ".join(lines[:8])
            + more
        )
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)

    nested = arrays.nested({n: target(x) for n, x in wanted.items()})
    with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
        read = checkpointer.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                item=nested, restore_args=ocp.checkpoint_utils.construct_restore_args(nested), partial_restore=True
            ),
        )
    got = dict(tree.named_leaves(read))
    return jax.tree.unflatten(jax.tree.structure(abstract), [got[n] for n in wanted])


def newest(workdir) -> int | None:
    """The newest step that verifies, looked for without touching anything; another process may be training here."""
    directory = _directory(workdir)
    for step in reversed(steps(directory)):
        found = manifest.problem(directory / str(step))
        if found is None:
            return step
        logging.error("checkpoint %s is left out: %s", directory / str(step), found)
    return None


def _chosen(workdir, last: int) -> int:
    """The step that is read by who names none: the newest, but of a run that was ended to go back
    (`Checkpoints.choose`), and has not gone on since, the one that it went back to."""
    file = _directory(workdir).parent / CHOSEN
    found = storage.read_json(file) if file.exists() else {"ended": None}
    if found["ended"] != last:
        return last
    told = "%s was ended to go back: its checkpoint %d is read, not %d, the newest (which %s in it stands against)"
    logging.warning(told, file.parent, found["step"], last, CHOSEN)
    return found["step"]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A saved step whose files are as they were written. sha256: of its manifest, and so of every byte in it."""

    folder: epath.Path
    step: int
    metadata: dict
    sha256: str


def saved(workdir, step: int | str | None = None) -> Saved:
    """A step of a run, the newest that verifies for "latest", and for None too but of a run that was ended to go back;
    `UserError` where it cannot be read.

    workdir: of the run, or the folder of one step, wherever that has been copied to. Hashes all of its files, once:
    who reads several things from a step asks once for it. Changes nothing in the workdir.
    """
    folder = _directory(workdir).parent
    if (folder / manifest.MANIFEST).exists():
        if found := manifest.problem(folder):
            raise UserError(f"checkpoint {folder} is damaged: {found}")
        if step not in (None, "latest", only := manifest.read(folder)["step"]):
            raise UserError(f"{folder} is the folder of step {only} alone, not of {step}")
        return _described(folder)
    directory = folder / "checkpoints"
    if step is None or step == "latest":
        last = newest(workdir)
        if last is None:
            raise UserError(f"{directory} holds no checkpoint that can be read; train there first")
        if step == "latest" or (step := _chosen(workdir, last)) == last:
            return _described(directory / str(last))
    folder = directory / str(step)
    if not folder.is_dir():
        raise UserError(f"{directory} has no checkpoint of step {step}; it has {steps(directory) or 'none'}")
    if found := manifest.problem(folder):
        raise UserError(f"checkpoint {folder} is damaged: {found}; choose another step of {steps(directory)}")
    return _described(folder)


def _described(folder: epath.Path) -> Saved:
    about = manifest.read(folder)
    return Saved(folder, about["step"], about["metadata"], about["sha256"])


def restore_params(workdir, abstract_params, step: int | str | None = None):
    """The parameters alone, without the optimizer's state: the branch `params` of what was saved.

    workdir: a run's, with `step` as in `saved`, or a step that `saved` has given. Leaves of `abstract_params` carry
    shape, dtype and, if wanted, a sharding.
    """
    found = workdir if isinstance(workdir, Saved) else saved(workdir, step)
    return _read(found.folder, abstract_params, "params/")


def read_metadata(workdir, step: int | str | None = None) -> dict:
    """The metadata that was saved with a step, and the step itself under `step`."""
    found = saved(workdir, step)
    return found.metadata | {"step": found.step}


# -------------------------------------------------------------------------------------------------------------- writing
def _is_disk_full(e: BaseException | None) -> bool:
    while e is not None:
        if getattr(e, "errno", None) in (28, 122) or re.search(r"ENOSPC|No space left|Disk quota", str(e)):
            return True
        e = e.__cause__ or e.__context__
    return False


class Checkpoints:
    """The checkpoints of one workdir, for the one program that trains there. Every process calls every method."""

    def __init__(self, workdir, cfg: Checkpointing):
        if cfg.every < 1 or cfg.keep_latest < 1 or cfg.keep_best < 0:
            raise UserError(
                "checkpoint.every and checkpoint.keep_latest must be 1 or more, checkpoint.keep_best 0 or more"
            )
        self.cfg = cfg
        self.directory = _directory(workdir)
        storage.make_dir(self.directory)
        self._pending = None  # (step, arrays, metadata, metric) of the save under way
        self._shared = None  # the same save, as several processes make it
        self._verified: set[int] = set()
        self._took: dict[str, float] = {}  # since `cost` was last asked
        self._began = 0.0  # the save under way, in monotonic seconds
        self._moved = False  # into quarantine, and the manager has not been told yet
        self._sweep()
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=_metric,  # without it Orbax does not store metrics, and the policy would forget them on resume
                best_mode="min",
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(cfg.keep_latest),
                        policies.BestN(get_metric_fn=_metric, reverse=True, n=cfg.keep_best),
                    ]
                ),
                async_options=ocp.AsyncOptions(
                    timeout_secs=ANY_JUMP,
                    post_finalization_callback=self._seal,
                    barrier_sync_fn=(lambda **at: self._shared.barrier(**at)) if jax.process_count() > 1 else None,
                ),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            ),
        )

    def _sweep(self) -> None:
        """Moves folders aside that would make Orbax trip: those without a sound manifest or of a wrong size."""
        if jax.process_index() == 0:
            for step in steps(self.directory):
                if found := manifest.problem(self.directory / str(step), full=False):
                    self._quarantine(step, found)
        together.agree(0)

    def _quarantine(self, step: int, why: str) -> None:
        # Object storage cannot rename a folder: a first save that was cut off there has its name, and no manifest.
        damaged = storage.is_local(self.directory) or (self.directory / str(step) / manifest.MANIFEST).exists()
        target = quarantine.put(self.directory, step, why, damaged)
        self._moved = True
        logging.error("CHECKPOINT %d IS BAD AND IS NOT USED: %s. Moved to %s", step, why, target)

    def go_back(self, step: int) -> None:
        """Moves what is newer than `step` to quarantine (-1: everything); `latest` then says what there is."""
        self.wait()
        if jax.process_index() == 0:
            for newer in [s for s in steps(self.directory) if s > step]:
                why = f"the runs that train with it have no good one after step {step}"
                logging.error("CHECKPOINT %d IS NOT USED: %s", newer, why)
                quarantine.put(self.directory, newer, why, damaged=False)
                self._moved = True

    def _seal(self) -> None:
        """Runs on process 0 in Orbax's thread, when every file is written and the folder has no final name yet."""
        step, described, metadata, metric = self._pending
        folder = manifest.under_way(self.directory / str(step))
        for name in CARRIED:
            storage.copy(self.directory.parent / name, folder / name)
        hashed, began = self._shared.told() if self._shared else [], time.monotonic()
        manifest.write(folder, step, described, metadata, metric, self._best(step, metric), hashed)
        slowest = max((part["seconds"] for part in hashed), default=0.0)
        self._took["checkpoint/hash_seconds"] = slowest + time.monotonic() - began
        self._took["checkpoint/write_seconds"] = time.monotonic() - self._began

    def _best(self, step: int, metric: float | None) -> dict | None:
        """{"step", "metric"} of the best up to this step, whether it is still kept or not."""
        before = max((s for s in steps(self.directory) if s < step), default=None)
        best = None if before is None else manifest.read(self.directory / str(before)).get("best")
        is_better = metric is not None and (best is None or metric < best["metric"])
        return {"step": step, "metric": metric} if is_better else best

    @contextlib.contextmanager
    def _errors(self):
        """A save fails in the background and shows at a later call: here it becomes one clear line."""
        try:
            yield
        except Exception as e:
            if not _is_disk_full(e):
                raise
            step = self._pending[0] if self._pending else "?"
            for p in self.directory.iterdir() if jax.process_index() == 0 else ():
                if ".orbax-checkpoint-tmp" in p.name:
                    p.rmtree(missing_ok=True)
            raise UserError(self._full(f"checkpoint {step} could not be written")) from e

    def _full(self, what: str) -> str:
        kept = steps(self.directory)
        safe = f"step {kept[-1]} is safe" if kept else "nothing was saved before"
        return f"the disk is full: {what} in {self.directory}; {safe}; free some space and start the same command again"

    def save(self, step: int, state, metadata: dict | None = None, metric: float | None = None, force=False) -> bool:
        """Starts saving `state` in the background; returns whether it did.

        It does not when the step is not due (`force` makes it due) or is saved already. `metadata` must be plain JSON.
        Raises `Diverged` when the metric (lower is better) or a value of the state is not finite: such a state is never
        the newest checkpoint. Raises `UserError` when the disk is full, now or at the previous save, and `ValueError`
        for a step older than the newest.
        """
        step = int(step)
        if step % self.cfg.every and not force:
            return False
        with self._errors():
            self._manager.check_for_errors()
        latest = self._manager.latest_step()
        if latest is not None and step <= latest:
            if step == latest:
                return False
            raise ValueError(f"cannot save step {step}: step {latest} is saved already")
        flat = arrays.named(state)
        if metric is not None and not math.isfinite(metric):
            raise Diverged(self._bad(step, f"its metric is {metric}", latest))
        if (name := arrays.not_finite(flat)) is not None:
            raise Diverged(self._bad(step, f"{name} has values that are not finite", latest))
        metadata = json.loads(json.dumps(metadata or {}))  # what is no JSON fails here, not in the background
        self._preflight(step, flat)
        final, me, of = self.directory / str(step), jax.process_index(), jax.process_count()
        with self._errors():
            self._manager.wait_until_finished()  # before `_pending` changes under the previous save
            metric, self._began = None if metric is None else float(metric), time.monotonic()
            self._pending = (step, {n: arrays.describe(x) for n, x in flat.items()}, metadata, metric)
            self._shared = together.Save(lambda: manifest.own(final, me)) if of > 1 else None
            started = self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(arrays.nested(flat))),
                metrics={"metric": metric},
                force=True,
            )
        if not started:
            raise RuntimeError(f"Orbax refused to save step {step} in {self.directory}")
        self._verified.discard(step)
        return True

    def _bad(self, step: int, why: str, latest: int | None) -> str:
        newest = "nothing was saved before" if latest is None else f"the newest is step {latest}"
        return f"checkpoint {step} of {self.directory.parent} is not saved: {why}; {newest}"

    def _preflight(self, step: int, flat: dict) -> None:
        needed = sum(x.size * x.dtype.itemsize for x in flat.values()) * 1.02 + (1 << 20)
        needed += sum(storage.size(self.directory.parent / name) for name in CARRIED)
        free = storage.free_bytes(self.directory)
        short = jax.process_index() == 0 and free is not None and free < needed
        if together.agree(int(short)):
            raise UserError(
                self._full(f"checkpoint {step} needs {needed / 2**20:.0f} MiB, there are {free / 2**20:.0f} MiB left")
            )

    def latest(self) -> int | None:
        """The newest step whose files are as they were written; newer bad ones are moved to quarantine, loudly.

        None where nothing was ever saved. `UserError` where there was something, and all of it is damaged: such a run
        begins again only where that is allowed by name (`lineage.allowing`).
        """
        self.wait()
        began, candidates = time.monotonic(), iter(reversed(steps(self.directory)))  # of process 0
        while (found := together.agree(next(candidates, -1))) >= 0 and found not in self._verified:
            if (bad := together.problem(self.directory / str(found))) is None:
                break
            if jax.process_index() == 0:
                self._quarantine(found, bad)
        if self._moved:
            logging.error("%s: %s", self.directory, f"going on from step {found}" if found >= 0 else "NONE IS LEFT")
        if together.agree(int(self._moved)):
            self._manager.reload()
        self._moved = False
        if found < 0:
            broadcast.from_first(self._require_nothing_lost)
            return None
        self._verified.add(found)
        self._took["checkpoint/verify_seconds"] = time.monotonic() - began
        return found

    def _require_nothing_lost(self) -> None:
        if not (damage := quarantine.damage(self.directory)):
            return
        more = f"; and {len(damage) - 3} more" if len(damage) > 3 else ""
        what = f"none of the checkpoints of {self.directory.parent} can be used: {'; '.join(damage[:3])}{more}"
        if not lineage.may_restart():
            raise UserError(
                f"{what}; they stand in {self.directory / quarantine.FOLDER}; put a good copy of one back into "
                f"{self.directory}, choose another --workdir, or, to begin again at step 0 here, move that folder "
                "elsewhere (launch.train: or give --allow=restart)"
            )
        logging.error("%s; begins again at step 0", what)

    def choose(self, back: int | None, ended: int) -> int | None:
        """Of a run that ended at step `ended` to go back to step `back`: who names no step reads the newest up to there
        that is kept, or the oldest of all where none is; returns it. None, None: the newest, as ever."""
        self.wait()
        kept = steps(self.directory)
        step = None if back is None or not kept else max((s for s in kept if s <= back), default=min(kept))
        if jax.process_index() == 0:
            file = self.directory.parent / CHOSEN
            if step is not None:
                storage.write_json(file, {"schema_version": 1, "step": step, "ended": ended, "back": back})
            elif file.exists():
                file.unlink()
        return step

    def restore(self, abstract_state, step: int | None = None):
        """(state, metadata) of `step`, by default the newest that verifies, with the shardings of `abstract_state`.

        `UserError` when there is none, when it is damaged, or when a name, shape or dtype differs.
        """
        self.wait()
        if step is None:
            step = self.latest()
            if step is None:
                raise UserError(f"{self.directory} holds no checkpoint that can be read")
        folder = self.directory / str(step) if step in self._verified else saved(self.directory.parent, step).folder
        return _read(folder, abstract_state), manifest.read(folder)["metadata"]

    def wait(self) -> None:
        """Blocks until the save under way is on disk with its manifest; raises what went wrong with it."""
        with self._errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def cost(self) -> dict[str, float]:
        """Seconds for the log, each once, on process 0, that no phase of the run's clock has: of the last save that is
        complete, all of them, behind training's back (`checkpoint/write_seconds`), and those of hashing what was
        written (`checkpoint/hash_seconds`: of the slowest process, and of process 0 for what was merged then); of
        verifying the step that was gone on from (`checkpoint/verify_seconds`).
        """
        took, self._took = self._took, {}
        return took

    def close(self) -> None:
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # the error of the last save has been raised by `wait`
                self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _metric(metrics: dict) -> float:
    value = metrics.get("metric")
    return math.inf if value is None else value
