"""One trial by its name, what came of it, and how many of each there were."""

import collections
import shutil
from pathlib import Path

import pytest

from jaxlm.config import UserError
from tests.faults.faults import CLASSES, FAULTS, SOAK, Fault
from tests.faults.trial import NotStruck, Trial, Wrong, timed

NOT_STRUCK = "not struck"


def trial(stage: str, fault: Fault, seed: int, phase: str | None, root: Path) -> dict:
    """Runs one; {"stage", "fault", "class", "seed", "phase", "at", "outcome", "expected", "ok", "codes", "seconds"}.

    ok is None where it cannot be tried on this machine, and where the fault did not strike.
    """
    t = Trial(root, stage, fault.name, seed, phase)
    record = {"stage": stage, "fault": fault.name, "class": fault.kind, "seed": seed, "phase": phase}
    with timed(record):
        try:
            fault.script(t)
            outcome, ok = "as expected", True
        except Wrong as e:
            outcome, ok = str(e), False
        except NotStruck as e:
            outcome, ok = f"{NOT_STRUCK}: {e}", None
        except pytest.skip.Exception as e:
            outcome, ok = f"not tried: {e}", None
    if ok is not False:
        shutil.rmtree(t.folder, ignore_errors=True)
    details = {"at": t.at, "outcome": outcome, "expected": CLASSES[fault.kind], "ok": ok, "codes": t.codes}
    return record | details


def table(records: list[dict]) -> str:
    """Counts by class and fault."""
    heads = f"{'as expected':>11} {'wrong':>5} {'not struck':>10} {'not tried':>9}"
    lines = [f"{'class':12} {'fault':26} {'trials':>6} {heads}"]
    counts = collections.defaultdict(collections.Counter)
    for r in records:
        for key in ((r["class"], r["fault"]), (r["class"], ""), ("all", "")):
            counts[key]["not struck" if r["outcome"].startswith(NOT_STRUCK) else r["ok"]] += 1
    for kind in (*CLASSES, "all"):
        for (k, fault), n in sorted(counts.items(), key=lambda x: x[0][1] == ""):
            if k == kind:
                found = f"{n[True]:11} {n[False]:5} {n['not struck']:10} {n[None]:9}"
                lines.append(f"{kind:12} {fault:26} {n.total():6} {found}")
    return "\n".join(lines)


def one(text: str) -> tuple[str, Fault, int, str | None]:
    """The trial that --only=STAGE/FAULT/SEED[/PHASE] names."""
    known = {(s, f.name): f for f in (*FAULTS, SOAK) for s in f.stages}
    stage, name, seed, phase = (*text.split("/"), "", "", "", "")[:4]
    fault = known.get((stage, name))
    if fault is None or not seed.isdigit() or text.count("/") > 3 or (phase and phase not in fault.phases):
        raise UserError(f"--only={text} is not STAGE/FAULT/SEED[/PHASE], such as {'/'.join(next(iter(known)))}/0/save")
    return stage, fault, int(seed), phase or None
