"""The root node of every definition. Its parts are declared beside the code that reads them."""

import dataclasses
import math

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data.chat import Chat, prepare_chat
from jaxlm.data.preferences import Preferences, prepare_preferences
from jaxlm.data.prepare import Data, Prepared, prepare
from jaxlm.data.prompts import Prompts, prepare_prompts
from jaxlm.nn.lora import LoRA
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW, Optimizer
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.sharding import MeshConfig
from jaxlm.steps import policy
from jaxlm.steps.distill import Distill
from jaxlm.steps.policy import PolicyGradient
from jaxlm.steps.preference import Preference
from jaxlm.steps.pretrain import NextToken
from jaxlm.steps.reward import RewardModel
from jaxlm.steps.update import Train

MAX_SEED = 2**31 - 1  # a compiled step takes it as an int32


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Validation during training: every `every` steps and at the end, on at most `max_batches` batches a source."""

    every: int = 200
    max_batches: int | None = None
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run, whole: what is trained, on what, to what end, how, and what is kept.

    With `parent`, the run starts from the newest parameters of that workdir; `model` and `data.tokenizer` must then be
    the parent's, and are taken from it where they are unset. With `lora`, adapters are trained in the model's place.
    `UserError` for a seed anywhere in it that is below 0, and for its own above `MAX_SEED`.
    """

    model: ModelConfig | None
    data: Data | Chat | Preferences | Prompts = Data()
    objective: NextToken | RewardModel | Preference | Distill | PolicyGradient = NextToken()
    optimizer: Optimizer = AdamW()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpointing = Checkpointing(every=200)
    mesh: MeshConfig = MeshConfig()
    parent: str | None = None
    lora: LoRA | None = None
    seed: int = 0  # of everything random in the run: initial values, the order of rows, dropout

    def __post_init__(self):
        for path, value in config.walk(self):
            most = MAX_SEED if path == "seed" else math.inf
            if path.split(".")[-1] == "seed" and type(value) is int and not 0 <= value <= most:
                end = f"to {most}" if path == "seed" else "on"
                raise UserError(f"{path} must be a whole number from 0 {end}, got {value}")

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that the run's parameters have, as `nn.heads` names them."""
        if isinstance(self.objective, PolicyGradient):
            return policy.head_names(self.objective)
        return ("reward",) if isinstance(self.objective, RewardModel) else ("lm",)


def prepared(data: Data | Chat | Preferences | Prompts, progress: bool = True) -> Prepared:
    """Packed rows of each kind of data: text to continue, conversations to answer in, answers with their ranks.

    Of prompts only the tokenizer and what lineage knows of them: their rows are made as the policy answers.
    """
    if isinstance(data, Prompts):
        return prepare_prompts(data)
    if isinstance(data, Preferences):
        return prepare_preferences(data, progress)
    return prepare_chat(data, progress) if isinstance(data, Chat) else prepare(data, progress)


def validate(e: Experiment, batch_shards: int) -> None:
    """Raises `UserError` for settings that are each well typed but cannot stand together.

    batch_shards: over how many devices the mesh spreads the rows of a batch.
    """
    t = e.train
    counts = {f"train.{n}": getattr(t, n) for n in ("steps", "batch_size", "accumulation", "log_every", "max_skipped")}
    counts |= {f"evaluation.{n}": getattr(e.evaluation, n) for n in ("every", "batch_size", "max_batches")}
    for path, value in (counts | {"train.loss_chunk": t.loss_chunk}).items():
        if value is not None and value < 1:
            raise UserError(f"{path} must be at least 1, got {value}")
    if t.clip is not None and not t.clip > 0:
        raise UserError(f"train.clip must be above 0, or none for no clipping, got {t.clip:g}")
    for path, value in config.walk(e):  # a critic has an optimizer of its own
        if "optimizer." in path and type(value) in (int, float) and not 0 <= value < math.inf:
            raise UserError(f"{path} must be a number from 0 on, got {value:g}")
    if t.hang_seconds is not None and t.hang_seconds <= 0:
        raise UserError(f"train.hang_seconds must be above 0, got {t.hang_seconds:g}; none turns the watch off")
    if t.batch_size % (t.accumulation * batch_shards):
        raise UserError(
            f"train.batch_size {t.batch_size} must be a multiple of train.accumulation {t.accumulation} "
            f"times the {batch_shards} devices that share a batch"
        )
    if e.evaluation.batch_size % batch_shards:
        raise UserError(
            f"evaluation.batch_size {e.evaluation.batch_size} must be a multiple of the {batch_shards} devices"
        )
