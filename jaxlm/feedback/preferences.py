"""Preferences to train on: K answers to a prompt with their ranks, from a store, an export or Anthropic's HH files.

K answers of one prompt stay one item (Ouyang et al. 2022, arXiv 2203.02155): pairs of it in different batches, or on
both sides of a split, would be seen again and again. Ranks may tie; a tie says nothing about its two answers.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import readers
from jaxlm.data.conversation import Conversation, Message, prompt_ids, render, without_ids
from jaxlm.data.tokenizer import Tokenizer, utf8
from jaxlm.feedback.judge import address
from jaxlm.feedback.lessons import Lesson
from jaxlm.feedback.records import (
    Alternative,
    Demonstration,
    Prompt,
    Ranking,
    Rating,
    Record,
    Response,
    conversation_hash,
    record_id,
)
from jaxlm.feedback.store import Store

HH = "hh"  # the annotator of HH's pairs


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer: its message, and where it was sampled, the ids (`sampled`: False for forced ones) as `Response`."""

    message: Message
    tokens: tuple[int, ...] | None = None
    sampled: tuple[bool, ...] | None = None
    tokenizer: str | None = None

    @property
    def text(self) -> str:
        return self.message.text


@dataclasses.dataclass(frozen=True)
class Preference:
    """Answers to one prompt with their ranks, 0 the best; equal ranks are ties. criterion: unset, better in all.

    A prompt that is text is one to go on with: its answers follow it as pretraining saw a document.
    """

    prompt: Conversation | str
    answers: tuple[Answer, ...]
    ranks: tuple[int, ...]
    annotator: str
    criterion: str | None = None
    metadata: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if len(self.ranks) != len(self.answers):
            raise UserError(f"a preference has {len(self.answers)} answers and {len(self.ranks)} ranks")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) places in `answers`, of all pairs that are not tied."""
        places = itertools.permutations(range(len(self.ranks)), 2)
        return [(a, b) for a, b in places if self.ranks[a] < self.ranks[b]]


class Pair(NamedTuple):
    """For DPO and its relatives."""

    prompt: Conversation | str
    chosen: Answer
    rejected: Answer


def pairs(preferences: Iterable[Preference]) -> list[Pair]:
    """Every pair that is not tied; K answers give up to K (K - 1) / 2, which stay next to each other."""
    return [Pair(p.prompt, p.answers[a], p.answers[b]) for p in preferences for a, b in p.pairs]


# ---------------------------------------------------------------------------------------------------- from the store
def latest_rankings(store: Store, annotators: Sequence[str] | None = None) -> list[Ranking]:
    """The last ranking of each annotator (of these, if given) for each set of responses shown, in order."""
    found: dict[tuple, Ranking] = {}
    for _, ranking in store.records(Ranking):
        if annotators is None or ranking.annotator in annotators:
            key = (ranking.prompt, ranking.annotator, frozenset(ranking.shown))
            found.pop(key, None)  # so that the order is that of the last ones
            found[key] = ranking
    return list(found.values())


def latest_ratings(store: Store, annotators: Sequence[str] | None = None) -> list[Rating]:
    """The last rating of each annotator for each response and criterion."""
    found: dict[tuple, Rating] = {}
    for _, rating in store.records(Rating):
        if annotators is None or rating.annotator in annotators:
            found[rating.response, rating.criterion, rating.annotator] = rating
    return list(found.values())


def _answer(response: Response) -> Answer:
    return Answer(response.message, response.tokens, response.sampled, response.tokenizer)


def from_store(store: Store, annotators: Sequence[str] | None = None, criterion: str | None = None) -> list[Preference]:
    """One item for each prompt, annotator and set of responses shown.

    An alternative that the annotator wrote comes before the responses that it is better than: before those of the same
    ranking, or, where there is none, before responses that are tied. criterion: what the ratings by it say instead.
    """
    prompts = store.prompts()
    responses = {i: r for i, r in store.records(Response)}

    def item(prompt: str, ids: Sequence[str], ranks: Sequence[int], annotator: str, *written: Alternative):
        answers = [Answer(w.message) for w in written] + [_answer(responses[i]) for i in ids]
        ranks = (*[0] * len(written), *(r + bool(written) for r in ranks))
        p = prompts[prompt]
        return Preference(p.conversation, tuple(answers), tuple(ranks), annotator, criterion, p.metadata)

    if criterion is not None:
        rated: dict[tuple, dict[str, float]] = collections.defaultdict(dict)
        for r in latest_ratings(store, annotators):
            if r.criterion == criterion:
                rated[responses[r.response].prompt, r.annotator, r.scale][r.response] = r.value
        out = []
        for (prompt, annotator, _), values in rated.items():
            if len(values) >= 2:
                best_first = sorted(set(values.values()), reverse=True)
                out.append(item(prompt, list(values), [best_first.index(v) for v in values.values()], annotator))
        return out
    written: dict[tuple, list[Alternative]] = collections.defaultdict(list)
    for _, a in store.records(Alternative):
        if annotators is None or a.annotator in annotators:
            written[a.prompt, a.annotator, frozenset(a.better_than)].append(a)
    out = []
    for r in latest_rankings(store, annotators):
        mine = written.pop((r.prompt, r.annotator, frozenset(r.shown)), [])
        out.append(item(r.prompt, r.shown, r.ranks, r.annotator, *mine))
    for alternatives in written.values():
        first = alternatives[0]
        out.append(item(first.prompt, first.better_than, [0] * len(first.better_than), first.annotator, *alternatives))
    return out


def written_answers(store: Store, annotators: Sequence[str] | None = None) -> list[Lesson]:
    """Demonstrations and written alternatives as conversations for fine-tuning: `lessons.write_lessons` writes them.

    Only the written answer is trained on, not what the assistant said before in the prompt.
    """
    prompts, out = store.prompts(), []
    for id, record in store.records(Demonstration, Alternative):
        if annotators is None or record.annotator in annotators:
            context = [dataclasses.replace(m, trained=False) for m in prompts[record.prompt].conversation.messages]
            kind = type(record).__name__.lower()
            source = {"made_by": record.annotator, "kind": kind, "record": id, "prompt": record.prompt}
            out.append(Lesson(Conversation((*context, record.message)), source))
    return out


# --------------------------------------------------------------------------------------------------------- splitting
def opening_hash(conversation: Conversation) -> str:
    """Of the messages up to the first user's: what dialogues that go on from one another have in common."""
    messages = conversation.messages
    end = next((i for i, m in enumerate(messages) if m.role == "user"), len(messages) - 1)
    return conversation_hash(Conversation(messages[: end + 1]))


def prompt_hash(prompt: Conversation | str) -> str:
    return storage.sha256_text(prompt) if isinstance(prompt, str) else conversation_hash(prompt)


def split(
    preferences: Iterable[Preference],
    test_fraction: float,
    seed: int = 0,
    key: Callable[[Conversation | str], str] = prompt_hash,
) -> tuple[list[Preference], list[Preference]]:
    """(train, test) by the hash of the prompt alone, so that all that belongs to one prompt is on one side.

    About `test_fraction` of the prompts are in the test; which ones does not depend on what else there is. key: what
    tells prompts apart; `opening_hash` for data sets whose dialogues share their beginnings.
    """
    if not 0 <= test_fraction <= 1:
        raise UserError(f"test_fraction must be from 0 to 1, got {test_fraction}")
    sides: tuple[list[Preference], list[Preference]] = ([], [])
    for p in preferences:
        sides[address("split", seed, key(p.prompt)) < test_fraction * 2**31].append(p)
    return sides


# ------------------------------------------------------------------------------------------------------------ to ids
class Encoded(NamedTuple):
    """Ids of a prompt, with the assistant's turn opened, and of each answer; `trained` marks those of `answers` that a
    model is to be scored on, which is all but what tools wrote."""

    prompt: list[int]
    answers: list[list[int]]
    trained: list[list[bool]]
    ranks: tuple[int, ...]


def encode(preference: Preference, tokenizer: Tokenizer, limit: int | None = None) -> Encoded:
    """An answer sampled with this tokenizer has the ids that were sampled; others are rendered, with the turn's end.

    limit: most tokens of prompt and longest answer together; the prompt loses its oldest exchanges to fit, the same for
    all answers. `UserError` when even the last exchange, or a text to go on with, leaves too little room.
    """
    if isinstance(preference.prompt, str):
        return _encode_text(preference, tokenizer, limit)
    prompt = without_ids(preference.prompt)
    whole = len(prompt_ids(prompt, tokenizer))
    answers, trained = [], []
    for answer in preference.answers:
        if answer.tokens is not None and answer.tokenizer == tokenizer.hash:
            answers.append(list(answer.tokens))
            trained.append(list(answer.sampled))
        else:
            fields = render(without_ids(Conversation((*prompt.messages, answer.message))), tokenizer)
            answers.append(fields["tokens"][whole:].tolist())
            trained.append(fields["loss_mask"][whole:].tolist())
    room = None if limit is None else limit - max(map(len, answers))
    return Encoded(prompt_ids(prompt, tokenizer, room), answers, trained, preference.ranks)


def _encode_text(preference: Preference, tokenizer: Tokenizer, limit: int | None) -> Encoded:
    begin, end = ([] if i is None else [i] for i in (tokenizer.bos, tokenizer.eos))
    prompt = [*begin, *tokenizer.encode(preference.prompt)]
    answers = [[*tokenizer.encode(a.text), *end] for a in preference.answers]
    if limit is not None and len(prompt) + max(map(len, answers)) > limit:
        raise UserError(f"the prompt {preference.prompt[:20]!r} and its longest answer are more than {limit} tokens")
    return Encoded(prompt, answers, [[True] * len(a) for a in answers], preference.ranks)


@dataclasses.dataclass
class Kept:
    """How many there were, how many are kept, and why the others are left out."""

    seen: int = 0
    kept: int = 0
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.left_out.most_common()) or "none"
        return f"{self.kept} of {self.seen} kept; left out: {reasons}"


def encode_each(
    preferences: Iterable[Preference], tokenizer: Tokenizer, limit: int | None = None, counts: Kept | None = None
) -> Iterator[tuple[Preference, Encoded]]:
    """`encode` of each preference that fits and ranks something; the rest is counted."""
    counts = Kept() if counts is None else counts
    for p in preferences:
        counts.seen += 1
        if not p.pairs:
            counts.left_out["all tied"] += 1
            continue
        try:
            encoded = encode(p, tokenizer, limit)
        except UserError:
            if limit is None:
                raise
            counts.left_out["too long"] += 1
            continue
        counts.kept += 1
        yield p, encoded


# ------------------------------------------------------------------------------------------------------ Anthropic's HH
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class _LeftOut(ValueError):
    pass


def _dialogue(text) -> tuple[Message, ...]:
    if not isinstance(text, str):
        raise _LeftOut("no pair of texts")
    head, *rest = _TURN.split(text)
    names, texts = rest[::2], [t.strip() for t in rest[1::2]]
    if head.strip() or not names:
        raise _LeftOut("does not begin with a turn")
    if names != ["Human", "Assistant"] * (len(names) // 2):
        raise _LeftOut("turns do not alternate")
    if not all(texts):
        raise _LeftOut("an empty turn")
    try:
        utf8(text)
    except UserError:
        raise _LeftOut("not valid Unicode") from None
    return tuple(Message(_ROLES[n], t) for n, t in zip(names, texts))


def _hh_pair(record) -> Preference:
    record = record if isinstance(record, dict) else {}
    chosen, rejected = (_dialogue(record.get(side)) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise _LeftOut("the prompts differ")
    if chosen[-1] == rejected[-1]:
        raise _LeftOut("the answers are the same")
    return Preference(Conversation(chosen[:-1]), (Answer(chosen[-1]), Answer(rejected[-1])), (0, 1), HH)


def read_hh(path, counts: Kept | None = None) -> list[Preference]:
    """Pairs as Anthropic's HH has them (Bai et al. 2022, arXiv 2204.05862), one a line, also .gz and .zst.

    {"chosen": dialogue, "rejected": dialogue}, each "\\n\\nHuman: ...\\n\\nAssistant: ..." and so on; they must
    differ in the last turn alone, an assistant's. The texts lose the spaces around them. What cannot be read strictly
    is left out and counted; `UserError` when nothing is left.
    """
    counts, file, out = Kept() if counts is None else counts, storage.path(path), []
    if not file.is_file():
        raise UserError(f"no such file: {path}")
    for _, record in readers.records(file):
        counts.seen += 1
        try:
            out.append(_hh_pair(record))
        except _LeftOut as e:
            counts.left_out[str(e)] += 1
    counts.kept += len(out)
    if not out:
        raise UserError(f"{path} has no pair as HH writes them ({counts})")
    return out


def as_records(preference: Preference, source: str) -> list[Record]:
    """What a store needs to hold a preference that nobody gave through it; the same one gives the same records."""
    prompt = Prompt(preference.prompt, {**preference.metadata, "source": source})
    responses = [Response(record_id(prompt), a.message, time="") for a in preference.answers]
    ids = [record_id(r) for r in responses]
    tiers = [tuple(i for i, r in zip(ids, preference.ranks) if r == rank) for rank in sorted(set(preference.ranks))]
    return [prompt, *responses, Ranking(record_id(prompt), tuple(ids), tuple(tiers), preference.annotator, time="")]


def is_hh(path) -> bool:
    """Whether the first line of a JSONL file is a pair as HH has them."""
    _, first = next(readers.records(storage.path(path)), ("", None))
    return isinstance(first, dict) and {"chosen", "rejected"} <= first.keys()


def load(
    path, annotators: Sequence[str] | None = None, criterion: str | None = None, counts: Kept | None = None
) -> list[Preference]:
    """Preferences of a store, of a store's export, or of a file of HH, whichever `path` is.

    annotators, criterion: as in `from_store`; a file of HH has neither. counts: what of a file of HH is left out.
    A line of an export that cannot be used, such as a ranking with an id twice or of what is not there, is a
    `UserError`: a program wrote it, so it has been changed or torn since.
    """
    file = storage.path(path)
    if not file.is_file():
        raise UserError(f"no such file: {path}")
    with file.open("rb") as f:
        is_store = f.read(16) == b"SQLite format 3\0"
    if not is_store and is_hh(path):
        return read_hh(path, counts)
    with Store(path if is_store else ":memory:", create=not is_store) as store:
        if not is_store:
            rejects = readers.Rejects(max_fraction=1.0)
            store.import_jsonl(path, rejects)
            if rejects.rejected:
                raise UserError(
                    f"{rejects.examples[0]} ({rejects.rejected} of {rejects.seen} lines cannot be used): export it "
                    "again, or bring the others into a store with launch.rank --import"
                )
        found = from_store(store, annotators, criterion)
    if not found:
        raise UserError(f"{path} holds no preferences" + (f" by {', '.join(annotators)}" if annotators else ""))
    return found
