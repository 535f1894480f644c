"""launch.eval on the world's suites, with a model that always searches and one that was never fine-tuned."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.prepare import Data
from jaxlm.data.tokenizer import Bytes
from jaxlm.tools.python import isolation_mode
from launch import eval as launch_eval
from tests.launch.talkers import HELLO, LOOK, run_folder
from tests.sample.scripted import say

flags.FLAGS.set_gnu_getopt(True)


def test_the_world_is_asked(tmp_path, capsys, monkeypatch):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["eval"])
    look, hello = run_folder(tmp_path / "look", LOOK), run_folder(tmp_path / "hello", HELLO)
    monkeypatch.setattr(launch_eval, "use_compilation_cache", lambda: None)
    with flagsaver.flagsaver(workdir=look, suite="world", limit=2, tools=["search"], seed=0, json=True, world=None):
        assert launch_eval.main() == 0
    found = json.loads(capsys.readouterr().out)
    need = found["tasks"]["tools"]["metrics"]
    assert need["needed/called"]["value"] == 1 and need["needed/called"]["n"] == 4  # withheld facts and strangers
    assert found["tools"]["tools/search/calls"] == 14 and found["form"] == "chat"
    assert (tmp_path / "look" / "eval" / "world_tools" / "results.json").exists()
    base = run_folder(tmp_path / "base", say("\n", "A", "<|end|>"), Data(tokenizer=Bytes(), context=512))
    with flagsaver.flagsaver(workdir=base, suite="world", limit=1, tools=[], json=True, world=hello):
        assert launch_eval.main() == 0
    assert json.loads(capsys.readouterr().out)["form"] == "text"
    for options, message in (
        ({"suite": "worl"}, "unknown suite 'worl'; nearest: world"),
        ({"suite": "heldout", "world": hello}, "--tools and --world are for the suites world, shots"),
        ({"suite": "world", "world": None}, "--world=DIR"),
    ):
        with flagsaver.flagsaver(**{"workdir": base, "tools": []} | options), pytest.raises(UserError, match=message):
            launch_eval.main()


def test_python_without_isolation_only_by_its_flag(tmp_path, capsys, monkeypatch, request):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["eval"])
    request.addfinalizer(isolation_mode.cache_clear)
    isolation_mode.cache_clear()
    offered = []
    monkeypatch.setattr("jaxlm.tools.python.isolation.candidates", lambda: [])
    monkeypatch.setattr(launch_eval, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(launch_eval.world_tasks, "run_suite", lambda *a: offered.append(a[-1]) or {})
    options = {"workdir": run_folder(tmp_path / "run", HELLO), "suite": "world", "tools": ["python"], "json": True}
    with flagsaver.flagsaver(**options), pytest.raises(UserError, match=r"be isolated.*--unsafe_python"):
        launch_eval.main()
    with flagsaver.flagsaver(unsafe_python=True, **options):
        assert launch_eval.main() == 0
    (tools,) = offered
    assert tools["python"].run("print(6 * 7)") == "42"
