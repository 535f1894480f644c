"""A run as something to hand on: a workdir with its adapters merged, or a Hugging Face folder."""

import dataclasses
import os

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxlm import config, storage, tree
from jaxlm.config import UserError
from jaxlm.data.hf_tokenizer import HuggingFaceTokenizer
from jaxlm.data.tokenizer import Saved
from jaxlm.interop import to_hf
from jaxlm.interop.workdir import new_folder, write_run, written_whole
from jaxlm.run import checkpoint
from jaxlm.run.load import Run, load_run


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: of which step, how many parameters, and the Hugging Face family, if it is one's."""

    step: int
    parameters: int
    family: str | None


def export_jaxlm(workdir, out, step: int | str | None = None) -> Exported:
    """Writes the run's model and tokenizer as the workdir `out`: no adapters, no parent, one checkpoint, 0.

    Written whole or not at all. `UserError` for a workdir that holds no run, and for an `out` that holds something.
    """
    target = new_folder(out)
    run = load_run(workdir, step)
    data = dataclasses.replace(run.data, tokenizer=Saved(str(target / "tokenizer")))
    e = dataclasses.replace(run.experiment, model=run.model, data=data, parent=None, lora=None)
    with written_whole(target) as root:
        run.tokenizer.save(root / "tokenizer")
        hashes = checkpoint.read_metadata(workdir, run.step).get("hashes", {"tokenizer": run.tokenizer.hash})
        write_run(root, e, run.params, hashes, exported=_origin(run))
    return Exported(run.step, tree.count(run.params), None)


def export_hf(workdir, out, step: int | str | None = None) -> Exported:
    """Writes the run's model as the Hugging Face folder `out`: config.json and model.safetensors, adapters merged.

    Its tokenizer stands in `tokenizer/` as jaxlm keeps it and is not converted; one that was imported also stands in
    its own form beside config.json, where transformers looks for it. Weights keep the parameters' dtype and pass
    through host memory once. Written whole or not at all. `UserError` as `export_jaxlm`, and for a model that no family
    expresses (`to_hf.config_to_hf`).
    """
    if not storage.is_local(out):
        raise UserError(f"--out={out} must be a local folder: safetensors files are written through the file system")
    target = new_folder(out)
    run = load_run(workdir, step)
    family, about = to_hf.config_to_hf(run.model, run.experiment.data.context)
    about |= {"bos_token_id": run.tokenizer.bos, "eos_token_id": run.tokenizer.eos}
    about |= dict.fromkeys(("dtype", "torch_dtype"), run.model.precision.params)  # as transformers 5 and 4 spell it
    arrays = to_hf.tensors(run.model, family, jax.device_get(run.params))
    with written_whole(target) as root:
        save_file(arrays, os.fspath(root / "model.safetensors"), metadata={"format": "pt"})
        storage.write_json(root / "config.json", about)
        run.tokenizer.save(root / "tokenizer")
        if isinstance(run.tokenizer, HuggingFaceTokenizer):
            for name, content in run.tokenizer.published_files().items():
                storage.write_bytes(root / name, content)
        storage.write_json(root / "jaxlm.json", {"exported": _origin(run)})
    return Exported(run.step, sum(int(np.size(x)) for x in arrays.values()), family)


def _origin(run: Run) -> dict:
    lora = run.experiment.lora
    return {
        "from": os.path.basename(os.path.abspath(run.workdir)),
        "step": run.step,
        "merged": None if lora is None else config.to_dict(lora),
    }
