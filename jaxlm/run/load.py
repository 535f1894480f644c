"""A trained run, read back from its workdir: all that sampling and evaluation need."""

import dataclasses

import jax

from jaxlm import config, sharding, storage
from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.chat import Chat
from jaxlm.data.preferences import Preferences
from jaxlm.data.prepare import Data, marks_documents
from jaxlm.data.prompts import Prompts
from jaxlm.data.tokenizer import Saved
from jaxlm.nn import heads, transformer
from jaxlm.nn import lora as adapters
from jaxlm.run import checkpoint, manifest
from jaxlm.run.experiment import Experiment
from jaxlm.sample.speculative import Draft


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir in memory. `model` has its vocabulary bound; `params` are those of checkpoint `step`, whose manifest
    has the hash `sha256`."""

    workdir: str
    experiment: Experiment
    model: transformer.ModelConfig
    params: dict
    tokenizer: tokenizers.Tokenizer
    step: int
    sha256: str = ""  # none of a run that was made in memory

    @property
    def data(self) -> Data | Chat | Preferences | Prompts:
        """The definition of its data, with the tokenizer as it was saved: not trained again, whatever has changed."""
        return dataclasses.replace(self.experiment.data, tokenizer=Saved(str(storage.path(self.workdir) / "tokenizer")))

    def with_cache_dtype(self, name: str | None) -> "Run":
        """The run with keys and values kept in that dtype while decoding; None leaves its definition's."""
        return dataclasses.replace(self, model=transformer.with_cache_dtype(self.model, name))

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt as training saw the beginning of a document: after the start token, where there is one."""
        ids = self.tokenizer.encode(text)
        data = self.experiment.data
        starts = (not isinstance(data, Data) or marks_documents(data.split)) and self.tokenizer.bos is not None
        return [self.tokenizer.bos, *ids] if starts else ids


def load_experiment(workdir) -> Experiment:
    """The resolved definition that a workdir holds; `UserError` when there is none."""
    root = storage.path(workdir)
    if not root.is_dir():
        raise UserError(f"no such workdir: {workdir}")
    file = root / "config.json"
    if not file.exists():
        if (root / manifest.MANIFEST).exists():
            raise UserError(f"{workdir} is a checkpoint of before they held their definition: read it in its run")
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json")
    storage.read_json(file)  # says what is wrong with a damaged file
    try:
        return config.from_json(Experiment, file.read_text())
    except UserError as e:
        raise UserError(f"{file} is of another kind or version: {e}") from e


def load_bound(workdir) -> Experiment:
    """`load_experiment` with the model's vocabulary bound to the run's tokenizer."""
    e = load_experiment(workdir)
    if e.model.vocab_size is not None:
        return e
    size = tokenizers.load(storage.path(workdir) / "tokenizer").vocab_size
    return dataclasses.replace(e, model=dataclasses.replace(e.model, vocab_size=size))


def read_params(saved: checkpoint.Saved, e: Experiment, mesh=None):
    """The parameters that a run of the bound definition `e` had learnt at a step, its adapters merged; spread over
    `mesh` if given."""
    described = heads.abstract(e.model, e.lora, e.heads)
    if mesh is not None:
        where = sharding.tree_shardings(mesh, heads.specs(e.model, e.lora, e.heads), described)
        described = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), described, where)
    params = checkpoint.restore_params(saved, described)
    if e.lora is None:
        return params

    def merged(plain, pairs):
        return adapters.merge(e.lora, plain | {"adapters": pairs})

    return jax.jit(merged, donate_argnums=0)({k: params[k] for k in ("backbone", "heads")}, params["adapters"])


def load_any(workdir, step: int | str | None = None, mesh=None) -> Run:
    """`load_run` of whatever was trained, a reward model too."""
    e = load_bound(workdir)
    tokenizer = tokenizers.load(storage.path(workdir) / "tokenizer")
    saved = checkpoint.saved(workdir, step)
    return Run(str(workdir), e, e.model, read_params(saved, e, mesh), tokenizer, saved.step, saved.sha256)


def load_run(workdir, step: int | str | None = None) -> Run:
    """Reads definition, tokenizer and the parameters of `step` (the newest good checkpoint when not given).

    Works for a run that is still training, for an imported model, and for the folder of one step, wherever that has
    been copied to; changes nothing. Adapters are merged.
    `UserError` says what is missing, and where the run is no language model.
    """
    e = load_experiment(workdir)
    if "lm" not in e.heads:
        raise UserError(f"{workdir} is a {e.heads[0]} model, which predicts no tokens")
    return load_any(workdir, step)


def load_draft(workdir, target: Run, tokens: int) -> Draft:
    """The model of a run as the draft of another, proposing so many tokens; `UserError` if their tokenizers differ.

    Where the target says how keys and values are kept, the draft's are kept so too.
    """
    run = load_run(workdir)
    if run.tokenizer.hash != target.tokenizer.hash:
        raise UserError(
            f"the tokenizer of the draft {workdir} is not that of {target.workdir}: a draft must be trained with the "
            "same one (or distilled from the target)"
        )
    return Draft(run.with_cache_dtype(target.model.precision.cache).model, run.params, tokens)
