"""Fine-tuning on conversations: always from a parent run, whose model and tokenizer it takes (--set=parent=WORKDIR)."""

from dataclasses import replace

from jaxlm.config import experiment
from jaxlm.data.chat import Chat
from jaxlm.data.world.talk import WorldConversations
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Cosine
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.sharding import MeshConfig
from jaxlm.steps.update import Train


@experiment
def sft_tiny() -> Experiment:
    """Conversations about the world, for a run of pretrain_tiny's size: minutes on two CPU cores.

    Your own: --set='data.sources=Messages(path=chats.jsonl)'.
    """
    return Experiment(
        model=None,
        data=Chat(sources=(WorldConversations(count=5000),), context=256),
        optimizer=AdamW(lr=1e-3, b2=0.98, weight_decay=0.01, schedule=Cosine(warmup=20, final=0.0)),
        train=Train(steps=400, batch_size=16, log_every=10),
        evaluation=Evaluation(every=100, max_batches=8, batch_size=16),
        checkpoint=Checkpointing(every=200),
        mesh=MeshConfig(fsdp=1),
    )


@experiment
def sft_124m() -> Experiment:
    """The same for a run of pretrain_124m: conversations of up to 1,024 tokens, 64 rows an update, a GPU or more."""
    return replace(
        sft_tiny(),
        data=Chat(sources=(WorldConversations(count=100_000),), context=1024),
        optimizer=AdamW(lr=3e-5, weight_decay=0.01, schedule=Cosine(warmup=100, final=0.0)),
        train=Train(steps=2000, batch_size=64, accumulation=4, loss_chunk=128),
        evaluation=Evaluation(every=200, max_batches=32, batch_size=32),
        checkpoint=Checkpointing(every=500),
        mesh=MeshConfig(),
    )
