"""Two real processes save a checkpoint and verify it: who hashes what, and what becomes of all when one fails."""

import errno
import json

import pytest

from jaxlm import storage
from jaxlm.run import checkpoint, exits, manifest, quarantine
from launch import local
from launch.job import Job, Processes
from tests.run import saving_together
from tests.run.saving_together import LAST
from tests.source import ROOT


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(folder, what is to happen -> what each of the two processes has seen); they have saved there before."""
    folder = tmp_path_factory.mktemp("together")

    def run(what: str) -> list[dict]:
        words = ("tests.run.saving_together", str(folder), what)
        with pytest.MonkeyPatch.context() as m:
            m.chdir(ROOT)
            m.delenv("JAX_PLATFORMS", raising=False)
            assert local.attempt(Job("local", words, Processes(2, cpu_devices=2)), []) == exits.EXIT_DONE
        return [storage.read_json(folder / f"{what}-{process}.json") for process in (0, 1)]

    return folder, run, run("saves")


def hashed(seen: list[dict], step: int) -> list[list[str]]:
    """By process."""
    return [sorted(n.split("/", 1)[1] for n in its["names"] if n.startswith(f"{step}/")) for its in seen]


def test_each_hashes_what_it_has_written_and_the_first_what_is_merged(together):
    folder, _, seen = together
    step = folder / "run/checkpoints/3"
    entries = manifest.read(step)["files"]
    zero, one = hashed(seen, 3)
    assert sorted(zero + one) == sorted(entries) == sorted(manifest._files(storage.path(step)))  # each once
    assert one == sorted(n for n in entries if "process_1" in n)
    assert any(n.startswith("state/ocdbt.process_1/d/") for n in one) and "state/array_metadatas/process_1" in one
    assert any(n.startswith("state/d/") for n in zero) and any(n.startswith("state/ocdbt.process_0/d/") for n in zero)
    assert manifest.problem(step) is None
    assert 0 < seen[0]["cost"]["checkpoint/hash_seconds"] < seen[0]["cost"]["checkpoint/write_seconds"]


def test_what_fails_on_one_process_fails_on_all_and_the_next_save_does_not(together):
    folder, _, (zero, one) = together
    kept = folder / "run/checkpoints"
    assert zero["errors"] == one["errors"]
    assert zero["errors"][:3] == [None] * 3 and zero["errors"][-1] is None
    for (step, failure), error in zip(saving_together.FAILURES.items(), zero["errors"][3:-1], strict=True):
        if failure[-1] == errno.ENOSPC:
            assert error.startswith(f"UserError: the disk is full: checkpoint {step} could not be written")
            assert f"step {step if failure[0] is saving_together.SAVED else 3} is safe" in error
        else:
            assert error.startswith("UserError: saving a checkpoint failed; process 0: no permission to write")
            assert error.endswith("manifest.json; choose another folder")
    assert checkpoint.steps(kept) == [1, 2, 3, 10, LAST]
    assert not [p.name for p in kept.iterdir() if p.name.startswith(("4.", "5.", "6.", "7.", "9."))]
    assert manifest.problem(kept / str(LAST)) is None


def test_a_save_that_ends_before_its_files_are_written_ends_all_for_that_reason(together):
    _, _, (zero, one) = together
    assert zero["ended"] == one["ended"]
    why = "PermissionError: [Errno 13] Permission denied"
    assert zero["ended"] == f"RuntimeError: saving a checkpoint failed; process 0: {why}"


def flip_a_byte(step, choose) -> str:
    """In the file that `choose` takes of all names, the largest file first."""
    entries = manifest.read(step)["files"]
    name = choose(sorted(entries, key=lambda n: (-entries[n]["bytes"], n)))
    content = bytearray((step / name).read_bytes())
    content[len(content) // 2] ^= 1
    (step / name).write_bytes(content)
    return name


def test_a_flipped_byte_of_either_is_found_whoever_looks(together):
    """The processes take the files in turn, the largest first: the second largest is the other's to look at."""
    folder, run, _ = together
    kept = folder / "run/checkpoints"
    flipped = {
        LAST: flip_a_byte(kept / str(LAST), lambda names: next(n for n in names if "process_1/d/" in n)),
        10: flip_a_byte(kept / "10", lambda names: names[0]),
        3: flip_a_byte(kept / "3", lambda names: next(n for n in names if "process_0/d/" in n)),
        2: flip_a_byte(kept / "2", lambda names: names[1]),
    }
    seen = run("continues")
    assert [(its.get("step"), its["ended"]) for its in seen] == [(1, None)] * 2
    shares = hashed(seen, 1)
    assert sorted(shares[0] + shares[1]) == sorted(manifest.read(kept / "1")["files"])  # each once
    assert abs(len(shares[0]) - len(shares[1])) <= 1
    assert flipped[2] in hashed(seen, 2)[1]
    notes = [json.loads(p.read_text()) for p in (kept / quarantine.FOLDER).glob("*.json")]
    assert {n["step"]: n["why"] for n in notes} == {
        step: f"the content of {name} has changed since it was written" for step, name in flipped.items()
    }
