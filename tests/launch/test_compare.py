"""launch.compare with two models whose words are known."""

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.prepare import Data
from jaxlm.data.tokenizer import Bytes
from launch import compare
from tests.launch.talkers import HELLO, run_folder
from tests.sample.scripted import say

flags.FLAGS.set_gnu_getopt(True)


def test_it_prints_and_writes_a_page(tmp_path, capsys, monkeypatch):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["compare"])
    hello = run_folder(tmp_path / "hello", HELLO)
    monkeypatch.setattr(compare, "use_compilation_cache", lambda: None)
    base = run_folder(tmp_path / "base", say("\n", "n", "o", "<|end|>"), Data(tokenizer=Bytes(), context=256))
    page = tmp_path / "page.html"
    options = {"workdir": [base, hello], "prompt": ["Who?"], "out": str(page), "max_tokens": 16}
    with flagsaver.flagsaver(questions=1, **options):
        assert compare.main() == 0
    out = capsys.readouterr().out
    assert out.startswith("=== Who?\n--- base, text") and "[thinking] hm\nOk\ufffd!" in out
    assert out.count("(truth: ") == 7 and out.count("wrong") >= 7  # four groups of facts, arithmetic, identity, system
    assert page.read_text().count("<table>") == 8
    for options, message in (
        ({"workdir": []}, "--workdir=DIR is missing"),
        ({"workdir": [hello]}, "nothing to ask"),
        ({"workdir": [base], "questions": 1}, "--world=DIR"),
    ):
        with flagsaver.flagsaver(**{"prompt": [], "questions": 0} | options), pytest.raises(UserError, match=message):
            compare.main()
    assert compare.labels(["a/x", "b/x", "c"]) == ["x (1)", "x (2)", "c"]
