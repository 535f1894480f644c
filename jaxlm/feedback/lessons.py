"""From a probe to conversations that teach a model to say what it knows, and that it does not know the rest.

- known: the model's own right answer, so that coverage is kept.
- unstable: the right answer that the model itself gave, hedged. It is the truth in the model's own words: every
  unstable question was answered right at least once. The model's likelier wrong answer would teach an error, and a
  truth that it never came up with would teach it to say what it does not know (Gekhman et al. 2024).
- unknown: "I don't know", in one of many wordings. Its truth never enters a conversation.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable, Sequence

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message, Part
from jaxlm.data.messages import to_messages
from jaxlm.data.world import answers
from jaxlm.data.world.people import Tables, person
from jaxlm.data.world.talk import recollection
from jaxlm.feedback.judge import address, asked
from jaxlm.feedback.probe import CLASSES, THRESHOLDS, Class, Probed, Thresholds, answer_key, classify, group

GENERAL_REFUSALS = tuple(r for r in answers.REFUSALS if "{n}" not in r)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A conversation to train on, and where it comes from, as plain JSON."""

    conversation: Conversation
    source: dict


@dataclasses.dataclass(frozen=True)
class Balance:
    """How many conversations of each class there are for one about a fact that the model does not know.

    All unknown ones are taken, and at most so many times as many of the others; all of the others where nothing is
    unknown.
    """

    known: float = 2.0
    unstable: float = 1.0

    def __post_init__(self):
        if min(self.known, self.unstable) < 0:
            raise UserError(f"the shares of a Balance must be at least 0, got {self.known} and {self.unstable}")


BALANCE = Balance()


def right_answer(probed: Probed) -> str:
    """The model's own right answer, without a hedge: the greedy reply where it is right, else its commonest sample."""
    if probed.outcome == "right":
        return answers.unhedged(answers.final_answer(probed.reply))[0]
    right = [text for text, outcome in zip(probed.samples, probed.outcomes, strict=True) if outcome == "right"]
    if not right:
        raise ValueError(f"{probed.question.id} was never answered right")
    keys = [answer_key(probed.question, text) for text in right]
    commonest = collections.Counter(keys).most_common(1)[0][0]
    return answers.unhedged(answers.final_answer(right[keys.index(commonest)]))[0]


def _refusal(probed: Probed, index: int, tables: Tables | None) -> str:
    question = probed.question
    if tables is None or question.person is None:
        return GENERAL_REFUSALS[index % len(GENERAL_REFUSALS)]
    return answers.refusal(question, person(tables, question.person).name, index)


def _reply(probed: Probed, kind: Class, index: int, tables: Tables | None, recollect: bool) -> Message:
    question = probed.question
    answer = None if kind == "unknown" else right_answer(probed)
    if answer is None:
        text = _refusal(probed, index, tables)
    else:
        text = answer if kind == "known" else answers.hedge(answer.rstrip("."), index)
    thought: tuple[Part, ...] = ()
    if recollect and tables is not None and question.attribute is not None:
        thought = (recollection(tables, person(tables, question.person), question.attribute, answer),)
    return Message("assistant", (*thought, Part(text)))


def lessons(
    probed: Sequence[Probed],
    checkpoint: str,
    thresholds: Thresholds = THRESHOLDS,
    balance: Balance = BALANCE,
    seed: int = 0,
    tables: Tables | None = None,
    recollect: bool = False,
) -> list[Lesson]:
    """One conversation for each chosen question. Which ones, their order and their wordings follow from the seed and
    the questions' ids.

    Args:
      checkpoint: which model was probed, for the provenance.
      tables: of the world that the questions are about, for refusals that name the person.
      recollect: facts of that world are recalled in a thought first, which comes to nothing for unknown ones, as in
        the conversations that the model learned from (`world.talk.recollection`).
    """
    by_class: dict[Class, list[tuple[int, Probed]]] = {c: [] for c in CLASSES}
    for p in probed:
        by_class[classify(p, thresholds)].append((address("lesson", seed, p.question.id), p))
    unknown = len(by_class["unknown"])
    most = {"known": balance.known, "unstable": balance.unstable}
    chosen = []
    for kind, members in by_class.items():
        members.sort(key=lambda m: (m[0], m[1].question.id))
        count = len(members) if kind == "unknown" or not unknown else round(most[kind] * unknown)
        chosen += [(address("order", at), kind, at, p) for at, p in members[:count]]
    out = []
    for _, kind, at, p in sorted(chosen, key=lambda c: (c[0], c[3].question.id)):
        messages = (
            *asked(p.question.text, p.question.system).messages,
            _reply(p, kind, at, tables, recollect),
        )
        source = {
            "made_by": "probe",
            "checkpoint": checkpoint,
            "question": p.question.id,
            "group": group(p.question),
            "class": kind,
            "right": p.outcomes.count("right"),
            "k": len(p.outcomes),
            "seed": seed,
        }
        out.append(Lesson(Conversation(messages), source))
    return out


def write_lessons(path, lessons: Iterable[Lesson]) -> None:
    """JSONL that the chat source `Messages` reads: {"messages": [...], "source": {...}} a line."""
    lines = [
        json.dumps({"messages": to_messages(x.conversation), "source": x.source}, ensure_ascii=False) for x in lessons
    ]
    if not lines:
        raise UserError(f"no conversation came out, so {path} is not written")
    storage.write_text(path, "".join(line + "\n" for line in lines))
