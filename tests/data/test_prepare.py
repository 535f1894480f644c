"""Stages found again or made anew, splits that do not leak, and every kind of bad input as one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from jaxlm.config import UserError, from_json, leaves, to_json
from jaxlm.data import packing, prepare
from jaxlm.data.curate import Curation
from jaxlm.data.dedup import ExactDuplicates
from jaxlm.data.filters import Length
from jaxlm.data.prepare import ByDocument, ById, ByPosition, Data
from jaxlm.data.sources import Files, documents
from jaxlm.data.tokenizer import Bytes, Chars, SentencePiece
from jaxlm.data.world.corpus import World
from jaxlm.data.world.people import AUGMENTATIONS, People, person, tables

WORDS = (np.__doc__ + np.ndarray.__doc__).split()


def texts(count, start=0):
    return [" ".join(np.random.default_rng([1, start + i]).choice(WORDS, 40)) for i in range(count)]


def write(path, lines):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus") / "a.jsonl", texts(200))


@pytest.fixture
def data(corpus, tmp_path):
    return Data(path=corpus, tokenizer=Bytes(), context=32, workers=1, cache=str(tmp_path / "cache"))


def stream(packed) -> bytes:
    """The text of a packed set, its documents ended by newlines."""
    tokens = packing.Reader(packed.directory).read(range(packed.rows))
    first, rest = tokens["tokens"][0, :1], tokens["tokens"][:, 1:][tokens["segments"][:, 1:] > 0]
    return b"".join(b"\n" if t == 3 else bytes([t - 32]) if t >= 32 else b"" for t in [*first, *rest])


def quietly(d):
    return prepare.prepare(d, progress=False)


def everything_under(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def test_the_definition_survives_json():
    d = Data(path="x.txt", tokenizer=Chars(), split=ByPosition(valid_fraction=0.2), curation=None)
    assert from_json(Data, to_json(d)) == d
    assert leaves(Data())["tokenizer"] == "SentencePiece()"


def test_documents_are_split_whole_and_none_is_lost(data):
    p = quietly(replace(data, split=ByDocument(valid_fraction=0.2)))
    train, valid = (stream(side["files"]).decode().splitlines() for side in (p.train, p.valid))
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(texts(200))
    assert 20 <= len(valid) <= 60
    assert [t for t in texts(200) if t in set(valid)] == valid  # in their order
    assert p.train["files"].documents == len(train) and p.valid["files"].documents == len(valid)


def test_a_text_keeps_its_side_when_others_come(data, tmp_path):
    more = write(tmp_path / "more.jsonl", texts(100, start=500) + texts(200))
    one, two = quietly(data), quietly(replace(data, path=more))
    for a, b in ((one.train, two.valid), (one.valid, two.train)):
        crossed = set(stream(a["files"]).splitlines()) & set(stream(b["files"]).splitlines())
        assert len(crossed) <= 1  # the one with the smallest hash, which is in validation whatever the fraction


def test_few_documents_still_validate(data, tmp_path):
    p = quietly(replace(data, path=write(tmp_path / "two.jsonl", texts(2)), split=ByDocument(valid_fraction=1e-9)))
    assert (p.train["files"].documents, p.valid["files"].documents) == (1, 1)


def test_one_document_is_cut_by_position(data, tmp_path):
    """So that any one text file can be trained on."""
    text = "\n".join(texts(10))
    (tmp_path / "one.txt").write_text(text)
    p = quietly(replace(data, path=str(tmp_path / "one.txt"), split=ByDocument(valid_fraction=0.25)))
    cut = int(len(text) * 0.75)
    assert stream(p.train["files"]).decode() == text[:cut] + "\n"  # the ends of documents, shown as newlines
    assert stream(p.valid["files"]).decode() == text[cut:] + "\n"


def test_position_cuts_characters_as_nanogpt_does(data, tmp_path):
    text = "".join(texts(4)) + "é\n"
    (tmp_path / "one.txt").write_text(text)
    d = replace(data, path=str(tmp_path / "one.txt"), split=ByPosition(valid_fraction=0.1), curation=None)
    p = quietly(d)
    n = int(len(text) * 0.9)
    assert (stream(p.train["files"]).decode(), stream(p.valid["files"]).decode()) == (text[:n], text[n:])
    rows = packing.Reader(p.train["files"].directory).read([0, 1])
    assert rows["segments"].max() == 1 and rows["loss_mask"][:, 1:].all()
    # Several documents are one stream, after newlines.
    p = quietly(replace(d, path=write(tmp_path / "more.jsonl", texts(7)), split=ByPosition(valid_fraction=0.3)))
    whole = "\n".join(texts(7))
    n = int(len(whole) * 0.7)
    assert (stream(p.train["files"]).decode(), stream(p.valid["files"]).decode()) == (whole[:n], whole[n:])


def test_stages_are_found_again(data, monkeypatch):
    d = replace(data, tokenizer=SentencePiece(vocab_size=320))
    first = quietly(d)
    before = everything_under(data.cache)

    def fail(*_, **__):
        raise AssertionError("made again")

    for name in ("_curate", "pack"):
        monkeypatch.setattr(prepare, name, fail)
    monkeypatch.setattr(prepare.tokenizers, "train", fail)
    again = quietly(replace(d, workers=2))  # the number of workers decides nothing
    assert again.hashes == first.hashes and again.train == first.train
    assert everything_under(data.cache) == before
    with pytest.raises(AssertionError, match="made again"):
        quietly(replace(d, context=16))


@pytest.mark.parametrize(
    "change",
    [
        {"context": 16},
        {"split": ByDocument(valid_fraction=0.5)},
        {"split": ByPosition(valid_fraction=0.05)},
        {"curation": None},
        {"curation": Curation(steps=(Length(min_characters=280),))},
        {"tokenizer": Chars()},
    ],
    ids=str,
)
def test_whatever_decides_the_rows_changes_the_hash(data, change):
    assert quietly(data).hashes["packed"] != quietly(replace(data, **change)).hashes["packed"]


def test_a_changed_text_changes_the_hash_and_its_name_does_not(data, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved, changed = tmp_path / "elsewhere" / "a.jsonl", tmp_path / "a.jsonl"
    shutil.copy(data.path, moved)
    write(changed, texts(199))
    hashes = [prepare.curated(replace(data, path=str(p)), False).hash for p in (data.path, moved, changed)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_tokenizer_never_sees_validation_text(data, monkeypatch):
    seen = []
    train = prepare.tokenizers.train

    def spy(cfg, corpus, seed):
        seen.extend(corpus)
        return train(cfg, seen, seed)

    monkeypatch.setattr(prepare.tokenizers, "train", spy)
    p = quietly(replace(data, tokenizer=SentencePiece(vocab_size=320), split=ByDocument(valid_fraction=0.2)))
    assert seen == stream_of_text(p, "train") and len(seen) < 190


def stream_of_text(p, side):
    packed = getattr(p, side)["files"]
    tokens = packing.Reader(packed.directory).read(range(packed.rows))
    ids = np.concatenate([tokens["tokens"][0, :1], tokens["tokens"][:, 1:][tokens["segments"][:, 1:] > 0]])
    ends = np.flatnonzero(ids == p.tokenizer.eos)
    return [p.tokenizer.decode(part.tolist()) for part in np.split(ids, ends)[:-1]]


def test_characters_come_from_the_whole_corpus(data, tmp_path):
    (tmp_path / "one.txt").write_text("abc " * 300 + "\u4e00")  # a character that only validation has
    p = quietly(replace(data, path=str(tmp_path / "one.txt"), tokenizer=Chars(), curation=None, split=ByPosition()))
    assert p.tokenizer.vocab_size == 32 + 5


def test_sources_keep_their_own_sets_and_weights(data, corpus, tmp_path):
    other = write(tmp_path / "b.jsonl", texts(60, start=1000) + texts(30))
    two = (Files(corpus, name="a", weight=3.0), Files(other, name="b"))
    d = replace(data, path=None, sources=two)
    p = quietly(d)
    assert [(n, s.weight) for n, s in p.train.items()] == [("a", 3.0), ("b", 1.0)] and list(p.valid) == ["a", "b"]
    # A text that both have is kept once, in the first.
    assert p.reports["sources"]["a"]["documents"] == 200 and p.reports["sources"]["b"]["documents"] == 60
    assert p.reports["curation"]["complete"] and sum(s["removed"] for s in p.reports["curation"]["steps"]) == 30
    weighed = quietly(replace(d, sources=(two[0], replace(two[1], weight=9.0))))
    assert weighed.hashes == p.hashes and weighed.train["b"].weight == 9.0


# Each person has one biography five times, and some problems have fewer characters than the default curation wants.
WORLD = World(people=People(count=12, augmentation=AUGMENTATIONS["single"]), problems=30, validation=8)


@pytest.fixture
def with_world(data, corpus):
    return replace(data, path=None, sources=(Files(corpus), WORLD), split=ById())


def test_a_world_validates_by_id_and_is_whole(with_world):
    p = quietly(with_world)
    made = {True: [], False: []}
    for d in documents(WORLD):
        made[d.id.startswith("heldout/")].append(d.text)
    read = {side: stream(sets["world"]).decode() for side, sets in ((False, p.train), (True, p.valid))}
    assert read == {side: "".join(text + "\n" for text in texts) for side, texts in made.items()}
    # Every fact that is told at all is told in training: those told once exactly so.
    for who in (person(tables(WORLD.people, WORLD.seed), i) for i in range(12)):
        own = [t for t in set(made[False]) if who.name in t]
        for attribute, known in who.known.items():
            assert known == "never" or any(who.facts[attribute] in text for text in own)
    assert any("once" in person(tables(WORLD.people, WORLD.seed), i).known.values() for i in range(12))


def test_without_such_ids_the_hash_decides(with_world):
    p, by_hash = quietly(with_world), quietly(replace(with_world, split=ByDocument()))
    assert stream(p.valid["files"]) == stream(by_hash.valid["files"])
    assert p.hashes["packed"] != by_hash.hashes["packed"] and p.hashes["corpus"] == by_hash.hashes["corpus"]


def test_a_world_without_heldout_documents_is_told(with_world, capsys):
    """And nobody else is, by whatever else the hash decides."""
    quietly(with_world)
    assert capsys.readouterr().err == ""
    without = replace(with_world, sources=(replace(WORLD, validation=0),))
    p = quietly(without)
    assert p.valid["world"].documents > 0  # which train no more
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("world: a World(validation=0) has no documents for data.split=ById to")
    assert " 5.0% of them validate by a hash" in said[0]
    quietly(replace(without, split=ByDocument()))
    assert capsys.readouterr().err == ""


def test_a_folder_named_heldout_validates(data, tmp_path):
    (tmp_path / "f" / "heldout").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.txt", "heldout/c.txt"), texts(3)):
        (tmp_path / "f" / name).write_text(text)
    p = quietly(replace(data, path=str(tmp_path / "f"), split=ById()))
    assert stream(p.valid["files"]).decode() == texts(3)[2] + "\n" and p.train["files"].documents == 2


def test_curation_leaves_a_world_alone_unless_named(with_world):
    p = quietly(with_world)
    steps = p.reports["curation"]["steps"]
    assert p.reports["sources"]["world"]["documents"] == 98 and not any(s["removed"] for s in steps)
    named = replace(with_world, curation=Curation((ExactDuplicates(only=("world",)),)))
    assert prepare.curated(named, False).sources["world"]["documents"] < 98
    alone = replace(with_world, sources=(WORLD,))
    assert prepare.curated(alone, False).hash == prepare.curated(replace(alone, curation=None), False).hash


def test_curation_for_a_source_that_is_not_there(data):
    for only in (("file",), ("files", "web")):
        cfg = Curation((ExactDuplicates(), Length(only=only)))
        with pytest.raises(UserError, match=rf"Length\(only=...\) names the source '{only[-1]}', .*: files$"):
            prepare.curated(replace(data, curation=cfg), False)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_either_side_has_a_share(data, share):
    for tokenizer in (Bytes(), SentencePiece(300)):
        with pytest.raises(UserError, match=f"valid_fraction must be between 0 and 1, got {share}"):
            quietly(replace(data, tokenizer=tokenizer, split=ByDocument(share)))


def test_rejected_texts_are_counted(data, tmp_path):
    path = tmp_path / "c.jsonl"
    write(path, texts(200))
    path.write_bytes(path.read_bytes() + b'{"text": "bad \xff"}\n')
    rejected = prepare.curated(replace(data, path=str(path)), False).sources["files"]["rejected"]
    assert rejected["texts"] == 1 and "a.jsonl" not in rejected["examples"][0]


# --------------------------------------------------------------------------------------------------------- bad input
def one_file(tmp_path, content: bytes, name="x.txt"):
    (tmp_path / name).write_bytes(content)
    return {"path": str(tmp_path / name)}


LINE = b"a line of good text that is long enough to be kept by every rule of curation\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"path": str(t / "nowhere.txt")}, "no such file or folder: .*nowhere.txt"),
        (lambda t: one_file(t, b""), "x.txt is empty"),
        (lambda t: one_file(t, b"\x89PNG\r\n\x1a\n" + bytes(100)), "x.txt .*PNG"),
        (lambda t: one_file(t, LINE + b"\xff\xfe\xfd" + LINE), "x.txt.*UTF-8"),
        (
            lambda t: one_file(t, b"short"),
            "none of its 1 documents is left after curation; most went in the step Length",
        ),
        (lambda t: {"tokenizer": SentencePiece(vocab_size=100_000)}, "vocabulary of 100000: the largest possible is"),
        (lambda t: {"context": 10**6}, r"files \(training\): a context of 1000000 is longer than all of the text, \d+"),
        (lambda t: {"context": 0}, "context must be at least 1"),
        (lambda t: {"path": None, "sources": ()}, "data.sources is empty"),
        (lambda t: {"path": None, "sources": (Files("x"), Files("y"))}, "two sources are named 'files'"),
        (lambda t: {"path": None, "sources": (Files("x", name="../up"),)}, "source name '../up'"),
        (lambda t: {"path": None, "sources": (Files("x", weight=-1.0),)}, "weight of source files must be above 0"),
        (lambda t: {"split": ByDocument(valid_fraction=0.0)}, "valid_fraction must be between 0 and 1, got 0.0"),
        (lambda t: {"split": ByPosition(valid_fraction=1.0)}, "valid_fraction must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_half_done(data, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as e:
        quietly(replace(data, **change(tmp_path)))
    assert "\n" not in str(e.value)
    assert not [p for p in Path(data.cache).rglob(".*")]


def test_a_cache_that_is_a_file(data, tmp_path):
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*: a file stands where a folder is needed"):
        quietly(data)
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize("stage", ["curated", "packed"])
def test_a_full_disk_harms_nothing_that_was_written(data, stage, monkeypatch):
    quietly(data)
    before = everything_under(data.cache)
    writer = array_record_module.ArrayRecordWriter

    class Full:
        def __init__(self, path, options):
            self._path, self._writer = path, writer(path, options)

        def write(self, record):
            self._writer.write(record)

        def close(self):
            self._writer.close()
            raise RuntimeError(f"write() failed: No space left on device; writing {self._path}")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match="the disk is full"):
        quietly(replace(data, **({"curation": None} if stage == "curated" else {"context": 16})))
    assert everything_under(data.cache) == before
    monkeypatch.undo()
    assert quietly(replace(data, context=16)).train["files"].context == 16  # and the same command goes on


def test_a_damaged_cache_is_named(data):
    p = quietly(data)
    (file,) = (Path(p.directory) / "train" / "files").glob("rows-*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="delete this folder and start again"):
        quietly(data)
