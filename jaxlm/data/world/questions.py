"""Questions about people, in many paraphrases, and the one type of all questions with their truth."""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Literal

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.world import draws
from jaxlm.data.world.draws import Draws
from jaxlm.data.world.people import Attribute, Known, Person, Split, Tables, person
from jaxlm.data.world.sentences import side

ATTEMPTS = 200

Check = Literal["exact", "numeric", "text"]
Kind = Literal["fact", "arithmetic", "graph", "spell", "count", "reverse", "identity", "system"]

# {n} the name, {p} its possessive, {x} a noun. Both frames and nouns are in training wordings; every fourth of their
# combinations is held out: what is tested is another way to ask, not words that nothing has explained.
FRAMES = (
    "What is {p} {x}?",
    "Tell me {p} {x}.",
    "Can you tell me {p} {x}?",
    "Please name {p} {x}.",
    "I need to know {p} {x}.",
    "{n}: {x}?",
    "Do you know {p} {x}?",
    "Name {p} {x}.",
)
NOUNS: dict[Attribute, tuple[str, str, str, str]] = {
    "birth_date": ("birth date", "date of birth", "birthday", "day of birth"),
    "birth_city": ("birthplace", "hometown", "place of birth", "city of birth"),
    "university": ("university", "alma mater", "school", "place of study"),
    "major": ("major", "field of study", "discipline", "main subject"),
    "employer": ("employer", "company", "firm", "paymaster"),
    "employer_city": ("city of work", "work city", "office city", "city of employment"),
    "hobby": ("hobby", "favorite pastime", "passion", "recreation"),
    "dish": ("favorite dish", "favorite food", "preferred meal", "favorite meal"),
}
# Free wordings, for training alone.
QUESTIONS: dict[Attribute, tuple[str, ...]] = {
    "birth_date": (
        "When was {n} born?",
        "What is {p} birth date?",
        "On which day was {n} born?",
        "What is {p} date of birth?",
        "When is {p} birthday?",
        "Can you tell me when {n} was born?",
        "On what date did {n} come into the world?",
        "What day was {n} born on?",
        "Please give {p} date of birth.",
        "I need to know when {n} was born.",
        "Tell me {p} birthday.",
        "When did {p} life begin?",
        "Which date does {p} birth certificate show?",
        "What was the date of {p} birth?",
        "{n}: date of birth?",
        "Do you know the day on which {n} was born?",
        "Since when has {n} been alive?",
        "When did {p} parents first hold their child?",
        "Name the date on which {n} was born.",
        "Could you look back and say when {n} was born?",
    ),
    "birth_city": (
        "Where was {n} born?",
        "What is {p} birthplace?",
        "In which city was {n} born?",
        "What is {p} hometown?",
        "Which city does {n} come from?",
        "Can you tell me where {n} was born?",
        "What is {p} city of birth?",
        "Where does {n} come from?",
        "Please name {p} birth city.",
        "I need to know where {n} was born.",
        "Tell me {p} place of birth.",
        "Which city is the birthplace of {n}?",
        "Where did {n} grow up?",
        "What city was {n} born in?",
        "{n}: place of birth?",
        "Do you know in which city {n} came into the world?",
        "Where are {p} roots?",
        "Where did {p} life begin?",
        "Name the city in which {n} was born.",
        "Of which city is {n} a native?",
    ),
    "university": (
        "Where did {n} study?",
        "What is {p} alma mater?",
        "Which university did {n} attend?",
        "Where did {n} go to university?",
        "Where did {n} graduate?",
        "Can you tell me where {n} studied?",
        "What is {p} university?",
        "From where did {n} get a degree?",
        "Please name {p} university.",
        "I need to know where {n} went to university.",
        "Tell me {p} alma mater.",
        "At which institution did {n} study?",
        "Which school awarded {n} a degree?",
        "What university did {n} graduate from?",
        "{n}: university?",
        "Do you know which university {n} went to?",
        "Where was {n} a student?",
        "Where did {n} earn a diploma?",
        "Name the university that {n} attended.",
        "Which university counts {n} among its graduates?",
    ),
    "major": (
        "What did {n} study?",
        "What was {p} major?",
        "Which subject did {n} major in?",
        "What is {p} degree in?",
        "What was {p} field of study?",
        "Can you tell me what {n} majored in?",
        "What is {p} discipline?",
        "In which subject does {n} hold a degree?",
        "Please name {p} major.",
        "I need to know what {n} studied.",
        "Tell me {p} field of study.",
        "What subject did {n} choose at university?",
        "In what field was {n} trained?",
        "What was the subject of {p} degree?",
        "{n}: major?",
        "Do you know which field {n} specialized in?",
        "What did {n} specialize in?",
        "Which subject was {n} taught?",
        "Name the subject that {n} studied.",
        "What did {p} studies focus on?",
    ),
    "employer": (
        "Who does {n} work for?",
        "What is {p} employer?",
        "Which company employs {n}?",
        "For which company does {n} work?",
        "Who employs {n}?",
        "Can you tell me who {n} works for?",
        "What is {p} company?",
        "Who pays {p} salary?",
        "Please name {p} employer.",
        "I need to know which company {n} works for.",
        "Tell me {p} employer.",
        "At which company does {n} have a job?",
        "What company does {n} work for?",
        "Which company hired {n}?",
        "{n}: employer?",
        "Do you know which company has {n} on its staff?",
        "Which firm is {n} employed by?",
        "With which company does {n} have a contract?",
        "Name the company that employs {n}.",
        "Whose staff does {n} belong to?",
    ),
    "employer_city": (
        "Where does {n} work?",
        "In which city does {n} work?",
        "What city is {p} job in?",
        "In what city is {p} office?",
        "Where is {p} employer based?",
        "Can you tell me which city {n} works in?",
        "What is {p} city of work?",
        "To which city does {n} commute?",
        "Please name the city of {p} employer.",
        "I need to know in which city {n} works.",
        "Tell me the city where {n} works.",
        "Where is {p} workplace?",
        "Which city is {p} company in?",
        "What city does {n} work in?",
        "{n}: city of work?",
        "Do you know where {p} company is located?",
        "Where does {n} go to work?",
        "Where is {p} job located?",
        "Name the city in which {n} has a job.",
        "In which city can {n} be found at work?",
    ),
    "hobby": (
        "What is {p} hobby?",
        "What does {n} do for fun?",
        "What is {p} favorite pastime?",
        "How does {n} spend free time?",
        "What does {n} enjoy after work?",
        "Can you tell me what {p} hobby is?",
        "What is {p} passion?",
        "What does {n} do at weekends?",
        "Please name {p} hobby.",
        "I need to know what {n} does for fun.",
        "Tell me {p} favorite pastime.",
        "Which pastime does {n} like best?",
        "Which hobby does {n} have?",
        "What does {n} like to do in spare time?",
        "{n}: hobby?",
        "Do you know what {n} does in leisure hours?",
        "With what does {n} relax?",
        "Which activity does {n} love?",
        "Name the hobby that {n} has.",
        "What fills {p} days off?",
    ),
    "dish": (
        "What is {p} favorite dish?",
        "What does {n} like to eat?",
        "What is {p} favorite food?",
        "Which dish does {n} like best?",
        "What does {n} love to eat?",
        "Can you tell me what {p} favorite dish is?",
        "What is {p} preferred meal?",
        "What does {n} order at a restaurant?",
        "Please name {p} favorite dish.",
        "I need to know what {n} likes to eat.",
        "Tell me {p} favorite food.",
        "Which food does {n} prefer?",
        "Which dish is {p} favorite?",
        "What food does {n} like most?",
        "{n}: favorite dish?",
        "Do you know which meal {n} likes most?",
        "What could {n} eat every day?",
        "Which meal does {n} ask for?",
        "Name the dish that {n} likes best.",
        "What should one cook for {n}?",
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A question and its truth. `answer` is true whether or not anybody could know it: `known` says that.

    text: what is asked. system: the system message that it is asked under.
    also: other right answers. check: how an answer is compared, see `answers.verify`.
    tool: the tool that a good answer uses where it is offered, or None. by_hand: whether one is expected without it.
    """

    text: str
    answer: str
    check: Check
    kind: Kind
    split: Split
    id: str
    also: tuple[str, ...] = ()
    system: str | None = None
    person: int | None = None
    attribute: Attribute | None = None
    known: Known | None = None  # of facts
    mentioned: bool | None = None  # of facts: whether the person is named anywhere in pretraining
    digits: int = 0  # of arithmetic: of its numbers; of words: letters
    steps: int = 0  # of a worked solution
    tool: str | None = None
    by_hand: bool = True

    def within_reach(self, tools: Collection[str]) -> bool:
        """Whether a good answer is expected of who has these tools."""
        return self.by_hand or self.tool in tools


@functools.cache
def wordings(attribute: Attribute, heldout: bool) -> tuple[str, ...]:
    """All ways to ask for an attribute, of one side."""
    nouns = NOUNS[attribute]
    # Turned by one from frame to frame, so that each noun is held out in some frames and seen in the others.
    composed = [f.replace("{x}", nouns[(k - i) % len(nouns)]) for i, f in enumerate(FRAMES) for k in range(len(nouns))]
    free = () if heldout else tuple(q for q in QUESTIONS[attribute] if q not in composed)
    return (*side(tuple(composed), heldout), *free)


def fact_question(who: Person, attribute: Attribute, paraphrase: int, heldout: bool | None = None) -> Question:
    """Question about a fact in wording `paraphrase` (taken modulo their number) of its side.

    heldout: which wordings; unset takes those of the person's own split.
    """
    heldout = who.split == "heldout" if heldout is None else heldout
    forms = wordings(attribute, heldout)
    paraphrase %= len(forms)
    return Question(
        text=forms[paraphrase].format(n=who.name, p=f"{who.name}'s"),
        answer=who.facts[attribute],
        check="text",
        kind="fact",
        split=who.split,
        id=f"fact/{who.index}/{attribute}/{'heldout' if heldout else 'train'}{paraphrase}",
        person=who.index,
        attribute=attribute,
        known=who.known[attribute],
        mentioned=who.mentioned,
    )


EVERYBODY = (0.0, 1.0)


@functools.lru_cache(maxsize=64)
def persons(
    t: Tables, split: Split | None = None, mentioned: bool | None = None, part: tuple[float, float] = EVERYBODY
) -> tuple[int, ...]:
    """Indices of the persons of a split (both: None) who are mentioned, who are not, or both.

    part: from and to which share of the training persons; all of the held-out ones are always meant.
    """
    p, out = t.people, []
    for is_mentioned, start, count in ((True, 0, p.count), (False, p.count, p.unmentioned)):
        cut = round(p.train_fraction * count)
        if mentioned in (None, is_mentioned):
            low, high = (start + round(share * cut) for share in part)
            out += range(low, high) if split != "heldout" else ()
            out += range(start + cut, start + count) if split != "train" else ()
    return tuple(out)


def drawn_fact(t: Tables, split: Split, told: bool, rng: np.random.Generator) -> Question:
    """About a split's person: a fact told often, of one who is mentioned; or else one told nowhere, of anybody."""
    wanted, pool = "often" if told else "never", persons(t, split, True if told else None)
    for _ in range(ATTEMPTS if pool else 0):
        who = person(t, pool[int(rng.integers(len(pool)))])
        if found := [a for a in t.people.attributes if who.known[a] == wanted]:
            return fact_question(who, found[int(rng.integers(len(found)))], int(rng.integers(2**32)))
    raise UserError(f"no {split} person has a fact that is told {'often' if told else 'nowhere'}: see world.people")


def fact_questions(
    t: Tables,
    split: Split,
    known: tuple[Known, ...] = ("often", "once", "never"),
    mentioned: bool | None = None,
    heldout_wordings: bool | None = None,
    per_fact: int = 1,
    part: tuple[float, float] = EVERYBODY,
) -> Iterator[Question]:
    """Every fact of a split's persons once, or in `per_fact` different paraphrases, in the order of persons.

    split: of the persons: "train" may appear in fine-tuning, "heldout" must not.
    known: how often the facts were told in pretraining.
    mentioned: only persons who were, or were not, named in pretraining.
    heldout_wordings: the paraphrases; unset takes those of the split.
    part: of the training persons, see `persons`.
    """
    for index in persons(t, split, mentioned, part):
        who = person(t, index)
        for place, attribute in enumerate(t.people.attributes):
            if who.known[attribute] in known:
                start = Draws(t.seed, draws.QUESTIONS, index, place).below(2**32)
                for i in range(per_fact):
                    yield fact_question(who, attribute, start + i, heldout_wordings)
