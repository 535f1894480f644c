"""launch.tour_seeds on records of stages whose figures are known."""

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.run import stages
from launch import tour_seeds

flags.FLAGS.set_gnu_getopt(True)


def known(lost: float) -> dict:
    return {"before": {"value": max(lost, 0.0)}, "after": {"value": max(-lost, 0.0)}, "lost": {"value": lost}}


def unknown(before: float, after: float) -> dict:
    return {"before": {"value": before}, "after": {"value": after}, "factor": None}


def results(right: float, before: float, after: float) -> dict:
    who = "people that fine-tuning has not a word about"
    row = {"model": "assistant", "asked about": who, "accuracy": {"value": right}}
    base = {"model": "base, asked as text", "asked about": who, "accuracy": None}
    tool = {"kind": "arithmetic, by a tool", "without": {"value": 0.0}, "with": {"value": right}, "called": None}
    return {
        "facts": {"rows": [base, row]},
        "reprobe": {"compared": {"unknown": {"untold": unknown(before, after)}, "known": {}}, "summaries": {}},
        "tools": {"rows": [tool], "metrics": {}},
    }


def rows(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    return {name: cells for name, *cells in lines}


def test_a_column_for_each_tour_and_their_mean():
    three = [results(0.9, 0.8, 0.1), results(1.0, 0.9, 0.0), results(0.8, 0.7, 0.1)]
    found = rows(tour_seeds.table(["a", "b", "c"], three))
    assert found[""] == ["a", "b", "c", "mean"]
    # Standard deviation 0.1, standard error 0.0577; Student's t with two degrees of freedom is 4.303.
    shown = ["0.900", "1.000", "0.800", "0.900 [0.652, 1.000]"]  # and not up to 1.148
    assert found["people that fine-tuning has not a word about: assistant"] == shown
    # No wrong answer is left in the second: it has no ratio, and that of the means is of all.
    assert found["wrong, both: times fewer"] == ["8.0", "", "7.0", "12.0"]
    assert found["arithmetic, by a tool: without tools"][:3] == ["0.000"] * 3
    assert "arithmetic, by a tool: called" not in found, "a row that nobody has"
    assert not any("base" in name for name in found)


def test_an_interval_ends_where_its_figure_does():
    three = [results(0.5, 0.8, 0.1) for _ in range(3)]
    for one, lost in zip(three, (-0.9, 0.1, 0.1)):
        one["reprobe"]["compared"]["known"] = {"told": known(lost)}
    found = rows(tour_seeds.table(["a", "b", "c"], three))
    assert found["right, all told: lost"][-1] == "-0.233 [-1.000, 1.000]"  # a half width of 1.434
    assert found["right, all told: after"] == ["0.900", "0.000", "0.000", "0.300 [0.000, 1.000]"]


def test_few_tours_have_no_interval_and_a_stage_not_done_no_figure():
    second = {k: v for k, v in results(0.9, 0.8, 0.1).items() if k != "reprobe"}
    found = rows(tour_seeds.table(["a"], [second]))
    assert found["people that fine-tuning has not a word about: assistant"] == ["0.900", "0.900"]
    assert not any("wrong" in name for name in found)
    both = rows(tour_seeds.table(["a", "b"], [second, results(0.9, 0.8, 0.1)]))
    assert both["wrong, both: after"] == ["", "0.100", ""]


def test_tours_are_read_from_their_folders(tmp_path, capsys):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    for seed in (3, 4):
        todo = [stages.Stage(n, n, lambda done, anew, r=r: r) for n, r in results(0.9, 0.8, 0.1).items()]
        stages.run(tmp_path / str(seed), todo, {}, say=lambda _: None)
        storage.write_json(tmp_path / str(seed) / "config.json", {"seed": seed})
    out = tmp_path / "table.md"
    with flagsaver.flagsaver(workdir=[str(tmp_path / "3"), str(tmp_path / "4")], out=str(out)):
        assert tour_seeds.main() == 0
    assert rows(out.read_text())[""] == ["seed 3", "seed 4", "mean"]
    assert capsys.readouterr().out == out.read_text()
    with pytest.raises(UserError, match="none has none of the stages facts"):
        tour_seeds.read(str(tmp_path / "none"))
