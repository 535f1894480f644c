"""launch.write: conversations that a model writes, in a file that fine-tuning reads."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.chat_sources import Messages, conversations
from launch import write
from tests.launch.talkers import run_folder
from tests.sample.scripted import say

flags.FLAGS.set_gnu_getopt(True)
TEMPLATES = [
    {"name": "explain", "text": "Explain {what}.", "slots": {"what": ["rain", "snow"]}, "system": "Be brief."},
    {"name": "again", "text": "And {what}?", "slots": {"what": ["rain", "snow"]}},
]


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setattr(write, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(write, "SLOTS", 4)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["write"])

    def run(**options):
        with flagsaver.flagsaver(**{"max_tokens": 16, "count": 6} | options):
            assert write.main() == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"), say("<|im_sep|>", *"Of course", "<|im_end|>"))


@pytest.fixture
def templates(tmp_path):
    path = tmp_path / "templates.jsonl"
    path.write_text("".join(json.dumps(t) + "\n" for t in TEMPLATES))
    return str(path)


def test_a_file_to_be_fine_tuned_on(call, run, templates, tmp_path):
    out = str(tmp_path / "written.jsonl")
    said = call(workdir=run, templates=templates, out=out)
    assert said == "6 conversations written, 4 kept; rejected: new 2\n"  # two templates of two texts each
    found = list(conversations(Messages(out)))
    assert [c.messages[-2].text for c in found] == ["Explain rain.", "And rain?", "Explain snow.", "And snow?"]
    assert all(c.messages[-1].text == "Of course" for c in found) and found[0].messages[0].text == "Be brief."
    lines = [json.loads(line) for line in (tmp_path / "written.jsonl").read_text().splitlines()]
    assert {line["source"]["template"] for line in lines} == {"explain", "again"}
    with pytest.raises(UserError, match="no conversation came out"):
        call(workdir=run, templates=templates, out=out + ".y", max_tokens=10_000)  # no room for a prompt beside it
    with pytest.raises(UserError, match="is there already"):
        call(workdir=run, templates=templates, out=out)
    with pytest.raises(UserError, match="no conversation came out"):
        call(workdir=run, templates=templates, out=out + ".x", characters=["20", "30"])


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "templates.jsonl line 1: "),
        ('{"name": "a"}', 'line 1: {"name", "text"} is wanted'),
        ('{"name": "a", "text": "b", "slot": {}}', "is wanted"),
        ('{"name": "a", "text": "{x}", "slots": {"x": "y"}}', "has lists of texts"),
        ('{"name": "a", "text": "{x}", "slots": {"x": [1]}}', "has lists of texts"),
        ('{"name": "a", "text": "{x}"}', "a slot without values"),
        ('{"name": "a", "text": "b", "writes": "poem"}', 'writes must be "reply" or "request"'),
    ],
)
def test_bad_templates_are_one_clear_line(call, run, tmp_path, line, message):
    (tmp_path / "templates.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        call(workdir=run, templates=str(tmp_path / "templates.jsonl"), out=str(tmp_path / "o.jsonl"))


def test_what_is_missing_is_said(call, run, templates, tmp_path):
    for options, message in (
        ({"workdir": None}, "--workdir is missing"),
        ({"templates": str(tmp_path / "none.jsonl")}, "no such file of templates"),
        ({"characters": ["2"]}, "the least and the most are wanted"),
        ({"characters": ["9", "2"]}, "the least and the most are wanted"),
    ):
        with pytest.raises(UserError, match=message):
            call(**{"workdir": run, "templates": templates, "out": str(tmp_path / "o.jsonl")} | options)
