"""The manifest of a saved step: what its files must be, so that damage shows before it is trained on.

`manifest.json` holds the sha256 and the size of every file, the shape and dtype of every array by name, the step's
metric and the best so far (null, or not there, where none is known), the caller's metadata, and a hash of itself.
"""

import json
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from jaxlm import storage
from jaxlm.config import UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# Orbax rewrites these when it gives the folder its final name, after the manifest; nothing is read from them.
BOOKKEEPING = ("_CHECKPOINT_METADATA", "commit_success.txt")
SMALL_FILE = 1 << 20


def _self_hash(manifest: dict) -> str:
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return storage.sha256_text(json.dumps(body, sort_keys=True))


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """Relative name -> path of every file of a step."""
    found = storage.files(folder)
    return {name: p for name, p in found.items() if p.name != MANIFEST and p.name not in BOOKKEEPING}


def write(
    folder, step: int, arrays: dict[str, str], metadata: dict, metric: float | None = None, best: dict | None = None
) -> None:
    files = _files(epath.Path(folder))
    with ThreadPoolExecutor(8) as pool:
        hashes = dict(zip(files, pool.map(storage.sha256_file, files.values())))
    entries = {n: {"bytes": files[n].stat().length, "sha256": hashes[n]} for n in sorted(files)}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "metric": metric,
        "best": best,
        "metadata": metadata,
        "arrays": arrays,
        "files": entries,
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


def problem(folder, full: bool = True) -> str | None:
    """What is wrong with a step's folder, or None when it holds what its manifest says.

    With `full=False` only the sizes of large files are compared, not their content.
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

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(check, manifest["files"], manifest["files"].values())
        return next((x for x in found if x), None)
