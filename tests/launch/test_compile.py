"""launch.compile: bad input in one line; and, where libtpu is installed, one small experiment whole."""

import importlib.util
import json
import types

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.run import compiled
from launch import compile as program

flags.FLAGS.set_gnu_getopt(True)
TPU = importlib.util.find_spec("libtpu") is not None
SETS = ["model.layers=2", "model.width=128", "model.heads=2", "data.context=128", "train.loss_chunk=none"]


def run(**options) -> int:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["compile"])
    with flagsaver.flagsaver(**options):
        return program.main()


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, "--experiment=NAME is missing"),
        ({"experiment": "pretrain_tiny"}, "--topology=NAME is missing"),
        ({"experiment": "pretrain_tny", "topology": "v5e-4"}, "nearest: pretrain_tiny"),
        ({"experiment": "pretrain_tiny", "topology": "v5p-100"}, "nearest: v5p-64, v5p-128"),
        ({"experiment": "pretrain_tiny", "topology": "v5e-4", "model": "70"}, "there is no size '70'; nearest: 70b"),
        ({"experiment": "sft_tiny", "topology": "v5e-4"}, "--model=SIZE"),
        ({"experiment": "sft_tiny", "topology": "v5e-4", "model": "1m"}, "--set=model.vocab_size=N"),
        ({"experiment": "pretrain_tiny", "topology": "v5e-4", "keep_hlo": True}, "--out=DIR, which is missing"),
        ({"experiment": "pretrain_tiny", "topology": "v5e-4", "slices": 0}, "--slices must be at least 1"),
    ],
)
def test_bad_input(options, told):
    with pytest.raises(UserError) as e:
        run(**options)
    assert told in str(e.value) and "\n" not in str(e.value)


@pytest.mark.skipif(TPU, reason="libtpu is installed")
def test_without_libtpu():
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        run(experiment="pretrain_tiny", topology="v5e-4")


def test_the_search_saves_as_it_grows(tmp_path, monkeypatch, capsys):
    """With another's word for what the compiler makes of a program, and with 8 devices of the CPU for chips."""
    seen = []

    def measure(stage, t, mesh, keep):
        seen.append(stage.name)
        if len(seen) > 2:
            raise RuntimeError("a bug of the compiler")
        sizes = ("argument_size", "output_size", "alias_size", "temp_size", "generated_code_size")
        memory = types.SimpleNamespace(**{f"{name}_in_bytes": 0 for name in sizes})
        return compiled.record(stage, t, mesh, "", memory, None, {"lower": 0.0, "compile": 0.0})

    for where, name, value in (
        (program.topology, "devices", lambda t: jax.devices()),
        (program.roofline, "bandwidth", lambda *_: 1e9),
        (compiled, "measure", measure),
        (program, "versions", dict),
    ):
        monkeypatch.setattr(where, name, value)
    options = {
        "experiment": "pretrain_tiny",
        "set": [*SETS, "train.batch_size=8", "evaluation.batch_size=8"],
        "topology": "v5e-8",
    }
    options |= {"search": True, "out": str(tmp_path)}
    assert run(**options, search_compiles=1) == 0
    result, out = json.loads((tmp_path / "compile.json").read_text()), capsys.readouterr().out
    (stage,), ranked = result["stages"], result["candidates"]
    assert stage["stage"] == "train" and stage["settings"] == ranked[0]["settings"] and len(ranked) > 3
    assert "by arithmetic, a gradient step:" in out and "as compiled, the best first:" in out
    assert out in (tmp_path / "table.txt").read_text()
    seen[:] = []
    with pytest.raises(RuntimeError, match="a bug of the compiler"):
        run(**options, search_compiles=3)
    kept = json.loads((tmp_path / "compile.json").read_text())
    assert len(kept["candidates"]) == len(ranked) and len(kept["stages"]) == 2
    assert kept["stages"][0]["settings"] == ranked[0]["settings"]


def test_slices_become_replicas():
    with flagsaver.flagsaver(experiment="pretrain_tiny", topology="v5e-4", slices=2):
        assert program.definition().mesh.replica == 2


def test_scheme_edits_change_the_mesh_alone():
    with flagsaver.flagsaver(experiment="pretrain_124m", topology="v5e-4", edit=["fsdp_tensor"]):
        assert (program.definition().mesh.tensor, program.definition().mesh.context) == (8, 1)
    with flagsaver.flagsaver(experiment="pretrain_124m", topology="v5e-4", edit=["context"]):
        assert (program.definition().mesh.tensor, program.definition().mesh.context) == (1, 4)


@pytest.mark.skipif(not TPU, reason="needs libtpu: pip install -e '.[tpu]'")
def test_a_small_experiment_whole(tmp_path, capsys):
    options = {"experiment": "pretrain_tiny", "edit": ["fsdp"], "set": SETS, "topology": "v5e-4", "out": str(tmp_path)}
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert run(**options) == 0
        with pytest.raises(UserError, match="has no stage 'learn'; it has train, prefill, decode"):
            run(**options, stages=["learn"])
        assert run(**options | {"set": [*SETS, "train.batch_size=1048576", "model.remat=none"]}, stages=["train"]) == 1
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    assert "does not fit: train" in capsys.readouterr().out
    result = json.loads((tmp_path / "compile.json").read_text())
    assert not result["stages"][0]["fits"] and result["stages"][0]["advice"]
    assert "to make it fit" in (tmp_path / "table.txt").read_text()
