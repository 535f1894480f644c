"""K responses of a policy to each prompt, into the store, for somebody to rank."""

import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import readers
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.messages import from_messages
from jaxlm.feedback.judge import Ask, address
from jaxlm.feedback.records import Policy, Prompt, Response, record_id
from jaxlm.feedback.store import ENDINGS, Store
from jaxlm.sample.engine import Sampling

TEXT_FIELDS = ("prompt", "question")


class Collected(NamedTuple):
    """Responses sampled now, and those that were there; each counts once."""

    new: int
    known: int


def _prompt(record, system: str | None) -> Prompt:
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is wanted, this is {type(record).__name__}")
    metadata = dict(record)
    if "messages" in record:
        messages = from_messages(metadata.pop("messages"), metadata.pop("tools", None)).messages
    else:
        field = next((f for f in TEXT_FIELDS if f in record), None)
        text = metadata.pop(field, None)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a list 'messages' or a text {' or '.join(map(repr, TEXT_FIELDS))} is wanted")
        messages = (Message("user", text),)
    if system is not None and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return Prompt(Conversation(messages), metadata)


def read_prompts(path, system: str | None = None) -> list[Prompt]:
    """Prompts of a JSONL file, one a line: {"messages": [...]}, or {"prompt": text}, or {"question": text}.

    The other fields of a line are the prompt's metadata, such as the answer, which a scorer may read. system: the
    system message of prompts that have none. `UserError` with file and line.
    """
    file, out = storage.path(path), {}
    if not file.is_file():
        raise UserError(f"no such file of prompts: {path}")
    if not file.name.lower().endswith(ENDINGS):
        raise UserError(f"{path}: prompts come from {' or '.join(readers.JSON_ENDINGS)}, also .gz and .zst")
    for where, record in readers.records(file):
        try:
            if isinstance(record, ValueError):
                raise record
            prompt = _prompt(record, system)
            out[record_id(prompt)] = prompt
        except (ValueError, UserError) as e:
            raise UserError(f"{path} {where}: {e}") from None
    if not out:
        raise UserError(f"{path} has no prompts")
    return list(out.values())


def collect(
    store: Store,
    ask: Ask,
    prompts: Sequence[Prompt],
    policy: Policy,
    tokenizer_hash: str,
    k: int = 5,
    sampling: Sampling | None = None,
    at_once: int = 32,
) -> Collected:
    """Adds each prompt with k responses, which depend on the policy, the prompt and the seed, not on other prompts.

    What is in the store is not sampled again: after a crash, or with a greater k, the same call goes on. at_once:
    prompts that are asked, and then stored, together.
    """
    sampling = Sampling(temperature=1.0) if sampling is None else sampling
    if k < 1 or (k > 1 and sampling.temperature == 0):
        raise UserError(f"{k} responses at temperature {sampling.temperature:g}: at least 1, and only 1 when greedy")
    settings = json.loads(json.dumps(dataclasses.asdict(sampling)))
    new = known = 0
    for first in range(0, len(prompts), at_once):
        todo: list[tuple[Prompt, str, int]] = []
        for prompt in prompts[first : first + at_once]:
            id = record_id(prompt)
            # By its hash: the same checkpoint may be named by another path.
            have = [r.sampling for r in store.responses(id).values() if r.policy and r.policy.hash == policy.hash]
            ids = [(address("collect", id) + j) % 2**31 for j in range(k)]
            missing = [i for i in ids if settings | {"sample_id": i} not in have]
            known += k - len(missing)
            todo += [(prompt, id, i) for i in missing]
        if not todo:
            continue
        replies = ask([p.conversation for p, _, _ in todo], sampling, sample_ids=[i for _, _, i in todo])
        records: list[Prompt | Response] = []
        for (prompt, id, sample_id), reply in zip(todo, replies, strict=True):
            c = reply.completion
            records += [
                prompt,
                Response(
                    prompt=id,
                    message=reply.message,
                    tokens=tuple(c.ids),
                    logprobs=tuple(c.logprobs),
                    sampled=tuple(c.sampled),
                    tokenizer=tokenizer_hash,
                    policy=policy,
                    sampling=settings | {"sample_id": sample_id},
                    finish_reason=c.finish_reason,
                ),
            ]
        store.add(*records)
        new += len(todo)
    return Collected(new, known)
