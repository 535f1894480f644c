"""A workdir as training leaves it, made in a second: random parameters, a byte tokenizer, packed held-out text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.data.packing import pack
from jaxlm.data.prepare import Data
from jaxlm.data.sources import Document
from jaxlm.data.tokenizer import Bytes, BytesTokenizer
from jaxlm.nn.transformer import ModelConfig, abstract
from jaxlm.run.checkpoint import Checkpointing, Checkpoints
from jaxlm.run.experiment import Evaluation, Experiment

TOKENIZER = BytesTokenizer()
EXPERIMENT = Experiment(
    model=ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=2, width=32, heads=4),
    data=Data(tokenizer=Bytes(), context=128),
    evaluation=Evaluation(batch_size=4),
    checkpoint=Checkpointing(every=1),
)
VOCABULARY = "the model reads a list of names and returns each value once or raises an error when none is found"


def texts(n: int = 12, seed: int = 0) -> list[str]:
    """Made-up documents with sentences."""
    generator = np.random.default_rng(seed)

    def sentence():
        return " ".join(generator.choice(VOCABULARY.split(), generator.integers(6, 14))).capitalize() + "."

    return [" ".join(sentence() for _ in range(12)) for _ in range(n)]


def random_params(cfg, seed: int = 1, scale: float = 0.3):
    """Larger values than those of `init`, whose distributions are nearly flat, and nothing to compile."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape) * scale, x.dtype), abstract(cfg))


def make(workdir, experiment: Experiment = EXPERIMENT, step: int = 7, params=None):
    """Writes definition, tokenizer and one checkpoint, with random parameters unless given; returns them."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json(experiment))
    TOKENIZER.save(workdir / "tokenizer")
    params = random_params(experiment.model) if params is None else params
    with Checkpoints(workdir, experiment.checkpoint) as checkpoints:
        checkpoints.save(step, {"params": params, "step": jnp.int32(step)}, force=True)
    return params


def packed(directory, documents: list[str], experiment: Experiment = EXPERIMENT):
    """One packed held-out set named `made_up`."""
    source = [Document(text=t, source="made_up", id=str(i)) for i, t in enumerate(documents)]
    return {"made_up": pack(source, TOKENIZER, directory, context=experiment.data.context, name="made_up")}


def replaced(**changes) -> Experiment:
    return dataclasses.replace(EXPERIMENT, **changes)
