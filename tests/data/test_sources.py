"""Sources: what comes out, in which order, and one clear line for everything that is no text."""

import ast
import gzip
import io
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError, from_json, to_json
from jaxlm.data import embedded, readers
from jaxlm.data.sources import (
    Document,
    EmbeddedPython,
    Files,
    HuggingFace,
    documents,
    fingerprint,
    rejects_for,
)
from jaxlm.data.world import corpus
from jaxlm.data.world.corpus import World
from jaxlm.data.world.people import People

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


def write(path, data) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def jsonl(*records) -> str:
    return "".join(json.dumps(r) + "\n" for r in records)


def error_of(source) -> str:
    with pytest.raises(UserError) as caught:
        list(documents(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------- files
def test_every_kind_gives_its_texts_in_order(tmp_path):
    records = jsonl({"text": "one", "url": "http://a.org"}, {"text": "two\r\n", "more": 1})
    write(tmp_path / "b" / "plain.txt", "naïve 漢字 🎉\r\n")
    write(tmp_path / "a.jsonl", records + "\n")
    write(tmp_path / "c.jsonl.gz", gzip.compress(records.encode()))
    frames = [zstandard.compress(part.encode()) for part in (records[:20], records[20:])]
    write(tmp_path / "d.jsonl.zst", b"".join(frames))  # two frames, cut in mid-line
    write(tmp_path / "e.txt.gz", gzip.compress("zipped".encode("utf-8-sig")))
    pq.write_table(pa.table({"text": ["p", None, "q"], "url": ["http://b.org", None, None]}), tmp_path / "f.parquet")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / "picture.png", PNG)
    rejects = rejects_for(source := Files(str(tmp_path), name="mine", max_bad_fraction=0.2))
    got = [(d.id, d.text, d.url) for d in documents(source, rejects)]
    two = [("one", "http://a.org"), ("two\r\n", None)]
    assert got == [
        *((f"a.jsonl:{i}", *x) for i, x in enumerate(two, 1)),
        ("b/plain.txt", "naïve 漢字 🎉\r\n", None),
        *((f"c.jsonl.gz:{i}", *x) for i, x in enumerate(two, 1)),
        *((f"d.jsonl.zst:{i}", *x) for i, x in enumerate(two, 1)),
        ("e.txt.gz", "zipped", None),
        ("f.parquet:1", "p", "http://b.org"),
        ("f.parquet:3", "q", None),
    ]
    assert {d.source for d in documents(source)} == {"mine"}
    assert (rejects.seen, rejects.rejected, rejects.empty) == (11, 1, 0)


def test_folder_glob_and_file_name_the_same_texts(tmp_path):
    for name in ("x/1.txt", "x/y/2.txt", "x/y/3.md", "x/code.py"):
        write(tmp_path / name, name)
    ids = lambda path: [d.id for d in documents(Files(str(tmp_path / path)))]  # noqa: E731
    assert ids("x") == ["1.txt", "y/2.txt", "y/3.md"]
    assert ids("x/**/*.txt") == ["1.txt", "y/2.txt"]
    assert ids("x/*.py") == ["code.py"]  # a glob takes what a folder would pass over
    assert ids("*/y/[0-9].*") == ["x/y/2.txt", "x/y/3.md"]
    assert ids("x/code.py") == ["code.py"]


def test_relative_glob(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a")
    monkeypatch.chdir(tmp_path)
    assert [d.text for d in documents(Files("*.txt"))] == ["a"]


def test_text_and_url_fields_are_chosen(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl({"body": "b", "link": "l", "text": "t"}))
    assert list(documents(Files(path, text_field="body", url_field="link"))) == [
        Document("b", "files", "a.jsonl:1", "l")
    ]


def test_bad_lines_below_the_rate_are_left_out_and_counted(tmp_path):
    good = jsonl({"text": "fine"}).encode() * 999
    path = write(tmp_path / "a.jsonl", good[: len(good) // 2 // 17 * 17] + b'{"text": "\xff"}\n' + good)
    rejects = rejects_for(source := Files(path))
    texts = [d.text for d in documents(source, rejects)]
    assert set(texts) == {"fine"} and rejects.rejected == 1 and rejects.seen == len(texts) + 1
    assert "not valid UTF-8 (byte 0xff" in rejects.examples[0] and "a.jsonl line " in rejects.examples[0]


def test_bad_lines_above_the_rate_end_it_early(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "ok"}\n' + b"\xc3(\n" * 50 + b'{"text": "ok"}\n' * 100_000)
    source, given = Files(path), 0
    with pytest.raises(
        UserError, match=r"a.jsonl line 2: not valid UTF-8 .*more than the allowed max_bad_fraction=0.01"
    ):
        for _ in documents(source):
            given += 1
    assert given < 10


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"content": "x", "id": 3}', "no field 'text'; fields there: content, id"),
        ('{"text": ["x"]}', "field 'text' is no string"),
        ('"text"', "a JSON object is wanted, this is str"),
        ('{"text": "x"', "not valid JSON"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    message = error_of(Files(write(tmp_path / "a.jsonl", '\n{"text": "x"}\n' + line + "\n")))
    assert "a.jsonl line 3: " in message and said in message


BAD = {
    "png.txt": (PNG, "looks like a PNG image"),
    "png": (PNG, "looks like a PNG image"),
    "lines.jsonl": (PNG, "looks like a PNG image"),
    "utf16.txt": ("hello".encode("utf-16"), "UTF-16"),
    "nul.txt": (b"abc\x00def", "a NUL byte at offset 3"),
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\t\n", "is empty"),
    "empty.jsonl": (b"\n", "is empty"),
    "empty.txt.gz": (b"", "is empty"),
    "empty.jsonl.zst": (b"", "is empty"),
    "latin.txt": ("ein schöner\nTag, größer".encode("latin-1"), "latin.txt line 1: not valid UTF-8 (byte 0xf6"),
    "cut.jsonl.gz": (gzip.compress(jsonl({"text": "x" * 99}).encode() * 9)[:-20], "damaged or truncated gz data"),
    "cut.txt.zst": (zstandard.compress(bytes(range(1, 128)) * 99)[:-3], "damaged or truncated zst data"),
    "rot.txt.zst": (b"\x28\xb5\x2f\xfd" + b"\xff" * 64, "damaged or truncated zst data"),
    "fake.gz": (b"plain text", "damaged or truncated gz data"),
    "table.parquet": (b"PAR1 not really", "not a readable Parquet file"),
    "list.json": (b"[]", "cannot read .json files; a file with one JSON object a line is named .jsonl"),
    "table.csv": (b"a,b", "cannot read .csv files"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_clear_line_with_its_name(tmp_path, name):
    data, said = BAD[name]
    message = error_of(Files(write(tmp_path / name, data)))
    assert said in message and name in message


def test_a_cut_archive_says_where(tmp_path):
    lines = "".join(json.dumps({"text": f"{i} {'abc' * i}"}) + "\n" for i in range(3000)).encode()
    whole = zstandard.compress(lines)
    source = Files(write(tmp_path / "a.jsonl.zst", whole[: len(whole) // 2]))
    given = []
    with pytest.raises(UserError, match=r"damaged or truncated zst data after line \d+"):
        given += [d for d in documents(source)]
    stream = io.BufferedReader(readers._ZstdFrames(io.BytesIO(whole + whole)))
    assert stream.read() == lines * 2


def test_links_and_names(tmp_path):
    folder = tmp_path / "texts"
    write(folder / "a" / "one.txt", "one")
    write(folder / "b.txt", "two")
    (folder / "a" / "back").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere" / "c.txt", "three")
    assert [d.id for d in documents(Files(str(folder)))] == ["a/one.txt", "b.txt", "linked/c.txt"]
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^cannot read .*gone\.txt: No such file or directory$"):
        fingerprint(Files(str(folder)))
    (folder / "gone.txt").unlink()
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as f:
        f.write("four")
    with pytest.raises(UserError, match=r"the name of the file '.*caf\\udce9\.txt' is not UTF-8: rename it"):
        fingerprint(Files(str(folder)))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_bad_texts_is_a_share(tmp_path, share):
    assert "max_bad_fraction is a share" in error_of(Files(write(tmp_path / "a.txt", "a"), max_bad_fraction=share))


def test_missing_paths_name_what_exists(tmp_path):
    assert f"nearest that exists: {tmp_path}" in error_of(Files(str(tmp_path / "no" / "such" / "x.txt")))
    assert f"nearest that exists: {tmp_path}" in error_of(Files(str(tmp_path / "no" / "*.txt")))
    assert "no file matches" in error_of(Files(str(tmp_path / "*.txt")))
    assert "it is empty" in error_of(Files(str(tmp_path)))
    write(tmp_path / "a.png", PNG)
    assert "it holds 1 files (.png)" in error_of(Files(str(tmp_path)))
    assert "the path of a text source is empty" in error_of(Files(" "))


def test_parquet_columns(tmp_path):
    pq.write_table(pa.table({"a": ["x"], "b": [1]}), tmp_path / "t.parquet")
    assert "no column 'text'; columns there: a, b" in error_of(Files(str(tmp_path / "t.parquet")))
    assert "holds int64, not strings" in error_of(Files(str(tmp_path / "t.parquet"), text_field="b"))
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    )
    pq.write_table(pa.table({"text": bad}), tmp_path / "t.parquet")
    assert "t.parquet row 2: not valid UTF-8" in error_of(Files(str(tmp_path / "t.parquet")))
    got = list(documents(Files(str(tmp_path / "t.parquet"), max_bad_fraction=0.5)))
    assert [d.text for d in got] == ["a"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20),
    st.sampled_from(["", ".gz", ".zst"]),
)
def test_any_text_survives_json_lines(tmp_path_factory, texts, ending):
    data = "".join(json.dumps({"text": t}, ensure_ascii=len(t) % 2 == 0) + "\n" for t in texts).encode()
    data = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending](data)
    path = write(tmp_path_factory.mktemp("t") / f"a.jsonl{ending}", data)
    wanted = [t for t in texts if t.strip()]
    if wanted:
        assert [d.text for d in documents(Files(path))] == wanted
    else:
        assert "is empty" in error_of(Files(path))


def test_fingerprint_follows_content_not_name(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    first = fingerprint(Files(path))
    assert fingerprint(Files(path, name="other", weight=2.0)) == first
    assert fingerprint(Files(path, text_field="body")) != first
    write(tmp_path / "copy" / "a.txt", "one")
    assert fingerprint(Files(str(tmp_path / "copy" / "a.txt"))) == first
    write(tmp_path / "a.txt", "two")
    assert fingerprint(Files(path)) != first


# -------------------------------------------------------------------------------------------------- the interpreter
@pytest.fixture(scope="module")
def python_documents():
    """Some of the library: all of it takes seconds to parse."""
    everything = embedded.library_files()
    assert sum(os.path.getsize(os.path.join(embedded.library_root(), f)) for f in everything) > 5_000_000
    assert not [f for f in everything if "/test" in f or "site-packages" in f or f.startswith("encodings/")]
    imported = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "library_files", lambda: [f for f in everything if f.startswith(("json/", "http/"))])
        found = list(documents(EmbeddedPython()))
        assert found == list(documents(EmbeddedPython()))
    assert not (set(sys.modules) - imported) & {"json.tool", "http.server", "http.cookiejar"}  # read, never imported
    return found


def test_embedded_text_is_there(python_documents):
    assert list(dict.fromkeys(d.id.split("/")[0] for d in python_documents)) == ["topics", "docstrings", "library"]
    texts = {d.id: d.text for d in python_documents}
    assert len(texts) == len(python_documents)
    assert "json.dumps(obj, *, skipkeys=False" in texts["docstrings/json.dumps"]
    assert "JSONEncoder.default(self, o)\n    Implement this method" in texts["docstrings/json.encoder.JSONEncoder"]
    assert "class JSONEncoder" in texts["library/json/encoder.py"]
    assert "Serialize ``obj``" in texts["docstrings/json.dumps"]
    assert "Serialize ``obj``" not in texts["library/json/__init__.py"]
    for text in texts.values():
        text.encode("utf-8")


def test_library_without_docstrings_is_still_python(python_documents):
    for d in [d for d in python_documents if d.id.startswith("library/")]:
        for node in ast.walk(ast.parse(d.text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert ast.get_docstring(node) is None, d.id


def test_without_docstrings():
    source = '"""m"""\nclass A:\n    """only"""\n\n    def f(self):\n        "x"  # note\n        return 1\n'
    source += '\ndef g(): "one line"\n'
    assert embedded.without_docstrings(source, ast.parse(source)) == (
        'class A:\n\n    def f(self):\n        return 1\n\ndef g(): "one line"\n'
    )
    alone = 'def f():\n    """Doc\n    more."""\nx = 1\n'
    assert embedded.without_docstrings(alone, ast.parse(alone)) == "def f():\n    pass\nx = 1\n"


def test_embedded_bound_is_kept_and_shared():
    sizes = {}
    for d in documents(EmbeddedPython(max_bytes=300_000)):
        part = d.id.split("/")[0]
        sizes[part] = sizes.get(part, 0) + len(d.text.encode())
    assert 270_000 < sum(sizes.values()) <= 300_000 and min(sizes.values()) > 80_000
    assert [d.id for d in documents(EmbeddedPython(max_bytes=50_000))] == [
        d.id for d in documents(EmbeddedPython(max_bytes=50_000))
    ]
    assert "raise the bound" in error_of(EmbeddedPython(max_bytes=10))


def test_embedded_fingerprint():
    assert fingerprint(EmbeddedPython()) == fingerprint(EmbeddedPython(name="x", weight=3.0))
    assert fingerprint(EmbeddedPython()) != fingerprint(EmbeddedPython(parts=("topics",)))


def test_sources_round_trip_as_json():
    source = EmbeddedPython(parts=("topics", "library"), max_bytes=5)
    assert from_json(EmbeddedPython, to_json(source)) == source


def test_a_world_is_a_source():
    world = World(name="mine", people=People(count=4), problems=3, validation=2)
    found = list(documents(world, rejects := rejects_for(world)))
    assert [(d.id, d.text) for d in found] == list(corpus.texts(world))
    assert {d.source for d in found} == {"mine"} and (rejects.seen, rejects.rejected, rejects.empty) == (25, 0, 0)
    assert fingerprint(world) == corpus.fingerprint(world) == fingerprint(World(**vars(world) | {"weight": 2.0}))
    assert "people.count must be at least 1" in error_of(World(people=People(count=0)))


# ---------------------------------------------------------------------------------------------------- Hugging Face
def test_hugging_face_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error_of(HuggingFace("some/set"))


def test_hugging_face_from_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "data" / "train.jsonl", jsonl({"text": "a", "url": "u"}, {"text": "b", "url": None}))
    source = HuggingFace(str(tmp_path / "data"))
    assert [(d.text, d.id, d.url) for d in documents(source)] == [("a", "train:0", "u"), ("b", "train:1", None)]
    first = fingerprint(source)
    write(tmp_path / "data" / "train.jsonl", jsonl({"text": "a", "url": "u"}))
    assert fingerprint(source) != first
    assert "no string field 'body'; fields there: text, url" in error_of(HuggingFace(source.dataset, text_field="body"))
    assert "cannot load the dataset" in error_of(HuggingFace(str(tmp_path / "none")))
