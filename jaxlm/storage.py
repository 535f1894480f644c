"""All run-directory I/O, over etils.epath, so that a workdir may be local or on object storage."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid

from etils import epath

from jaxlm.config import UserError


def path(p) -> epath.Path:
    return epath.Path(p)


@contextlib.contextmanager
def disk_errors(p):
    """Turns a full disk or a missing permission into one clear line."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: cannot write {p}; free some and start the same command again") from e
        if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"no permission to write {p}; choose another folder") from e
        wrong_kind = isinstance(e, IsADirectoryError | NotADirectoryError)  # etils gives no number with its own
        if wrong_kind or e.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError(f"cannot write {p}: a file stands where a folder is needed, or the reverse") from e
        if e.errno == errno.ENOENT:
            raise UserError(f"cannot write {p}: there is no such folder") from e
        raise


def make_dir(p) -> epath.Path:
    with disk_errors(p):
        path(p).mkdir(parents=True, exist_ok=True)
    return path(p)


def write_bytes(p, data: bytes) -> None:
    """Writes the whole file or nothing: a reader never sees half of it."""
    p = path(p)
    if "://" in os.fspath(p):
        p.write_bytes(data)  # object stores publish an object only when it is complete
        return
    # The same process id may be in use on another machine that shares the disk.
    temporary = p.parent / f".{p.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    with disk_errors(p):
        try:
            p.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(p)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_text(p, text: str) -> None:
    write_bytes(p, text.encode())


def write_json(p, obj) -> None:
    write_text(p, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def read_json(p):
    p = path(p)
    try:
        return json.loads(p.read_text())
    except FileNotFoundError:
        raise UserError(f"no such file: {p}") from None
    except ValueError as e:
        raise UserError(f"{p} is not valid JSON: {e}") from e


def is_local(p) -> bool:
    """False on object storage, where files cannot be appended to."""
    return "://" not in os.fspath(p)


def append_jsonl(p, obj) -> None:
    with disk_errors(p), open(os.fspath(p), "a", encoding="utf-8") as f:
        f.write(json.dumps(obj) + "\n")


def files(folder) -> dict[str, epath.Path]:
    """Relative name -> path of every file below a folder."""
    out, todo = {}, [("", path(folder))]
    while todo:
        prefix, here = todo.pop()
        for p in here.iterdir():
            if p.is_dir():
                todo.append((f"{prefix}{p.name}/", p))
            else:
                out[prefix + p.name] = p
    return out


def copy(source, target) -> None:
    """Copies a file or a folder with all in it to where nothing stands; nothing where there is no source."""
    source, target = path(source), path(target)
    if source.is_dir():
        for name, p in files(source).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            p.copy(target / name)
    elif source.exists():
        source.copy(target)


def size(p) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is neither."""
    p = path(p)
    if p.is_dir():
        return sum(f.stat().length for f in files(p).values())
    return p.stat().length if p.exists() else 0


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(p) -> str:
    with path(p).open("rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(p) -> int | None:
    """Free bytes on the disk that holds `p` (or its nearest existing parent); None on object storage."""
    p = os.path.abspath(os.fspath(p)) if "://" not in os.fspath(p) else None
    if p is None:
        return None
    while not os.path.exists(p):
        p = os.path.dirname(p)
    return shutil.disk_usage(p).free
