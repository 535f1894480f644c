"""launch.chat as people use it: lines in, replies out, with models whose words are known."""

import contextlib
import dataclasses
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data import chat_sources
from jaxlm.data.chat_sources import Messages
from jaxlm.data.conversation import Message, Part
from jaxlm.data.prepare import Data
from jaxlm.data.tokenizer import Bytes
from jaxlm.tools.python import isolation_mode
from launch import chat
from tests.launch.talkers import CHAT, HELLO, LOOK, run_folder
from tests.sample.scripted import say

flags.FLAGS.set_gnu_getopt(True)
ENDLESS = {"<|im_sep|>": "x", "x": "y", "y": "x"}


@pytest.fixture(scope="module")
def hello(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("hello"), HELLO)


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    root = tmp_path_factory.mktemp("look")
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("Plim\n\nPlim is a tree.\n")
    return run_folder(root / "run", LOOK), str(root / "texts")


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs launch.chat on these lines with these options; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(chat, "use_compilation_cache", lambda: None)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["chat"])

    def run(*lines, **options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with flagsaver.flagsaver(**{"max_tokens": 32, "temperature": 0.0, "tools": []} | options):
            code = chat.main()
        return code, *capsys.readouterr()

    return run


def test_one_message_a_line(call, hello):
    assert call("hi", "", "and you?", workdir=hello) == (0, "[thinking] hm\nOk\ufffd!\n" * 2, "")
    assert call("hi", workdir=hello, hide_thinking=True) == (0, "Ok\ufffd!\n", "")


def test_the_cache_may_be_kept_in_fewer_bytes(call, hello, monkeypatch):
    kept, reply = [], chat.reply

    def watched(model, *args, **options):
        kept.append(model.precision.cache)
        return reply(model, *args, **options)

    monkeypatch.setattr(chat, "reply", watched)
    for name in ("int8", None):
        assert call("hi", workdir=hello, cache_dtype=name) == (0, "[thinking] hm\nOk\ufffd!\n", "")
    assert kept == ["int8", None]


def test_a_draft_changes_no_reply(call, hello, tmp_path):
    assert call("hi", "and you?", workdir=hello, draft=hello) == (0, "[thinking] hm\nOk\ufffd!\n" * 2, "")
    wrong = run_folder(tmp_path / "wrong", say("<|im_sep|>", "<think>", "n", "o", "</think>", "O", "x"))
    assert call("hi", workdir=hello, draft=wrong) == (0, "[thinking] hm\nOk\ufffd!\n", "")


def test_what_was_said_is_saved_as_messages_and_read_back(call, hello, tmp_path):
    file = tmp_path / "said.jsonl"
    lines = ("/system Be\tbrief.", "hi\x1b", f"/save {file}", "/system", "more", f"/save {file}")
    code, _, err = call(*lines[:3], workdir=hello)
    assert code == 0 and err == f"note: 3 messages in {file}\n"
    (c,) = chat_sources.conversations(Messages(str(file)))
    assert c.messages == (
        Message("system", "Be\tbrief."),
        Message("user", "hi\x1b"),
        Message("assistant", (Part("hm", "thinking"), Part("Ok\x07!"))),  # as it was said, not as it was shown
    )
    code, _, err = call("hi", f"/save {file}", workdir=hello)
    assert code == 2 and err == f"error: /save: {file} exists; choose another name\n"
    file.unlink()
    code, _, err = call(*lines, workdir=hello)
    assert code == 0 and err.endswith(f"note: 4 messages in {file}\n")
    (c,) = chat_sources.conversations(Messages(str(file)))
    assert [m.role for m in c.messages] == ["user", "assistant"] * 2


def test_tools_are_offered_run_and_switched_off(call, look, tmp_path):
    workdir, texts = look
    options = {"workdir": workdir, "tools": ["search"], "index": texts}
    code, out, err = call("hi", f"/save {tmp_path / 'a.jsonl'}", **options)
    assert (code, out) == (0, "[call] search\nPlim\n[result] [1] Plim: Plim Plim is a tree.\n7\n"), err
    (c,) = chat_sources.conversations(Messages(str(tmp_path / "a.jsonl")))
    assert c.messages[0] == Message("system", "You can use these tools: search.")
    assert [p.kind for p in c.messages[2].parts] == ["tool_call", "tool_result", "text"]
    code, out, err = call("/tools off", "/system Hm.", "hi", f"/save {tmp_path / 'b.jsonl'}", **options)
    assert code == 0 and "[call]" not in out  # without tools a call's symbols are never sampled
    (c,) = chat_sources.conversations(Messages(str(tmp_path / "b.jsonl")))
    assert c.messages[0] == Message("system", "Hm.")


def test_commands_and_their_errors(call, hello):
    code, out, err = call("/help", "/reset", "/exit", "never read", workdir=hello)
    assert code == 0 and "/save FILE.jsonl" in out and "Ok" not in out
    for line, message in (
        ("/sav x", "unknown command /sav; nearest: save"),
        ("/save x.jsonl", "/save: nothing was said yet"),
        ("/tools on", "/tools on: none were given"),
        ("/probabilities yes", "/probabilities takes on or off, got 'yes'"),
        ("x" * 600, "and 480 fit"),
    ):
        code, out, err = call(line, "hi", workdir=hello)
        assert code == 2 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1
        assert out.endswith("!\n")  # and goes on
    code, _, err = call("hi", "/reset", "/save x.jsonl", workdir=hello)
    assert code == 2 and err == "error: /save: nothing was said yet\n"
    code, _, err = call("hi", "/save chat.txt", workdir=hello)
    assert code == 2 and "the name must end so" in err


def test_probabilities_on_request(call, hello):
    code, out, _ = call("/probabilities on", "hi", "/probabilities off", "hi", workdir=hello)
    lines = out.splitlines()
    assert code == 0 and lines[2].split() == ["token", "probability", "likeliest"]
    assert lines[3].split()[:4] == ["<think>", "100.000%", "<think>", "100.0%"] and out.count("probability") == 1
    assert len(lines) == 2 + 1 + 9 + 2  # a line a token, <|im_end|> too
    assert call("hi", workdir=hello, show_probabilities=1)[1].splitlines()[3].count("%") == 2


def test_older_exchanges_are_left_out_and_said_so(call, hello):
    code, out, err = call(*["x" * 160] * 4, workdir=hello)
    assert code == 0 and out.count("Ok") == 4
    assert err == "note: older exchanges no longer fit into the context of 512 tokens and are left out from here on\n"


def test_a_reply_can_be_stopped_and_stays_as_far_as_it_went(call, tmp_path, monkeypatch):
    class Stopping(io.StringIO):
        def write(self, text):
            super().write(text)
            if self.getvalue().count("x") == 3:
                raise KeyboardInterrupt

    workdir, file = run_folder(tmp_path / "run", ENDLESS), tmp_path / "said.jsonl"
    out = Stopping()
    with contextlib.redirect_stdout(out):
        code, _, err = call("hi", f"/save {file}", workdir=workdir, max_tokens=100)
    assert code == 0 and err.startswith("note: stopped\n") and len(out.getvalue()) < 20
    (c,) = chat_sources.conversations(Messages(str(file)))
    assert out.getvalue().startswith(c.messages[1].text) and c.messages[1].text.startswith("xyxyx")
    code, _, err = call("hi", workdir=workdir, max_tokens=10)
    assert err == "note: the reply ends at its limit of 10 tokens\n"


def test_a_base_model_is_said_to_be_one(call, tmp_path):
    code, _, err = call("hi", workdir=run_folder(tmp_path / "base", HELLO, Data(tokenizer=Bytes())))
    assert code == 0 and err.startswith("note: ") and "never fine-tuned on conversations" in err


def test_bad_options_are_one_clear_line(call, hello, look, monkeypatch):
    for options, message in (
        ({"workdir": None}, "--workdir=DIR is missing"),
        ({"tools": ["pyton"]}, "unknown tool 'pyton'; nearest: python"),
        ({"tools": ["search"], "index": None}, "the tool search needs an index: a folder of texts"),
        ({"tools": ["search"], "index": hello + "/none"}, "no index at .*/none, and no folder of texts"),
        ({"tools": ["calculator"], "index": hello}, "--index is what the tool search looks into"),
        ({"top_p": 2.0}, "top_p must be above 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            call("hi", **{"workdir": hello} | options)
    monkeypatch.setattr("jaxlm.tools.python.isolation.candidates", lambda: [])
    isolation_mode.cache_clear()
    with pytest.raises(UserError, match=r"does not let model-written Python be isolated.*--unsafe_python"):
        call("hi", workdir=hello, tools=["python"])


def test_python_runs_as_this_user_where_nothing_isolates_it_and_a_flag_says_so(call, tmp_path, monkeypatch, request):
    request.addfinalizer(isolation_mode.cache_clear)
    monkeypatch.setattr("jaxlm.tools.python.isolation.candidates", lambda: [])
    isolation_mode.cache_clear()
    calls = say("<|im_sep|>", "<|tool_call|>", *"python", "\n", *"(1)", "<|tool_call_end|>")
    workdir = run_folder(tmp_path / "run", calls | say("<|tool_result_end|>", "7", "<|im_end|>"))
    with pytest.raises(UserError, match="be isolated"):
        call("hi", workdir=workdir, tools=["python"])
    code, out, err = call("hi", workdir=workdir, tools=["python"], unsafe_python=True)
    assert (code, out) == (0, "[call] python\n(1)\n[result] (the program printed nothing)\n7\n"), err


def test_in_a_terminal(tmp_path):
    """One process under a terminal of its own: a prompt, colors, and a Ctrl-C that stops the reply alone."""
    # Long enough that the reply cannot have ended before the signal comes, however busy the machine is.
    longer = dataclasses.replace(CHAT, context=20_000)
    workdir = run_folder(tmp_path / "run", {"<|im_sep|>": "<think>", "<think>": "x", "x": "y", "y": "x"}, longer)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "launch.chat", f"--workdir={workdir}", "--max_tokens=16000", "--temperature=0"]
    # A background job of a plain shell ignores Ctrl-C, and so would whatever it starts: a person's terminal does not.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    signal.signal(signal.SIGINT, former)
    os.close(theirs)
    seen = ""

    def until(text: str):
        nonlocal seen
        end = time.monotonic() + 300
        while text not in seen:
            assert time.monotonic() < end and process.poll() is None, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096).decode()

    try:
        until("> ")
        os.write(ours, b"hi\n")
        until("\x1b[2m[thinking] xyxy")
        process.send_signal(2)
        until("note: stopped")
        seen = seen.partition("note: stopped")[2]
        until("> ")
        os.write(ours, b"/exit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
