import dataclasses
import os
import signal

import pytest

from jaxlm.config import UserError
from jaxlm.run import exits, stages
from jaxlm.run.stages import Stage

ran = []


@pytest.fixture(autouse=True)
def forget():
    ran.clear()


def three(first="1", noise=0.0, fail=False):
    def run(name, result):
        def call(before, anew):
            ran.append((name, sorted(before), anew))
            if fail and name == "c":
                raise ValueError("broken")
            return result(before)

        return Stage(name, f"does {name}", call)

    return [
        run("a", lambda before: {"value": first, "seconds": noise, "identity": first}),
        run("b", lambda before: {"value": before["a"]["result"]["value"] + "b"}),
        run("c", lambda before: {"value": before["b"]["result"]["value"] + "c"}),
    ]


def go(workdir, todo, definition="d", **options):
    ran.clear()
    said = []
    done = stages.run(workdir, todo, {"definition": definition}, say=said.append, **options)
    return {n: r["result"]["value"] for n, r in done.items()}, [name for name, _, _ in ran], said


def test_each_stage_once(tmp_path):
    values, names, _ = go(tmp_path, three())
    assert values == {"a": "1", "b": "1b", "c": "1bc"} and names == ["a", "b", "c"]
    assert ran[2] == ("c", ["a", "b"], False)
    values, names, said = go(tmp_path, three())
    assert values["c"] == "1bc" and names == [] and len(said) == 3 and all("skipped" in s for s in said)
    assert stages.records(tmp_path, ["a", "x"])["a"]["seconds"] >= 0


def test_redo_runs_what_depends_on_it_only_when_it_comes_out_otherwise(tmp_path):
    go(tmp_path, three())
    _, names, _ = go(tmp_path, three(noise=5.0), redo=["a"])
    assert names == ["a"] and ran[0] == ("a", [], True)
    values, names, _ = go(tmp_path, three(first="2"), redo=["a"])
    assert names == ["a", "b", "c"] and values["c"] == "2bc"


def test_what_was_made_from_something_else_begins_anew(tmp_path):
    """A training that goes on where it stood would go on from another parent."""
    go(tmp_path, three())
    go(tmp_path, three(first="2"), redo=["a"])
    assert [(name, anew) for name, _, anew in ran] == [("a", True), ("b", True), ("c", True)]
    with pytest.raises(ValueError, match="broken"):
        go(tmp_path / "w", three(fail=True))
    go(tmp_path / "w", three())
    assert [(name, anew) for name, _, anew in ran] == [("c", False)]  # it goes on


def test_a_stage_depends_on_what_it_reads(tmp_path):
    def go_on(definition, reads=("x",)):
        ran.clear()
        first, *rest = three()
        stages.run(tmp_path, [dataclasses.replace(first, reads=reads), *rest], definition, say=lambda _: None)
        return [(name, anew) for name, _, anew in ran]

    go_on({"x": 1, "y": 1})
    assert go_on({"x": 1, "y": 2}) == [("b", False), ("c", False)]  # what was made before them is the same
    assert go_on({"x": 2, "y": 2}) == [("a", False), ("b", False), ("c", False)]


def test_what_a_stage_does_not_come_after_does_not_begin_it_anew(tmp_path):
    def go_on(first):
        ran.clear()
        a, b, c = three(first)
        c = dataclasses.replace(c, run=lambda before, anew: ran.append(("c", anew)) or {"value": "c"}, after=())
        stages.run(tmp_path, [a, b, c], {}, redo=["a"], say=lambda _: None)
        return [entry[0] for entry in ran]

    assert go_on("1") == ["a", "b", "c"] and go_on("2") == ["a", "b"]


def test_a_redo_that_is_stopped_is_not_done_and_goes_on(tmp_path):
    go(tmp_path, three())
    with pytest.raises(ValueError, match="broken"):
        go(tmp_path, three(fail=True), redo=["c"])
    assert "c" not in stages.records(tmp_path, ["c"])
    go(tmp_path, three(), redo=["c"])
    assert [(name, anew) for name, _, anew in ran] == [("c", False)]


def test_a_former_run_makes_room(tmp_path):
    for _ in range(2):
        (tmp_path / "run").mkdir()
        stages.make_room(tmp_path / "run")
    stages.make_room(tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run-1", "run-2"]


def test_another_definition_runs_all(tmp_path):
    go(tmp_path, three())
    assert go(tmp_path, three(), definition="e")[1] == ["a", "b", "c"]


def test_goes_on_after_a_failure(tmp_path):
    with pytest.raises(ValueError, match="broken"):
        go(tmp_path, three(fail=True))
    assert go(tmp_path, three())[1] == ["c"]


def test_goes_on_after_sigterm(tmp_path, capsys):
    stopped = Stage("b", "is told to stop", lambda before, anew: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    a, b, c = three()
    with pytest.raises(SystemExit) as e:
        go(tmp_path, [a, stopped, c])
    assert e.value.code == exits.EXIT_PREEMPTED and "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert go(tmp_path, [a, b, c])[1] == ["b", "c"]


def test_only(tmp_path):
    with pytest.raises(UserError, match="the stage c needs a, b first"):
        go(tmp_path, three(), only=["c"])
    assert go(tmp_path, three(), only=["a"])[1] == ["a"]
    assert go(tmp_path, three(), only=["b"])[1] == ["b"]
    assert go(tmp_path, three())[1] == ["c"]


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="unknown stage 'bb'; nearest: b"):
        go(tmp_path, three(), redo=["bb"])
