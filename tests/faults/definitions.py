"""The runs that faults befall: every stage at a size that trains in a second, each on a file that can be changed.

All but pretraining begin with the parameters of a pretraining run, which is their parent.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from jaxlm.data.chat import Chat
from jaxlm.data.chat_sources import PromptResponse
from jaxlm.data.preference_sources import Comparisons
from jaxlm.data.preferences import Preferences
from jaxlm.data.prepare import ByDocument, Data
from jaxlm.data.prompts import PromptFile, Prompts
from jaxlm.data.tokenizer import Bytes
from jaxlm.feedback.parts import Correct, Function
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Cosine, Linear
from jaxlm.rl.kl import Adaptive
from jaxlm.rl.rewards import Subtract
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.sharding import MeshConfig
from jaxlm.steps.policy import GRPO, PPO, Critic
from jaxlm.steps.reward import RewardModel
from jaxlm.steps.update import Train

STAGES = ("pretrain", "sft", "reward", "ppo", "grpo")
RL = ("ppo", "grpo")
STEPS, SAVE_EVERY = 8, 2


# ------------------------------------------------------------------------------------------------------------ the data
def _lines(stage: str) -> list[dict]:
    """The same at each call; the last line is one of the training side."""
    rng = np.random.default_rng(0)

    def words(n):
        return " ".join(rng.choice(["reads", "text", "learns", "which", "word", "comes", "next", *"abcdefgh"], n))

    match stage:
        case "pretrain":
            return [{"text": words(60)} for _ in range(40)]
        case "sft":
            return [{"prompt": words(3), "response": words(3)} for _ in range(60)]
        case "reward":
            return [{"prompt": f"{i}", "answers": [words(1) for _ in range(3)], "ranks": [0, 1, 2]} for i in range(60)]
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]


def write_data(stage: str, folder: Path) -> Path:
    """The file that a stage trains on."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stage if stage not in RL else 'sums'}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in _lines(stage)))
    return file


def change_data(file: Path) -> None:
    """Leaves out the first line, as who has filtered his data anew does."""
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


# ----------------------------------------------------------------------------------------------------- the definitions
def evenness(prompts, completions, metadata):
    """The share of even ids in a reply: by this rule a policy without any skill is rewarded now more, now less."""
    return [sum(i % 2 == 0 for i in c.completion.ids) / len(c.completion.ids) for c in completions]


FAST = AdamW(lr=3e-3, weight_decay=0.0, schedule=Linear())
POLICY = dict(
    reward=(Function("tests.faults.definitions:evenness"), Correct(0.5)), samples=4, max_tokens=4, slots=16,
    heldout_prompts=4, heldout_samples=2, preflight="off",
)  # fmt: skip


def definition(stage: str, data: Path, parent: Path, cache: Path) -> Experiment:
    """data: the folder of `write_data`'s file, which is written where it is missing."""
    file = data / f"{stage if stage not in RL else 'sums'}.jsonl"
    file = str(file if file.exists() else write_data(stage, data))
    shared = dict(
        optimizer=AdamW(lr=0.01, schedule=Cosine(warmup=1)),
        train=Train(steps=STEPS, batch_size=8, log_every=1),
        evaluation=Evaluation(every=4, max_batches=2, batch_size=8),
        checkpoint=Checkpointing(every=SAVE_EVERY),
        mesh=MeshConfig(fsdp=1),
    )
    if stage == "pretrain":
        return Experiment(
            model=ModelConfig(layers=1, width=16, heads=2, hidden=32, tied=True),
            data=Data(
                path=file, curation=None, tokenizer=Bytes(), split=ByDocument(valid_fraction=0.2), context=32,
                workers=1, cache=str(cache),
            ),
            **shared,
        )  # fmt: skip
    shared |= dict(model=None, parent=str(parent))
    if stage == "sft":
        chat = Chat((PromptResponse(file),), valid_fraction=0.2, context=96, workers=1, cache=str(cache))
        return Experiment(data=chat, **shared)
    if stage == "reward":
        ranked = Preferences((Comparisons(file),), 0.3, context=104, cache=str(cache))
        return Experiment(data=ranked, objective=RewardModel(), **shared)
    asked = Prompts(PromptFile(file, as_text=True, heldout=0.2), context=24)
    shared |= dict(optimizer=FAST, train=Train(steps=STEPS, batch_size=16, log_every=1))
    if stage == "grpo":
        return Experiment(data=asked, objective=dataclasses.replace(GRPO, **POLICY), **shared)
    ppo = dataclasses.replace(
        PPO, **POLICY, epochs=2, minibatches=2, kl=Adaptive(0.1, target=0.5, horizon=40.0),
        critic=Critic(optimizer=FAST), missing_stop=Subtract(0.5),
    )  # fmt: skip
    return Experiment(data=asked, objective=ppo, **shared)
