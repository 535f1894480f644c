"""A trained run, read back from its workdir: all that sampling and evaluation need."""

import dataclasses

from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.chat import Chat
from jaxlm.data.prepare import Data, marks_documents
from jaxlm.data.tokenizer import Saved
from jaxlm.nn import transformer
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


def load_run(workdir, step: int | str | None = None) -> Run:
    """Reads definition, tokenizer and the parameters of `step` (the newest good checkpoint when not given).

    Works for a run that is still training and for an imported model; changes nothing. `UserError` says what is missing.
    """
    experiment = load_experiment(workdir)
    tokenizer = tokenizers.load(storage.path(workdir) / "tokenizer")
    model = experiment.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    metadata = checkpoint.read_metadata(workdir, step)
    params = checkpoint.restore_params(workdir, transformer.abstract(model), metadata["step"])
    return Run(str(workdir), experiment, model, params, tokenizer, metadata["step"])
