"""Replies shown as they come: whole characters, parts by their marks, nothing that a terminal obeys."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.conversation import Conversation, Message, Part, prompt_ids, render
from jaxlm.sample import alternatives
from jaxlm.sample.engine import next_token_distribution
from jaxlm.sample.transcript import Printer, printable
from tests import tiny_run

TOKENIZER = tiny_run.TOKENIZER
USER = Message("user", "q")
PARTS = (Part("let me é", "thinking"), Part("sum\n1+1", "tool_call"), Part("2", "tool_result"), Part("It is 世 2."))


def ids_of(*parts: Part) -> list[int]:
    """What a model would have written."""
    whole = render(Conversation((USER, Message("assistant", parts))), TOKENIZER)["tokens"].tolist()
    return whole[len(prompt_ids(Conversation((USER,)), TOKENIZER)) :]


def shown(ids, cuts=(), **options) -> str:
    out: list[str] = []
    printer = Printer(TOKENIZER, out.append, **options)
    for part in np.split(ids, sorted(cuts)):
        printer.feed(part.tolist())
    printer.finish()
    assert printer.ids == list(ids)
    return "".join(out)


def test_parts_stand_on_lines_of_their_own():
    ids = ids_of(*PARTS)
    assert shown(ids) == "[thinking] let me é\n[call] sum\n1+1\n[result] 2\nIt is 世 2.\n"
    assert shown(ids, thinking=False) == "[call] sum\n1+1\n[result] 2\nIt is 世 2.\n"
    assert shown(ids_of(Part("a"), Part("b", "thinking"), Part("c"))) == "a\n[thinking] b\nc\n"
    assert shown(ids_of(Part("a"), Part("b", "thinking"), Part("c")), thinking=False) == "ac\n"
    assert shown(ids_of(Part("b", "thinking"), Part("c")), color=True) == "\x1b[2m[thinking] b\x1b[0m\nc\n"
    assert shown([]) == ""


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_however_it_comes_it_reads_the_same(data):
    kinds = st.sampled_from(["text", "thinking", "tool_call", "tool_result"])
    parts = data.draw(st.lists(st.builds(Part, st.text(max_size=6), kinds), max_size=4))
    ids = ids_of(*parts)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    assert shown(ids, cuts) == shown(ids)
    assert all(c.isprintable() or c in "\n\t" for c in shown(ids))


def test_an_unfinished_part_and_broken_bytes_are_ended():
    ids = ids_of(Part("x", "thinking"))[:-2]
    assert shown(ids, color=True) == "\x1b[2m[thinking] x\x1b[0m\n"
    assert shown(TOKENIZER.encode("é")[:1]) == "\ufffd\n"


def test_a_terminal_is_told_nothing():
    assert printable("a\x1b[2Jb\rc\u202ed\te\n") == "a\ufffd[2Jb\ufffdc\ufffdd\te\n"


def test_alternatives_are_the_models_own_distribution():
    model, params = tiny_run.EXPERIMENT.model, tiny_run.random_params(tiny_run.EXPERIMENT.model)
    prompt, reply = TOKENIZER.encode("what"), TOKENIZER.encode("so é")
    found = alternatives.alternatives(model, params, prompt, reply, 3)
    for n, i in enumerate(reply):
        expected = next_token_distribution(model, params, [*prompt, *reply[:n]])
        assert found.probabilities_n[n] == pytest.approx(expected[i], rel=1e-4)
        assert found.ids_nK[n].tolist() == np.argsort(-expected[: TOKENIZER.vocab_size])[:3].tolist()
        np.testing.assert_allclose(found.probabilities_nK[n], np.sort(expected)[::-1][:3], rtol=1e-4)
    lines = alternatives.table(TOKENIZER, reply, found, [True, False, True, True, True]).splitlines()
    assert len(lines) == 6 and lines[2].split() == ["o", "(given)"]
    assert lines[1].split()[:2] == ["s", f"{found.probabilities_n[0]:.3%}"] and lines[1].count("%") == 4
