"""The grid, equal compute, and the answer of a sweep."""

import dataclasses
import json

import numpy as np
import pytest

import experiments  # noqa: F401  registers definitions
from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data.prepare import Data
from jaxlm.nn import flops, lora
from jaxlm.nn.lora import LoRA
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import Muon
from jaxlm.run import checkpoint, sweep
from jaxlm.run.experiment import Experiment
from jaxlm.run.sweep import Variant
from jaxlm.steps.preference import Preference
from jaxlm.steps.reward import RewardModel


def names(variants):
    return [v.name for v in variants]


def test_grid_of_edits():
    variants = sweep.grid(["a", "b", "a+b"], [])
    assert names(variants) == ["baseline", "a", "b", "a+b"]
    assert variants[3].edits == ("a", "b") and variants[3].sets == ()


def test_grid_crosses_edits_with_settings():
    variants = sweep.grid(["a"], ["optimizer.lr=1e-3,3e-3", "model.layers=2,4"])
    assert len(variants) == 1 + 2 * 4
    assert Variant("a+optimizer.lr=3e-3+model.layers=2", ("a",), ("optimizer.lr=3e-3", "model.layers=2")) in variants


def test_a_node_is_one_value():
    variants = sweep.grid([], ["optimizer=AdamW(lr=1e-3, b2=0.99), Muon()"])
    assert [v.sets for v in variants[1:]] == [("optimizer=AdamW(lr=1e-3, b2=0.99)",), ("optimizer=Muon()",)]


@pytest.mark.parametrize("text", ["optimizer.lr", "optimizer.lr="])
def test_bad_settings(text):
    with pytest.raises(UserError, match="--vary takes path=value"):
        sweep.grid([], [text])


def test_folders_are_safe_and_distinct():
    odd = [Variant("optimizer=Muon(lr=1)", (), ()), Variant("optimizer=Muon(lr 1)", (), ()), Variant("x" * 300, (), ())]
    made = [sweep.folder(v, 0) for v in [Variant("no_rope+muon"), *odd]]
    assert made[0] == "runs/no_rope+muon/seed0" and len(set(made)) == 4
    for path in made:
        assert len(path) < 120 and not set(path) & set(" ()*?:\\'\"")


def test_repeats_run_once():
    a, b, c = Variant("baseline"), Variant("lr=1"), Variant("edit")
    kept, notes = sweep.drop_repeats({a: "same", b: "same", c: "other"})
    assert list(kept) == [a, c] and notes == [
        "lr=1 resolves to the same definition as baseline: it runs once, as baseline"
    ]


def test_a_setting_that_undoes_an_edit_is_named():
    e = config.resolve("pretrain_tiny")
    edited = config.override(e, {"model.width": 64, "optimizer": Muon()})
    sets = ["model.width=32", "model.layers=2", "optimizer=AdamW()", "data.context=8"]
    lost = [line.split()[0] for line in sweep.undone(Variant("wide"), e, edited, sets)]
    assert lost == ["--set=model.width=32", "--set=optimizer=AdamW()"]


def test_an_update_costs_what_its_objective_makes_of_it():
    model = ModelConfig(vocab_size=64, layers=2, width=32, heads=2)
    e, tokens = Experiment(model=model), 16 * Data().context
    whole = sweep.flops_per_step(e, 64)
    passed = flops.flops_per_token(model, Data().context)
    assert whole == passed["train"] * tokens
    adapted = sweep.flops_per_step(dataclasses.replace(e, lora=LoRA(rank=1)), 64)
    assert adapted == lora.flops_per_token(model, LoRA(rank=1), Data().context)["train"] * tokens < 0.9 * whole
    compared = sweep.flops_per_step(dataclasses.replace(e, objective=Preference()), 64)
    assert compared == whole + passed["forward"] * tokens
    # A reward model makes no logits, with adapters or without: neither a pass nor a gradient of them.
    larger = dataclasses.replace(model, vocab_size=6400)
    for adapters in (None, LoRA(rank=1)):
        scored = dataclasses.replace(e, objective=RewardModel(), lora=adapters)
        assert sweep.flops_per_step(scored, 64) == sweep.flops_per_step(dataclasses.replace(scored, model=larger), 64)


def test_equal_flops():
    assert sweep.steps_at_equal_flops(1000, 2e9, 4e9) == 500
    assert sweep.steps_at_equal_flops(3, 1.0, 100.0) == 1


VARIANTS = [Variant("baseline"), Variant("good", ("good",)), Variant("noise"), Variant("bad"), Variant("broken")]


def values(seeds=3):
    rng = np.random.default_rng(0)
    base = 2.0 + 0.01 * rng.normal(size=seeds)
    shift = {"baseline": 0, "good": -0.1, "noise": 0.0, "bad": 0.1, "broken": 0.0}
    out = {
        name: {s: float(base[s] + delta + (0.002 * rng.normal() if name != "baseline" else 0)) for s in range(seeds)}
        for name, delta in shift.items()
    }
    out["noise"] = {0: base[0] + 0.004, **{s: base[s] - 0.004 for s in range(1, seeds)}}
    out["broken"][1] = None
    return out


def test_verdicts_and_pairs():
    results = sweep.analyze(VARIANTS, values(), "eval/bits_per_byte")
    said = {r["name"]: r["verdict"] for r in results["variants"]}
    expected = {
        "baseline": "",
        "good": "better",
        "noise": "within noise",
        "bad": "worse",
        "broken": "diverged (1 of 3)",
    }
    assert said == expected
    flipped = sweep.analyze(VARIANTS, values(), "eval/accuracy", lower_is_better=False)
    assert [r["verdict"] for r in flipped["variants"]][1] == "worse"
    assert results["variants"][4]["seeds"]["1"] is None and results["variants"][4]["n"] == 2
    json.dumps(results, allow_nan=False)


def test_a_run_that_ends_in_nan_counts_as_diverged():
    results = sweep.analyze(VARIANTS[:2], {"baseline": {0: 1.0, 1: 1.1}, "good": {0: float("nan"), 1: 1.0}}, "m")
    assert results["variants"][1]["verdict"] == "diverged (1 of 2)"
    json.dumps(results, allow_nan=False)


def test_table_is_sorted_and_states_the_noise():
    costs = {v.name: {"steps": 100, "flops": 1.5e12} for v in VARIANTS}
    text = sweep.table(sweep.analyze(VARIANTS, values(), "eval/bits_per_byte", costs=costs))
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[:3] == ["variant", "baseline", "good"] and rows[-1] == "bad"
    assert "Noise floor" in text and "lower is better" in text and "1.5e+12" in text
    assert "4 comparisons at 95%" in text
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1


def test_one_seed_claims_nothing():
    one = {name: {0: v[0]} for name, v in values().items()}
    text = sweep.table(sweep.analyze(VARIANTS, one, "m"))
    assert "the noise is unknown" in text and "better or worse" in text and "| better" not in text


def test_plot(tmp_path):
    for variants, v in ((VARIANTS, values()), (VARIANTS[:1], {"baseline": {0: 1.0}})):
        sweep.plot(sweep.analyze(variants, v, "m"), tmp_path / "report" / "sweep.png")
        assert (tmp_path / "report" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_metric_is_chosen_only_when_there_is_one():
    one = {"eval/python/loss": 1.0, "eval/python/bits_per_byte": 2.0}
    two = one | {"eval/files/loss": 1.0, "eval/files/bits_per_byte": 2.0}
    assert sweep.choose_metric([one, one]) == "eval/python/bits_per_byte"
    assert sweep.choose_metric([two | {"eval/all/bits_per_byte": 2.0}]) == "eval/all/bits_per_byte"
    with pytest.raises(UserError, match="--metric"):
        sweep.choose_metric([two])


def test_only_the_last_step_counts(tmp_path):
    lines = [{"step": 5, "eval/x/loss": 3.0}, {"step": 10, "train/loss": 1.0}, {"step": 10, "eval/x/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line | {"seconds": 1.0}) + "\n" for line in lines))
    assert sweep.final_metrics(tmp_path, 10) == {"eval/x/loss": 2.0}
    assert sweep.final_metrics(tmp_path, 20) is None
    assert sweep.final_metrics(tmp_path / "nothing", 20) is None
    chosen = tmp_path / checkpoint.CHOSEN  # an alarm has ended it there, or at 5, from where it has gone on
    for ended, found in ((10, {"eval/x/loss": 2.0}), (5, None)):
        chosen.write_text(json.dumps({"schema_version": 1, "step": 2, "ended": ended, "back": 2}))
        assert sweep.final_metrics(tmp_path, 20) == found
