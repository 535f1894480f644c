"""Ranks the responses in a feedback store, in a terminal: which answer is best, and which is next?

usage:
  python -m launch.rank --store=FEEDBACK.db --annotator=NAME [--seed=0] [--rating_scale=1,7]
  python -m launch.rank --store=FEEDBACK.db --annotator=NAME < rankings.txt         a line for each prompt
  python -m launch.rank --store=FEEDBACK.db [--import=FILE] [--agreement] [--export=FILE] [--written=FILE]

A prompt is shown with its responses, numbered in an order that the seed, the annotator and the prompt decide and that
says nothing about where they come from. What you type:
  2 > 1 = 3 > 4       the ranking, best first, = for a tie, every response once; then the next prompt comes
  rate 2 helpful 6    response 2 by a criterion, on the --rating_scale
  better TEXT         an answer of yours that is better than all of these; without TEXT, lines that end with a dot alone
  demo TEXT           an answer of yours to learn from, whatever these are
  skip                the next prompt; this one comes again when the command is started again
  undo                takes back the last thing that you said, also from an earlier time
  show, help, quit    the end of the input quits too
Ratings and answers are about the prompt that is shown, so give them before the ranking.

Everything is on the disk when the next line is asked for; the same command goes on with what you have not ranked.
Several people may rank at once. launch.collect fills the store. Lines that do not come from a terminal end at the first
that cannot be understood: the rest would be about other prompts.

--agreement: how far annotators agree (--annotators=A,B for some). Agreement is the share of pairs of responses that
two order alike, a tie against an order counting half; chance is .5. Kendall's tau-b and Krippendorff's alpha are 1 for
the same and 0 by chance. In brackets, the 95% interval over prompts.
--export writes every record, a JSON object a line; --import reads them, leaves out what is known, and also reads pairs
as Anthropic's HH has them. --written writes better answers and demonstrations as conversations for fine-tuning.

Exit codes: 0 done; 2 bad input.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError, nearest
from jaxlm.data.conversation import Message
from jaxlm.data.readers import Rejects
from jaxlm.feedback import agreement
from jaxlm.feedback.judge import address
from jaxlm.feedback.lessons import write_lessons
from jaxlm.feedback.preferences import Kept, as_records, is_hh, read_hh, written_answers
from jaxlm.feedback.records import Alternative, Demonstration, Ranking, Rating, Response, Retraction
from jaxlm.feedback.store import MAX_BAD_FRACTION, Store
from jaxlm.sample.transcript import LABELS, printable
from launch import common

STORE = flags.DEFINE_string("store", None, "The feedback store.")
ANNOTATOR = flags.DEFINE_string("annotator", None, "Who ranks.")
SEED = flags.DEFINE_integer("seed", 0, "Of the order in which responses are shown.")
CRITERIA = flags.DEFINE_list("criteria", ["helpful", "accurate", "safe"], "What responses may be rated by.")
SCALE = flags.DEFINE_list("rating_scale", ["1", "7"], "Lowest and highest rating.")
IMPORT = flags.DEFINE_string("import", None, "Add the records of this file.")
EXPORT = flags.DEFINE_string("export", None, "Write every record to this file.")
WRITTEN = flags.DEFINE_string("written", None, "Write better answers and demonstrations to this file.")
AGREEMENT = flags.DEFINE_bool("agreement", False, "Print how far annotators agree.")
ANNOTATORS = flags.DEFINE_list("annotators", [], "For --agreement and --written: these alone.")

HELP = __doc__.split("What you type:\n")[1].split("Ratings and answers")[0].rstrip()
COMMANDS = ("rate", "better", "demo", "skip", "undo", "show", "help", "quit")
_RANKING = re.compile(r"\s*\d+(\s*[>=]\s*\d+)*\s*")


def read_ranking(text: str, count: int) -> list[list[int]]:
    """`2 > 1 = 3` as [[2], [1, 3]]: each number from 1 to `count` once, or `UserError`."""
    if not _RANKING.fullmatch(text):
        raise UserError(f"a ranking is written like 2 > 1 = 3, got {printable(text)[:60]!r}")
    tiers = [[int(n) for n in tier.split("=")] for tier in text.split(">")]
    ranked = [n for tier in tiers for n in tier]
    if wrong := [n for n in ranked if not 1 <= n <= count]:
        raise UserError(f"there is no response {wrong[0]}: they are 1 to {count}")
    if twice := [n for n in ranked if ranked.count(n) > 1]:
        raise UserError(f"response {twice[0]} is in the ranking more than once")
    if missing := [str(n) for n in range(1, count + 1) if n not in ranked]:
        raise UserError(f"the ranking lacks {', '.join(missing)}: every response is in it once")
    return tiers


# ----------------------------------------------------------------------------------------------------------- the desk
@dataclasses.dataclass
class Desk:
    """A store, who sits at it, and what is to be ranked: prompt -> its responses in the order shown."""

    store: Store
    annotator: str
    seed: int
    criteria: list[str]
    scale: tuple[float, float]
    waiting: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    total: int = 0  # prompts, ranked ones too

    def look(self, first: str | None = None) -> None:
        """Finds what this annotator has not ranked; `first` comes first."""
        responses: dict[str, list[str]] = {}
        for id, r in self.store.records(Response):
            responses.setdefault(r.prompt, []).append(id)
        responses = {p: ids for p, ids in responses.items() if len(ids) >= 2}
        done = {(r.prompt, frozenset(r.shown)) for _, r in self.store.records(Ranking, annotator=self.annotator)}
        left = [p for p, ids in responses.items() if (p, frozenset(ids)) not in done]
        left.sort(key=lambda p: p != first)
        self.total, self.waiting = len(responses), {p: self.shuffled(responses[p]) for p in left}

    def shuffled(self, ids: list[str]) -> list[str]:
        return sorted(ids, key=lambda i: (address("shown", self.seed, self.annotator, i), i))

    @property
    def prompt(self) -> str:
        return next(iter(self.waiting))

    @property
    def shown(self) -> tuple[str, ...]:
        return tuple(self.waiting[self.prompt])


def _part(kind: str, text: str) -> str:
    return LABELS.get(kind, "") + (printable(text) or "(empty)")


def view(desk: Desk) -> str:
    """The prompt and its responses, with nothing that a terminal would obey."""
    lines = [f"--- {desk.total - len(desk.waiting) + 1} of {desk.total} ---"]
    for m in desk.store.get(desk.prompt).conversation.messages:
        lines += [f"[{m.role}]", *(_part(p.kind, p.text) for p in m.parts)]
    for n, id in enumerate(desk.shown, 1):
        message = desk.store.get(id).message
        lines += ["", f"({n})", *([_part(p.kind, p.text) for p in message.parts] or ["(empty)"])]
    return "\n".join([*lines, ""])


def _rate(desk: Desk, words: str) -> None:
    found = re.fullmatch(r"(\d+)\s+(\S+)\s+(\S+)", words)
    if found is None:
        raise UserError(f"a rating is written like: rate 2 {desk.criteria[0]} {desk.scale[1]:g}")
    number, criterion, value = int(found[1]), found[2], _number(found[3], "a rating")
    if not 1 <= number <= len(desk.shown):
        raise UserError(f"there is no response {number}: they are 1 to {len(desk.shown)}")
    if criterion not in desk.criteria:
        raise UserError(f"unknown criterion {printable(criterion)!r}; {nearest(criterion, desk.criteria)}")
    desk.store.add(Rating(desk.shown[number - 1], criterion, value, desk.scale, desk.annotator))


def _undo(desk: Desk) -> None:
    said = list(desk.store.records(Ranking, Rating, Alternative, Demonstration, annotator=desk.annotator))
    if not said:
        raise UserError("there is nothing to undo")
    id, record = said[-1]
    desk.store.add(Retraction(id, desk.annotator))
    desk.look(desk.store.get(record.response).prompt if isinstance(record, Rating) else record.prompt)
    print(f"taken back: the last {type(record).__name__.lower()}")


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{what} is a number, got {printable(text)!r}") from None


def obey(desk: Desk, line: str, more: Callable[[], str]) -> bool:
    """Does what a line says; True when another prompt, or the same one anew, is to be shown. more: reads on."""
    word, _, rest = line.partition(" ")
    if line[0].isdigit():
        tiers = read_ranking(line, len(desk.shown))
        ids = tuple(tuple(desk.shown[n - 1] for n in tier) for tier in tiers)
        desk.store.add(Ranking(desk.prompt, desk.shown, ids, desk.annotator, {"seed": desk.seed}))
        del desk.waiting[desk.prompt]
        return True
    if word not in COMMANDS:
        raise UserError(f"unknown {printable(word)!r}; {nearest(word, COMMANDS)}, or a ranking like 2 > 1 = 3")
    if word == "rate":
        _rate(desk, rest.strip())
    elif word in ("better", "demo"):
        message = Message("assistant", rest.strip() or more())
        if word == "better":
            desk.store.add(Alternative(desk.prompt, message, desk.shown, desk.annotator))
        else:
            desk.store.add(Demonstration(desk.prompt, message, desk.annotator))
        print("kept")
    elif word == "undo":
        _undo(desk)
    elif word == "skip":
        del desk.waiting[desk.prompt]
        desk.total -= 1
    elif word == "help":
        print(HELP)
    return word in ("skip", "undo", "show")


# ----------------------------------------------------------------------------------------------------------- the loop
def work(desk: Desk, interactive: bool) -> None:
    desk.look()
    given = common.typed(interactive)

    def more() -> str:
        if interactive:
            print("(your answer; a line with a dot alone ends it)")
        out = []
        for line in given:
            if line.strip() == ".":
                return "\n".join(out)
            out.append(line.rstrip("\n"))
        raise UserError("the answer has no end: a line with a dot alone is missing")

    show, ranked = True, 0
    while desk.waiting:
        if show:
            print(view(desk), flush=True)
            show = False
        line = next(given, "quit").strip()
        if line == "quit":
            break
        left = len(desk.waiting)
        try:
            show = bool(line) and obey(desk, line, more)
        except UserError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
        ranked += len(desk.waiting) < left and line != "skip"
    if not desk.total:
        print("no prompt in the store has two responses; launch.collect puts some there")
    elif not desk.waiting:
        print("nothing is left to rank")
    print(f"{ranked} ranked")


def bring_in(store: Store, path: str) -> str:
    if is_hh(path):
        counts = Kept()
        store.add(*(r for p in read_hh(path, counts) for r in as_records(p, "hh")))
        return f"pairs: {counts}"
    rejects = Rejects(MAX_BAD_FRACTION)
    done = store.import_jsonl(path, rejects)
    bad = f", {done.rejected} lines left out, such as {rejects.examples[0]}" if done.rejected else ""
    return f"{done.new} new records, {done.known} were there{bad}"


def agreed(store: Store, annotators: list[str] | None) -> str:
    ratings = agreement.of_ratings(store, annotators)
    try:
        rankings = agreement.of_rankings(store, annotators)
    except UserError:
        if not ratings:
            raise
        rankings = None
    return agreement.table(rankings, ratings)


def main() -> int:
    if STORE.value is None:
        raise UserError("--store=FILE is missing: the feedback store")
    files = IMPORT.value, AGREEMENT.value or None, EXPORT.value, WRITTEN.value
    only = ANNOTATORS.value or None
    scale = tuple(_number(x, "an end of --rating_scale") for x in SCALE.value)
    if len(scale) != 2 or not scale[0] < scale[1]:
        raise UserError("--rating_scale is two numbers, the lower first, such as --rating_scale=1,7")
    if files == (None,) * 4 and ANNOTATOR.value is None:
        raise UserError("--annotator=NAME is missing: who ranks (or give --import, --export, --written or --agreement)")
    if not CRITERIA.value:
        raise UserError("--criteria must name at least one")
    if IMPORT.value is not None and not storage.path(IMPORT.value).is_file():
        raise UserError(f"--import: no such file: {IMPORT.value}")
    written = [os.path.realpath(f.value) for f in (STORE, EXPORT, WRITTEN) if f.value is not None]
    if len(set(written)) < len(written):
        raise UserError("--store, --export and --written are files of their own: one would be written over another")
    with Store(STORE.value, create=IMPORT.value is not None) as store:
        if IMPORT.value is not None:
            print(bring_in(store, IMPORT.value))
        if AGREEMENT.value:
            print(agreed(store, only))
        if WRITTEN.value is not None:
            found = written_answers(store, only)
            write_lessons(WRITTEN.value, found)
            print(f"{len(found)} conversations in {WRITTEN.value}")
        if EXPORT.value is not None:
            print(f"{store.export_jsonl(EXPORT.value)} records in {EXPORT.value}")
        if files == (None,) * 4:
            work(Desk(store, ANNOTATOR.value, SEED.value, CRITERIA.value, scale), sys.stdin.isatty())
    return 0


if __name__ == "__main__":
    common.run(main)
