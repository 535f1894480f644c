"""The manifest of a saved step: what its files must be, so that damage shows before it is trained on.

`manifest.json` holds the sha256 and the size of every file, the shape and dtype of every array by name, the step's
metric and the best so far (null, or not there, where none is known), the caller's metadata, and a hash of itself.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from jaxlm import storage
from jaxlm.config import UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# Orbax rewrites these when it gives the folder its final name, after the manifest; nothing is read from them.
BOOKKEEPING = ("_CHECKPOINT_METADATA", "commit_success.txt")
SMALL_FILE = 1 << 20
# What a process alone writes, in the folder of a step. Process 0 writes the rest, when all have written theirs.
STATE = "state"
OWN = ("ocdbt.process_{}", "array_metadatas/process_{}")


def _self_hash(manifest: dict) -> str:
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return storage.sha256_text(json.dumps(body, sort_keys=True))


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """Relative name -> path of every file of a step."""
    found = storage.files(folder)
    return {name: p for name, p in found.items() if p.name != MANIFEST and p.name not in BOOKKEEPING}


def _entries(files: dict[str, epath.Path]) -> dict[str, dict]:
    with ThreadPoolExecutor(8) as pool:
        hashes = pool.map(storage.sha256_file, files.values())
        return {n: {"bytes": p.stat().length, "sha256": h} for (n, p), h in zip(files.items(), hashes)}


def under_way(final: epath.Path) -> epath.Path:
    """The folder that Orbax writes and will name `final`; on object storage it has that name already."""
    temporary = [p for p in final.parent.iterdir() if p.name.startswith(f"{final.name}.orbax-checkpoint-tmp")]
    return max(temporary, key=lambda p: p.stat().mtime) if temporary else final


def own(final: epath.Path, process: int) -> dict:
    """{"files", "seconds"}: the manifest's entries of the files that `process` alone has written of a step under way,
    which will be named `final`."""
    began, found = time.monotonic(), {}
    state = under_way(under_way(final) / STATE)
    for name in (n.format(process) for n in OWN):
        if (p := state / name).is_dir():
            found |= {f"{STATE}/{name}/{n}": f for n, f in storage.files(p).items()}
        elif p.exists():
            found[f"{STATE}/{name}"] = p
    return {"files": _entries(found), "seconds": time.monotonic() - began}


def write(
    folder,
    step: int,
    arrays: dict[str, str],
    metadata: dict,
    metric: float | None = None,
    best: dict | None = None,
    hashed: Sequence[dict] = (),
) -> None:
    """Hashes the files of a step but those that are `hashed` already: what `own` gave on each process."""
    entries = {name: entry for part in hashed for name, entry in part["files"].items()}
    entries |= _entries({n: p for n, p in _files(epath.Path(folder)).items() if n not in entries})
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "metric": metric,
        "best": best,
        "metadata": metadata,
        "arrays": arrays,
        "files": dict(sorted(entries.items())),
    }
    storage.write_json(epath.Path(folder) / MANIFEST, manifest | {"sha256": _self_hash(manifest)})


def read(folder) -> dict:
    """The manifest of a step's folder; `ValueError` says what is wrong with it."""
    p = epath.Path(folder) / MANIFEST
    if not p.exists():
        raise ValueError("it has no manifest.json, so it was never completely saved")
    try:
        manifest = json.loads(p.read_text())
        good = manifest["sha256"] == _self_hash(manifest)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError("manifest.json is damaged")
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{p} has schema version {manifest['schema_version']}, this program reads version {SCHEMA_VERSION}"
        )
    return manifest


def problem(folder, full: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a step's folder, or None when it holds what its manifest says.

    full: without it only the sizes of large files are compared, not their content. share: (which, of how many) of the
    equal shares of the files is looked at.
    """
    folder = epath.Path(folder)
    try:
        manifest = read(folder)
    except ValueError as e:
        return str(e)

    def check(name: str, entry: dict) -> str | None:
        p = folder / name
        try:
            if (length := p.stat().length) != entry["bytes"]:
                return f"{name} has {length} bytes, its manifest says {entry['bytes']}"
            if (full or length < SMALL_FILE) and storage.sha256_file(p) != entry["sha256"]:
                return f"the content of {name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        return None

    which, of = share
    mine = dict(sorted(manifest["files"].items(), key=lambda named: (-named[1]["bytes"], named[0]))[which::of])
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(check, mine, mine.values())
        return next((x for x in found if x), None)
