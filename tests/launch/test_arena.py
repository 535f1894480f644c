"""launch.arena: from the rankings in a store to a table, figures and a plot."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.feedback.records import Policy, Prompt, Ranking, Response
from jaxlm.feedback.store import Store
from launch import arena

flags.FLAGS.set_gnu_getopt(True)


@pytest.fixture
def call(capsys):
    """Runs launch.arena with these options; returns what it printed."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["arena"])

    def run(**options):
        with flagsaver.flagsaver(**options):
            assert arena.main() == 0
        return capsys.readouterr().out

    return run


def test_a_table_figures_and_a_plot(call, tmp_path):
    path, out = str(tmp_path / "f.db"), tmp_path / "elo"
    with Store(path) as store:
        for n in range(8):
            (pid,) = store.add(Prompt(Conversation((Message("user", str(n)),))))
            a, b = store.add(
                *(Response(pid, Message("assistant", w), policy=Policy(w, 1, "h")) for w in ("old", "new"))
            )
            store.add(Ranking(pid, (a, b), ((a,), (b,)) if n < 2 else ((b,), (a,)), "ada"))
            store.add(Ranking(pid, (a, b), ((a, b),), "bob"))
    printed = call(store=path, annotators=["ada"], anchor="old@1", bootstrap=20, out=str(out))
    lines = printed.splitlines()
    assert lines[1].split()[0] == "new@1" and lines[2].split()[:3] == ["old@1", "1000", "1000..1000"]
    found = json.loads((out / "elo.json").read_text())
    assert (found["games"], found["prompts"], found["draws"]) == (8, 8, 20)
    assert (
        1150 < found["standings"][0]["elo"] < 1000 + 190.85 and (out / "elo.png").exists()
    )  # odds of 3, and the prior
    assert call(store=path).splitlines()[1].split()[-1] == "62.5"
    for options, message in (
        ({}, "--store=FILE is missing"),
        ({"store": str(tmp_path / "none.db")}, "no feedback store"),
        ({"store": path, "annotators": ["nobody"]}, "no ranking that holds responses of two"),
        ({"store": path, "anchor": "x"}, "plays no game"),
    ):
        with pytest.raises(UserError, match=message):
            call(**options)
