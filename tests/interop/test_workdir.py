"""A Hugging Face folder becomes a workdir that is sampled like any other. Needs the extra hf."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data.tokenizer import train
from jaxlm.interop import hf
from jaxlm.interop.export import export_hf
from jaxlm.interop.workdir import import_folder
from jaxlm.nn.definition import Precision
from jaxlm.run.load import load_run
from jaxlm.sample.engine import Sampling, generate

pytest.importorskip("tokenizers", reason="the extra hf is not installed")
pytest.importorskip("jinja2", reason="the extra hf is not installed")

TOKENIZER = Path(__file__).parent.parent / "goldens" / "hf" / "tokenizer_bytelevel"
SIZES = {
    "vocab_size": 330,  # four more than the tokenizer has pieces, as published models often do
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tensors():
    generator = np.random.default_rng(0)
    d, f, v = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(SIZES["num_hidden_layers"]):
        for name, shape in {
            **{"self_attn.q_proj": (d, d), "self_attn.k_proj": (d // 2, d), "self_attn.v_proj": (d // 2, d)},
            **{"self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)},
            **{"input_layernorm": (d,), "post_attention_layernorm": (d,)},
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return {name: generator.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(TOKENIZER, folder)
    save_file(tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES}))
    return folder


@pytest.fixture(scope="module")
def workdir(source, tmp_path_factory):
    """Imported as from the shell."""
    path = tmp_path_factory.mktemp("runs") / "imported"
    command = [sys.executable, "-m", "launch.import_hf", f"--from={source}", f"--workdir={path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parameters = sum(t.size for t in tensors().values())
    assert f"{parameters:,} parameters in 2 layers of width 16" in done.stdout
    assert "330 ids, with a chat template" in done.stdout
    return path


def test_the_workdir_holds_the_model(source, workdir):
    run = load_run(workdir)
    cfg, params = hf.load_hf(source)
    assert (run.model, run.step) == (cfg, 0)
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    assert run.tokenizer.vocab_size == cfg.vocab_size
    assert {p.name for p in workdir.iterdir()} >= {"config.json", "lineage.json", "environment.json", "tokenizer"}
    assert storage.sha256_file(source / "model.safetensors") in (workdir / "lineage.json").read_text()


def test_it_is_sampled_and_its_chats_are_rendered(workdir):
    run = load_run(workdir)
    ids = run.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    sampling = Sampling(temperature=0.0, max_tokens=4)
    [completion] = generate(run.model, run.params, run.tokenizer, [ids], sampling)
    assert len(completion.ids) == 4 and completion.text == run.tokenizer.decode(completion.ids)


def test_the_workdir_does_not_need_its_source(source, workdir):
    run = load_run(workdir)
    assert train(run.experiment.data.tokenizer, iter(())).hash == run.tokenizer.hash
    assert str(source) not in (workdir / "config.json").read_text()


def test_dtypes(source, tmp_path):
    done = import_folder(source, tmp_path / "w", Precision(params="bfloat16", compute="bfloat16"))
    assert done.experiment.model.precision.compute == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(load_run(tmp_path / "w").params)} == {"bfloat16"}


def test_a_model_is_exported_with_its_tokenizer_as_it_came(source, tmp_path):
    import_folder(source, tmp_path / "first", Precision(params="bfloat16"))
    export_hf(tmp_path / "first", tmp_path / "out")
    for name, x in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(x, load_file(source / "model.safetensors")[name].astype(x.dtype))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TOKENIZER / "tokenizer.json").read_bytes()
    import_folder(tmp_path / "out", tmp_path / "second", Precision(params="bfloat16"))
    first, second = load_run(tmp_path / "first"), load_run(tmp_path / "second")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.tokenizer.hash == second.tokenizer.hash
    assert first.tokenizer.chat_template == second.tokenizer.chat_template is not None


def test_a_bad_import_leaves_nothing_and_harms_nothing(source, workdir, tmp_path):
    before = sorted(p.relative_to(workdir) for p in workdir.rglob("*"))
    with pytest.raises(UserError, match="is not empty"):
        import_folder(source, workdir, Precision())
    assert sorted(p.relative_to(workdir) for p in workdir.rglob("*")) == before

    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        import_folder(broken, tmp_path / "w", Precision())
    shutil.copy(source / "tokenizer.json", broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        import_folder(broken, tmp_path / "w", Precision())
    assert {p.name for p in tmp_path.iterdir()} == {"broken"}


def test_an_interrupted_import_is_done_again(source, tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.interop.workdir.lineage.write_lineage", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_folder(source, tmp_path / "w", Precision())
    assert not any((tmp_path / "w").iterdir()) and len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".w.partial").mkdir()  # what a kill leaves
    import_folder(source, tmp_path / "w", Precision())
    assert load_run(tmp_path / "w").step == 0


def test_errors_are_one_line_and_exit_2(tmp_path):
    command = [sys.executable, "-m", "launch.import_hf", f"--from={tmp_path}", f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and "config.json" in done.stderr
