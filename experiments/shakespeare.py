"""Tiny Shakespeare, the text on which small recipes are compared: pass it by --set=data.path=FILE."""

from dataclasses import replace

from experiments import edits
from experiments.sizes import gpt2
from jaxlm.config import experiment, override
from jaxlm.data.prepare import ByPosition, Data
from jaxlm.data.tokenizer import Chars, SentencePiece
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Cosine
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.sharding import MeshConfig
from jaxlm.steps.update import Train


@experiment
def shakespeare_char() -> Experiment:
    """nanoGPT's recipe for a laptop: 0.8 M parameters, context 64, batch 12, 2,000 steps; it publishes 1.88."""
    context = 64
    model = ModelConfig(layers=4, width=128, heads=4, vocab_multiple=1, scan=False)
    return Experiment(
        model=replace(gpt2(model, context, bias=False), activation="gelu"),
        data=Data(sources=(), curation=None, tokenizer=Chars(), split=ByPosition(valid_fraction=0.1), context=context),
        optimizer=AdamW(lr=1e-3, b1=0.9, b2=0.99, weight_decay=0.1, schedule=Cosine(warmup=100, final=0.1)),
        train=Train(steps=2000, batch_size=12, clip=1.0, log_every=50),
        evaluation=Evaluation(every=500, batch_size=64),
        checkpoint=Checkpointing(every=1000),
        mesh=MeshConfig(fsdp=1),
    )


# What leads from nanoGPT's recipe to ours, in the order in which docs/results/shakespeare.md adds it up.
BETTER = (
    edits.high_lr_to_zero, edits.rope, edits.rmsnorm, edits.qk_norm, edits.relu_squared, edits.fan_in_init,
    edits.untied, edits.short_conv,
)  # fmt: skip


@experiment
def shakespeare_best() -> Experiment:
    """The same characters, context, parameters and FLOPs as nanoGPT's recipe, spent better."""
    e = shakespeare_char()
    for better in BETTER:
        e = better(e)
    # A narrower MLP pays for the output kernel and the filters.
    return override(e, {"model.hidden": 496})


@experiment
def shakespeare_bpe() -> Experiment:
    """The same text in pieces of a small BPE vocabulary, in bits per byte comparable with the characters."""
    e = shakespeare_char()
    return replace(e, data=replace(e.data, tokenizer=SentencePiece(vocab_size=512)))
