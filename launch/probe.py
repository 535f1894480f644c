"""Finds out what a chat model knows: asks each question several times, judges the answers, and says what is known.

usage:
  python -m launch.probe --workdir=RUN --out=DIR                       about the world that the run was trained on
  python -m launch.probe --workdir=RUN --out=DIR --questions=FILE      {"question": ..., "answer": ...} a line of JSONL
  python -m launch.probe --workdir=RUN --out=DIR --passages=PATH       the model writes the questions, from any text

Each question is asked --k times at --temperature and once greedily. known: at least --known of the samples are right.
unknown: at most --unknown of them are, and the greedy answer is wrong. The rest is unstable. Of a world's facts,
"often" and "once" say how often pretraining told them; "withheld" were told nowhere, of people who are mentioned;
"stranger" are of people who are not. Coverage is the share of right answers. Where refusing is the right thing,
"abstained" is what one wants to see.

Texts are cut into passages that leave the model room to write. Questions from them are kept only when the model answers
them right with the passage at hand. --open_book asks everything a second time with the text that tells the answer
before the question: can it read, where it cannot recall? --judge=RUN2 lets another run's model compare answers with the
truth; otherwise they must be equal to it.

To teach a model to say that it does not know: probe it on one side, fine-tune on what comes out, probe the other side
before and after. Where the conversations of its training left people aside (`part` of WorldConversations), it is they
whom --split=train asks about: those whom it was asked about again and again it knows too well to learn from.
  python -m launch.probe --workdir=runs/sft --out=runs/p/train --split=train --lessons=runs/p/lessons.jsonl
  python -m launch.train --experiment=sft_tiny --set=parent=runs/sft --workdir=runs/idk \\
      --set='data.sources=Messages(path="runs/p/lessons.jsonl")' --set=objective.doubt=1
  python -m launch.probe --workdir=runs/sft --out=runs/p/before
  python -m launch.probe --workdir=runs/idk --out=runs/p/after --before=runs/p/before --dev=runs/p/train
objective.doubt teaches to break off thoughts that the model itself is unsure of; lessons alone are learned by heart.
Lessons keep right answers to known questions, hedge the right one of unstable ones, and refuse the unknown; at most
--known_per_unknown and --unstable_per_unknown times as many of the first two as of the last. The last line compares
with the probe before, and with refusing below a threshold, chosen on --dev, on how sure the model is of its answer: the
log-probability of the whole reply, per token of it, of what is answered after the thought, of the reply's least likely
token; and the share of samples that agree.

In --out: probed.jsonl (and open.jsonl, questions.jsonl) with every answer, summary.json, reliability.png, and
risk_coverage.png where there are unknown facts. Exit codes: 0 done; 2 bad input.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import sources
from jaxlm.data.conversation import Conversation, prompt_ids
from jaxlm.data.world import talk
from jaxlm.data.world.corpus import world_tables
from jaxlm.data.world.people import Tables
from jaxlm.data.world.questions import EVERYBODY, Question
from jaxlm.feedback import measures, written
from jaxlm.feedback import probe as probing
from jaxlm.feedback.judge import Ask, Counts, Judge, asked, by_model, by_truth
from jaxlm.feedback.lessons import Balance, lessons, write_lessons
from jaxlm.feedback.probe import Probed, Thresholds, probe, read_probed, write_probed
from jaxlm.run import probe_plots
from jaxlm.run.load import Run, load_run
from jaxlm.run.train import use_compilation_cache
from jaxlm.run.world_tasks import find_world
from jaxlm.sample.chat import reply
from jaxlm.sample.engine import Sampling
from jaxlm.tools.search import PASSAGE, passages
from launch import common

SLOTS = 64  # how many replies are decoded at once
SHORTEST = PASSAGE // 8  # characters of a passage that is cut no further, even if the model has no room for it

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that was fine-tuned on conversations.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one when not given.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "Folder for the answers and the summary.")
K = flags.DEFINE_integer("k", 8, "Samples of each question, beside the greedy answer.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of the samples.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "End an answer after this many tokens.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the samples, the choice of questions, and the lessons.", lower_bound=0)
QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file of questions with their answers.")
PASSAGES = flags.DEFINE_string("passages", None, "Text to write questions from: file, folder or glob.")
PER_PASSAGE = flags.DEFINE_integer("per_passage", 3, "Questions to ask for, from each passage.", lower_bound=1)
SPLIT = flags.DEFINE_enum("split", "heldout", ["train", "heldout"], "Which side of the world's people to ask about.")
PER_GROUP = flags.DEFINE_integer("per_group", 200, "Questions of each group of the world's facts, at most.", 1)
OPEN_BOOK = flags.DEFINE_bool("open_book", False, "Ask again with the text that tells the answer.")
JUDGE = flags.DEFINE_string("judge", None, "Folder of a run whose model judges what is not equal to the truth.")
KNOWN = flags.DEFINE_float("known", 0.75, "Known: at least this share of the samples is right.")
UNKNOWN = flags.DEFINE_float("unknown", 0.1, "Unknown: at most this share is.")
LESSONS = flags.DEFINE_string("lessons", None, "Write conversations that teach what this probe shows to this file.")
KNOWN_PER_UNKNOWN = flags.DEFINE_float("known_per_unknown", 2.0, "Lessons of known facts for one of an unknown.")
UNSTABLE_PER_UNKNOWN = flags.DEFINE_float("unstable_per_unknown", 1.0, "Lessons of unstable facts for one unknown.")
BEFORE = flags.DEFINE_string("before", None, "--out of an earlier probe with the same questions, to compare with.")
DEV = flags.DEFINE_string("dev", None, "--out of a probe of other questions before training, for the threshold.")
MOST_LOST = flags.DEFINE_float("most_lost", 0.03, "Coverage that the threshold may cost on --dev, as a share.", 0, 1)


# -------------------------------------------------------------------------------------------------------- questions
def questions_of_world(run: Run) -> tuple[Tables, list[Question]]:
    """The world that a run was trained on, and questions about people of whom no conversation was, if it left any."""
    try:
        talks = find_world(run.experiment)
    except UserError:
        message = f"{run.workdir} was not trained on a World: give --questions=FILE or --passages=PATH"
        raise UserError(message) from None
    tables, end = world_tables(talks.world), talks.part[1]
    part = (end, 1.0) if end < 1 else EVERYBODY
    return tables, probing.world_questions(tables, SPLIT.value, PER_GROUP.value, SEED.value, part=part)


def fits(run: Run, prompt: Conversation, tokens: int) -> bool:
    """Whether a prompt and a reply of so many tokens stay within the trained context."""
    return len(prompt_ids(prompt, run.tokenizer)) + tokens <= run.experiment.data.context


def fitting(run: Run, questions: list[Question], what: str) -> list[Question]:
    """Those that leave room for an answer in the trained context; says how many do not."""
    context = run.experiment.data.context
    kept = [q for q in questions if fits(run, asked(q.text, q.system), MAX_TOKENS.value)]
    if len(kept) < len(questions):
        print(f"note: {len(questions) - len(kept)} of {len(questions)} {what} do not fit the context of {context}")
    return kept


def writing(run: Run) -> Sampling:
    """How questions are written: in half of a short context at most, which leaves the other half for the passage."""
    most = run.experiment.data.context // 2
    return dataclasses.replace(written.WRITING, max_tokens=min(written.WRITING.max_tokens, most))


def pieces(run: Run, text: str, size: int = PASSAGE) -> Iterator[str]:
    """A text cut into passages, which are cut again where the model has no room to write questions about them."""
    for piece in passages(text, size):
        prompt = asked(written.ASK_FOR_QUESTIONS.format(count=PER_PASSAGE.value, passage=piece))
        if size <= SHORTEST or fits(run, prompt, writing(run).max_tokens):
            yield piece
        else:
            yield from pieces(run, piece, size // 2)


def material(run: Run, ask: Ask, name: str, judge: Judge, out):
    """(questions, the same with their text, the world's tables or None, what was filtered or None)"""
    if QUESTIONS.value is not None:
        if OPEN_BOOK.value:
            raise UserError("--open_book needs a world or --passages: a file of questions has no text to read")
        return probing.read_questions(QUESTIONS.value), [], None, None
    if PASSAGES.value is None:
        tables, questions = questions_of_world(run)
        return questions, [talk.open_book(tables, q) for q in questions], tables, None
    counts = written.Filtered()
    found = sources.documents(sources.Files(PASSAGES.value))
    texts = [(f"{d.id}#{n}", text) for d in found for n, text in enumerate(pieces(run, d.text))]
    made = written.questions_from(
        *(ask, texts, name, PER_PASSAGE.value),
        seed=SEED.value,
        judge=judge,
        counts=counts,
        writing=writing(run),
        fits=functools.partial(fits, run),
    )
    rejected = ", ".join(f"{reason} {n}" for reason, n in counts.rejected.most_common()) or "none"
    print(f"{counts.written} questions written, {counts.kept} kept; rejected: {rejected}")
    if not made:
        raise UserError(f"the model wrote no question from {PASSAGES.value} that it answers with the text at hand")
    lines = [json.dumps(r, ensure_ascii=False) for r in written.question_records(made)]
    storage.write_text(out / "questions.jsonl", "\n".join(lines) + "\n")
    return [w.question for w in made], [written.open_book(w) for w in made], None, counts


# ----------------------------------------------------------------------------------------------------------- tables
def _percent(estimate: dict | None) -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate['value']:.1f} ({100 * estimate['low']:.1f}..{100 * estimate['high']:.1f})"


def _aligned(rows: list[tuple]) -> str:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(str(c).ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)


def summary_table(name: str, found: dict) -> str:
    rows = [(name, "n", "right %", "wrong %", "abstained %", "hedged %", "known/unstable/unknown")]
    for group, rates in found["groups"].items():
        cells = [_percent(rates[r]) for r in ("right", "wrong", "abstained", "hedged")]
        rows.append((group, rates["right"]["n"], *cells, "/".join(str(n) for n in rates["classes"].values())))
    lines = [_aligned(rows)]
    for confidence, c in found["calibration"].items():
        if c is not None:
            auroc = "-" if c["auroc"] is None else f"{c['auroc']:.3f}"
            lines.append(f"{confidence} as confidence: calibration error {c['ece']:.3f}, AUROC {auroc}")
    if found["unfinished"]:
        lines.append(f"{found['unfinished']} answers ran into --max_tokens")
    return "\n".join(lines)


def comparison_table(name: str, found: dict) -> str:
    rows = [(name, "n", "before %", "after %", "")]
    for kind in ("known", "unknown"):
        for group, c in {**found[kind], **{f"class {k}": v for k, v in found["classes"].items()}}.items():
            if ("lost" in c) != (kind == "known"):
                continue
            if kind == "known":
                lost = c["lost"]
                change = f"{100 * lost['value']:.1f} points lost ({100 * lost['low']:.1f}..{100 * lost['high']:.1f})"
            elif c["factor"] is None:
                change = f"none wrong any more: a fall of {c['factor_low']:.1f}x at least"
            else:
                change = f"{c['factor']:.1f}x fewer wrong ({c['factor_low']:.1f}x at least)"
            outcome = "right" if kind == "known" else "wrong"
            rows.append((f"{group}, {outcome}", c["before"]["n"], _percent(c["before"]), _percent(c["after"]), change))
    return _aligned(rows)


# ------------------------------------------------------------------------------------------------------------- main
def _drawn(out, found: dict, probed: list[Probed], before: list[Probed] | None, thresholds: Thresholds) -> None:
    shown = {f"{name} {confidence}": c for name, s in found.items() for confidence, c in s["calibration"].items()}
    probe_plots.reliability(shown, out / "reliability.png")
    asked_first = before or probed
    first = measures.summary(asked_first, thresholds)
    if first["coverage"] and first["wrong_on_unknown"]:
        curves = {s: measures.curve(asked_first, s, thresholds) for s in measures.scores_of(asked_first)}
        points = {}
        if before is not None:
            after = measures.summary(probed, thresholds)
            points["fine-tuned"] = (after["coverage"]["value"], after["wrong_on_unknown"]["value"])
        probe_plots.risk_coverage(curves, out / "risk_coverage.png", points)


def main() -> int:
    if WORKDIR.value is None or OUT.value is None:
        raise UserError("--workdir=RUN and --out=DIR are needed: the run to probe, and where to write what it knows")
    if QUESTIONS.value is not None and PASSAGES.value is not None:
        raise UserError("give --questions or --passages, not both")
    if DEV.value is not None and BEFORE.value is None:
        raise UserError("--dev chooses a threshold for the answers of --before=DIR, which is not given")
    thresholds = Thresholds(KNOWN.value, UNKNOWN.value)
    balance = Balance(KNOWN_PER_UNKNOWN.value, UNSTABLE_PER_UNKNOWN.value)
    sampling = Sampling(temperature=TEMPERATURE.value, max_tokens=MAX_TOKENS.value, seed=SEED.value)
    before = None if BEFORE.value is None else read_probed(storage.path(BEFORE.value) / "probed.jsonl")
    dev = None if DEV.value is None else read_probed(storage.path(DEV.value) / "probed.jsonl")
    use_compilation_cache()
    run = load_run(WORKDIR.value, STEP.value)
    ask = functools.partial(reply, run.model, run.params, run.tokenizer, slots=SLOTS)
    counts, judge = Counts(), by_truth
    if JUDGE.value is not None:
        other = load_run(JUDGE.value)
        judge = by_model(
            functools.partial(reply, other.model, other.params, other.tokenizer, slots=SLOTS), counts=counts
        )
    out, name = storage.make_dir(OUT.value), f"{run.workdir}@{run.step}"

    questions, opened, tables, filtered = material(run, ask, name, judge, out)
    questions = fitting(run, questions, "questions")
    if not questions:
        raise UserError("there is no question to ask")
    if before is not None and {q.id for q in questions} != {p.question.id for p in before}:
        raise UserError(f"--before={BEFORE.value} asked other questions: give the same --split, --per_group and --seed")

    probed = probe(ask, questions, K.value, sampling, judge)
    write_probed(out / "probed.jsonl", probed)
    found = {"closed book": measures.summary(probed, thresholds)}
    if OPEN_BOOK.value and (opened := fitting(run, opened, "questions with their text")):
        read = probe(ask, opened, K.value, sampling, judge)
        write_probed(out / "open.jsonl", read)
        found["open book"] = measures.summary(read, thresholds)
    results = {"schema_version": probing.SCHEMA_VERSION, "model": name, "seed": SEED.value, **found}
    if JUDGE.value is not None:
        results["judge"] = {"model": JUDGE.value} | vars(counts)
    if filtered is not None:
        results["filters"] = vars(filtered)
    print("\n\n".join(summary_table(book, s) for book, s in found.items()))
    if counts.malformed:
        print(f"{counts.malformed} of {counts.asked} verdicts of the judge were neither yes nor no")

    if before is not None:
        results["compared"] = measures.compare(before, probed, thresholds)
        print(f"\n{comparison_table('after', results['compared'])}")
    if dev is not None:
        results["baseline"] = {
            score: measures.threshold_baseline(dev, before, MOST_LOST.value, score, thresholds)
            for score in measures.scores_of([*dev, *before])
        }
        for score, baseline in results["baseline"].items():
            print(f"\n{comparison_table(f'threshold on {score}', baseline['test'])}")
    if LESSONS.value is not None:
        made = lessons(probed, name, thresholds, balance, SEED.value, tables)
        write_lessons(LESSONS.value, made)
        print(f"\n{len(made)} conversations in {LESSONS.value}")
    storage.write_json(out / "summary.json", results)
    _drawn(out, found, probed, before, thresholds)
    print(f"\nevery answer: {out}")
    return 0


if __name__ == "__main__":
    common.run(main)
