"""What people see of launch.probe, run in this process on a model of random parameters."""

import dataclasses
import json
import re

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data import chat_sources
from jaxlm.data.chat import Chat
from jaxlm.data.chat_sources import Messages
from jaxlm.data.conversation import prompt_ids
from jaxlm.data.prepare import Data
from jaxlm.data.tokenizer import Bytes
from jaxlm.data.world.corpus import World, world_tables
from jaxlm.data.world.people import People
from jaxlm.data.world.questions import Question, persons
from jaxlm.data.world.talk import WorldConversations
from jaxlm.feedback import judge
from jaxlm.feedback import probe as probing
from jaxlm.feedback.measures import SCORES
from jaxlm.feedback.probe import GROUPS, group, read_probed, write_probed
from jaxlm.feedback.written import WRITING
from jaxlm.run.experiment import Experiment
from launch import probe
from tests import tiny_run
from tests.feedback.scripted import Scripted

flags.FLAGS.set_gnu_getopt(True)
WORLD = World(people=People(count=40, unmentioned=20))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on the conversations of a file, whose parent saw the world."""
    root = tmp_path_factory.mktemp("runs")
    base = tiny_run.replaced(data=Data(sources=(WORLD,), tokenizer=Bytes(), context=256))
    tiny_run.make(root / "base", base)
    chat = Chat(sources=(Messages("chats.jsonl"),), context=256)
    tiny_run.make(root / "sft", dataclasses.replace(base, data=chat, parent=str(root / "base")))
    return root / "sft"


@pytest.fixture
def call(workdir, tmp_path, capsys, monkeypatch):
    """Runs launch.probe with these options; returns what it printed."""
    monkeypatch.setattr(probe, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(probe, "SLOTS", 8)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["probe"])

    def run(**options):
        given = {"workdir": str(workdir), "out": str(tmp_path / "out"), "k": 1, "max_tokens": 4, "per_group": 1}
        with flagsaver.flagsaver(**given | options):
            assert probe.main() == 0
        return capsys.readouterr().out

    return run


def test_probing_a_world_and_comparing(call, tmp_path):
    lessons, out = tmp_path / "lessons.jsonl", tmp_path / "out"
    printed = call(split="train", lessons=str(lessons), open_book=True)
    probed = read_probed(out / "probed.jsonl")
    assert [group(p.question) for p in probed] == list(GROUPS[:4]) and {p.question.split for p in probed} == {"train"}
    assert [line.split()[0] for line in printed.splitlines()[:6]] == ["note:", "closed", *GROUPS[:4]]
    found = json.loads((out / "summary.json").read_text())
    assert found["closed book"]["coverage"]["n"] == 2 and found["model"].endswith("sft@7")
    # A world's text has more bytes than the context: what was left out is said.
    assert "of 4 questions with their text do not fit the context of 256" in printed
    said = list(chat_sources.conversations(Messages(str(lessons))))
    assert len(said) == 4 and {c.messages[0].text for c in said} == {p.question.text for p in probed}
    assert "4 conversations in" in printed

    # As if it had learnt to refuse, compared with the probe before.
    before = [dataclasses.replace(p, outcome="wrong") for p in probed]
    (tmp_path / "before").mkdir()
    write_probed(tmp_path / "before" / "probed.jsonl", before)
    printed = call(split="train", before=str(tmp_path / "before"), dev=str(tmp_path / "before"))
    assert "withheld, wrong" in printed and "threshold on mean_logprob" in printed and "points lost" in printed
    found = json.loads((out / "summary.json").read_text())
    assert found["compared"]["unknown"]["untold"]["before"]["value"] == 1 and set(found["baseline"]) == set(SCORES)
    for name in ("reliability.png", "risk_coverage.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="asked other questions"):
        call(split="heldout", before=str(tmp_path / "before"))


def test_questions_from_a_file_and_a_judge(call, workdir, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "What is two and two?", "answer": "4"}\n')
    printed = call(questions=str(tmp_path / "q.jsonl"), judge=str(workdir))
    assert "other" in printed and "neither yes nor no" in printed
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["judge"]["asked"] == found["judge"]["malformed"] == 2
    probed = read_probed(tmp_path / "out" / "probed.jsonl")
    assert probed[0].question == Question("What is two and two?", "4", "numeric", "fact", "heldout", "line1")


def test_passages_that_lead_to_nothing_are_said(call, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Ada was born in London.")
    with pytest.raises(UserError, match="wrote no question"):
        call(passages=str(tmp_path / "text.txt"))
    assert "rejected: fits 1" in capsys.readouterr().out


CITIES = {"Ada": "London", "Emil": "Prague", "Nora": "Bergen"}


def test_a_long_text_is_cut_and_its_questions_are_asked_with_and_without_it(call, workdir, tmp_path, monkeypatch):
    """By a model that reads but recalls nothing, in a context that the whole text does not fit into."""
    prompts = []

    def says(prompt, draw):
        prompts.append(prompt)
        name = next((n for n in CITIES if f"{n} was born in" in prompt), None)
        if prompt.startswith("Write 3 short questions"):
            return f"Question: Where was {name} born?\nAnswer: {CITIES[name]}" if name else "There is nothing to ask."
        return CITIES[name] if name else "I don't know."

    model = Scripted(says)
    monkeypatch.setattr(probe, "reply", lambda *a, slots, **k: model(*a[3:], **k))
    run, context = probe.load_run(workdir), 680
    data = dataclasses.replace(run.experiment.data, context=context)
    wider = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, data=data))
    monkeypatch.setattr(probe, "load_run", lambda *_: wider)
    paragraphs = [
        f"{n} was born in {city}, a town by the water. " + 8 * "It rains there. " for n, city in CITIES.items()
    ]
    (tmp_path / "text.txt").write_text("\n\n".join([*paragraphs, "x" * 250]))
    assert not [p for p in paragraphs if probe.fits(run, judge.asked(p), WRITING.max_tokens)]

    printed = call(passages=str(tmp_path / "text.txt"), open_book=True, k=2)
    assert "4 questions written, 3 kept; rejected: fits 1" in printed  # what no cut makes fit
    out = tmp_path / "out"
    asked = probing.read_questions(out / "questions.jsonl")
    assert [(q.text, q.answer) for q in asked] == [(f"Where was {n} born?", city) for n, city in CITIES.items()]
    assert [q.id for q in asked] == [f"text.txt#{n}/0" for n in range(3)]
    sources = [json.loads(line)["source"] for line in (out / "questions.jsonl").read_text().splitlines()]
    assert [(s["passage"], s["agreed"]) for s in sources] == [(f"text.txt#{n}", 1.0) for n in range(3)]
    closed, opened = (read_probed(out / name) for name in ("probed.jsonl", "open.jsonl"))
    assert [p.outcome for p in closed] == ["abstained"] * 3 and [p.outcome for p in opened] == ["right"] * 3
    assert all(p.question.text.startswith(text.strip()) for p, text in zip(opened, paragraphs))
    found = json.loads((out / "summary.json").read_text())
    assert found["open book"]["groups"]["other"]["right"]["value"] == 1 and found["filters"]["rejected"] == {"fits": 1}
    written = [p for p in prompts if p.startswith("Write")]
    assert len(written) == 3 and all(p.count("was born in") == 1 for p in written)
    assert all(len(prompt_ids(judge.asked(p), wider.tokenizer)) + WRITING.max_tokens <= context for p in written)


def test_questions_are_about_people_whom_the_conversations_left_aside(workdir):
    run, talk = probe.load_run(workdir), WorldConversations(world=WORLD, part=(0.0, 0.5))
    left = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, data=Chat(sources=(talk,))))
    with flagsaver.flagsaver((probe.SPLIT, "train"), (probe.PER_GROUP, 1000)):
        everybody, asked = ({q.person for q in probe.questions_of_world(r)[1]} for r in (run, left))
    spoken_of = set(persons(world_tables(WORLD), "train", None, talk.part))
    assert asked and not asked & spoken_of and everybody & spoken_of
    neither = dataclasses.replace(run.experiment, parent=None)
    with pytest.raises(UserError, match="was not trained on a World"):
        probe.questions_of_world(dataclasses.replace(run, experiment=neither))


def test_bad_values_are_one_clear_line(call, tmp_path):
    for options, message in (
        ({"out": None}, "--out=DIR are needed"),
        ({"questions": "a", "passages": "b"}, "not both"),
        ({"dev": "a"}, "--dev chooses a threshold"),
        ({"questions": str(tmp_path / "none.jsonl")}, "no such file of questions"),
        ({"before": str(tmp_path / "none")}, "no such file of a probe"),
        ({"known": 0.1}, "unknown < known"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"max_tokens": 500}, "there is no question to ask"),
    ):
        with pytest.raises(UserError, match=message):
            call(**options)


def test_the_setting_in_the_help_can_be_given():
    setting = re.search(r"--set='(.+)'", probe.__doc__)[1]
    changed = config.parse_sets(Experiment(model=None, data=Chat()), [setting])
    assert changed.data.sources == (Messages("runs/p/lessons.jsonl"),)
