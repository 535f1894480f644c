"""The world's suites with models whose every word is known, and with a random one from end to end."""

import dataclasses
import json

import pytest

from jaxlm.config import UserError
from jaxlm.data.chat import Chat
from jaxlm.data.chat_sources import Messages
from jaxlm.data.conversation import Message, Part, prompt_ids
from jaxlm.data.prepare import Data
from jaxlm.data.prompting import Example, few_shot_conversation
from jaxlm.data.prompts import Prompts
from jaxlm.data.tokenizer import Bytes
from jaxlm.data.world.arithmetic import Arithmetic
from jaxlm.data.world.corpus import World, task_problem
from jaxlm.data.world.people import People
from jaxlm.data.world.questions import Question
from jaxlm.data.world.talk import WorldConversations
from jaxlm.run import world_tasks
from jaxlm.run.ask import Asked, ancestry, is_chat, replies
from jaxlm.run.evals import table
from jaxlm.run.experiment import Experiment
from jaxlm.run.load import Run, load_run
from jaxlm.run.report import Page
from jaxlm.run.side_by_side import add_to_page, side_by_side, text, transcript
from jaxlm.run.world_tasks import ask, find_world, items, metrics, needed, plot_shots, run_suite, tool_metrics
from jaxlm.tools import Counters, Tool, registry
from tests import tiny_run
from tests.sample.scripted import AUTOMATON, TOKENIZER, automaton, say

WORLD = World(people=People(count=30, unmentioned=10), arithmetic=Arithmetic(max_digits=2, max_steps=2))
TALK = WorldConversations(world=WORLD)
CHAT = Chat(sources=(TALK,), tokenizer=Bytes(), context=512)
BASE = Data(sources=(WORLD,), tokenizer=Bytes(), context=512)


def scripted(table, data=CHAT) -> Run:
    """A run whose model says what the table says."""
    return Run("scripted", Experiment(AUTOMATON, data), AUTOMATON, automaton(table), TOKENIZER, 1)


def number(answer: str, **fields) -> Question:
    return Question(f"How much? {answer}", answer, "numeric", "arithmetic", "heldout", f"n/{answer}", **fields)


def fact(known, mentioned=True) -> Question:
    return Question("Where?", "7", "text", "fact", "heldout", "f", known=known, mentioned=mentioned)


SEVEN = say("<|im_sep|>", "7", "<|im_end|>")
NO_IDEA = say("<|im_sep|>", *"no idea", "<|im_end|>")


def test_replies_are_judged_by_the_truth():
    right, wrong = ask(scripted(SEVEN), [number("7", digits=1, steps=2), number("8")], max_tokens=16)
    assert (right["outcome"], wrong["outcome"]) == ("right", "wrong")
    assert right["reply"] == "7" and right["digits"] == 1 and right["finish_reason"] == "stop" and not right["called"]
    assert right["logprob"] == pytest.approx(0, abs=1e-3) and right["tokens"] == 2
    assert ask(scripted(NO_IDEA), [fact("never")], max_tokens=16)[0]["outcome"] == "abstained"


def test_a_base_model_completes_text_after_the_examples():
    run = scripted(say(":", " ", "7", "\n", "x"), BASE)
    shots = [Example("How much is 3?", "3")]
    (r,) = ask(run, [number("7")], shots=[shots], work="none", max_tokens=16)
    assert r["reply"] == " 7" and r["outcome"] == "right" and r["shots"] == 1 and r["finish_reason"] == "stop"
    with pytest.raises(UserError, match="is a base model"):
        replies(run, [Asked("x", 8)], tools=registry([Tool("sum", "adds", str)]))
    (r,) = ask(scripted(say("\n", *"Answer: 7", "<|end|>"), BASE), [number("7")], max_tokens=16)  # steps of its own
    assert r["reply"] == "Answer: 7" and r["outcome"] == "right"


def test_nothing_is_cut_silently():
    long = [Example("x" * 300, "1"), Example("y" * 300, "2")]
    fits, skipped = ask(scripted(SEVEN), [number("7"), number("7")], shots=[[], long], max_tokens=16)
    assert fits["outcome"] == "right" and "outcome" not in skipped
    assert skipped["skipped"].endswith("16 of reply, data.context is 512") and skipped["shots"] == 2
    assert metrics([skipped]) == {} and metrics([fits, skipped])["accuracy"].n == 1
    assert "outcome" not in ask(scripted(SEVEN), [number("7")], shots=[long], max_tokens=16)[0]  # none is left to ask


def test_tools_are_offered_run_and_counted():
    call = say("<|im_sep|>", "<|tool_call|>", "s", "u", "m", "\n", "3", "<|tool_call_end|>") | say(
        "<|tool_result_end|>", "7", "<|im_end|>"
    )
    tools, counters = registry([Tool("sum", "adds", lambda x: "12")]), Counters()
    questions = [number("7", tool="sum"), number("8", tool="sum"), number("7", tool="calculator")]
    records = ask(scripted(call), questions, tools=tools, counters=counters, max_tokens=16)
    assert [r["needed"] for r in records] == ["sum", "sum", None] and all(r["called"] == ["sum"] for r in records)
    assert records[0]["parts"] == [["tool_call", "sum\n3"], ["tool_result", "12"], ["text", "7"]]
    found = {name: (e.value, e.n) for name, e in tool_metrics(records).items()}
    assert found == {
        "needed/called": (1, 2),
        "needed/accuracy": (0.5, 2),
        "not needed/called": (1, 1),
        "not needed/accuracy": (1, 1),
    }
    assert counters.metrics()["tools/sum/calls"] == 3
    assert needed(fact("never"), ["search"]) == "search" and needed(fact("often"), ["search"]) is None


def test_metrics_tell_the_groups_apart():
    cells = [number("7", digits=1, steps=1), number("7", digits=2, steps=1), number("8", digits=2, steps=1)]
    found = metrics(ask(scripted(SEVEN), cells, max_tokens=16), chance=0.25)
    assert found["accuracy"].value == pytest.approx(2 / 3) and found["accuracy"].chance == 0.25
    assert (found["1 digits, 1 steps"].value, found["2 digits, 1 steps"].value) == (1, 0.5)
    found = metrics(ask(scripted(SEVEN), [fact("often")], max_tokens=16))
    assert (found["accuracy"].value, found["wrong"].value, found["abstained"].value) == (1, 0, 0)


def test_items_are_heldout_different_and_the_same_every_time():
    for task in world_tasks.task_names(TALK):
        asked, pool = items(TALK, task, 12), items(TALK, task, 12, "train")
        assert asked == items(TALK, task, 12) and 4 <= len(asked) <= 12
        assert {i.question.split for i in asked} == {"heldout"} and {i.question.split for i in pool} == {"train"}
        if task != "system":  # there the message is different
            assert len({i.question.text for i in asked}) == len(asked)
        assert not {i.example.about for i in asked} & {i.example.about for i in pool} - {None}
        if task in world_tasks.FACTS:
            known, mentioned = world_tasks.FACTS[task]
            assert {(i.question.known, i.question.mentioned) for i in asked} == {(known[0], mentioned)}
    for task in ("fact_often", "arithmetic", "system"):
        assert items(TALK, task, 5) != items(TALK, task, 5, seed=1)
    p = task_problem(WORLD, "graph", "heldout", 0)
    assert items(TALK, "graph", 1)[0].example == Example(
        p.question.text, p.question.answer, p.solution, about=p.argument
    )


def test_the_world_is_found_where_the_run_came_from(tmp_path):
    assert find_world(Experiment(AUTOMATON, CHAT)) is TALK
    assert find_world(Experiment(AUTOMATON, BASE)).world == WORLD
    tiny_run.make(tmp_path / "base", tiny_run.replaced(data=BASE))
    other = Chat(sources=(Messages("chats.jsonl"),))
    child = Experiment(None, other, parent=str(tmp_path / "base"))
    assert find_world(child).world == WORLD and is_chat(child) and not is_chat(Experiment(None, BASE))
    assert len(list(ancestry(child))) == 2
    rewarded = Experiment(None, Prompts(), parent=str(tmp_path / "base"))  # its data has no sources
    assert find_world(rewarded).world == WORLD
    for e in (Experiment(None, other, parent=str(tmp_path / "gone")), Experiment(None, Data(path="x"))):
        with pytest.raises(UserError, match="--world=DIR"):
            find_world(e)


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    tiny_run.make(path, tiny_run.replaced(data=CHAT))
    return load_run(path)


def test_the_suite_world_runs_and_writes_what_a_suite_does(chat_run, tmp_path):
    results = run_suite(chat_run, "world", out=tmp_path, limit=2)
    assert list(results["tasks"]) == list(world_tasks.task_names(TALK)) and results["form"] == "chat"
    assert json.loads((tmp_path / "results.json").read_text()) == results
    lines = [json.loads(x) for x in (tmp_path / "arithmetic.jsonl").read_text().splitlines()]
    assert [x["text"] for x in lines] == [i.question.text for i in items(TALK, "arithmetic", 2)]
    printed = table(results).splitlines()
    assert any(line.split()[:3] == ["fact_often", "1", "abstained"] for line in printed)
    with pytest.raises(UserError, match=r"unknown suite 'word'; the world's are world, shots"):
        run_suite(chat_run, "word")


def test_the_suite_shots_measures_what_fits_and_draws_it(chat_run, tmp_path):
    small = dataclasses.replace(TALK, world=dataclasses.replace(WORLD, tasks=("arithmetic",)))
    results = run_suite(chat_run, "shots", small, out=tmp_path, limit=2)
    assert list(results["tasks"]) == ["fact_often", "arithmetic"]
    names = list(results["tasks"]["arithmetic"]["metrics"])
    assert names[:3] == ["direct/0 shots", "direct/1 shots", "direct/2 shots"] and "steps/1 shots" in names
    assert "steps/8 shots" not in names  # 512 bytes are too few
    lines = [json.loads(x) for x in (tmp_path / "arithmetic.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * len(names) and {x["shots"] for x in lines} >= {0, 1, 2}
    assert (tmp_path / "shots.png").read_bytes()[:4] == b"\x89PNG"
    plot_shots({"runs/base": results, "runs/sft": results}, tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 5000
    tight = dataclasses.replace(
        chat_run, experiment=dataclasses.replace(chat_run.experiment, data=dataclasses.replace(CHAT, context=32))
    )
    with pytest.raises(UserError, match=r"no question of the world fits data\.context 32"):
        run_suite(tight, "shots", small, limit=2)


def test_an_offer_of_tools_takes_room_from_the_shots():
    small = dataclasses.replace(TALK, world=dataclasses.replace(WORLD, tasks=("arithmetic",)))

    def tokens_of(asked) -> int:
        prompt = few_shot_conversation((), asked[0].question.text, "none", None)
        return len(prompt_ids(prompt, TOKENIZER)) + world_tasks.budget(scripted(SEVEN), asked, "none", True)

    context = min(tokens_of(items(small, task, 1)) for task in ("fact_often", "arithmetic"))
    just = scripted(SEVEN, dataclasses.replace(CHAT, context=context))
    with pytest.raises(UserError, match="no question of the world fits"):
        run_suite(just, "shots", small, limit=1, tools=registry([Tool("sum", "adds", str)]))


def test_side_by_side():
    runs = {"base": scripted(say("\n", *"Answer: 7", "<|end|>"), BASE), "sft": scripted(SEVEN)}
    rows = side_by_side(runs, ["How much <b>?", number("8")], max_tokens=16)
    assert [r["answer"] for r in rows] == [None, "8"]
    assert rows[0]["replies"]["base"] == {
        "form": "text",
        "text": "Answer: 7",
        "outcome": None,
        "finish_reason": "stop",
    }
    assert rows[1]["replies"]["sft"]["outcome"] == "wrong" and rows[1]["replies"]["sft"]["form"] == "chat"
    page = Page("x")
    add_to_page(page, rows)
    html = page.render()
    assert "How much &lt;b&gt;?" in html and "The truth: 8" in html and html.count("<table>") == 2
    assert "=== How much? 8   (truth: 8)\n--- base, text: wrong\nAnswer: 7\n--- sft, chat: wrong\n7" in text(rows)


def test_a_transcript_marks_what_is_not_the_answer():
    parts = (Part("hm", "thinking"), Part("sum\n1+1", "tool_call"), Part("2", "tool_result"), Part("two"))
    assert transcript(Message("assistant", parts)) == "[thinking] hm\n[sum] 1+1\n[result] 2\ntwo"
