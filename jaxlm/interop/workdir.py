"""A Hugging Face folder as a run directory, so that the imported model is sampled, evaluated and trained on as any."""

import contextlib
import dataclasses
import os

from etils import epath

from jaxlm import config, storage, tree
from jaxlm.config import UserError
from jaxlm.data import hf_tokenizer
from jaxlm.data.prepare import Data
from jaxlm.interop import hf
from jaxlm.nn.definition import Precision
from jaxlm.nn.rope import LearnedPositions
from jaxlm.run import lineage
from jaxlm.run.checkpoint import Checkpointing, Checkpoints
from jaxlm.run.exits import Diverged
from jaxlm.run.experiment import Experiment

LONGEST_ROWS = 1024  # rows of the definition that is written; a model may know longer contexts than fit a first run


@dataclasses.dataclass(frozen=True)
class Imported:
    """What `import_folder` wrote: the definition, and sizes to report."""

    experiment: Experiment
    parameters: int
    tokens: int
    chat: bool


def import_folder(source, workdir, precision: Precision) -> Imported:
    """Writes the model and the tokenizer of the folder `source` as the run directory `workdir`.

    The parameters are checkpoint 0; the definition holds the model, its tokenizer (in the workdir) and defaults for
    the rest. Everything is written beside `workdir` and moved there at the end, so it is whole or not there.
    `UserError` for a bad source (see `hf.load_hf`), and for a workdir that holds something.
    """
    target = new_folder(workdir)
    model = hf.config_from_hf(hf.read_config(os.fspath(source)), precision)
    tokenizer = hf_tokenizer.from_folder(source, model.vocab_size)  # cheap, so that it fails first
    model, params = hf.load_hf(source, precision)

    e = Experiment(model=model, data=_data(model, target))
    with written_whole(target) as root:
        _write(root, e, params, tokenizer, os.fspath(source))
    padding = (params["backbone"]["embed"]["tokens"].shape[0] - model.vocab_size) * model.width
    count = tree.count(params) - padding * (1 if model.tied else 2)
    return Imported(e, count, tokenizer.vocab_size, tokenizer.chat_template is not None)


def new_folder(path) -> epath.Path:
    """`path` made absolute; `UserError` when it holds something."""
    text = os.fspath(path)
    target = storage.path(text if "://" in text else os.path.abspath(text))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{path} is not empty; give what is to be written there a folder of its own")
    return target


@contextlib.contextmanager
def written_whole(target: epath.Path):
    """Yields a new folder beside `target` that takes its place at the end; nothing is left of it after an error."""
    beside = target.parent / f".{target.name}.partial"
    if beside.exists():
        beside.rmtree()
    storage.make_dir(beside)
    try:
        yield beside
        if target.exists():
            target.rmdir()
        beside.rename(target)
    finally:
        if beside.exists():
            beside.rmtree()


def _data(model, target) -> Data:
    longest = model.positions.length if isinstance(model.positions, LearnedPositions) else LONGEST_ROWS
    tokenizer = hf_tokenizer.HFTokenizer(str(target / "tokenizer"))
    return Data(tokenizer=tokenizer, context=min(LONGEST_ROWS, longest))


def _write(root, e: Experiment, params, tokenizer, source) -> None:
    tokenizer.save(root / "tokenizer")
    imported = {
        "from": os.path.basename(os.path.abspath(source)),
        "files": {name: storage.sha256_file(os.path.join(source, name)) for name in hf.weight_files(source)},
    }
    write_run(root, e, params, {"tokenizer": tokenizer.hash}, imported=imported)


def write_run(root, e: Experiment, params, hashes: dict, **origin) -> None:
    """A run directory that starts and ends with `params`, but for its tokenizer; `origin` is for lineage.json."""
    lineage.write_environment(root)
    lineage.write_lineage(root, hashes, **origin)
    storage.write_text(root / "diff.txt", "")
    storage.write_text(root / "config.json", config.to_json(e))
    with Checkpoints(root, Checkpointing(every=1)) as checkpoints:
        try:
            checkpoints.save(0, {"params": params}, {"hashes": hashes}, force=True)
        except Diverged as e:  # it did so where it comes from: here it is bad input
            raise UserError(str(e)) from None
