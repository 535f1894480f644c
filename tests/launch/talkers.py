"""Workdirs of models whose words are known, and which say that they were fine-tuned on talk about a small world."""

from jaxlm.data.chat import Chat
from jaxlm.data.tokenizer import Bytes
from jaxlm.data.world.corpus import World
from jaxlm.data.world.people import People
from jaxlm.data.world.talk import WorldConversations
from jaxlm.run.experiment import Experiment
from tests import tiny_run
from tests.sample.scripted import AUTOMATON, automaton, say

WORLD = WorldConversations(world=World(people=People(count=10, unmentioned=4), tasks=("arithmetic",)))
CHAT = Chat(sources=(WORLD,), tokenizer=Bytes(), context=512)
HELLO = say("<|im_sep|>", "<think>", "h", "m", "</think>", "O", "k", "\x07", "!", "<|im_end|>")
# Looks a word up; Python would not run on every machine.
LOOK = say("<|im_sep|>", "<|tool_call|>", *"search", "\n", "P", "l", "i", "m", "<|tool_call_end|>") | say(
    "<|tool_result_end|>", "7", "<|im_end|>"
)


def run_folder(path, table, data=CHAT):
    tiny_run.make(path, Experiment(AUTOMATON, data, checkpoint=tiny_run.EXPERIMENT.checkpoint), params=automaton(table))
    return str(path)
