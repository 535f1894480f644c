"""A trained run, read back from its workdir: all that sampling and evaluation need."""

import dataclasses

import jax

from jaxlm import config, sharding, storage
from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.chat import Chat
from jaxlm.data.prepare import Data, marks_documents
from jaxlm.data.tokenizer import Saved
from jaxlm.nn import lora as adapters
from jaxlm.nn import transformer
from jaxlm.nn.lora import LoRA
from jaxlm.run import checkpoint
from jaxlm.run.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir in memory. `model` has its vocabulary bound; `params` are those of checkpoint `step`."""

    workdir: str
    experiment: Experiment
    model: transformer.ModelConfig
    params: dict
    tokenizer: tokenizers.Tokenizer
    step: int

    @property
    def data(self) -> Data | Chat:
        """The definition of its data, with the tokenizer as it was saved: not trained again, whatever has changed."""
        return dataclasses.replace(self.experiment.data, tokenizer=Saved(str(storage.path(self.workdir) / "tokenizer")))

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt as training saw the beginning of a document: after the start token, where there is one."""
        ids = self.tokenizer.encode(text)
        data = self.experiment.data
        starts = (isinstance(data, Chat) or marks_documents(data.split)) and self.tokenizer.bos is not None
        return [self.tokenizer.bos, *ids] if starts else ids


def load_experiment(workdir) -> Experiment:
    """The resolved definition that a workdir holds; `UserError` when there is none."""
    root = storage.path(workdir)
    if not root.is_dir():
        raise UserError(f"no such workdir: {workdir}")
    file = root / "config.json"
    if not file.exists():
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json")
    storage.read_json(file)  # says what is wrong with a damaged file
    return config.from_json(Experiment, file.read_text())


def read_params(workdir, model, lora: LoRA | None, step: int, mesh=None):
    """The parameters that a run has learnt, its adapters merged; spread over `mesh` if given."""
    described = adapters.abstract(model, lora)
    if mesh is not None:
        where = sharding.tree_shardings(mesh, adapters.specs(model, lora), described)
        described = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), described, where)
    params = checkpoint.restore_params(workdir, described, step)
    if lora is None:
        return params

    def merged(plain, pairs):
        return adapters.merge(lora, plain | {"adapters": pairs})

    return jax.jit(merged, donate_argnums=0)({k: params[k] for k in ("backbone", "heads")}, params["adapters"])


def load_run(workdir, step: int | str | None = None) -> Run:
    """Reads definition, tokenizer and the parameters of `step` (the newest good checkpoint when not given).

    Works for a run that is still training and for an imported model; changes nothing. Adapters are merged.
    `UserError` says what is missing.
    """
    experiment = load_experiment(workdir)
    tokenizer = tokenizers.load(storage.path(workdir) / "tokenizer")
    model = experiment.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    metadata = checkpoint.read_metadata(workdir, step)
    params = read_params(workdir, model, experiment.lora, metadata["step"])
    return Run(str(workdir), experiment, model, params, tokenizer, metadata["step"])
