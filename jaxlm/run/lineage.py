"""Where a run comes from: the environment it ran in, the hashes of what it was made of, and that it is still itself."""

import contextlib
import contextvars
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence

import jax
from absl import logging

import jaxlm
from jaxlm import config, storage
from jaxlm.config import UserError

SCHEMA_VERSION = 1
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array_record",
    "sentencepiece",
    "numpy",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)
# What the same run may change when it goes on. A path ending in a dot stands for all below it.
MAY_CHANGE = (
    "train.steps",  # a run may be made longer; its schedule is then that of the new length
    "train.log_every",  # from here on: what is written, how often, and what is kept, not what is computed
    "train.tensorboard",
    "train.hang_seconds",
    "train.max_skipped",
    "train.skip",  # from here on
    "evaluation.",
    "checkpoint.",
    "objective.heldout_prompts",
    "objective.heldout_samples",
    "objective.preflight",
    "objective.gold",
    "objective.stop_at_alarm",
    "objective.reward_timeout",
    "mesh.",  # a checkpoint restores onto any mesh: another machine may go on
    "data.workers",  # the packed rows do not depend on these two
    "data.cache",
)


# ------------------------------------------------------------------------------------------------------ the environment
def _git(*arguments: str) -> str | None:
    root = pathlib.Path(jaxlm.__file__).parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def git_state() -> dict | None:
    """Commit and uncommitted changes of the code that runs; None when it does not come from a git checkout."""
    commit, changes = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
    if commit is None or changes is None:
        return None
    state = {"commit": commit.strip(), "changed": bool(changes)}
    return state | ({"diff_sha256": storage.sha256_text(changes)} if changes else {})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """Versions, code, devices and platform, without anything that names a person or a machine."""
    versions = {p: _version(p) for p in PACKAGES}
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "packages": {p: v for p, v in versions.items() if v is not None},
        "git": git_state(),
        "platform": {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()},
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "flags": {k: os.environ[k] for k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES") if k in os.environ},
    }


def _time() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_environment(workdir) -> None:
    """Adds this start to `environment.json`: {"schema_version", "starts": [{"time" in UTC, ...}, ...]}."""
    if jax.process_index() != 0:
        return
    p = storage.path(workdir) / "environment.json"
    starts = storage.read_json(p)["starts"] if p.exists() else []
    now = {"time": _time()} | environment()
    storage.write_json(p, {"schema_version": SCHEMA_VERSION, "starts": [*starts, now]})


# ---------------------------------------------------------------------------------------------------------- the lineage
def write_lineage(workdir, hashes: dict, **parents) -> None:
    """Writes `lineage.json`: hashes of the data stages, and whatever the run started from, such as a checkpoint."""
    if jax.process_index() == 0:
        record = {"schema_version": SCHEMA_VERSION, "hashes": hashes} | parents
        storage.write_json(storage.path(workdir) / "lineage.json", record)


# ----------------------------------------------------------------------------------------- what a checkpoint says of it
def _draws() -> dict:
    """What decides, beside seed and addresses, what is drawn: settings of jax, and another version's may be others."""
    partitionable = bool(jax.config.jax_threefry_partitionable)
    return {"implementation": jax.config.jax_default_prng_impl, "partitionable": partitionable}


def metadata(hashes: dict) -> dict:
    """What a run's checkpoints hold beside the arrays and the files that they carry."""
    return {"hashes": hashes, "rng": _draws()}


def check_same_draws(metadata: dict) -> None:
    """Raises `UserError` when this process would draw other numbers than the one that wrote the checkpoint."""
    had, now = metadata.get("rng"), _draws()  # none in those of before
    if had is not None and had != now:
        raise UserError(
            f"the checkpoint was written with the random numbers {had}, this process draws {now}: set "
            f"JAX_DEFAULT_PRNG_IMPL={had['implementation']} JAX_THREEFRY_PARTITIONABLE={had['partitionable']}"
        )


# ------------------------------------------------------------------------------------------------ what must be the same
HELD = ("model", "lora")  # the checkpoints have their shapes
RESTART = "restart"


@dataclasses.dataclass
class _Allowed:
    workdir: object
    names: tuple[str, ...]
    lines: list[str]  # of the definition, that differ and may
    told: list[str]  # of definition and data, once both may
    hashes: dict  # of the data, then


_allowed: contextvars.ContextVar[_Allowed | None] = contextvars.ContextVar("allowed", default=None)


@contextlib.contextmanager
def allowing(workdir, names: Sequence[str], cfg):
    """Inside, the run of `workdir` goes on though it differs from what it was in what goes by these names, which its
    `lineage.json` then tells: "data", "tokenizer", or paths of its definition `cfg`, each with all below it. With
    `RESTART` it begins again where all of its checkpoints were damaged."""
    known = [*(f.name for f in dataclasses.fields(cfg)), "tokenizer", RESTART]
    for name in names:
        if (first := name.split(".")[0]) in HELD:
            raise UserError(f"--allow={name}: the checkpoints hold arrays of the {first} that they were begun with")
        if first not in known:
            raise UserError(f"--allow={name}: the definition has no such part; {config.nearest(first, known)}")
    token = _allowed.set(_Allowed(workdir, tuple(names), [], [], {}))
    try:
        yield
    finally:
        _allowed.reset(token)


def _may_differ(path: str) -> bool:
    """path: in a definition; what is made of the data stands under "data" and "data.tokenizer"."""
    now = _allowed.get()
    names = () if now is None else ["data.tokenizer" if n == "tokenizer" else n for n in now.names]
    return any(path == n or path.startswith(f"{n}.") for n in names)


def may_restart() -> bool:
    """Whether a run may begin again that has been trained, and of which no checkpoint is left."""
    return _may_differ(RESTART)


def _otherwise(paths: Iterable[str]) -> str:
    """The end of a refusal: another folder, or, where the program has a way to say it, the same one all the same."""
    names = list(dict.fromkeys(paths))
    if len(names) > 6:  # as the parts of the definition that they stand in
        names = list(dict.fromkeys(path.split(".")[0] for path in names))
    can = _allowed.get() is not None and not any(path.split(".")[0] in HELD for path in names)
    offered = f", or go on all the same with --allow={','.join(names)}" if can else ""
    return f"choose another --workdir{offered}"


def _flat(hashes: dict, prefix: str = "") -> dict[str, str]:
    out = {}
    for k, v in hashes.items():
        out |= _flat(v, f"{prefix}{k}/") if isinstance(v, dict) else {prefix + k: v}
    return out


def _changed(saved: dict, now: dict) -> list[str]:
    """Lines of "stage: saved -> now"; `UserError` where they may not differ."""
    a, b = _flat(saved), _flat(now)
    changed = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
    lines = [f"{k}: {str(a.get(k, 'none'))[:12]} -> {str(b.get(k, 'none'))[:12]}" for k in changed]
    causes = [k for k in changed if k != "packed"] or changed  # rows are packed anew with whatever they are made of
    paths = ["data.tokenizer" if k == "tokenizer" else "data" for k in causes]
    if not all(map(_may_differ, paths)):
        raise UserError(
            f"the data has changed since the checkpoint was written: {'; '.join(lines)}; bring the former data back, "
            + _otherwise(paths)
        )
    return lines


def check_same_data(saved: dict, now: dict) -> None:
    """Raises `UserError` when the data of a checkpoint (hashes by stage) is not the data of this run. What differs and
    may (`allowing`) is kept for `write_allowed`."""
    lines, allowed = _changed(saved, now), _allowed.get()
    if allowed is not None:
        allowed.told, allowed.hashes = [*allowed.lines, *lines], now


def write_allowed() -> None:
    """Tells what `check_same_data` found to differ as it may, and writes it into `lineage.json`, with the hashes of the
    data that hold from now on. Nothing where nothing differs, and where no run goes on."""
    allowed = _allowed.get()
    if allowed is None or not allowed.told:
        return
    logging.warning("%s goes on though it differs: %s", allowed.workdir, "; ".join(allowed.told))
    if jax.process_index() == 0:
        p = storage.path(allowed.workdir) / "lineage.json"
        had = storage.read_json(p)
        told = {"time": _time(), "differences": allowed.told}
        storage.write_json(p, had | {"hashes": allowed.hashes, "allowed": [*had.get("allowed", []), told]})


def check_same_tokenizer(workdir, now: str) -> None:
    """As `check_same_data`, of the tokenizer alone: before a run's own is written over."""
    p = storage.path(workdir) / "lineage.json"
    had = storage.read_json(p)["hashes"].get("tokenizer") if p.exists() else None
    if had is not None:
        _changed({"tokenizer": had}, {"tokenizer": now})


def check_same_experiment(workdir, cfg, parts: tuple[str, ...] = ("",)) -> None:
    """Raises `UserError` when `workdir` holds a run of another definition, and names the paths that differ."""
    lines = differences(workdir, cfg, parts)
    paths = [line.split(":", 1)[0] for line in lines]
    if not all(map(_may_differ, paths)):
        raise UserError(f"{held(workdir, lines)}; {_otherwise(paths)}")
    if lines:
        _allowed.get().lines[:] = lines


def held(workdir, lines: list[str]) -> str:
    """What to say of `differences`."""
    more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
    return f"{workdir} holds another experiment: {'; '.join(lines[:6])}{more} (its own -> asked for)"


def _own_definition(workdir):
    """The file with the definition of the run that `workdir` holds; where it is gone, the newest checkpoint's copy."""
    root = storage.path(workdir)
    if (root / "config.json").exists():
        return root / "config.json"
    carried = [p for p in root.glob("checkpoints/*/config.json") if p.parent.name.isdigit()]
    return max(carried, key=lambda p: int(p.parent.name), default=None)


def differences(workdir, cfg, parts: tuple[str, ...] = ("",)) -> list[str]:
    """Lines of "path: its own -> asked for", of the run that `workdir` holds and of `cfg`; none without a run.

    A vocabulary that `cfg` leaves to its tokenizer, and the paths of `MAY_CHANGE`, may differ. parts: the paths below
    which experiments stand in `cfg`, where it is not one itself.
    """
    p = _own_definition(workdir)
    if p is None:
        if storage.path(workdir).exists() and not storage.path(workdir).is_dir():
            raise UserError(f"{workdir} is a file; --workdir is the folder that holds the run")
        return []
    storage.read_json(p)  # says what is wrong with a damaged file
    try:
        had = config.from_json(type(cfg), p.read_text())
    except UserError as e:
        raise UserError(f"{workdir} holds a run of another kind or version ({e}); choose another --workdir") from e
    bound = "" not in parts or cfg.model.vocab_size is not None
    allowed = [part + path for part in parts for path in (MAY_CHANGE if bound else (*MAY_CHANGE, "model.vocab_size"))]

    def may_change(line: str) -> bool:
        path = line.split(":", 1)[0]
        return any(path == a or (a.endswith(".") and path.startswith(a)) for a in allowed)

    return [line for line in config.diff(had, cfg) if not may_change(line)]
