"""Bad input to the program itself: one clear line, exit code 2, and nothing that was written before is harmed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.full_disk import small_disk

ROOT = Path(__file__).parents[2]
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489")
WORDS = b"the model reads the text and the text is all that the model reads "
TINY = ("model.layers=1", "model.width=16", "model.heads=2", "train.steps=2", "data.context=16", "data.workers=1")


def launch(workdir, *arguments, cache):
    command = [sys.executable, "-m", "launch.train", f"--workdir={workdir}", *arguments]
    environment = os.environ | {"JAXLM_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def tiny(path, *more):
    return ("--experiment=pretrain_tiny", f"--set=data.path={path}", *(f"--set={s}" for s in (*TINY, *more)))


def write(tmp_path, name, data: bytes):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def missing(tmp_path):
    return tiny(tmp_path / "bok.txt"), ["bok.txt", "nearest"]


def empty(tmp_path):
    return tiny(write(tmp_path, "empty.txt", b"")), ["empty.txt", "empty"]


def picture(tmp_path):
    return tiny(write(tmp_path, "picture.txt", PNG + bytes(200))), ["picture.txt", "PNG"]


def bad_utf8(tmp_path):
    return tiny(write(tmp_path, "latin1.txt", WORDS * 50 + b"caf\xe9 " + WORDS * 50)), ["latin1.txt", "UTF-8"]


def too_small_for_the_vocabulary(tmp_path):
    path = write(tmp_path, "small.txt", WORDS * 60)
    return tiny(path, "data.curation=none"), ["vocab_size"]


def context_longer_than_the_data(tmp_path):
    path = write(tmp_path, "short.txt", WORDS * 60)
    return tiny(path, "data.curation=none", "data.tokenizer=Bytes", "data.context=100000"), ["context", "100000"]


def wrong_setting(tmp_path):
    return (*tiny("x"), "--set=optimizer.learning_rate=1"), ["optimizer.learning_rate", "nearest"]


def unknown_edit(tmp_path):
    return (*tiny("x"), "--edit=muom"), ["unknown edit 'muom'", "muon"]


CASES = [missing, empty, picture, bad_utf8, too_small_for_the_vocabulary, context_longer_than_the_data]


@pytest.mark.parametrize("case", [*CASES, wrong_setting, unknown_edit], ids=lambda f: f.__name__)
def test_one_clear_line_and_exit_code_2(case, tmp_path):
    arguments, words = case(tmp_path)
    done = launch(tmp_path / "run", *arguments, cache=tmp_path / "cache")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0]
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_full_disk_ends_a_run_in_one_line_and_a_larger_one_lets_it_go_on(tmp_path):
    text = write(tmp_path, "text.txt", WORDS * 400)
    arguments = tiny(
        text, "data.curation=none", "data.tokenizer=Bytes", "train.steps=6", "checkpoint.every=2", "model.width=64"
    )
    with small_disk(tmp_path / "disk", "1200k") as disk:
        done = launch(disk / "run", *arguments, cache=tmp_path / "cache")
        assert done.returncode == 2, done.stderr
        assert "the disk is full" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        done = launch(disk / "run", *arguments, cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr


def test_a_help_text_whose_reader_has_gone():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "launch.train", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
