"""Which of two replies is better? By a model that is shown both, in both orders, and by scores that are known.

A judge prefers the reply that it sees first, or second, whatever it says (Zheng et al. 2023, arXiv 2306.05685), so that
each pair is asked in both orders and averaged: p(a, b) + p(b, a) = 1, and one that looks at the place alone says 0.5. A
verdict that cannot be read is counted and labels nothing, and a prompt with such a pair gets no ranking.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message, prompt_ids
from jaxlm.feedback.endpoint import Say
from jaxlm.feedback.journal import Journal
from jaxlm.feedback.journal import question as key_of
from jaxlm.feedback.judge import VERDICTS, Ask, address, asked
from jaxlm.feedback.records import Prompt, Ranking, Response
from jaxlm.feedback.scoring import TIMEOUT, Reward, scores
from jaxlm.feedback.store import Store
from jaxlm.nn.transformer import ModelConfig
from jaxlm.sample import score
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion, Sampling

BETTER = "better: more helpful, more accurate, and safe"
LETTERS = ("A", "B")
# Each line of what is quoted begins with "> ", so that no reply can pass for the other one or for the question.
QUESTION = """Here is a conversation and two replies to its last message.

Conversation:
{conversation}

Reply A:
{a}

Reply B:
{b}

Which reply is {criterion}? Answer with the letter A or B alone."""
TIE = 1e-6  # a probability so close to 0.5 is rounding
_VERDICT = re.compile(r"\W*(?:[Rr]eply\s+)?([AB])\W*")


class Case(NamedTuple):
    """Two replies to compare."""

    prompt: Conversation
    a: str
    b: str


# The probability that `a` is better for each case; None where the judge said nothing that counts.
Compare = Callable[[Sequence[Case]], list[float | None]]
# Log-probabilities of two answers as the next words in each conversation; None where it does not fit.
AnswerScores = Callable[[Sequence[Conversation], tuple[str, str]], list[tuple[float, float] | None]]


@dataclasses.dataclass
class Verdicts:
    """What came back; each case is asked twice. `malformed`: neither letter. `missing`: too long, or no answer came."""

    asked: int = 0
    malformed: int = 0
    missing: int = 0


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def question(case: Case, criterion: str = BETTER) -> Conversation:
    """What a judge is asked about a case in the order given."""
    said = "\n".join(_quoted(f"{m.role.capitalize()}: {m.text}") for m in case.prompt.messages)
    return asked(QUESTION.format(conversation=said, a=_quoted(case.a), b=_quoted(case.b), criterion=criterion))


def _both_orders(cases: Sequence[Case], criterion: str) -> list[Conversation]:
    return [question(c, criterion) for case in cases for c in (case, Case(case.prompt, case.b, case.a))]


# ------------------------------------------------------------------------------------------------------------- judges
def by_probability(answer_scores: AnswerScores, criterion: str = BETTER, counts: Verdicts | None = None) -> Compare:
    """A judge by the softmax over its two answers, averaged over both orders (Bai et al. 2022, arXiv 2212.08073)."""
    counts = Verdicts() if counts is None else counts

    def first(pair: tuple[float, float]) -> float:
        return 0.5 * (1 + math.tanh((pair[0] - pair[1]) / 2))  # the softmax, which cannot overflow

    def compare(cases: Sequence[Case]) -> list[float | None]:
        found = answer_scores(_both_orders(cases, criterion), LETTERS) if cases else []
        counts.asked += len(found)
        counts.missing += found.count(None)
        both = zip(found[::2], found[1::2], strict=True)
        return [None if x is None or y is None else (first(x) + 1 - first(y)) / 2 for x, y in both]

    return compare


def by_text(say: Say, criterion: str = BETTER, counts: Verdicts | None = None) -> Compare:
    """A judge by what it writes: one letter, and nothing else. Both orders agree, or the case is a tie."""
    counts = Verdicts() if counts is None else counts

    def verdict(text: str | None) -> float | None:
        if text is None:
            counts.missing += 1
            return None
        letter = _VERDICT.fullmatch(text)
        counts.malformed += letter is None
        return None if letter is None else float(letter[1] == "A")

    def compare(cases: Sequence[Case]) -> list[float | None]:
        found = [verdict(t) for t in say(_both_orders(cases, criterion))] if cases else []
        counts.asked += len(found)
        both = zip(found[::2], found[1::2], strict=True)
        return [None if x is None or y is None else (x + 1 - y) / 2 for x, y in both]

    return compare


def said_by(ask: Ask, sampling: Sampling = VERDICTS) -> Say:
    """What a model of the decoder writes; a sample depends on the question alone."""

    def say(conversations: Sequence[Conversation]) -> list[str | None]:
        ids = [address("pairwise", c.messages[-1].text) for c in conversations]
        return [reply.message.text for reply in ask(conversations, sampling, sample_ids=ids)]

    return say


def scores_of(cfg: ModelConfig, params, tokenizer, limit: int | None = None) -> AnswerScores:
    """Log-probabilities of the answers' own ids at the beginning of the model's turn. limit: most tokens of all."""

    def answer_scores(conversations, answers):
        endings = [tokenizer.encode(a) for a in answers]
        prompts: list[list[int] | None] = []
        for conversation in conversations:
            ids = prompt_ids(conversation, tokenizer)
            prompts.append(ids if limit is None or len(ids) + max(map(len, endings)) <= limit else None)
        rows = [[*ids, *ending] for ids in prompts if ids is not None for ending in endings]
        sums = iter(float(x[-len(endings[n % 2]) :].sum()) for n, x in enumerate(score.score(cfg, params, rows)))
        return [None if ids is None else (next(sums), next(sums)) for ids in prompts]

    return answer_scores


def journaled(journal: Journal, judge: str, inner: AnswerScores, at_once: int = 32) -> AnswerScores:
    """The same log-probabilities, but of a question those that were found first, kept after each call of `inner`.

    judge: as in `journal.question`. at_once: questions a call.
    """

    def answer_scores(conversations, answers):
        keys = [key_of(f"{judge} {' '.join(answers)}", c) for c in conversations]
        new = [(k, c) for k, c in dict(zip(keys, conversations)).items() if not journal.has(0, k)]
        for first in range(0, len(new), at_once):
            some = new[first : first + at_once]
            for (key, _), found in zip(some, inner([c for _, c in some], answers), strict=True):
                if found is not None:
                    journal.put(0, key, list(found))
        known = [journal.get(0, key, lambda: None) for key in keys]
        return [None if pair is None else tuple(pair) for pair in known]

    return answer_scores


# ------------------------------------------------------------------------------------------------------------ rankings
class Ranked(NamedTuple):
    """Places of responses from best to worst, tied ones together, and plain JSON that says why."""

    tiers: tuple[tuple[int, ...], ...]
    details: dict


# A ranking of the responses to each prompt; None where there is none.
Ranker = Callable[[Sequence[Prompt], Sequence[Sequence[Response]]], list[Ranked | None]]


def tiers_of(values: Sequence[float | None]) -> tuple[tuple[int, ...], ...]:
    """Places by value, the highest first; equal values are tied, None is left out, NaN is a `UserError`."""
    if any(v is not None and math.isnan(v) for v in values):
        raise UserError("a score is NaN: there is no ranking by it")
    known = sorted({v for v in values if v is not None}, reverse=True)
    return tuple(tuple(i for i, v in enumerate(values) if v == value) for value in known)


def wins(count: int, judged: dict[tuple[int, int], float]) -> list[float]:
    """How many of the others each response beats; a tie is half a win. judged: (i, j) -> p(i is better), each pair."""
    out = np.zeros(count)
    for (i, j), p in judged.items():
        won = 0.5 if abs(p - 0.5) <= TIE else float(p > 0.5)
        out[i] += won
        out[j] += 1 - won
    return out.tolist()


def by_wins(compare: Compare) -> Ranker:
    """Ranks by the number of others that a response beats, all pairs compared; equal numbers are tied."""

    def rank(prompts, responses):
        places = [list(itertools.combinations(range(len(rs)), 2)) for rs in responses]
        cases = [
            Case(p.conversation, rs[i].text, rs[j].text)
            for p, rs, mine in zip(prompts, responses, places, strict=True)
            for i, j in mine
        ]
        found, out = iter(compare(cases)), []
        for rs, mine in zip(responses, places):
            judged = {pair: next(found) for pair in mine}
            if None in judged.values():
                out.append(None)
                continue
            won = wins(len(rs), judged)
            details = {"wins": won, "pairs": [[i, j, p] for (i, j), p in judged.items()]}
            out.append(Ranked(tiers_of(won), details))
        return out

    return rank


def completion_of(response: Response) -> Reply | Message:
    """What a reward function is given: a reply where the ids are known, else the message."""
    if response.tokens is None:
        return response.message
    completion = Completion(
        response.tokens, response.logprobs, response.text, response.finish_reason or "stop", response.sampled
    )
    return Reply(response.message, completion)


def by_scores(reward: Reward, timeout: float | None = TIMEOUT) -> Ranker:
    """Ranks by a reward function, which is given conversations, replies and the prompts' metadata.

    Responses that it cannot score are left out of the ranking; with fewer than two others there is none. timeout: as in
    `scoring.scores`.
    """

    def rank(prompts, responses):
        flat = [(p, r) for p, rs in zip(prompts, responses, strict=True) for r in rs]
        metadata = [p.metadata | ({"finish_reason": r.finish_reason} if r.finish_reason else {}) for p, r in flat]
        conversations, replies = [p.conversation for p, _ in flat], [completion_of(r) for _, r in flat]
        values = iter(scores(reward, conversations, replies, metadata, timeout))
        out = []
        for rs in responses:
            mine = [next(values) for _ in rs]
            scored = sum(v is not None for v in mine)
            out.append(Ranked(tiers_of(mine), {"scores": mine}) if scored >= 2 else None)
        return out

    return rank


class Annotated(NamedTuple):
    """Prompts that were ranked, those whose ranking was there, and those that got none."""

    ranked: int
    known: int
    unranked: int


def annotate(
    store: Store,
    annotator: str,
    rank: Ranker,
    prompts: Sequence[str] | None = None,
    chosen: Callable[[Response], bool] = lambda response: True,
    at_once: int = 16,
) -> Annotated:
    """Ranks the responses to each prompt that this annotator has not ranked, and adds the rankings as they come.

    prompts: ids, all if unset. chosen: which of the responses count. at_once: prompts a call of `rank`; what was ranked
    before a crash is there, and the same call goes on; what a judge has said since, its journal knows. The replies'
    thinking is not shown to a judge.
    """
    known, todo = 0, []
    ranked = {
        (r.prompt, frozenset((*r.shown, *r.details.get("left_out", ()))))
        for _, r in store.records(Ranking, annotator=annotator)
    }
    wanted = None if prompts is None else set(prompts)
    for id, prompt in store.prompts().items():
        if wanted is not None and id not in wanted:
            continue
        responses = {i: r for i, r in store.responses(id).items() if chosen(r)}
        if len(responses) < 2:
            continue
        if (id, frozenset(responses)) in ranked:
            known += 1
        else:
            todo.append((id, prompt, responses))
    new = 0
    for first in range(0, len(todo), at_once):
        batch = todo[first : first + at_once]
        found = rank([p for _, p, _ in batch], [list(rs.values()) for _, _, rs in batch])
        for (id, _, responses), result in zip(batch, found, strict=True):
            if result is None:
                continue
            ids = list(responses)
            tiers = tuple(tuple(ids[i] for i in tier) for tier in result.tiers)
            ranked_ids = {i for tier in tiers for i in tier}
            left_out = [i for i in ids if i not in ranked_ids]
            details = result.details | ({"left_out": left_out} if left_out else {})
            store.add(Ranking(id, tuple(i for i in ids if i in ranked_ids), tiers, annotator, details))
            new += 1
    return Annotated(new, known, len(todo) - new)
