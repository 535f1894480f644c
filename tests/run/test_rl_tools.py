"""Tools and thoughts in rollouts: what is called stands in the journal, right steps pay, and all of it resumes."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data.chat import Chat
from jaxlm.data.conversation import Conversation, Message, read_completion
from jaxlm.data.prompts import Prompt, PromptFile, Prompts, WorldTask
from jaxlm.data.tokenizer import Bytes, BytesTokenizer
from jaxlm.data.world.talk import WorldConversations
from jaxlm.feedback.journal import Journal
from jaxlm.feedback.journal import tools as journaled_tools
from jaxlm.feedback.parts import Correct, CosineLength, Format, Shorter, SoftLength, Steps
from jaxlm.nn.lora import LoRA
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Linear
from jaxlm.run import checkpoint, exits, load, rl
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.log import read_metrics
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion
from jaxlm.sharding import MeshConfig
from jaxlm.steps import learn
from jaxlm.steps.policy import GRPO, PPO, DynamicSampling, ValueHead
from jaxlm.steps.rollout import Sample
from jaxlm.steps.update import Train
from jaxlm.tools import Tool, call
from tests import tiny_run
from tests.run.rl_runs import assert_explained, assert_same, said, saved, stop
from tests.sample.scripted import AUTOMATON, automaton, say

FAST = AdamW(lr=3e-3, weight_decay=0.0, schedule=Linear())


def test_a_tools_result_is_the_first_of_its_step(tmp_path):
    calls = []

    def run(text):
        calls.append(text)
        if text == "bad":
            raise ValueError("cannot")
        return f"{text} {len(calls)}"

    found = {"t": Tool("t", "", run)}
    tools = journaled_tools(Journal(tmp_path), 3, found)
    first = [call(tools, "t", text) for text in ("a", "b", "a", "bad")]
    assert first[0] == first[2] and calls == ["a", "b", "bad"] and not first[3].ok
    with open(tmp_path / "journal.jsonl", "a") as f:
        f.write('{"step": 3, "ke')  # torn by a power cut
    again = journaled_tools(Journal(tmp_path, 3), 3, found)
    assert [call(again, "t", text) for text in ("a", "b", "a", "bad")] == first and len(calls) == 3
    assert call(journaled_tools(Journal(tmp_path, 4), 4, found), "t", "a").text == "a 4"


def test_conversations_with_tools_and_thinking_go_through_the_same_step(tmp_path):
    """Every part of a reward that is not a model's or a function's; process rewards; a value head; no parent."""
    reward = (Correct(), Format(), Steps(), Shorter(), SoftLength(limit=6, buffer=3), CosineLength(longest=6))
    objective = dataclasses.replace(
        PPO, reward=reward, samples=2, max_tokens=6, epochs=1, minibatches=1, critic=ValueHead(), process=0.5,
        heldout_prompts=2, heldout_samples=2, slots=4, preflight="off", missing_stop=None,
    )  # fmt: skip
    e = Experiment(
        model=ModelConfig(layers=1, width=16, heads=2, hidden=32),
        data=Prompts(task=WorldTask(), tokenizer=Bytes(), context=512, tools=("calculator",)),
        objective=objective,
        train=Train(steps=1, batch_size=4, log_every=1),
        mesh=MeshConfig(fsdp=1),
    )
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    record = read_metrics(tmp_path / "run")[-1]
    assert {f"train/reward/{rl.parts.name_of(p)}" for p in reward} <= record.keys()
    assert record["train/tools/calls"] >= 0 and record["train/value/mean"] == 0.0
    assert record["train/reward/process"] == 0.0  # noise thinks nothing right
    assert_explained(tmp_path / "run")
    run = load.load_run(tmp_path / "run")
    assert set(run.params["heads"]) == {"lm", "value"} and np.any(run.params["heads"]["value"]["kernel"])


def test_right_steps_of_a_thought_are_rewarded_at_their_last_tokens():
    """Of five equations two are right, new and of the question's numbers, or of what those led to."""
    tokenizer = BytesTokenizer()
    thought, told = "2+3=5 5+1=7 9+9=18 2+3=5 5+4=9", "9"
    control = tokenizer.control
    ids = (control["<think>"], *tokenizer.encode(thought), control["</think>"], *tokenizer.encode(told),
           control["<|im_end|>"])  # fmt: skip
    completion = Completion(ids, (-1.0,) * len(ids), "", "stop", (True,) * len(ids))
    prompt = Prompt(Conversation((Message("user", "What is 2 and 3 and 4?"),)), {}, "0")
    before = (2, 7, 7)
    sample = Sample(prompt, 0, 0, before, Reply(read_completion(ids, tokenizer), completion), 1.0)
    trainer = types.SimpleNamespace(p=types.SimpleNamespace(process=0.5), sampler=types.SimpleNamespace())
    trainer.sampler.tokenizer = tokenizer
    (values,) = rl.Trainer.process(trainer, [sample])
    begin = len(before) + 1
    want = {begin + thought.index("2+3=5") + 4: 0.5, begin + thought.index("5+4=9") + 4: 0.5}
    assert len(values) == len(before) + len(ids) and {i: v for i, v in enumerate(values) if v} == want
    trainer.p.process = None
    assert rl.Trainer.process(trainer, [sample]) is None


def test_rollouts_search(tmp_path):
    """A parent that always looks up "z": what is found is forced into the reply, and stands in the journal."""
    says = say("<|im_sep|>", "<|tool_call|>", *"search", "\n", "z", "<|tool_call_end|>") | say(
        "<|tool_result_end|>", "<|im_end|>"
    )
    chat = Chat(sources=(WorldConversations(),), tokenizer=Bytes(), context=640)
    tiny_run.make(tmp_path / "parent", tiny_run.replaced(model=AUTOMATON, data=chat), params=automaton(says))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The last letter is Z.")
    objective = dataclasses.replace(
        GRPO, samples=2, max_tokens=16, heldout_prompts=2, heldout_samples=2, slots=4, preflight="off"
    )
    e = Experiment(
        model=None,
        parent=str(tmp_path / "parent"),
        data=Prompts(task=WorldTask(), context=640, tools=("search",), index=str(tmp_path / "texts")),
        objective=objective,
        train=Train(steps=1, batch_size=4, log_every=1),
        mesh=MeshConfig(fsdp=1),
    )
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    record = read_metrics(tmp_path / "run")[-1]
    assert record["train/tools/search/calls"] == 4 and record["train/tools/search/failures"] == 0
    assert "The last letter is Z." in (tmp_path / "run" / "journal.jsonl").read_text()
    with pytest.raises(UserError, match="no such folder"):
        rl.run(config.override(e, {"data.index": str(tmp_path / "none")}), tmp_path / "other", e)


def test_adapters_a_value_head_tools_and_dynamic_sampling_resume_bit_equal(tmp_path, monkeypatch):
    """A parent that looks up "z", then says 3, 4 or 5, where 4 is right; a power cut in the midst of the last step."""
    says = say("<|im_sep|>", "<|tool_call|>", *"search", "\n", "z", "<|tool_call_end|>")
    says |= {"<|tool_result_end|>": ("3", "4", "5"), "3": "<|im_end|>", "4": "<|im_end|>", "5": "<|im_end|>"}
    rng = np.random.default_rng(0)  # a little noise, without which no adapter has a gradient
    params = jax.tree.map(lambda x: x + (0.02 * rng.normal(size=x.shape)).astype(x.dtype), automaton(says))
    chat = Chat(sources=(WorldConversations(),), tokenizer=Bytes(), context=512)
    tiny_run.make(tmp_path / "parent", tiny_run.replaced(model=AUTOMATON, data=chat), params=params)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The last letter is Z.")
    asked = [json.dumps({"prompt": f"{i}?", "answer": "4"}) + "\n" for i in range(40)]
    (tmp_path / "asked.jsonl").write_text("".join(asked))
    task = PromptFile(str(tmp_path / "asked.jsonl"), heldout=0.2)
    e = Experiment(
        model=None,
        parent=str(tmp_path / "parent"),
        data=Prompts(task, context=512, tools=("search",), index=str(tmp_path / "texts")),
        objective=dataclasses.replace(
            PPO, samples=2, max_tokens=64, epochs=1, minibatches=1, critic=ValueHead(), dynamic=DynamicSampling(1),
            missing_stop=None, heldout_prompts=1, heldout_samples=1, slots=8, preflight="off",
        ),
        optimizer=dataclasses.replace(FAST, lr=1e-4),  # slow enough to be right and wrong to the end
        lora=LoRA(rank=2),
        train=Train(steps=3, batch_size=8, log_every=1),
        evaluation=Evaluation(every=3),
        checkpoint=Checkpointing(every=1),
        mesh=MeshConfig(fsdp=1),
    )  # fmt: skip
    assert rl.run(e, tmp_path / "whole", e) == exits.EXIT_DONE

    def crash(*_, **__):
        raise RuntimeError("power cut")

    with monkeypatch.context() as m:
        stop(m, 2, lambda: m.setattr(learn, "credit", crash))
        with pytest.raises(RuntimeError, match="power cut"):
            rl.run(e, tmp_path / "run", e)
    assert checkpoint.newest(tmp_path / "run") == 2
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    ended = saved(tmp_path / "whole")
    assert_same(saved(tmp_path / "run"), ended)

    def of_the_policy(workdir):
        return [{k: v for k, v in r.items() if "tools/" not in k} for r in said(workdir)]  # counted since a start

    assert of_the_policy(tmp_path / "run") == of_the_policy(tmp_path / "whole")
    records = read_metrics(tmp_path / "whole")
    assert records[-1]["train/tools/search/calls"] > 0 and sum(r.get("train/dropped_groups", 0) for r in records) > 0
    assert all(0 < r["train/right"] < 1 for r in records[1:])
    assert all(np.any(x) for x in jax.tree.leaves([ended.params["heads"]["value"], ended.params["adapters"]]))
    assert_explained(tmp_path / "whole")
