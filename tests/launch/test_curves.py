"""launch.curves in seconds: each arm and its control from the seed's own parent, resumption, what the table says."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.run import rl_evals
from jaxlm.run.load import load_experiment
from jaxlm.run.log import MetricsLog
from launch import curves

flags.FLAGS.set_gnu_getopt(True)
START = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.hidden=16",
    "train.steps=4",
    "data.sources.0.count=60",
]
SETS = ["train.steps=4", "train.batch_size=8", "evaluation.every=1", "objective.heldout_prompts=2",
        "objective.heldout_samples=4"]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("curves")
    start = [*START, f"data.cache={root / 'cache'}"]
    asked = curves.Asked(["walks_grpo"], "walks_sft", sets=SETS, start_sets=start)
    return root / "w", asked, curves.curves(root / "w", asked, [2, 5])


def test_arms_begin_from_the_parent_of_their_seed(done):
    root, _, found = done
    assert list(found) == ["walks_grpo"] and list(found["walks_grpo"]["arms"]) == [
        "walks_grpo", "walks_grpo+random_reward",
    ]  # fmt: skip
    for seed in (2, 5):
        for arm in found["walks_grpo"]["arms"]:
            e = load_experiment(root / str(seed) / arm)
            assert (e.seed, e.parent) == (seed, str(root / str(seed) / "start"))
            assert [s for s, _ in found["walks_grpo"]["arms"][arm]["curves"][str(seed)]] == [0, 1, 2, 3, 4]
    starts = [arm["curves"]["2"][0] for arm in found["walks_grpo"]["arms"].values()]
    assert starts[0] == starts[1]


def test_the_answer_is_written_and_the_same_command_trains_nothing(done, capsys):
    root, asked, found = done
    written = json.loads((root / "results.json").read_text())
    assert written["experiments"] == json.loads(json.dumps(found)) and written["seeds"] == [2, 5]
    assert (root / "table.md").read_text() == curves.table(found, "eval/score")
    assert (root / "report" / "curves.png").exists()
    capsys.readouterr()
    assert curves.curves(root, asked, [5])["walks_grpo"]["gain"]["n"] == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("done before" in line for line in said)
    course = curves.curves(root, asked, [5], since=4)["walks_grpo"]["arms"]["walks_grpo"]["course"]["5"]
    assert course["lowest since"] == course["end"]
    assert all("done before" in line for line in capsys.readouterr().out.splitlines())
    assert "from update 4" in (root / "table.md").read_text()


def test_what_is_said_of_curves_whose_truth_is_known():
    def arm(*values):
        return [{"step": 10 * i, "eval/score": v, "eval/greedy": 1 - v} for i, v in enumerate(values)]

    asked = curves.Asked(["walks_ppo"], "walks_sft")
    runs = {
        seed: {
            "walks_ppo": arm(0.5, 0.9 + up, 0.8, 0.95, 1.0),
            "walks_ppo+random_reward": arm(0.5, 0.4, 0.52, 0.5, 0.5),
        }
        for seed, up in ((0, 0.0), (1, 0.1))
    }
    found = curves.results(asked, runs, "eval/score")["walks_ppo"]
    assert found["arms"]["walks_ppo"]["course"]["1"] == {
        "start": 0.5, "since": 1.0, "lowest since": 0.8, "highest": 1.0, "end": 1.0,
    }  # fmt: skip
    assert found["gain"]["mean"] == 0.5
    assert found["arms"]["walks_ppo"]["others"] == {"eval/greedy": {"0": [0.5, 0.0], "1": [0.5, 0.0]}}
    table = curves.table({"walks_ppo": found}, "eval/score")
    assert "| walks_ppo | 0.500 (0.500, 0.500) | 0.950 (0.900, 1.000) | 0.800 (0.800, 0.800) |" in table
    assert "rises by at most 0.020 above its start" in table
    # At least .95 by update 25, the first evaluation from which on is that of 30, and never below .95 after it.
    found = curves.results(asked, runs, "eval/score", 25)["walks_ppo"]
    course = found["arms"]["walks_ppo"]["course"]
    assert [(c["since"], c["lowest since"], c["highest"]) for c in course.values()] == [(0.95, 0.95, 1.0)] * 2
    assert "| from update 25 | lowest since |" in curves.table({"walks_ppo": found}, "eval/score", 25)
    assert curves.course([(0, 0.5), (10, 0.9), (20, 0.8)], 15)["lowest since"] == 0.8
    assert curves.course([(0, 0.5), (10, 0.9)], 15)["lowest since"] == 0.9  # ended by an alarm


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "--experiments needs"),
        ({"experiments": ["walks_ppo"]}, "one of --start=NAME and --parent=RUN"),
        ({"experiments": ["walks_ppo"], "start": "walks_sft", "seeds": ["0", "0"]}, "--seeds takes whole numbers"),
        ({"experiments": ["walks_sft"], "start": "walks_sft"}, "walks_sft is another training"),
        ({"experiments": ["walks_ppo"], "start": "walk_sft"}, "walks_sft"),
        ({"experiments": ["walks_ppo"], "start": "walks_sft", "set": ["train.step=3"]}, "train.steps"),
        (
            {"experiments": ["walks_ppo"], "start": "walks_sft", "set": ["data=Data()"]},
            "from Prompts, and data is Data",
        ),
        ({"experiments": ["walks_ppo"], "start": "walks_sft", "since": 101}, "beyond the 100 updates of walks_ppo"),
        (
            {"experiments": ["walks_ppo"], "start": "walks_sft", "metric": "eval/scor"},
            "no 'eval/scor'; nearest: eval/score",
        ),
    ],
)
def test_bad_input(given, message, tmp_path):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with (
        flagsaver.flagsaver(workdir=str(tmp_path / "w"), **({"set": []} | given)),
        pytest.raises(UserError, match=message),
    ):
        curves.main()
    assert not (tmp_path / "w").exists()


def test_prompts_without_answers_have_curves_of_the_reward(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(20)))
    asked = curves.Asked(["walks_ppo"], "walks_sft", sets=[f"data.task=PromptFile(path={tmp_path}/p.jsonl)"])
    with pytest.raises(UserError, match=r"--metric: walks_ppo measures no 'eval/score'; .*eval/reward"):
        curves.curves(tmp_path / "w", asked, [0])  # told before anything is trained
    assert not (tmp_path / "w").exists()
    monkeypatch.setattr(curves.stages, "run", lambda *_, **__: None)
    for arm in asked.arms("walks_ppo"):
        log = MetricsLog(tmp_path / arm)
        for step in (0, 4):
            log.write(step, {"eval/reward": 0.5 * step, "eval/length": 3.0})
            log.write(step + 1, {"train/reward": 9.0})
        log.close()
    found = curves.results(asked, {0: curves.run_seed(asked, 0, tmp_path)}, "eval/reward")
    assert found["walks_ppo"]["arms"]["walks_ppo"]["curves"]["0"] == [(0, 0.0), (4, 2.0)]


def test_a_figure_that_nobody_measured(done):
    root, _, found = done
    records = [{"step": 0, **{f"eval/{k}": 0.5 for k in ("score", "greedy")}}]
    with pytest.raises(UserError, match=r"eval/thinking/better.*eval/greedy, eval/score"):
        curves.curve(records, "eval/thinking/better")  # that replies think is not known before
    e = load_experiment(root / "2" / "walks_grpo")
    measured = {"eval/score", *found["walks_grpo"]["arms"]["walks_grpo"]["others"]}
    assert measured == {n for n in rl_evals.names(e.objective, True) if "thinking" not in n}
