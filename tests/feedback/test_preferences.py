"""From rankings to training data: what may be trained on, what stays together, what a data set's lines must be."""

import collections
import dataclasses
import gzip
import json

import pytest

from jaxlm.config import UserError
from jaxlm.data import chat_sources, preference_sources
from jaxlm.data.chat_sources import Messages
from jaxlm.data.conversation import Conversation, Message, Part, prompt_ids, read_completion, render
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.feedback.lessons import write_lessons
from jaxlm.feedback.preferences import (
    Answer,
    Kept,
    Preference,
    as_records,
    encode,
    encode_each,
    from_store,
    load,
    opening_hash,
    pairs,
    read_hh,
    split,
    written_answers,
)
from jaxlm.feedback.records import Alternative, Demonstration, Prompt, Ranking, Rating, Response, Retraction
from jaxlm.feedback.store import Store

TOKENIZER = BytesTokenizer()


def talk(*texts: str) -> Conversation:
    """A dialogue that the user begins."""
    return Conversation(tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(texts)))


def said(text: str) -> Message:
    return Message("assistant", text)


def preference(ranks, prompt=None, answers=None) -> Preference:
    texts = answers or [f"answer {i}" for i in range(len(ranks))]
    return Preference(prompt or talk("hi"), tuple(Answer(said(t)) for t in texts), tuple(ranks), "ada")


@pytest.fixture
def store():
    with Store(":memory:") as s:
        yield s


def added(store, text="hi", k=3):
    (pid,) = store.add(Prompt(talk("before", "yes", text), {"answer": "7"}))
    return pid, store.add(*(Response(pid, said(f"{text} {i}")) for i in range(k)))


# --------------------------------------------------------------------------------------------------------- from a store
def test_rankings_become_items_with_ties(store):
    pid, (a, b, c) = added(store)
    store.add(Ranking(pid, (a, b, c), ((c,), (a, b)), "ada"), Ranking(pid, (a, b), ((a,), (b,)), "ada"))
    store.add(Ranking(pid, (c, b, a), ((b,), (c,), (a,)), "bob"))
    three, two, other = from_store(store)
    assert three.ranks == (1, 1, 0) and [x.text for x in three.answers] == ["hi 0", "hi 1", "hi 2"]
    assert three.pairs == [(2, 0), (2, 1)] and three.metadata == {"answer": "7"}
    assert two.ranks == (0, 1) and (other.annotator, other.ranks) == ("bob", (1, 0, 2))
    assert [(p.chosen.text, p.rejected.text) for p in pairs([three, two])] == [
        ("hi 2", "hi 0"),
        ("hi 2", "hi 1"),
        ("hi 0", "hi 1"),
    ]
    assert from_store(store, ["bob"]) == [other] and from_store(store, []) == []


def test_the_last_ranking_counts_unless_it_is_retracted(store):
    pid, rs = added(store, k=2)
    store.add(Ranking(pid, tuple(rs), (tuple(rs),), "ada"))
    (last,) = store.add(Ranking(pid, tuple(rs), ((rs[1],), (rs[0],)), "ada"))
    assert [p.ranks for p in from_store(store)] == [(1, 0)]
    store.add(Retraction(last, "ada"))
    assert [p.ranks for p in from_store(store)] == [(0, 0)]


def test_a_written_alternative_comes_before_what_it_is_better_than(store):
    pid, rs = added(store)
    store.add(
        Ranking(pid, tuple(rs), ((rs[1],), (rs[0], rs[2])), "ada"), Alternative(pid, said("best"), tuple(rs), "ada")
    )
    store.add(Alternative(pid, said("also"), tuple(rs[:2]), "bob"))
    ranked, alone = from_store(store)
    assert [x.text for x in ranked.answers] == ["best", "hi 0", "hi 1", "hi 2"] and ranked.ranks == (0, 2, 1, 2)
    assert [x.text for x in alone.answers] == ["also", "hi 0", "hi 1"] and alone.pairs == [(0, 1), (0, 2)]


def test_ratings_rank_by_their_criterion(store):
    _, (a, b, c) = added(store)
    _, (d, _, _) = added(store, "other")
    for response, value in ((a, 2), (a, 6), (b, 6), (c, 7), (d, 1)):
        store.add(Rating(response, "helpful", value, (1, 7), "ada"), Rating(response, "safe", 1, (0, 1), "ada"))
    (p,) = from_store(store, criterion="helpful")  # one response of the other prompt is no comparison
    assert p.ranks == (1, 1, 0) and p.criterion == "helpful"
    assert [p.ranks for p in from_store(store, criterion="safe")] == [(0, 0, 0)]
    assert from_store(store) == [] == from_store(store, criterion="accurate")


def test_written_answers_are_read_as_conversations_that_train_on_them_alone(store, tmp_path):
    pid, rs = added(store)
    store.add(Demonstration(pid, said("as I would"), "ada"), Alternative(pid, said("better"), tuple(rs), "bob"))
    lessons = written_answers(store)
    assert [x.source["kind"] for x in lessons] == ["demonstration", "alternative"] and len(
        written_answers(store, ["ada"])
    ) == 1
    write_lessons(tmp_path / "sft.jsonl", lessons)
    first, second = chat_sources.conversations(Messages(str(tmp_path / "sft.jsonl")))
    assert [m.text for m in first.messages] == ["before", "yes", "hi", "as I would"]
    for conversation, text in ((first, "as I would"), (second, "better")):
        fields = render(conversation, TOKENIZER)
        assert TOKENIZER.decode(fields["tokens"][fields["loss_mask"]]) == text


# -------------------------------------------------------------------------------------------------------------- split
def test_a_prompt_never_straddles_a_split():
    everything = [
        preference((0, 1), talk(f"opening {n}", "yes", f"on {m}"))
        for n in range(100)
        for m in range(3)
        for _ in range(2)
    ]
    for key in (opening_hash, None):
        train, test = split(everything, 0.3, 5, *([key] if key else []))
        assert len(train) + len(test) == 600 and 120 < len(test) < 240
        assert not {p.prompt for p in train} & {p.prompt for p in test}
        openings = [{p.prompt.messages[0] for p in side} for side in (train, test)]
        assert bool(openings[0] & openings[1]) == (key is None)
    few, _ = split(everything[:60], 0.3, 5)
    assert few == [p for p in split(everything, 0.3, 5)[0] if p in everything[:60]]  # whatever else there is
    assert split(everything, 0.3, 5) != split(everything, 0.3, 6) and split(everything, 0)[1] == []
    with pytest.raises(UserError, match="from 0 to 1"):
        split(everything, 1.5)
    system = Conversation((Message("system", "Be brief."), *talk("hi", "yes", "no").messages))
    assert opening_hash(system) == opening_hash(Conversation(system.messages[:2])) != opening_hash(talk("hi"))


# ------------------------------------------------------------------------------------------------------------- to ids
def test_sampled_ids_are_trained_on_as_they_were_sampled():
    ids = (*TOKENIZER.encode("caf"), 0xC3 + 32)  # cut off in the middle of a character, and no end
    message = read_completion(ids, TOKENIZER)
    sampled = Answer(message, ids, (True,) * 3 + (False,), TOKENIZER.hash)
    p = Preference(
        talk("hi"), (sampled, Answer(said("yes")), dataclasses.replace(sampled, tokenizer="other")), (0, 1, 2), "ada"
    )
    found = encode(p, TOKENIZER)
    assert found.prompt == prompt_ids(talk("hi"), TOKENIZER) and found.ranks == (0, 1, 2)
    assert found.answers[0] == list(ids) and found.trained[0] == [True] * 3 + [False]
    end = TOKENIZER.control["<|im_end|>"]
    assert found.answers[1] == [*TOKENIZER.encode("yes"), end] and found.trained[1] == [True] * 4
    assert found.answers[2] == [*TOKENIZER.encode(message.text), end]  # another tokenizer's ids are not used
    tool = said("")
    tool = dataclasses.replace(tool, parts=(Part("calculator\n1", "tool_call"), Part("1", "tool_result"), Part("1")))
    found = encode(Preference(talk("hi"), (Answer(tool), Answer(said("1"))), (0, 1), "ada"), TOKENIZER)
    assert found.trained[0].count(False) == 3  # the result and its two symbols


def test_all_answers_of_an_item_have_the_same_prompt_and_what_does_not_fit_is_counted():
    long = talk("x" * 100, "y" * 100, "the last")
    p = preference((0, 1), long, ["short", "z" * 50])
    found = encode(p, TOKENIZER, 150)
    assert found.prompt == prompt_ids(talk("the last"), TOKENIZER) and len(found.prompt) + len(found.answers[1]) <= 150
    counts = Kept()
    kept = list(
        encode_each([p, preference((1, 1)), preference((0, 1), answers=["a" * 200, "b"])], TOKENIZER, 150, counts)
    )
    assert [x for x, _ in kept] == [p]
    assert (counts.seen, counts.kept, counts.left_out) == (3, 1, {"too long": 1, "all tied": 1})
    with pytest.raises(UserError, match="no prompt to answer"):
        list(encode_each([preference((0, 1), talk("hi", "yes"))], TOKENIZER))


# ----------------------------------------------------------------------------------------------------------------- HH
def dialogue(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {t}" for i, t in enumerate(texts))


def test_hh_pairs_are_read_strictly_and_what_is_left_out_is_counted(tmp_path):
    good = {
        "chosen": dialogue("hi", "yes?", "a: b\n\nc", "one "),
        "rejected": dialogue("hi", "yes?", "a: b\n\nc", "two"),
    }
    lines = [
        json.dumps(good),
        json.dumps(good | {"rejected": dialogue("hi", "no?", "a: b\n\nc", "two")}),
        json.dumps(good | {"rejected": good["chosen"]}),
        json.dumps(good | {"chosen": good["chosen"] + "\n\nHuman: more"}),
        json.dumps(good | {"chosen": "\n\nAssistant: hi" + good["chosen"]}),
        json.dumps(good | {"chosen": dialogue("hi", " ")}),
        json.dumps(good | {"chosen": "hello" + good["chosen"]}),
        json.dumps(good | {"chosen": None}),
        json.dumps(good | {"chosen": dialogue("hi", "\ud800")}),
        "no JSON",
        "[1]",
    ]
    file = tmp_path / "hh.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    counts = Kept()
    (pair,) = read_hh(file, counts)
    assert [m.role for m in pair.prompt.messages] == ["user", "assistant", "user"]
    assert pair.prompt.messages[2].text == "a: b\n\nc" and [a.text for a in pair.answers] == ["one", "two"]
    assert pair.ranks == (0, 1) and (counts.seen, counts.kept) == (11, 1)
    assert counts.left_out == collections.Counter(
        {
            "the prompts differ": 1,
            "the answers are the same": 1,
            "turns do not alternate": 2,
            "an empty turn": 1,
            "does not begin with a turn": 1,
            "no pair of texts": 3,
            "not valid Unicode": 1,
        }
    )
    assert str(counts).startswith("1 of 11 kept; left out: no pair of texts 3, turns do not alternate 2, ")
    assert load(file) == [pair]
    file.write_bytes(gzip.compress(b"\n".join(line.encode() for line in lines[1:])))
    with pytest.raises(UserError, match="has no pair as HH writes them"):
        read_hh(file)


def test_one_door_for_store_export_and_hh(tmp_path):
    with Store(tmp_path / "f.db") as store:
        p = preference((1, 0, 1), talk("a", "b", "c"))
        for _ in range(2):  # the same records again
            store.add(*as_records(p, "made up"))
        store.export_jsonl(tmp_path / "f.jsonl")
        assert len(list(store.records())) == 5
    (found,) = load(tmp_path / "f.db")
    assert found == dataclasses.replace(p, metadata={"source": "made up"}) and load(tmp_path / "f.jsonl") == [found]
    with pytest.raises(UserError, match="holds no preferences by bob"):
        load(tmp_path / "f.db", ["bob"])
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match="2 answers and 1 ranks"):
        dataclasses.replace(preference((0, 1)), ranks=(0,))


def export(tmp_path) -> list[str]:
    """The lines of 40 rankings of two responses: one bad line is less than what an import lets pass."""
    with Store(":memory:") as store:
        for i in range(40):
            store.add(*as_records(preference((1, 0), talk(f"prompt {i}")), "made up"))
        store.export_jsonl(tmp_path / "good.jsonl")
    return (tmp_path / "good.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: r["tiers"].append(r["tiers"][0]), "bad.jsonl line 160: .*more than once"),
        (lambda r: r["tiers"].pop(), "bad.jsonl line 160: .*the ranking lacks"),
        (lambda r: r["shown"].pop(), "bad.jsonl line 160: .*at least two responses"),
        (lambda r: r.update(prompt="0" * 32), "bad.jsonl line 160: the id .* is not that of what the record holds"),
    ],
    ids=["twice", "lacks", "one", "changed"],
)
def test_an_export_with_a_bad_ranking_is_refused_and_never_trained_on_in_part(tmp_path, change, words):
    lines = export(tmp_path)
    assert len(load(tmp_path / "good.jsonl")) == 40 and len(lines) == 160
    ranking = json.loads(lines[-1])
    change(ranking)
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:-1], json.dumps(ranking)]))
    with pytest.raises(UserError, match=f"{words}.* \\(1 of 160 lines cannot be used\\): export it again"):
        load(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match=r"bad\.jsonl line 160"):
        preference_sources.read(preference_sources.Rankings(str(tmp_path / "bad.jsonl")))


def test_an_export_without_a_response_that_was_ranked_is_refused(tmp_path):
    lines = export(tmp_path)
    (tmp_path / "bad.jsonl").write_text("\n".join(lines[:-2] + lines[-1:]))
    with pytest.raises(UserError, match=r"bad\.jsonl line 159: .* is not in the store \(1 of 159 lines"):
        load(tmp_path / "bad.jsonl")
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines, *lines[-4:]]))
    assert len(load(tmp_path / "twice.jsonl")) == 40  # the same record again is one
