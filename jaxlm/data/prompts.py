"""Prompts for reinforcement learning: a task's, in an order that hangs on the seed and the place in it alone.

A task is a config node with functions of its module:

    size(task, split) -> how many prompts there are, or None where there is no end
    prompt(task, split, index, tools) -> Prompt
    texts(task) -> (id, text) of what there is to read beforehand, for tasks that are also a source of text
"""

import dataclasses
import functools
import itertools
import json
import pathlib

import numpy as np

from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.prepare import Prepared
from jaxlm.data.tasks import addition, chains, file, walks, world
from jaxlm.data.tasks.addition import Addition
from jaxlm.data.tasks.chains import Chains
from jaxlm.data.tasks.file import PromptFile
from jaxlm.data.tasks.prompt import Prompt, Split
from jaxlm.data.tasks.walks import Walks
from jaxlm.data.tasks.world import WorldTask
from jaxlm.data.tokenizer import Bytes, Saved, Tokenizer
from jaxlm.data.world.talk import Tool, tools_message, write_index_files
from jaxlm.feedback import verifiers
from jaxlm.feedback.scoring import Reward, each

Task = Walks | Addition | Chains | WorldTask | PromptFile
MODULES = {Walks: walks, Addition: addition, Chains: chains, WorldTask: world, PromptFile: file}
VERSION = 2  # of what the tasks give
LOOKED_AT = 10  # held-out places for each prompt that is wanted


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a policy is asked. With `tools`, a conversation without a system message gets one that offers them."""

    task: Task = Walks()
    tokenizer: Bytes | Saved | None = None  # unset: the parent's
    context: int = 256  # most tokens of prompt and reply together, and of a row that they are packed in
    tools: tuple[Tool, ...] = ()
    index: str | None = None  # for search: a folder of texts, or an index of one; unset, what the task's world has


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed % 2**64, epoch]).permutation(count)


def at(cfg: Prompts, split: Split, seed: int, place: int) -> Prompt:
    """The prompt at a place of the endless order: every epoch of a task of finite size is shuffled anew."""
    task, count = MODULES[type(cfg.task)], size(cfg, split)
    if count is not None:
        epoch, place = divmod(place, count)
        place = int(_order(count, seed, epoch)[place])
    return _offered(cfg, task.prompt(cfg.task, split, place, cfg.tools))


def size(cfg: Prompts, split: Split) -> int | None:
    """How many prompts there are; None where there is no end."""
    return MODULES[type(cfg.task)].size(cfg.task, split)


def heldout(cfg: Prompts, count: int) -> list[Prompt]:
    """The first held-out prompts in their own order: at most `count`, and each once.

    A task without an end draws its prompts, some of them again: what was asked before is passed over, and a small space
    that gives no others has fewer.
    """
    task, there = MODULES[type(cfg.task)], size(cfg, "heldout")
    places = range(LOOKED_AT * count if there is None else min(count, there))
    drawn = (task.prompt(cfg.task, "heldout", i, cfg.tools) for i in places)
    if there is None:
        seen: set[str | Conversation] = set()
        drawn = (p for p in drawn if not (p.asked in seen or seen.add(p.asked)))
    return [_offered(cfg, p) for p in itertools.islice(drawn, count)]


def _offered(cfg: Prompts, prompt: Prompt) -> Prompt:
    if not cfg.tools or isinstance(prompt.asked, str) or prompt.asked.messages[0].role == "system":
        return prompt
    offer = Message("system", tools_message(cfg.tools))
    return dataclasses.replace(prompt, asked=Conversation((offer, *prompt.asked.messages)))


def texts_to_search(cfg: Prompts, scratch) -> str | None:
    """The index of the tool search or a folder for it: `cfg.index`, or what no text of the task's world tells, which is
    written below the folder `scratch`. None where nothing is searched."""
    if "search" not in cfg.tools or cfg.index is not None:
        return cfg.index
    return str(write_index_files(cfg.task.world, storage.path(scratch) / "texts"))


def reward_of(cfg: Prompts) -> Reward:
    """By which an answer is right: 1, 0, or between where a task knows more or less right."""
    match cfg.task:
        case Walks() as task:
            return each(lambda start, reply, about: walks.optimality(task, start + reply.message.text), "optimality")
        case Chains() as task:
            return each(lambda start, reply, about: chains.follows(task, start + reply.message.text), "follows")
        case WorldTask():
            return verifiers.verified(verifiers.world, "question")
        case PromptFile() as task:
            return verifiers.verified(getattr(verifiers, task.verifier))
        case Addition():
            return verifiers.verified(verifiers.exact)


def answered(cfg: Prompts) -> bool:
    """Whether the task can say what is right: all but a file without answers can."""
    return not isinstance(cfg.task, PromptFile) or file.read(cfg.task)[2] is None


def ids_of(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Of a text to go on with: after the start token, as pretraining saw the beginning of a document."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    return [*start, *tokenizer.encode(prompt.asked)]


def fingerprint(cfg: Prompts) -> str:
    """Hex SHA-256 of all that decides the prompts."""
    task = config.to_dict(cfg.task)
    content = file.read(cfg.task)[1] if isinstance(cfg.task, PromptFile) else None
    task.pop("path", None)
    if task.get("untold") == 0.0:  # the prompts are those of before there was this share
        del task["untold"]
    searched = [] if cfg.index is None else [_contents(pathlib.Path(cfg.index))]
    return storage.sha256_text(json.dumps([VERSION, task, cfg.tools, content, *searched], sort_keys=True))


def _contents(index: pathlib.Path) -> list:
    """[(path, hash)] of what is searched. Raises `UserError` where there is nothing."""
    if not index.exists():
        raise UserError(f"data.index: no such folder or index: {index}")
    files = sorted(p for p in index.rglob("*") if p.is_file()) if index.is_dir() else [index]
    return [[str(p.relative_to(index)) if index.is_dir() else "", storage.sha256_file(p)] for p in files]


def check(cfg: Prompts, verdicts: bool = True) -> None:
    """Raises `UserError` for a definition without a prompt, by making the first of each side.

    verdicts: whether the task's own are asked, for which each prompt of a file needs its answer.
    """
    if cfg.context < 2:
        raise UserError(f"data.context must be at least 2, got {cfg.context}")
    if cfg.index is not None and "search" not in cfg.tools:
        raise UserError("data.index is for the tool search, which data.tools does not offer")
    if "search" in cfg.tools and cfg.index is None and not isinstance(cfg.task, WorldTask):
        raise UserError("data.tools: search needs data.index, a folder of texts or an index of one")
    at(cfg, "train", 0, 0)
    if verdicts and isinstance(cfg.task, PromptFile) and (where := file.read(cfg.task)[2]) is not None:
        raise UserError(
            f"{where}: no field {cfg.task.answer_field!r}, which Correct, CosineLength and dynamic sampling need; "
            "an objective.reward of other parts needs none"
        )
    if not heldout(cfg, 1):
        raise UserError("data.task has no held-out prompts")
    if cfg.tools and isinstance(at(cfg, "train", 0, 0).asked, str):
        raise UserError("data.tools: tools are called in conversations, and this task gives texts to go on with")


def prepare_prompts(cfg: Prompts) -> Prepared:
    """The tokenizer and the hashes; there are no rows. Raises `UserError` as `check`, and where no tokenizer is set."""
    check(cfg, verdicts=False)
    if cfg.tokenizer is None:
        raise UserError("data.tokenizer is unset and there is no parent to take it from: --set=parent=WORKDIR")
    tokenizer = tokenizers.train(cfg.tokenizer, (), 0)
    return Prepared(tokenizer, {}, {}, {"corpus": fingerprint(cfg), "tokenizer": tokenizer.hash}, {}, "")
