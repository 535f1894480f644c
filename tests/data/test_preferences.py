"""Ranked answers in rows: groups whole, ids as they were sampled, prompts on one side, what is left out counted."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message, prompt_ids, render
from jaxlm.data.loader import Loader, evaluation_batches
from jaxlm.data.packing import Reader
from jaxlm.data.preference_sources import HH, Comparisons, Rankings, read, split
from jaxlm.data.preferences import Preferences, groups, pack_groups, prepare_preferences
from jaxlm.data.tokenizer import Bytes, BytesTokenizer
from jaxlm.feedback.preferences import Answer, Kept, Preference
from jaxlm.feedback.records import Prompt, Ranking, Response
from jaxlm.feedback.store import Store

TOKENIZER = BytesTokenizer()
CONTEXT = 240


def preference(i: int, k: int = 2, words: int = 2) -> Preference:
    prompt = Conversation((Message("user", f"question {i}"),))
    answers = tuple(Answer(Message("assistant", f"{i}.{j} " + "so " * (words + j))) for j in range(k))
    return Preference(prompt, answers, tuple((j + i) % k for j in range(k)), "ada")


def packed(tmp_path, found, answers=8, context=CONTEXT):
    return pack_groups(found, TOKENIZER, tmp_path / "rows", context=context, answers=answers)


def test_rows_hold_whole_groups_as_they_were_rendered(tmp_path):
    found = [preference(i, k=2 + i % 3) for i in range(30)]
    rows, counts = packed(tmp_path, found)
    assert counts.seen == counts.kept == 30 and not counts.left_out
    fields = Reader(rows.directory).read(range(rows.rows))
    assert fields["rank"].shape == fields["prompt_id"].shape == (rows.rows, 8) and rows.rows < 30
    assert not fields["segments"][:, -1].any()  # the model is fed all but the last position
    seen = {}
    for r in range(rows.rows):
        count = fields["segments"][r].max()
        assert (fields["prompt_id"][r, :count] > 0).all() and not fields["prompt_id"][r, count:].any()
        for s in range(1, count + 1):
            here = fields["segments"][r] == s
            key = (r, fields["prompt_id"][r, s - 1])
            one = [fields[name][r][here].tolist() for name in ("tokens", "loss_mask")] + [int(fields["rank"][r, s - 1])]
            seen.setdefault(key, []).append(one)
            assert np.array_equal(fields["positions"][r][here], np.arange(here.sum()))
    wanted = []
    for p in found:
        group = []
        for answer, rank in zip(p.answers, p.ranks):
            whole = render(Conversation((*p.prompt.messages, answer.message)), TOKENIZER)
            group.append([whole["tokens"].tolist(), whole["loss_mask"].tolist(), rank])
        wanted.append(group)
    assert sorted(map(str, seen.values())) == sorted(map(str, wanted))


def test_no_row_has_more_answers_than_it_may(tmp_path):
    rows, _ = packed(tmp_path, [preference(i, words=0) for i in range(40)], answers=5, context=600)
    count = Reader(rows.directory).read(range(rows.rows))["segments"].max(axis=1)
    assert count.max() == 4 and rows.answers == 5  # pairs: the fifth place stays empty


def test_sampled_ids_are_used_as_they_are():
    a, b = TOKENIZER.encode("ab")
    sampled = Answer(Message("assistant", "ab"), (a, b), (True, False), TOKENIZER.hash)
    foreign = dataclasses.replace(sampled, tokenizer="another")
    p = preference(0)
    for answer, end in ((sampled, (a, b)), (foreign, (a, b, TOKENIZER.control["<|im_end|>"]))):
        (group,) = groups([dataclasses.replace(p, answers=(answer, p.answers[1]))], TOKENIZER, CONTEXT, 4)
        prompt = prompt_ids(p.prompt, TOKENIZER)
        assert tuple(group.tokens[0]) == (*prompt, *end) and not group.masks[0][: len(prompt)].any()
        assert tuple(group.masks[0][len(prompt) :]) == ((True, False) if answer is sampled else (True,) * 3)


def test_long_prompts_lose_old_exchanges_and_what_cannot_be_used_is_counted(tmp_path):
    old = tuple(Message(role, "long ago " * 8) for role in ("user", "assistant"))
    p = preference(0)
    long = dataclasses.replace(p, prompt=Conversation((*old, *p.prompt.messages)))
    tied, many = dataclasses.replace(p, ranks=(1, 1)), preference(1, k=4)
    endless = dataclasses.replace(p, prompt=Conversation((Message("user", "why? " * 80),)))
    counts = Kept()
    (first, second) = groups([p, long, tied, many, endless], TOKENIZER, CONTEXT, 3, counts)
    assert all(np.array_equal(a, b) for a, b in zip(first.tokens, second.tokens))
    assert counts.kept == 2 and counts.left_out == {"all tied": 1, "more than 3 answers": 1, "too long": 1}
    with pytest.raises(UserError, match="nothing to compare: 0 of 1 kept; left out: all tied 1"):
        packed(tmp_path, [tied])
    assert not (tmp_path / "rows").exists()


def test_a_prompt_is_on_one_side_and_stays_there():
    source = Comparisons("x")
    found = [preference(i % 40) for i in range(120)]
    train, valid = split(source, found, 0.3)
    sides = [{p.prompt for p in side} for side in (train, valid)]
    assert not sides[0] & sides[1] and len(train) + len(valid) == 120 and valid
    more = split(source, [*found, *(preference(i) for i in range(40, 80))], 0.3)
    assert sides[1] <= {p.prompt for p in more[1]} and not sides[0] & {p.prompt for p in more[1]}


def lines(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def test_comparisons_in_all_their_forms(tmp_path):
    def said(role, text):
        return {"role": role, "content": text}

    path = lines(
        tmp_path / "a.jsonl",
        {"prompt": "hi", "chosen": "good", "rejected": "bad"},
        {"prompt": [said("user", "hi")], "chosen": said("assistant", "good"), "rejected": [said("assistant", "bad")]},
        {"chosen": [said("user", "hi"), said("assistant", "good")],
         "rejected": [said("user", "hi"), said("assistant", "bad")]},
        {"messages": [said("user", "hi")], "answers": ["good", "bad"], "ranks": [0, 1]},
    )  # fmt: skip
    found = read(Comparisons(path))
    assert len(found) == 4 and all(p == found[0] for p in found)
    assert found[0].prompt == Conversation((Message("user", "hi"),)) and found[0].ranks == (0, 1)
    assert [a.text for a in found[0].answers] == ["good", "bad"]


def test_texts_to_go_on_with_are_seen_as_documents_are(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "b", "chosen": "a", "rejected": "cda"})
    found = read(Comparisons(path, as_text=True))
    assert split(Comparisons(path), found, 1.0) == ([], found)
    ((chosen, rejected),) = ([t.tolist() for t in g.tokens] for g in groups(found, TOKENIZER, 12, 2))
    begin, end = TOKENIZER.bos, TOKENIZER.eos
    assert chosen == [begin, *TOKENIZER.encode("ba"), end] and rejected == [begin, *TOKENIZER.encode("bcda"), end]
    (group,) = groups(found, TOKENIZER, 12, 2)
    assert [m.tolist() for m in group.masks] == [[False, False, True, True], [False, False, True, True, True, True]]
    counts = Kept()
    assert not list(groups(found, TOKENIZER, 9, 2, counts)) and counts.left_out == {"too long": 1}
    with pytest.raises(UserError, match="with as_text, the prompt and its answers must be texts"):
        read(Comparisons(lines(tmp_path / "b.jsonl", {"chosen": "a", "rejected": "b"}), as_text=True))


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "hi", "chosen": "good"}, "'chosen' and 'rejected', or 'answers' and 'ranks', are wanted"),
        ({"chosen": "good", "rejected": "bad"}, "a prompt ends before the assistant's turn, and there must be one"),
        ({"prompt": "hi", "answers": ["a", "b"], "ranks": [0]}, "2 answers with 1 ranks"),
        ({"prompt": "hi", "answers": ["a", "b"], "ranks": [0, None]}, "must be lists"),
        ({"prompt": "hi", "answers": ["a", "b"], "ranks": [-1, 0]}, "count from 0, the best, got -1 to 0"),
        ({"prompt": "hi", "answers": ["a", "b"], "ranks": [0, 1 << 31]}, "count from 0, the best, got 0 to 2147483648"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "line 1"),
        ("{broken", "line 1"),
        ([1], "a JSON object is wanted"),
    ],
    ids=str,
)
def test_lines_that_cannot_be_used_are_named(tmp_path, record, words):
    with pytest.raises(UserError, match=words) as e:
        read(Comparisons(lines(tmp_path / "a.jsonl", record)))
    assert "a.jsonl line 1" in str(e.value)


@pytest.mark.parametrize("source", [Comparisons("nowhere.jsonl"), Rankings("nowhere.db"), HH("nowhere.gz")])
def test_a_missing_file_is_named(source):
    with pytest.raises(UserError, match=r"no such file.*nowhere"):
        read(source)


@pytest.fixture
def data(tmp_path):
    with Store(tmp_path / "feedback.db") as store:
        for i in range(24):
            p = preference(i, k=3)
            (pid,) = store.add(Prompt(p.prompt))
            ids = store.add(*(Response(pid, a.message) for a in p.answers))
            store.add(Ranking(pid, tuple(ids), tuple((j,) for j in ids), "ada"))
    sources = (Rankings(str(tmp_path / "feedback.db")),)
    return Preferences(sources, 0.25, Bytes(), context=CONTEXT, answers=8, cache=str(tmp_path / "cache"))


def test_batches_carry_the_ranks(data, tmp_path):
    made = prepare_preferences(data, progress=False)
    assert made.reports["sources"]["rankings"]["train"]["kept"] + made.valid["rankings"].documents == 24
    with Loader(made.train, 4, seed=0) as loader:
        batch = loader.batch(0)
        assert batch.rank.shape == batch.prompt_id.shape == (4, 8) and batch.tokens.shape == (4, CONTEXT + 1)
    (last,) = evaluation_batches(made.valid["rankings"], 16)
    rows = made.valid["rankings"].rows
    assert rows < 16 and not np.any(last.prompt_id[rows:]) and np.all(last.prompt_id[:rows, 0] == 1)

    again = prepare_preferences(data, progress=False)
    assert again.hashes == made.hashes and again.directory == made.directory
    with Store(tmp_path / "feedback.db") as store:
        p = preference(99, k=3)
        (pid,) = store.add(Prompt(p.prompt))
        ids = store.add(*(Response(pid, a.message) for a in p.answers))
        store.add(Ranking(pid, tuple(ids), (tuple(ids[:1]), tuple(ids[1:])), "ada"))
        store.export_jsonl(tmp_path / "export.jsonl")
    grown = prepare_preferences(data, progress=False)
    assert grown.hashes["corpus"] != made.hashes["corpus"]
    exported = dataclasses.replace(data, sources=(Rankings(str(tmp_path / "export.jsonl")),))
    assert prepare_preferences(exported, progress=False).hashes == grown.hashes


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sources": ()}, "data.sources is empty"),
        ({"valid_fraction": 0.0}, "valid_fraction must be between 0 and 1"),
        ({"answers": 1}, "data.answers 2 or more"),
        ({"tokenizer": None}, "no parent to take it from"),
        ({"valid_fraction": 1e-9}, "validation.*no preference"),
    ],
    ids=str,
)
def test_bad_definitions_are_refused(data, change, words):
    with pytest.raises(UserError, match=words):
        prepare_preferences(dataclasses.replace(data, **change), progress=False)
