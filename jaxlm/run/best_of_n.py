"""Rejection sampling: of n sampled answers to each prompt the best by a reward, as conversations to fine-tune on, with
the matched control that has as many and chooses at random.

What fine-tuning on the chosen ones gains over the control is the reward's doing; the rest is that of training on one's
own samples. P prompts, K answers sampled for each, n of them in the draw.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.estimates import Estimate, clustered
from jaxlm.feedback.judge import address
from jaxlm.feedback.lessons import Lesson, write_lessons
from jaxlm.feedback.overoptimization import best_of_n_kl, choose
from jaxlm.feedback.records import Prompt, Response, record_id
from jaxlm.feedback.scoring import TIMEOUT, Reward, name_of, scores
from jaxlm.feedback.store import Store
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and the answers that were sampled for it."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclasses.dataclass(frozen=True)
class Selected:
    """Conversations of the chosen answers and of the control's, about the same prompts in the same order.

    best, random, pool: the mean reward of the chosen, of the control's, and of all that could be scored; gain: of best
    less random, prompt by prompt. kl: best-of-n's, in nats. left_out: prompts with fewer than n that could be scored.
    """

    chosen: list[Lesson]
    control: list[Lesson]
    best: Estimate
    random: Estimate
    pool: Estimate
    gain: Estimate
    kl: float
    left_out: int


def groups(store: Store, policy_hash: str | None = None) -> list[Group]:
    """Sampled answers by prompt, in the store's order; of one checkpoint, by its hash, if given.

    `UserError` where answers of several checkpoints would be mixed: n samples are then no samples of one policy.
    """
    by_prompt: dict[str, list[Response]] = collections.defaultdict(list)
    for _, response in store.records(Response):
        if response.policy is not None and policy_hash in (None, response.policy.hash):
            by_prompt[response.prompt].append(response)
    policies = {r.policy.hash: r.policy.name for responses in by_prompt.values() for r in responses}
    if len(policies) > 1:
        raise UserError(f"the store holds answers of several checkpoints, {', '.join(policies.values())}: choose one")
    prompts = store.prompts()
    return [Group(prompts[id], tuple(responses)) for id, responses in by_prompt.items()]


def _completion(response: Response) -> Message | Reply:
    """What a reward function is given: the reply as it was sampled, where that is known."""
    if response.tokens is None:
        return response.message
    about = response.tokens, response.logprobs, response.text, response.finish_reason, response.sampled
    return Reply(response.message, Completion(*about))


def _lesson(group: Group, response: Response, kind: str, about: dict) -> Lesson:
    context = [dataclasses.replace(m, trained=False) for m in group.prompt.conversation.messages]
    source = about | {"kind": kind, "prompt": record_id(group.prompt), "record": record_id(response)}
    return Lesson(Conversation((*context, response.message)), source)


def select(found: Iterable[Group], reward: Reward, n: int, seed: int = 0, timeout: float | None = TIMEOUT) -> Selected:
    """Of n answers drawn from each prompt's, the one with the highest reward, and for the control a random one of the
    same n. Ties fall at random. What is drawn for a prompt does not depend on the other prompts.

    An answer that cannot be scored (None) is not drawn; a prompt with fewer than n others is left out and counted.
    Raises `UserError` when no prompt is left, and `RewardError` for a reward function that fails.
    """
    found = list(found)
    flat = [(g, r) for g in found for r in g.responses]
    values = scores(
        reward,
        [g.prompt.conversation for g, _ in flat],
        [_completion(r) for _, r in flat],
        [g.prompt.metadata | {"finish_reason": r.finish_reason} for g, r in flat],
        timeout,
    )
    taken = iter(values)
    kept: list[tuple[Group, list[Response], np.ndarray]] = []
    for g in found:
        scored = [(r, v) for r, v in zip(g.responses, itertools.islice(taken, len(g.responses))) if v is not None]
        if len(scored) >= n:
            kept.append((g, [r for r, _ in scored], np.array([v for _, v in scored])))
    if not kept:
        raise UserError(f"none of {len(found)} prompts has {n} answers that could be scored")
    chosen, control, best, other, pool = [], [], [], [], []
    for group, responses, rewards in kept:
        at, at_random = choose(rewards[None], n, address("best of n", seed, record_id(group.prompt)))
        about = {"made_by": "rejection sampling", "reward": name_of(reward), "n": n, "seed": seed}
        chosen.append(_lesson(group, responses[at[0]], "best", about))
        control.append(_lesson(group, responses[at_random[0]], "random", about))
        best.append(rewards[at[0]])
        other.append(rewards[at_random[0]])
        pool.append(rewards.mean())
    means = [clustered(x, range(len(kept))) for x in (best, other, pool, np.subtract(best, other))]
    return Selected(chosen, control, *means, best_of_n_kl(n), len(found) - len(kept))


def write(selected: Selected, chosen_path, control_path) -> None:
    """Two JSONL files that the chat source `Messages` reads: the chosen answers, and the control's."""
    write_lessons(chosen_path, selected.chosen)
    write_lessons(control_path, selected.control)
