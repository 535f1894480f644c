"""Every shipped experiment resolves to its golden and survives JSON; every edit applies to some experiment."""

import dataclasses

import jax
import pytest

import experiments  # noqa: F401  registers definitions and edits
from jaxlm import config, sharding
from jaxlm.config import UserError
from jaxlm.nn import transformer
from jaxlm.optim.optimizers import AdamW
from jaxlm.run import rl
from jaxlm.run.experiment import Experiment, validate
from jaxlm.steps import state
from tests.goldens.make_experiments import FOLDER

REFRESH = "if the change is meant: python -m tests.goldens.make_experiments"


def bound(e: Experiment) -> Experiment:
    """The definition with a model and a vocabulary, as training binds them; a child's model is its parent's."""
    if e.model is None:
        e = dataclasses.replace(e, model=config.resolve("pretrain_tiny").model)
    return config.override(e, {"model.vocab_size": e.model.vocab_size or 512})


def check(e: Experiment) -> None:
    config.check(e)
    validate(e, 1)
    transformer.validate(bound(e).model)
    assert config.from_json(Experiment, config.to_json(e)) == e


@pytest.mark.parametrize("name", sorted(config.EXPERIMENTS))
def test_resolves_to_its_golden(name):
    e = config.resolve(name)
    check(e)
    file = FOLDER / f"{name}.json"
    assert file.exists(), f"{name} has no golden; {REFRESH}"
    golden = config.from_json(Experiment, file.read_text(encoding="utf-8"))
    assert not config.diff(golden, e), REFRESH
    assert file.read_text(encoding="utf-8") == config.to_json(e), REFRESH


@pytest.mark.parametrize(
    "path, seed, end", [("seed", -1, "to 2147483647"), ("seed", 2**31, ""), ("data.seed", -1, "on")]
)
def test_a_seed_that_no_run_can_have_is_no_definition(path, seed, end):
    with pytest.raises(UserError, match=f"^{path} must be a whole number from 0 {end}.*, got {seed}$"):
        config.resolve("pretrain_tiny", sets=[f"{path}={seed}"])
    with pytest.raises(UserError, match=f"{path} must be"):
        config.override(config.resolve("pretrain_tiny", sets=["seed=2147483647"]), {path: seed})


@pytest.mark.parametrize(
    "name, missing, settings",
    [
        ("ppo_tiny", "reward_tiny", "--set=objective.reward.0.run=WORKDIR --set=objective.critic.run=WORKDIR"),
        ("distill_tiny", "sft_tiny", "--set=objective.teacher=WORKDIR"),
    ],
)
def test_a_run_that_is_named_by_default_and_missing_is_told_with_its_settings(
    name, missing, settings, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^no such workdir: runs/{missing}; name the run to take with {settings}$"):
        rl.run(config.resolve(name), tmp_path / "run")
    here = [s.removeprefix("--set=").replace("WORKDIR", str(tmp_path)) for s in settings.split()]
    with pytest.raises(UserError, match="only with a parent: --set=parent=WORKDIR"):  # the next thing that is missing
        rl.run(config.resolve(name, sets=[*here, "model=none"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(config.EXPERIMENTS))
def test_a_model_can_be_built(name):
    """Shapes and logical axes of every size, without a byte of weights."""
    model = bound(config.resolve(name)).model
    transformer.abstract(model)
    transformer.specs(model)


def test_no_golden_is_left_over():
    assert {f.stem for f in FOLDER.glob("*.json")} == set(config.EXPERIMENTS), REFRESH


@pytest.mark.parametrize("name", sorted(config.EDITS))
def test_edit_applies_and_changes_something(name):
    changed = []
    for experiment in config.EXPERIMENTS:
        try:
            e = config.resolve(experiment, [name])
        except UserError:
            continue
        check(e)
        changed += config.diff(config.resolve(experiment), e)
    assert changed, f"{name} changes no experiment"
    assert config.EDITS[name].__doc__, f"{name} does not say what it changes"


# What a parent's adapters cannot be trained for, and how the edit says so: nothing so far.
WITHOUT_LORA: dict[str, str] = {}
CHILDREN = sorted(name for name in config.EXPERIMENTS if config.resolve(name).model is None)


@pytest.mark.parametrize("name", CHILDREN)
def test_lora_applies_to_whatever_has_a_parent(name):
    """Adapters train, beside heads that a language model does not have; the parent's own parameters stay."""
    if name in WITHOUT_LORA:
        with pytest.raises(UserError, match=WITHOUT_LORA[name]):
            check(config.resolve(name, ["lora"]))
        return
    e = config.override(config.resolve(name, ["lora"]), {"parent": "runs/parent"})
    check(e)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=1))
    made = state.abstract(bound(e).model, e.optimizer, mesh, e.lora, e.heads)
    heads = () if e.heads == state.LM else ("heads",)
    assert made.trainable == (*heads, "adapters") and jax.tree.leaves(made.params["adapters"])
    plain = config.override(config.resolve(name), {"parent": "runs/parent"})
    if isinstance(plain.optimizer, AdamW):
        assert e.optimizer.lr == pytest.approx(10 * plain.optimizer.lr)


def test_experiments_say_what_they_are():
    assert not [name for name, fn in config.EXPERIMENTS.items() if not fn.__doc__]


def test_the_golden_sees_a_changed_default():
    e = config.resolve("pretrain_tiny")
    golden = config.from_json(Experiment, (FOLDER / "pretrain_tiny.json").read_text(encoding="utf-8"))
    changed = dataclasses.replace(e, train=dataclasses.replace(e.train, steps=e.train.steps + 1))
    assert config.diff(golden, changed) == [f"train.steps: {e.train.steps} -> {e.train.steps + 1}"]
