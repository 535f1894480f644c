"""What the suites share: turns, rows, the table and what is drawn of it."""

import pytest

from launch import bench_rows
from launch.bench_rows import OURS, row


def test_all_take_turns_and_the_best_other_counts():
    order = []
    seconds = bench_rows.in_turn({n: lambda n=n: order.append(n) for n in "ab"}, 2)
    assert order == ["a", "b"] * 3 and {n: len(s) for n, s in seconds.items()} == {"a": 2, "b": 2}
    r = bench_rows.compared({OURS: [1.0, 2.0, 1.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 2.0, 3.0]})
    assert r["times as fast"] == {"as": "fast", "median": 2.0, "min": 1.0, "max": 3.0}
    assert r["times as fast as"] == {"slow": 9.0, "fast": 2.0} and bench_rows.compared({OURS: [1.0]}) == {}


def test_a_row_has_rates_of_the_median_round_and_shares_of_what_was_measured():
    r = row([2.0, 1.0, 4.0], {"tokens": 100, "MB": 3}, flops=8e9, peak=1e10, memory=5e8)
    assert r == {
        "seconds": {"median": 2.0, "min": 1.0, "max": 4.0},
        "tokens per second": 50.0,
        "MB per second": 1.5,
        "model FLOPs utilization": 0.4,
        "GB at most": 0.5,
    }
    assert row([1.0]) == {"seconds": {"median": 1.0, "min": 1.0, "max": 1.0}}


RESULTS = {
    "load": {"updates": 3},
    "a": {"shape": {"rows": 2}, OURS: row([2.0, 1.0], {"tokens": 30}), "times as fast": {"as": "x", "median": 1.0}},
    "b, time": {
        OURS: {"seconds": bench_rows.spread([9.0]), "ms an update": bench_rows.spread([3.0, 5.0, 4.0])},
        "times as fast": {"ms an update": bench_rows.spread([2.0])},
    },
    "b, quality": {"parent": {"score": 0.5}, OURS: {"score": bench_rows.spread([0.6])}, "both": {"score": "+0.1"}},
}


def test_each_part_is_drawn_by_the_figure_that_says_most_and_ratios_are_not():
    assert bench_rows.drawn(RESULTS) == {
        ("a", "tokens per second"): {OURS: (pytest.approx(20.0), pytest.approx(15.0), pytest.approx(30.0))},
        ("b, time", "ms an update"): {OURS: (4.0, 3.0, 5.0)},
        ("b, quality", "score"): {"parent": (0.5, 0.5, 0.5), OURS: (0.6, 0.6, 0.6)},
    }


def test_the_table_shows_spreads_as_three_figures():
    lines = bench_rows.table(RESULTS).splitlines()
    assert lines[0] == "load" and lines[1].split() == ["updates", "3"]
    assert next(line for line in lines if "ms an update" in line).split()[-5:] == ["3", "..", "4", "..", "5"]


@pytest.mark.parametrize("results", [RESULTS, {"load": {"updates": 3}}])
def test_the_plot_is_a_picture_even_of_nothing(results, tmp_path):
    pytest.importorskip("matplotlib")
    bench_rows.plot(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
