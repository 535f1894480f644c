"""A run of reinforcement learning whose tool and reward function say something else on every process.

usage: python -m tests.run.rl_together FOLDER WORKDIR, as each of two processes, after `write(FOLDER)`
"""

import dataclasses
import faulthandler
import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxlm.data.chat import Chat
from jaxlm.data.preferences import Preferences
from jaxlm.data.prompts import PromptFile, Prompts
from jaxlm.data.tokenizer import Bytes
from jaxlm.data.world.talk import WorldConversations
from jaxlm.feedback.parts import Correct, Function, Learned
from jaxlm.feedback.scoring import each
from jaxlm.nn import heads
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.run import processes, rl
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.sharding import MeshConfig
from jaxlm.steps.policy import PPO, Critic
from jaxlm.steps.reward import RewardModel
from jaxlm.steps.update import Train
from jaxlm.tools import Tool
from tests import tiny_run
from tests.faults.child import cheaper
from tests.sample.scripted import AUTOMATON, automaton, say

TOO_LONG = 240  # seconds: what hangs ends with its stacks
SCALE = {"schema_version": 1, "gain": 2.0, "bias": -0.5, "step": 5, "responses": 3}


def drawn(shapes, scale: float):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(x.dtype), shapes)


def write(folder: Path) -> None:
    """A policy that calls the tool and then says 3, 4 or 5, where 4 is right; a reward model; the prompts."""
    says = say("<|im_sep|>", "<|tool_call|>", *"python", "\n", "z", "<|tool_call_end|>")
    says |= {"<|tool_result_end|>": ("3", "4", "5"), "3": "<|im_end|>", "4": "<|im_end|>", "5": "<|im_end|>"}
    params = automaton(says)
    params = jax.tree.map(np.add, params, drawn(params, 0.02))
    chat = Chat(sources=(WorldConversations(),), tokenizer=Bytes(), context=128)
    tiny_run.make(folder / "parent", tiny_run.replaced(model=AUTOMATON, data=chat), params=params)
    model = ModelConfig(vocab_size=AUTOMATON.vocab_size, layers=1, width=16, heads=2, hidden=32)
    ranked = Experiment(
        model=model, data=Preferences(tokenizer=Bytes(), context=128), objective=RewardModel(),
        checkpoint=Checkpointing(every=2),
    )  # fmt: skip
    tiny_run.make(folder / "reward", ranked, 5, drawn(heads.abstract(model, None, ("reward",)), 0.3))
    (folder / "reward" / "reward.json").write_text(json.dumps(SCALE))
    lines = [json.dumps({"prompt": f"{i}?", "answer": "4"}) + "\n" for i in range(20)]
    (folder / "asked.jsonl").write_text("".join(lines))


def definition(folder: Path) -> Experiment:
    fast, reward = AdamW(lr=1e-3, weight_decay=0.0), str(folder / "reward")
    return Experiment(
        model=None,
        parent=str(folder / "parent"),
        data=Prompts(PromptFile(str(folder / "asked.jsonl"), system="s", heldout=0.2), context=128, tools=("python",)),
        objective=dataclasses.replace(
            PPO, reward=(Learned(reward), Function("tests.run.rl_together:whose"), Correct()), samples=2, max_tokens=32,
            epochs=1, minibatches=1, critic=Critic(reward, fast), heldout_prompts=2, heldout_samples=2, slots=8,
            preflight="warn",
        ),
        optimizer=fast,
        train=Train(steps=2, batch_size=8, log_every=1),
        evaluation=Evaluation(every=2),
        checkpoint=Checkpointing(every=2),
        mesh=MeshConfig(fsdp=2),
    )  # fmt: skip


whose = each(lambda prompt, reply, about: len(reply.completion.ids) + 100.0 * jax.process_index(), "whose")


def tools(*_) -> dict[str, Tool]:
    return {"python": Tool("python", "", lambda text: "r" * (1 + 5 * jax.process_index()))}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TOO_LONG, exit=True)
    cheaper()
    folder, workdir = map(Path, sys.argv[1:])
    with processes.joined():
        rl.by_name = tools
        code = rl.run(definition(folder), workdir, definition(folder))
    sys.exit(code)
