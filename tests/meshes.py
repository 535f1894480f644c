"""Every stage under every scheme on 8 devices, of one process and of several, beside the same run on one device.

usage:
  python -m tests.meshes --out=FILE.json [--stage=NAME]... [--scheme=NAME]... [--process_counts=1,2]
                         [--folder=DIR] [--limit=SECONDS]

Two updates of each stage's tiny definition (tests/faults/definitions.py) in fresh processes. What is compared: the
batches, which must be the same; the losses of both updates and the norm of their gradients, relative to their value or
to a thousandth, if that is more: the first loss of GRPO is nothing but rounding, since a group's advantages add up to
0; and the first moments of the optimizer, which are the gradients of both updates, array by array, relative to the
greatest value of each or to a thousandth of the greatest of all, if that is more: the bias of a reward model has a
gradient of nothing but rounding, since only differences of rewards count.

In --folder stand the runs and what was compiled: with it one stage and scheme can be asked for at a time, and runs that
are there already are only compared. Exit codes: 0 all within 1e-4; 1 not.
"""

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from jaxlm.config import UserError
from launch import common
from tests.faults import child
from tests.faults.definitions import STAGES
from tests.faults.trial import Wrong, arrays, same_batches, whole

SCHEMES = {
    "fsdp": {"mesh.fsdp": 8},
    "replica_fsdp": {"mesh.replica": 2, "mesh.fsdp": 4},
    "fsdp_tensor": {"mesh.fsdp": 4, "mesh.tensor": 2},
    "context": {"mesh.fsdp": 2, "mesh.context": 4},
}
SHARED = {"train.steps": 2, "evaluation.every": 2}
LOGGED = ("train/loss", "train/gradient_norm", "eval/all/loss", "train/reward")
WITHIN = 1e-4

OUT = flags.DEFINE_string("out", None, "File that gets all that was found, as JSON.")
STAGE = flags.DEFINE_multi_enum("stage", [], STAGES, "Only this stage; may be repeated.")
SCHEME = flags.DEFINE_multi_enum("scheme", [], sorted(SCHEMES), "Only this scheme; may be repeated.")
PROCESSES = flags.DEFINE_list(
    "process_counts", ["1", "2"], "How many processes have the 8 devices, with commas between."
)
FOLDER = flags.DEFINE_string("folder", None, "Folder to work in, kept for the next time.")
LIMIT = flags.DEFINE_float("limit", child.TOO_LONG, "Seconds for a run; one that takes longer ends with its stacks.")


def greatest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def compared(root: Path, stage: str, scheme: str, processes: int) -> dict:
    """{"logged", "gradients", "worst"}: the greatest relative differences, and the array of the second."""
    alone = whole(root, stage, settings=tuple(SHARED.items()))
    settings = tuple((SHARED | SCHEMES[scheme]).items())
    spread = whole(root, stage, devices=8 // processes, processes=processes, settings=settings)
    same_batches(spread, alone)
    logged = [
        abs(mine[name] - its[name]) / max(abs(its[name]), 1e-3)
        for mine, its in zip(spread.history, alone.history, strict=True)
        for name in LOGGED
        if name in its
    ]
    mine, its = arrays(root, spread), arrays(root, alone)
    least = 1e-3 * max(greatest(x) for name, x in its.items() if "/mu/" in name)
    moments = {name: greatest(mine[name] - x) / max(greatest(x), least) for name, x in its.items() if "/mu/" in name}
    worst = max(moments, key=moments.get)
    return {"logged": max(logged), "gradients": moments[worst], "worst": worst}


def main() -> int:
    if OUT.value is None:
        raise UserError("--out=FILE.json is missing: what was found")
    if wrong := [n for n in PROCESSES.value if n not in ("1", "2", "4", "8")]:
        raise UserError(f"--process_counts={wrong[0]}: 8 devices are shared by 1, 2, 4 or 8 processes")
    found, child.TOO_LONG = [], LIMIT.value  # which the processes that run have from this one
    kept = contextlib.nullcontext(FOLDER.value) if FOLDER.value else tempfile.TemporaryDirectory()
    with kept as root:
        for stage in STAGE.value or STAGES:
            for scheme in SCHEME.value or SCHEMES:
                for processes in map(int, PROCESSES.value):
                    r = {"stage": stage, "scheme": scheme, "processes": processes, "devices": 8}
                    try:
                        r |= compared(Path(root), stage, scheme, processes)
                        r["ok"] = max(r["logged"], r["gradients"]) <= WITHIN
                        said = f"logged {r['logged']:.1e}, gradients {r['gradients']:.1e} ({r['worst']})"
                    except Wrong as e:
                        r |= {"ok": False, "wrong": str(e)}
                        said = str(e)
                    found.append(r)
                    word = "ok   " if r["ok"] else "WRONG"
                    print(f"{word} {stage:8} {scheme:13} {processes} x {8 // processes}  {said}", flush=True)
                    Path(OUT.value).write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(r["ok"] for r in found))


if __name__ == "__main__":
    common.run(main)
