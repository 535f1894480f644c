"""What people see of launch.sample and launch.eval, run in this process, and their one-line errors."""

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.tokenizer import CharsTokenizer
from jaxlm.sample import show
from launch import sample
from tests import tiny_run

flags.FLAGS.set_gnu_getopt(True)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    tiny_run.make(path)
    return path


@pytest.fixture
def call(workdir, capsys, monkeypatch):
    """Runs launch.sample with these options; returns what it printed."""
    monkeypatch.setattr(sample, "use_compilation_cache", lambda: None)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["sample"])

    def run(**options):
        with flagsaver.flagsaver(**{"workdir": str(workdir), "max_tokens": 8} | options):
            assert sample.main() == 0
        return capsys.readouterr()

    return run


def test_samples_are_printed_and_repeat(call):
    out = call(prompt="def main", num_samples=2, seed=5)
    assert out.out.count("def main") == 2 and "--- sample 2 of 2: 8 tokens, length ---" in out.out
    assert call(prompt="def main", num_samples=2, seed=5) == out
    assert call(prompt="def main", num_samples=2, seed=6) != out


def test_json_holds_everything(call):
    options = {"num_samples": 2, "show_probabilities": 4, "show_tokens": True, "json": True, "temperature": 0.0}
    out = json.loads(call(prompt="a é", **options).out)
    assert out["prompt"] == "a é" and out["step"] == 7 and out["settings"]["temperature"] == 0
    assert out["prompt_ids"] == [2, 129, 64, 227, 201]
    assert [t["token"] for t in out["tokens"]] == ["a", "▁", "<0xC3>", "<0xA9>"]
    probabilities = [t["probability"] for t in out["next_token"]]
    assert len(probabilities) == 4 and sorted(probabilities, reverse=True) == probabilities
    a, b = out["samples"]
    assert a == b and len(a["ids"]) == len(a["logprobs"]) <= 8  # greedy


def test_the_cache_may_be_kept_in_fewer_bytes(call, workdir):
    """int8 is used, and costs little; a name that is none is told with those that are."""

    def said(**options):
        out = json.loads(call(prompt="def main", temperature=0.0, json=True, **options).out)
        return out["cache_dtype"], np.asarray(out["samples"][0]["logprobs"])

    (name, logprobs), (plain, want) = said(cache_dtype="int8"), said()
    assert (name, plain) == ("int8", "float32") and said(cache_dtype="float32")[1].tolist() == want.tolist()
    assert 1e-6 < np.abs(logprobs[:2] - want[:2]).max() < 0.1  # later tokens may be others
    drafted = said(cache_dtype="int8", draft=str(workdir), draft_tokens=3)[1]
    np.testing.assert_allclose(drafted[:2], logprobs[:2], atol=1e-2)
    with pytest.raises(flags.IllegalFlagValueError, match=r"one of <float32\|bfloat16\|int8>"):
        flags.FLAGS(["sample", "--cache_dtype=int4"])


def test_a_draft_leaves_greedy_text_as_it_is(call, workdir, tmp_path):
    want = json.loads(call(prompt="def main", temperature=0.0, json=True).out)
    got = call(prompt="def main", temperature=0.0, json=True, draft=str(workdir), draft_tokens=3)
    with_draft = json.loads(got.out)
    assert [s["ids"] for s in with_draft["samples"]] == [s["ids"] for s in want["samples"]] and "draft" not in want
    worth = with_draft["draft"]
    assert worth["accepted"] == worth["drafted"] == 6 and worth["steps"] == 2 and worth["tokens_per_step"] == 3.5
    assert (
        got.err == "note: of 6 tokens that the draft proposed 6 were accepted (100%); a pass of the model gave 3.50\n"
    )
    tiny_run.make(tmp_path, tiny_run.replaced(model=dataclasses.replace(tiny_run.EXPERIMENT.model, vocab_size=97)))
    CharsTokenizer("abc").save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"is not that of .*: a draft must be trained with the same one"):
        call(prompt="a", draft=str(tmp_path))


def test_a_prompt_from_standard_input(call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from\nafar")))
    assert call(prompt="-", num_samples=2).out.count("from\nafar") == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    with pytest.raises(UserError, match="not valid UTF-8: byte 2 is 0xff"):
        call(prompt="-")


def test_looking_alone_samples_nothing(call, tmp_path):
    picture = tmp_path / "a.png"
    out = call(prompt="a $b\n", show_tokens=True, show_probabilities=3, show_attention=str(picture)).out
    assert "a  |▁ |$ |b  |↵" in out and "5 tokens, 5 bytes" in out and "(285 others)" in out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "--- sample" not in out and out.rstrip().endswith("a.png")


def test_bad_values_are_one_clear_line(call, tmp_path):
    for options, message in (
        ({"prompt": None}, "--prompt=TEXT is missing"),
        ({"workdir": None}, "--workdir=DIR is missing"),
        ({"workdir": str(tmp_path / "none")}, "no such workdir"),
        ({"temperature": -0.5}, "temperature must be 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"step": 3}, "no checkpoint of step 3"),
        ({"stop": [""]}, "a stop string must not be empty"),
        ({"stop_id": [999]}, "token id 999 is outside the vocabulary of 288"),
        ({"show_attention": "x.jpg"}, "takes the name of a .png file"),
        ({"show_attention": str(tmp_path / "no" / "x.png")}, "there is no folder"),
        ({"show_attention": str(tmp_path / "x.png"), "prompt": "x" * 200}, "at most 128 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            call(**{"prompt": "a"} | options)


def test_from_the_shell(workdir):
    """Exit codes and streams, once each: a process takes seconds to start."""

    def shell(*command):
        return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)

    bad = shell("launch.sample", f"--workdir={workdir}", "--prompt=a", "--top_k=many")
    assert bad.returncode == 2 and bad.stdout == ""
    assert len(bad.stderr.splitlines()) == 1 and bad.stderr.startswith("error: ") and "top_k" in bad.stderr
    bad = shell("launch.eval", f"--workdir={workdir}", "--suite=helpout")
    assert bad.returncode == 2 and bad.stderr == "error: unknown suite 'helpout'; nearest: heldout, shots\n"
    described = shell("launch.sample", "--help").stdout  # flags of modules that programs share stand beside its own
    assert all(f"\n  --{name}:" in described for name in ("prompt", "draft", "draft_tokens", "cache_dtype"))


def test_tables_wrap_align_and_show_what_is_invisible():
    tokenizer = tiny_run.TOKENIZER
    ids = tokenizer.encode("ab\tc") + [tokenizer.eos]
    assert show.token_view(tokenizer, ids, columns=10).splitlines() == [
        *("a  |b", "129|130", "", "⇥ |c", "41|131", "", "<|end|>", "3", "", "5 tokens, 4 bytes, 0.80 bytes a token"),
    ]
    colored = show.token_view(tokenizer, ids, columns=80, color=True)
    assert colored.count(show.RESET) == 5 and all(colored.count(b) >= 1 for b in show.BACKGROUNDS)
    probabilities = np.full(tokenizer.vocab_size, 0.1 / 286)
    probabilities[[97, 98]] = [0.6, 0.3]
    lines = show.probability_table(tokenizer, probabilities, 2, columns=46).splitlines()
    assert [x.split() for x in lines] == [
        ["token", "id", "probability"],
        ["A", "97", "60.000%", "█" * 14],
        ["B", "98", "30.000%", "█" * 7],
        ["(286", "others)", "10.000%"],
    ]
    assert [show.bar(x, 2) for x in (0, 1e-9, 0.5, 1, 3)] == ["", "▏", "█", "██", "██"]
    assert show.width("a世é") == 4
