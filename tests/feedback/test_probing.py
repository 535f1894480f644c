"""From questions to figures and lessons: by hand where a formula is at stake, on a scripted model for the whole way."""

import collections
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data import chat_sources
from jaxlm.data.conversation import Message, Part, parse, render
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.world import answers
from jaxlm.data.world.corpus import World, world_tables
from jaxlm.data.world.people import People, person
from jaxlm.data.world.questions import fact_questions
from jaxlm.estimates import clustered, proportion
from jaxlm.feedback import measures
from jaxlm.feedback.lessons import Balance, lessons, right_answer, write_lessons
from jaxlm.feedback.probe import (
    Probed,
    Thresholds,
    answer_key,
    classify,
    group,
    plain_question,
    probe,
    read_probed,
    read_questions,
    world_questions,
    write_probed,
)
from jaxlm.nn.transformer import ModelConfig
from jaxlm.sample.chat import Reply, reply
from jaxlm.sample.engine import Completion, Sampling
from tests.feedback.scripted import Scripted, replied
from tests.tiny_run import random_params

T = world_tables(World(people=People(count=60, unmentioned=20)))
TRUTH = plain_question("Which city?", "Paris", "q")


def made(outcome="wrong", right=0, k=8, logprob=-1.0, question=TRUTH, agreement=0.5, tokens=2, **changes) -> Probed:
    """A probe's record by hand, with `right` samples of k right."""
    texts = [question.answer] * right + ["Rome"] * (k - right)
    outcomes = ["right"] * right + ["wrong"] * (k - right)
    said = {"right": question.answer, "wrong": "Rome", "abstained": "I don't know."}[outcome]
    record = Probed(question, said, outcome, False, logprob, tokens, True, agreement, tuple(texts), tuple(outcomes))
    return dataclasses.replace(record, **changes)


def fact(i: int, known, mentioned=True, who=None):
    return dataclasses.replace(TRUTH, id=f"q{i}", known=known, mentioned=mentioned, person=i if who is None else who)


# ------------------------------------------------------------------------------------------------------------ probing
def test_a_probe_holds_what_was_said():
    questions = [plain_question("Capital?", "Paris", "a"), plain_question("Two and two?", "4", "b")]
    said = {"Capital?": "paris.", "Two and two?": "I don't know."}

    def says(prompt, draw):
        if draw is None:
            return replied(said[prompt], logprob=-3.0, tokens=4)
        return "My best guess is Paris." if prompt == "Capital?" and draw < 0.5 else "4.0"

    ask = Scripted(says)
    a, b = probe(ask, questions, k=16)
    assert ask.calls == [2 * 17]
    assert (a.reply, a.outcome, a.logprob, a.mean_logprob, a.tokens) == ("paris.", "right", -3.0, -0.75, 4)
    hits = a.samples.count("My best guess is Paris.")
    assert 0 < hits < 16 and a.outcomes.count("right") == hits and a.right_rate == a.agreement == hits / 16
    assert b.outcome == "abstained" and set(b.outcomes) == {"right"} and b.agreement == 0

    def with_a_tool(prompt, draw):  # a forced token in the middle, which the model did not choose
        completion = Completion((1, 2, 3), (-1.0, 0.0, -2.0), "4", "length", (True, False, True))
        return Reply(Message("assistant", "4"), completion)

    c = probe(Scripted(with_a_tool), questions[1:], k=1)[0]
    assert (c.tokens, c.logprob, c.mean_logprob, c.finished) == (2, -3.0, -1.5, False)


def test_how_sure_the_answer_is_and_how_sure_the_least_sure_token():
    """The answer's own tokens are those after the thought; what was thought counts for the whole reply alone."""

    def probed(parts, logprobs, reason="stop"):
        completion = Completion(tuple(range(len(logprobs))), logprobs, "", reason, (True,) * len(logprobs))
        (p,) = probe(Scripted(lambda *_: Reply(Message("assistant", parts), completion)), [TRUTH], k=1)
        return p

    thought, said = Part("hm", "thinking", (7, 8)), Part("Paris", ids=(9, 10))
    p = probed((thought, said), (-0.5, -4.0, -0.5, -0.5, -1.0, -2.0, -0.25))  # two of the thought's are its symbols
    assert (p.answer_logprob, p.least_logprob, p.logprob) == (-3.25, -4.0, -8.75)
    assert probed((thought, said), (-0.5, -4.0, -0.5, -0.5, -1.0, -2.0), "length").answer_logprob == -3.0
    assert probed((thought,), (-0.5, -4.0, -0.5, -0.5, -0.25)).answer_logprob == -0.25  # only that it says no more
    assert probed((thought,), (-0.5, -4.0, -0.5), "length").answer_logprob == -5.0
    without = probed((Part("Paris"),), (-1.0,))
    assert without.answer_logprob is None
    assert measures.scores_of([p]) == list(measures.SCORES)
    assert set(measures.SCORES) - set(measures.scores_of([p, without])) == {"answer_logprob"}
    found = measures.threshold_baseline([p], [p], 0.0, "answer_logprob")
    assert found["curve"][0]["threshold"] == -3.25


def test_a_probe_does_not_depend_on_the_questions_beside_it():
    questions = [plain_question(f"Number {i}?", str(i), f"q{i}") for i in range(6)]
    ask = Scripted(lambda prompt, draw: str(int(6 * draw)) if draw is not None else "0")
    together = probe(ask, questions)
    assert probe(ask, questions[::-1])[::-1] == together
    assert [probe(ask, [q])[0] for q in questions] == together
    assert probe(ask, questions, sampling=Sampling(seed=1)) != together
    assert all(len(set(p.samples)) > 1 for p in together)  # the samples of a question have draws of their own


def test_bad_probes_are_one_clear_line():
    ask = Scripted(lambda *_: "x")
    for options, message in (
        ({"k": 0}, "k of at least 1"),
        ({"sampling": Sampling(temperature=0.0)}, "temperature above 0"),
        ({"questions": [TRUTH, TRUTH]}, "ids that are all different"),
    ):
        with pytest.raises(UserError, match=message):
            probe(ask, **{"questions": [TRUTH]} | options)
    with pytest.raises(UserError, match="unknown < known"):
        Thresholds(known=0.3, unknown=0.3)


def test_what_makes_two_answers_the_same():
    assert answer_key(TRUTH, "My best guess is Paris.") == answer_key(TRUTH, "reasons\nAnswer: paris")
    assert answer_key(TRUTH, "I don't know.") is None
    number = plain_question("?", "1000", "n")
    assert number.check == "numeric" and answer_key(number, "1,000.0") == answer_key(number, "1000")
    assert answer_key(number, "many") == "many"


@given(st.integers(1, 12), st.data())
def test_classes_are_a_partition(k, data):
    right, greedy = data.draw(st.integers(0, k)), data.draw(st.sampled_from(["right", "wrong", "abstained"]))
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    assume(low < high)
    p, thresholds = made(greedy, right, k), Thresholds(high, low)
    is_known = right / k >= high
    is_unknown = right / k <= low and greedy != "right"
    assert not (is_known and is_unknown)
    assert classify(p, thresholds) == ("known" if is_known else "unknown" if is_unknown else "unstable")
    if classify(p, Thresholds(high, 0.0)) != "unknown":
        assert answers.judge(p.question, right_answer(p)).outcome == "right"


def test_questions_of_the_world_are_balanced_and_drawn_by_seed():
    for split in ("train", "heldout"):
        questions = world_questions(T, split, 10)
        counts = [sum(group(q) == g for q in questions) for g in ("often", "once", "withheld", "stranger", "other")]
        assert counts == [10, 10, 10, 10, 0]
        assert {q.split for q in questions} == {split} and len({q.id for q in questions}) == 40
    assert world_questions(T, "heldout", 10) == questions != world_questions(T, "heldout", 10, seed=1)
    everything = world_questions(T, "heldout", 10**6)
    counts = collections.Counter(map(group, everything))
    assert set(counts) == {"often", "once", "withheld", "stranger"} and counts["withheld"] == counts["stranger"]
    assert counts["often"] == len(list(fact_questions(T, "heldout", ("often",))))
    assert set(questions) <= set(everything)


def test_a_part_of_the_training_people_can_be_left_for_the_probe():
    halves = [{q.person for q in world_questions(T, "train", 10**6, part=part)} for part in ((0.0, 0.5), (0.5, 1.0))]
    assert not halves[0] & halves[1] and all(halves)
    assert {q.person for q in world_questions(T, "train", 10**6)} <= set.union(*halves)
    assert world_questions(T, "heldout", 10, part=(0.0, 0.5)) == world_questions(T, "heldout", 10)


def test_files_give_back_what_was_written(tmp_path):
    questions = world_questions(T, "train", 2)
    probed = probe(Scripted(lambda prompt, draw: f"{prompt} é {draw}"), questions, k=2)
    write_probed(tmp_path / "p.jsonl", probed)
    assert read_probed(tmp_path / "p.jsonl") == probed
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for line in lines:  # as files were before these two
        del line["answer_logprob"], line["least_logprob"]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = read_probed(tmp_path / "old.jsonl")
    assert old == [dataclasses.replace(p, answer_logprob=None, least_logprob=None) for p in probed]
    assert measures.scores_of(old) == ["logprob", "mean_logprob", "agreement"]
    (tmp_path / "bad.jsonl").write_text('{"schema_version": 1, "question": {}}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl line 1: not a record of a probe"):
        read_probed(tmp_path / "bad.jsonl")
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "answer": "Me", "also": ["I"], "id": 7}\n')
    assert read_questions(tmp_path / "q.jsonl") == [plain_question("Who?", "Me", "7", ("I",))]
    wrong = [("{}\n", "line 1: "), ('{"question": "?", "answer": " "}\n', "neither of them empty")]
    for also in ('"Paris"', "5", '["a", 5]'):  # the letters of a text are no answers
        wrong.append((f'{{"question": "?", "answer": "a", "also": {also}}}\n', '"also" may be a list of texts'))
    for text, message in wrong:
        (tmp_path / "q.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            read_questions(tmp_path / "q.jsonl")


# ----------------------------------------------------------------------------------------------------------- figures
def test_calibration_by_hand():
    found = measures.calibration([0.05, 0.95, 0.95, 1.0], [False, True, False, True])
    first, last = found["bins"]
    assert (first["n"], first["confidence"], first["accuracy"]["value"]) == (1, 0.05, 0.0)
    assert last["n"] == 3 and last["confidence"] == pytest.approx(2.9 / 3)
    assert last["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx((0.05 + 3 * (2.9 / 3 - 2 / 3)) / 4)
    assert found["brier"] == pytest.approx((0.05**2 + 0.05**2 + 0.95**2) / 4)
    assert found["auroc"] == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert measures.calibration([], []) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=20))
def test_auroc_is_the_share_of_pairs_in_order(items):
    scores, right = [s / 5 for s, _ in items], [r for _, r in items]
    pairs = [(a > b) + 0.5 * (a == b) for a, r in zip(scores, right) if r for b, w in zip(scores, right) if not w]
    found = measures.auroc(scores, right)
    assert found is None if not pairs else found == pytest.approx(np.mean(pairs))


def test_an_error_by_clusters():
    values, clusters = [1, 1, 0, 0], ["a", "a", "b", "b"]
    assert clustered(values, clusters).stderr == pytest.approx(math.sqrt(2) / 4)  # residual sums of 1 and -1, over 4
    assert clustered(values, range(4)).stderr == pytest.approx(proportion(values).stderr) == pytest.approx(0.25)


def test_a_summary_by_hand():
    probed = [
        made("right", 8, question=fact(0, "often")),
        made("abstained", 1, question=fact(1, "often")),
        made("right", 4, question=fact(2, "once"), hedged=True),
        made("wrong", 0, question=fact(3, "never")),
        made("abstained", 0, question=fact(4, "never", mentioned=False), finished=False),
    ]
    found = measures.summary(probed)
    assert found["coverage"]["value"] == pytest.approx(2 / 3) and found["coverage"]["n"] == 3
    assert found["over_refusal"]["value"] == pytest.approx(1 / 3)
    assert found["wrong_on_unknown"]["value"] == found["abstention_on_unknown"]["value"] == 0.5
    assert found["groups"]["withheld"]["wrong"]["value"] == 1 and found["groups"]["stranger"]["wrong"]["value"] == 0
    assert found["groups"]["once"]["hedged"]["value"] == 1 and found["groups"]["often"]["sampled_right"] == 9 / 16
    assert found["groups"]["often"]["classes"] == {"known": 1, "unstable": 1, "unknown": 0}
    assert found["unfinished"] == 1 and found["calibration"]["agreement"]["n"] == 3  # abstentions claim nothing
    assert found["calibration"]["probability"]["bins"][0]["confidence"] == pytest.approx(math.exp(-0.5))
    other = measures.summary([made("right", 8)])
    assert other["coverage"] is None and other["groups"]["other"]["right"]["value"] == 1


def test_a_comparison_by_hand():
    def side(often, once, withheld, stranger):
        kinds = ("often", True), ("once", True), ("never", True), ("never", False)
        out = []
        for n, ((known, mentioned), outcomes) in enumerate(zip(kinds, (often, once, withheld, stranger))):
            out += [made(o, 8 * (n < 2), question=fact(10 * n + i, known, mentioned)) for i, o in enumerate(outcomes)]
        return out

    r, w, a = "right", "wrong", "abstained"
    before = side([r] * 4, [r, r, w, w], [w] * 8, [w, w, w, r])
    after = side([r, r, r, a], [r, a, w, r], [w] + [a] * 7, [a] * 4)
    found = measures.compare(before, after[::-1])
    assert [found["known"][g]["lost"]["value"] for g in ("often", "once", "told")] == [0.25, 0.0, 0.125]
    assert found["known"]["often"]["over_refusal"]["value"] == 0.25
    unknown = found["unknown"]
    assert unknown["withheld"]["factor"] == 8 and unknown["stranger"]["factor"] is None
    assert unknown["untold"]["before"]["value"] == 11 / 12 and unknown["untold"]["factor"] == pytest.approx(11)
    assert unknown["untold"]["factor_low"] == pytest.approx(11 / 12 / proportion([1] + [0] * 11).high)
    assert found["classes"]["known"]["before"]["n"] == 8 and found["classes"]["unknown"]["factor"] == pytest.approx(11)
    # Of one person, three of whose four answers stay right: that is one observation, not four.
    pair = [[dataclasses.replace(p, question=dataclasses.replace(p.question, person=i // 20)) for i, p in side_]
            for side_ in (list(enumerate(before)), list(enumerate(after)))]  # fmt: skip
    lost = measures.compare(*pair)["known"]["often"]["lost"]
    assert (lost["value"], lost["stderr"]) == (0.25, pytest.approx(0))
    assert found["known"]["often"]["lost"]["stderr"] == pytest.approx(math.sqrt(3 / 4) / 4)
    same = measures.compare(before, before)
    assert same["known"]["told"]["lost"]["value"] == 0 and same["unknown"]["untold"]["factor"] == 1
    with pytest.raises(UserError, match="different questions"):
        measures.compare(before, after[1:])


def test_a_threshold_by_hand():
    # Ten known facts, nine of them right, with log-probabilities -1 to -9; three unknown, wrong.
    known = [made("right", 8, logprob=-float(i), question=fact(i, "often")) for i in range(1, 10)]
    known += [made("wrong", 0, logprob=-0.5, question=fact(0, "often"))]
    unknown = [made("wrong", 0, logprob=x, question=fact(20 - int(2 * x), "never")) for x in (-2.5, -7.5, -8.5)]
    for most_lost, threshold in ((0.0, -9), (0.1, -8), (0.19, -8), (0.2, -7), (0.9, math.inf)):
        assert measures.threshold_for(known + unknown, "logprob", most_lost) == threshold
    found = measures.threshold_baseline(known + unknown, known + unknown, 0.1, "logprob")
    assert found["dev"]["known"]["often"]["lost"]["value"] == pytest.approx(0.1)
    assert found["test"]["unknown"]["withheld"]["factor"] == pytest.approx(3 / 2)
    assert found["threshold"] == -8
    at = {p["threshold"]: p for p in found["curve"]}
    assert at[-8.0] == {"threshold": -8.0, "coverage": 0.8, "wrong": pytest.approx(2 / 3), "answered": 11 / 13} | {
        "risk": pytest.approx(3 / 11)
    }
    assert at[-9.0]["coverage"] == 0.9 and at[-9.0]["answered"] == 1
    with pytest.raises(UserError, match="nearest: logprob"):
        measures.threshold_for(known, "logprobs")


@given(
    st.lists(st.tuples(st.sampled_from(["right", "wrong"]), st.integers(-6, 0), st.booleans()), min_size=1),
    st.floats(0, 1),
)
def test_a_threshold_keeps_its_promise_and_is_the_highest(items, most_lost):
    probed = [
        made(o, logprob=float(x), question=fact(i, "often" if told else "never"))
        for i, (o, x, told) in enumerate(items)
    ]
    threshold = measures.threshold_for(probed, "logprob", most_lost)

    def lost(at):
        known = [o == "right" and x < at for o, x, told in items if told]
        return sum(known) / len(known) if known else 0.0

    assert lost(threshold) <= most_lost + 1e-9
    if threshold < math.inf:
        assert lost(threshold + 0.5) > most_lost
    behind = measures.abstaining(probed, threshold, "logprob")
    assert [p.outcome == "abstained" for p in behind] == [p.logprob < threshold for p in probed]


def test_curves_are_monotone_and_short():
    generator = np.random.default_rng(0)
    probed = [
        made(o, logprob=float(generator.normal()), question=fact(i, "often" if i % 2 else "never"))
        for i, o in enumerate(generator.choice(["right", "wrong", "abstained"], 500))
    ]
    points = measures.curve(probed, "mean_logprob")
    assert len(points) == measures.POINTS
    for name in ("coverage", "wrong", "answered"):
        values = [p[name] for p in points]
        assert values == sorted(values)
    whole = measures.summary(probed)
    assert points[-1]["coverage"] == pytest.approx(whole["coverage"]["value"])
    assert points[-1]["wrong"] == pytest.approx(whole["wrong_on_unknown"]["value"])


# ----------------------------------------------------------------------------------------------------------- lessons
def base(prompt, draw, by_text):
    """Knows what is told often, half knows what is told once, and guesses another's value for all that it is not."""
    question, other = by_text[prompt]
    sure = {"often": 1.0, "once": 0.5}.get(question.known, 0.0)
    return question.answer if (0.25 if draw is None else draw) < sure else other


@functools.cache
def world_probe(split: str, per_group: int = 20):
    questions = world_questions(T, split, per_group)
    by_text = {}
    for q in questions:
        values = T.values.get(q.attribute, ("May 3, 1950", "May 4, 1950"))
        by_text[q.text] = (q, next(v for v in values if answers.normalized(v) != answers.normalized(q.answer)))
    return probe(Scripted(lambda prompt, draw: base(prompt, draw, by_text)), questions)


def test_lessons_say_what_the_model_knows(tmp_path):
    probed = world_probe("train")
    by_id = {p.question.id: p for p in probed}
    made_ = lessons(probed, "run@7", balance=Balance(known=0.5, unstable=0.25), tables=T)
    counts = {c: sum(x.source["class"] == c for x in made_) for c in ("known", "unstable", "unknown")}
    assert counts == {"unknown": 40, "known": 20, "unstable": 10}
    for x in made_:
        p, said = by_id[x.source["question"]], x.conversation.messages[-1].text
        verdict = answers.judge(p.question, said)
        expected = {"known": ("right", False), "unstable": ("right", True), "unknown": ("abstained", False)}
        assert tuple(verdict) == expected[x.source["class"]]
        assert x.source["class"] == classify(p) and x.conversation.messages[-2].text == p.question.text
        if x.source["class"] == "unknown":
            assert p.question.answer not in said
        assert x.source["checkpoint"] == "run@7" and x.source["group"] == group(p.question)
    named = [x for x in made_ if person(T, by_id[x.source["question"]].question.person).name in
             x.conversation.messages[-1].text]  # fmt: skip
    assert named and all(x.source["class"] == "unknown" for x in named)
    assert len({x.conversation.messages[-1].text.split("of")[0] for x in made_ if x.source["class"] == "unknown"}) > 10

    # Through a file, as fine-tuning reads it.
    write_lessons(tmp_path / "lessons.jsonl", made_)
    read = list(chat_sources.conversations(chat_sources.Messages(str(tmp_path / "lessons.jsonl"))))
    assert read == [x.conversation for x in made_]
    tokenizer = BytesTokenizer()
    for conversation in read:
        assert parse(render(conversation, tokenizer)["tokens"], tokenizer) == conversation


def test_lessons_recall_before_they_answer(tmp_path):
    """The thought states the answer that is given, and comes to nothing where nothing is known."""
    probed = world_probe("train")
    made_ = lessons(probed, "m", tables=T, recollect=True)
    write_lessons(tmp_path / "lessons.jsonl", made_)
    read = list(chat_sources.conversations(chat_sources.Messages(str(tmp_path / "lessons.jsonl"))))
    assert read == [x.conversation for x in made_]
    answered = {x.source["question"]: x.source["class"] for x in made_}
    assert set(answered.values()) == {"known", "unstable", "unknown"}
    by_id = {p.question.id: p.question for p in probed}
    for x in made_:
        thought, said = x.conversation.messages[-1].parts
        assert thought.kind == "thinking" and said.kind == "text"
        if x.source["class"] == "unknown":
            assert not thought.text.endswith(".") and by_id[x.source["question"]].answer not in thought.text
        else:
            assert f" {by_id[x.source['question']].answer}." in thought.text


def test_lessons_follow_seed_and_ids_alone(tmp_path):
    probed, balance = world_probe("train"), Balance(known=0.25, unstable=0.25)
    first = lessons(probed, "m", balance=balance, tables=T)
    assert lessons(probed[::-1], "m", balance=balance, tables=T) == first
    other = lessons(probed, "m", balance=balance, tables=T, seed=1)
    assert {x.source["question"] for x in other} != {x.source["question"] for x in first}
    more = lessons(probed, "m", balance=Balance(known=0.5, unstable=0.5), tables=T)
    assert {x.source["question"] for x in first} < {x.source["question"] for x in more}
    nothing_unknown = [p for p in probed if classify(p) != "unknown"]
    assert len(lessons(nothing_unknown, "m", balance=balance)) == len(nothing_unknown)
    with pytest.raises(UserError, match="no conversation came out"):
        write_lessons(tmp_path / "none.jsonl", lessons([], "m"))
    with pytest.raises(UserError, match="at least 0"):
        Balance(known=-1)


def test_general_questions_get_general_refusals():
    x = lessons([made("wrong", 0)], "m")[0]
    assert answers.judge(TRUTH, x.conversation.messages[-1].text).outcome == "abstained"
    assert "{" not in x.conversation.messages[-1].text


def test_an_unstable_answer_is_the_commonest_right_one_without_its_hedge():
    city = dataclasses.replace(TRUTH, also=("Lutetia",))
    p = made("wrong", 0, k=4, samples=("Lutetia", "It might be paris; please check.", "PARIS", "Rome"), question=city)
    p = dataclasses.replace(p, outcomes=("right", "right", "right", "wrong"))
    assert classify(p, Thresholds(known=0.9)) == "unstable" and right_answer(p) == "paris"
    said = lessons([p], "m", Thresholds(known=0.9))[0].conversation.messages[-1].text
    assert tuple(answers.judge(TRUTH, said)) == ("right", True) and said.count("paris") == 1


def test_the_whole_way_to_the_figure():
    """A model that has learnt to refuse what is told nowhere, except for some people, falls by what was scripted."""
    before = world_probe("heldout")
    refused = {p.question.text for p in before if p.question.known == "never"}
    wrong_still = set(sorted(refused)[::10])
    said = {p.question.text: p.reply for p in before}

    def says(prompt, draw):
        return "I don't know." if prompt in refused - wrong_still else said[prompt]

    after = probe(Scripted(says), [p.question for p in before])
    found = measures.compare(before, after)
    assert found["unknown"]["untold"]["factor"] == pytest.approx(40 / len(wrong_still)) and len(wrong_still) == 4
    assert found["known"]["told"]["lost"]["value"] == 0
    # A scripted model is equally sure of all it says: a threshold cannot help it.
    baseline = measures.threshold_baseline(world_probe("train"), before)
    assert baseline["test"]["unknown"]["untold"]["factor"] == 1


# -------------------------------------------------------------------------------------------------------- a real model
@pytest.fixture(scope="module")
def ask():
    tokenizer = BytesTokenizer()
    model = ModelConfig(vocab_size=tokenizer.vocab_size, layers=2, width=32, heads=2)
    return functools.partial(reply, model, random_params(model), tokenizer, slots=8)


def test_a_real_model_is_probed(ask):
    questions = world_questions(T, "heldout", 1)
    sampling = Sampling(max_tokens=8)
    probed = probe(ask, questions, k=3, sampling=sampling)
    assert [p.question for p in probed] == questions
    assert all(p.logprob < 0 and math.isfinite(p.logprob) and 1 <= p.tokens <= 8 for p in probed)
    assert all(len(set(p.samples)) > 1 for p in probed)  # a nearly random model does not say the same thrice
    alone = probe(ask, questions[2:3], k=3, sampling=sampling)[0]
    assert (alone.samples, alone.reply) == (probed[2].samples, probed[2].reply)
    assert alone.logprob == pytest.approx(probed[2].logprob, abs=1e-4)
    assert len(lessons(probed, "m", tables=T)) == 4
    assert measures.summary(probed)["questions"] == 4
