"""What a run exports is what it was: tensors against the folders that the peer wrote, workdirs against the run."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlm.config import UserError
from jaxlm.interop import hf, to_hf
from jaxlm.interop.export import export_hf, export_jaxlm
from jaxlm.nn import lora, transformer
from jaxlm.nn.lora import LoRA
from jaxlm.run import load, train
from tests import tiny_run
from tests.nn.tiny import FAMILIES

GOLDENS = Path(__file__).parent.parent / "goldens" / "hf"
SPELLED = {"llama3": "llama", "llama_yarn": "llama"} | {
    name: name for name in ("gpt2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
}


# --------------------------------------------------------------------------------------------------- Hugging Face's
@pytest.mark.parametrize("name, family", SPELLED.items())
def test_every_family_goes_back_to_what_the_peer_wrote(name, family):
    cfg, params = hf.load_hf(GOLDENS / name)
    found, about = to_hf.config_to_hf(cfg, 64)
    assert found == family
    back = hf.config_from_hf(about)
    back = dataclasses.replace(back, head_width=back.head_dim)
    assert back == dataclasses.replace(cfg, init=back.init, head_width=cfg.head_dim)
    theirs = {}
    for file in (GOLDENS / name).glob("*.safetensors"):
        theirs |= load_file(file)
    ours = to_hf.tensors(cfg, family, params)
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if cfg.tied else set())
    for tensor, x in ours.items():
        np.testing.assert_array_equal(x, theirs[tensor], err_msg=tensor)


def test_settings_of_the_peers_own_files_are_spelled_as_there():
    """Whatever transformers keeps of its own definition and we write too has the same value."""
    for name in SPELLED:
        theirs = json.loads((GOLDENS / name / "config.json").read_text())
        cfg = hf.config_from_hf(theirs)
        _, ours = to_hf.config_to_hf(cfg, theirs.get("max_position_embeddings", 0))
        shared = (ours.keys() & theirs.keys()) - {"n_inner", "sliding_window", "max_window_layers"}
        assert len(shared) > 8
        assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}, name


@pytest.mark.parametrize(
    "change, words",
    [
        ({"short_conv": 3}, r"nearest, llama, .*model\.short_conv: 3 -> None$"),
        ({"positions": None}, r"model\.positions: None -> 'Rope\(\)'$"),
        ({"gated": False, "activation": "gelu"}, r"model\.gated: False -> True"),
        ({"norm_placement": "post"}, r"model\.norm_placement: 'post' -> 'pre'"),
        ({"logit_softcap": 3.0}, r"model\.logit_softcap: 3\.0 -> None"),
        ({"norm": transformer.RMSNorm(scale_offset=0.5)}, r"model\.norm\.scale_offset: 0\.5 -> 0\.0"),
    ],
    ids=lambda x: None if isinstance(x, str) else next(iter(x)),
)
def test_what_no_family_expresses_is_refused_by_name(change, words):
    with pytest.raises(UserError, match=words):
        to_hf.config_to_hf(dataclasses.replace(tiny_run.EXPERIMENT.model, **change), 64)


def test_what_does_not_change_the_function_does_not_matter():
    cfg = dataclasses.replace(
        FAMILIES["gemma2"], pattern=("window", "full", "window"), embed_scale=4.0, dropout=0.1, scan=False, hidden=None
    )
    family, about = to_hf.config_to_hf(cfg, 64)
    assert family == "gemma2" and about["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert about["intermediate_size"] == cfg.hidden_width


# ------------------------------------------------------------------------------------------------------------- runs
EXPERIMENT = tiny_run.replaced(lora=LoRA(rank=2, alpha=3.0), parent="runs/elsewhere")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    described = lora.abstract(EXPERIMENT.model, EXPERIMENT.lora)
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * generator.normal(size=x.shape), x.dtype), described)
    path = tmp_path_factory.mktemp("runs") / "adapted"
    tiny_run.make(path, EXPERIMENT, step=5, params=params)
    return path


def launch(*arguments):
    return subprocess.run([sys.executable, "-m", "launch.export", *arguments], capture_output=True, text=True)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_plain_workdir_of_a_run_with_adapters(workdir, tmp_path):
    run = load.load_run(workdir)
    assert run.params["adapters"] == {}
    done = export_jaxlm(workdir, tmp_path / "plain")
    assert done.step == 5
    plain = load.load_run(tmp_path / "plain")
    assert_same(plain.params, run.params)
    assert (plain.step, plain.model, plain.tokenizer.hash) == (0, run.model, run.tokenizer.hash)
    assert plain.experiment.lora is None and plain.experiment.parent is None
    told = json.loads((tmp_path / "plain" / "lineage.json").read_text())["exported"]
    assert (told["from"], told["step"], told["merged"]["rank"]) == ("adapted", 5, 2)
    child = dataclasses.replace(
        EXPERIMENT,
        model=None,
        parent=str(tmp_path / "plain"),
        data=dataclasses.replace(EXPERIMENT.data, tokenizer=None),
    )
    assert train.inherit(child).model == run.model


def test_a_hugging_face_folder_of_a_run_with_adapters(workdir, tmp_path):
    out = tmp_path / "hf"
    assert export_hf(workdir, out).family == "llama"
    run = load.load_run(workdir)
    cfg, params = hf.load_hf(out)
    size = run.model.vocab_size
    ours = {k: run.params[k] for k in ("backbone", "heads")}
    ours["backbone"]["embed"]["tokens"] = ours["backbone"]["embed"]["tokens"].at[size:].set(0)  # padding
    ours["heads"]["lm"]["kernel"] = ours["heads"]["lm"]["kernel"].at[:, size:].set(0)
    assert_same({k: params[k] for k in ("backbone", "heads")}, ours)
    tokens = jnp.arange(12)[None] + 60
    batch = tokens, jnp.arange(12)[None], jnp.ones_like(tokens)
    logits = [
        transformer.unembed(c, p, transformer.apply(c, p, *batch)[0])
        for c, p in ((cfg, params), (run.model, run.params))
    ]
    np.testing.assert_array_equal(*logits)
    about = json.loads((out / "config.json").read_text())
    assert about["max_position_embeddings"] == EXPERIMENT.data.context and about["eos_token_id"] == run.tokenizer.eos
    assert (out / "tokenizer" / "tokenizer.json").exists() and not (out / "tokenizer.json").exists()


def test_from_the_shell(workdir, tmp_path):
    done = launch(f"--workdir={workdir}", f"--out={tmp_path / 'hf'}", "--format=hf", "--step=5")
    assert done.returncode == 0, done.stderr
    _, params = hf.load_hf(tmp_path / "hf")
    size = sum(x.size for x in load_file(tmp_path / "hf" / "model.safetensors").values())
    assert f"step 5: {size:,} parameters" in done.stdout and "family llama" in done.stdout
    kernels = (p["backbone"]["blocks"]["0"]["mlp"]["up"]["kernel"] for p in (params, load.load_run(workdir).params))
    np.testing.assert_allclose(*kernels, atol=1e-6)  # the two processes compile at different levels


def test_bad_exports_leave_nothing_and_harm_nothing(workdir, tmp_path):
    for arguments, words in (
        ([f"--workdir={workdir}"], "--out=DIR is missing"),
        ([f"--workdir={tmp_path / 'nowhere'}", f"--out={tmp_path / 'out'}"], "no such workdir"),
    ):
        done = launch(*arguments)
        assert done.returncode == 2 and done.stdout == "" and words in done.stderr
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    for write in (export_hf, export_jaxlm):
        with pytest.raises(UserError, match="is not empty"):
            write(workdir, workdir)
        with pytest.raises(UserError, match="has no checkpoint of step 3"):
            write(workdir, tmp_path / "out", 3)
    shutil.copytree(workdir, tmp_path / "other")
    about = json.loads((tmp_path / "other" / "config.json").read_text())
    about["model"]["logit_softcap"] = 2.0
    (tmp_path / "other" / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="logit_softcap"):
        export_hf(tmp_path / "other", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"other"}
