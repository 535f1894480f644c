"""The programs that are compiled from shapes are those that training runs on arrays; and what is said of them."""

import dataclasses
import types

import jax
import numpy as np
import pytest

import experiments  # noqa: F401  registers definitions and edits
from jaxlm import config, sharding
from jaxlm.config import UserError
from jaxlm.data import loader
from jaxlm.nn.transformer import ModelConfig
from jaxlm.run import compiled, pod, rl, roofline, search, topology, train
from jaxlm.run.roofline import Work
from jaxlm.run.topology import GiB
from jaxlm.sample import slots
from jaxlm.sharding import MeshConfig
from jaxlm.steps import learn, state

TINY = ModelConfig(vocab_size=64, layers=2, width=16, heads=4, kv_heads=2, hidden=32)
SMALL = ("data.context=32", "train.batch_size=8", "mesh=MeshConfig(fsdp=4, tensor=2)", "evaluation.batch_size=8")
T = topology.parse("v5e-8")


def tiny(name: str, *sets: str, edits=()):
    e = config.override(config.resolve(name), {"model": TINY})
    return pod.bound(config.changed(e, name, edits, [*SMALL, *sets]))


def staged(e):
    mesh = sharding.make_mesh(e.mesh)
    pod.check(e, mesh)
    return mesh, {s.name: s for s in pod.stages(e, mesh)}


def described(tree):
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype), x.sharding.shard_shape(x.shape)), tree)


# ------------------------------------------------------------------------------------------ shapes as training has them
def test_the_training_step_is_the_one_that_runs():
    e = tiny("pretrain_tiny", "train.accumulation=2")
    mesh, stages = staged(e)
    real = state.create_sharded(e.model, e.optimizer, e.seed, mesh, e.lora, e.heads)
    given = loader.described(e.train.batch_size, e.data.context + 1, 0, mesh)
    batch = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), given)
    step = train.step_function(e, mesh)
    with jax.set_mesh(mesh):
        ran = step.jitted.lower(real, batch, *step.rest).as_text()
    assert stages["train"].lower().as_text() == ran


def test_slots_are_spread_as_the_decoder_spreads_them():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    shape = {"B": 8, "N": 32, "S": 4, "capacity": 64}
    with jax.set_mesh(mesh):
        real = slots.empty(TINY, **shape)
    assert described(slots.described(TINY, mesh, **shape)) == described(real)


@pytest.mark.parametrize("name, sets", [("ppo_tiny", ()), ("grpo_tiny", ()), ("walks_grpo", ())])
def test_rows_to_learn_from_have_the_fields_that_credit_gives(name, sets, monkeypatch):
    """With the programs replaced by zeros: only which fields there are is asked."""
    e = tiny(name, *sets, "objective.max_tokens=8")
    mesh = sharding.make_mesh(e.mesh)
    learner = rl.learner(e, TINY, mesh)
    zeros = lambda params, batch: (np.zeros(np.subtract(batch.tokens.shape, (0, 1)), np.float32), None)  # noqa: E731
    for program in ("score", "refer", "evaluate"):
        monkeypatch.setitem(learner.__dict__, program, zeros)
    sequence = {
        "tokens": np.arange(33, dtype=np.int32),
        "sampled_by_policy": np.arange(33) > 8,
        "rollout_logprobs": np.zeros(33, np.float32),
        "temperature": np.ones(33, np.float32),
    }
    columns, groups = [sequence] * e.train.batch_size, np.arange(e.train.batch_size) // e.objective.samples
    s = types.SimpleNamespace(params=None, kl_coefficient=0.1, critic=types.SimpleNamespace(params=None))
    credited = learn.credit(learner, s, {}, columns, np.arange(len(columns), dtype=np.float32), groups)
    rows = learn.minibatches(learner, credited.columns, 0, 0)[0]
    made = learn.described(learner, rows.tokens.shape[0], credited=True)
    as_numpy = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), made)
    assert as_numpy == jax.tree.map(lambda x: (x.shape, x.dtype), rows)
    asked = learn.described(learner, rows.tokens.shape[0], credited=False)
    assert set(vars_of(asked)) == {*sequence, "positions", "segments"}


def vars_of(batch):
    return [f.name for f in dataclasses.fields(batch) if getattr(batch, f.name) is not None]


# --------------------------------------------------------------------------------------------------------- the stages
STAGES = {
    ("pretrain_tiny", ()): ["train", "prefill", "decode"],
    ("sft_tiny", ("lora",)): ["train", "prefill", "decode"],
    ("reward_tiny", ()): ["train"],
    ("dpo_tiny", ()): ["train", "prefill", "decode"],
    ("grpo_tiny", ()): ["prefill", "decode", "refer", "policy"],
    ("ppo_tiny", ()): ["prefill", "decode", "reward", "score", "values", "critic", "policy"],
}


@pytest.mark.parametrize("name, edits", STAGES)
def test_every_kind_has_its_stages(name, edits):
    _, stages = staged(tiny(name, edits=edits))
    assert list(stages) == STAGES[name, edits]
    assert all(s.work.flops > 0 for s in stages.values())


def test_what_stays_beside_a_stage():
    """Of PPO: four models throughout, two optimizers, and the cache only while it samples."""
    _, stages = staged(tiny("ppo_tiny"))
    totals = {}
    for s in stages.values():
        kinds = ("parameters", "optimizer", "cache")
        totals[s.name] = [pod.device_bytes(s.given.get(k)) + pod.device_bytes(s.beside.get(k)) for k in kinds]
    assert len({tuple(x[:2]) for x in totals.values()}) == 1
    assert {name for name, x in totals.items() if x[2]} == {"prefill", "decode"}
    model = pod.device_bytes(stages["policy"].given["parameters"])
    assert totals["policy"][0] == pytest.approx(4 * model, rel=0.3)  # critic and reward model have no output kernel


def test_one_is_lowered_of_each_kind():
    """The rest is lowered in the evidence; here the two that share the least with training."""
    _, stages = staged(tiny("grpo_tiny", "objective.max_tokens=8", edits=("lora",)))
    for name in ("decode", "refer"):
        assert "func.func public @main" in stages[name].lower().as_text()


def test_a_definition_without_a_model_or_vocabulary():
    with pytest.raises(UserError, match="--model=SIZE"):
        pod.bound(config.resolve("sft_tiny"))
    unbound = dataclasses.replace(TINY, vocab_size=None)
    with pytest.raises(UserError, match=r"--set=model\.vocab_size=N"):
        pod.bound(config.override(config.resolve("sft_tiny"), {"model": unbound}))
    bytes_too = config.override(config.resolve("pretrain_tiny"), {"model": unbound})
    assert pod.bound(bytes_too).model.vocab_size == 2048


# ------------------------------------------------------------------------------------------------------- the measures
def test_a_step_compiled_here_is_measured(monkeypatch):
    """On CPU devices: every kind of bytes, donation, and collectives over the mesh's own axes."""
    monkeypatch.setattr(roofline, "bandwidth", lambda *_: 1e9)
    mesh, stages = staged(tiny("pretrain_tiny"))
    r = compiled.measure(stages["train"], T, mesh)
    assert r["fits"] and r["bytes"]["parameters"] > 0 and r["bytes"]["optimizer"] > r["bytes"]["parameters"]
    assert r["donated"]["aliased"] >= r["donated"]["state"] > 0
    assert {"fsdp", "tensor"} <= {row["axes"] for row in r["collectives"]}
    assert set(r["least"]) == {"fsdp", "tensor"}
    text = compiled.as_text(r, [])
    assert "updated in place" in text and "fits" in text and "utilization" in text


def record(total, temporaries, **bytes_of):
    held = dict.fromkeys(compiled.KINDS, 0) | bytes_of
    held["temporaries"] = temporaries
    held["other"] = total - sum(held.values())
    return {"total": total, "hbm": 16 * GiB, "fits": total <= 16 * GiB, "bytes": held}


def test_advice_names_what_would_fit():
    model = dataclasses.replace(TINY, width=1024, hidden=4096, layers=24, remat="none")
    work = Work(model, 1e12, tokens=16 * 1024, microbatches=2, length=1024, update=True, logits=True)
    r = record(30 * GiB, 25 * GiB, parameters=1 * GiB, optimizer=2 * GiB)
    tips = compiled.advice(r, work, {"fsdp": 4})
    said = {t.split(":")[0].split(" (")[0]: t for t in tips}
    assert {"--set=model.remat=dots", "--set=model.remat=full", "--set=train.accumulation=8"} <= set(said)
    assert said["--set=train.accumulation=8"].endswith("about 11.2 GiB a chip, fits")
    assert "--set=model.precision.moments=bfloat16" in said and "4 times the chips" in "".join(tips)
    assert not compiled.advice(record(10 * GiB, 5 * GiB), work, {"fsdp": 4})
    one_row = dataclasses.replace(work, tokens=4 * 1024)
    assert not [t for t in compiled.advice(r, one_row, {"fsdp": 4}) if "accumulation" in t]


@pytest.mark.parametrize(
    "message, asked",
    [
        ("the total memory required for HLO temporaries (24.48G) exceeds available HBM (15.75G).", 24.48 * GiB),
        ("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.", 19 * GiB),
        ("something else", 0),
    ],
)
def test_what_a_refusal_says(message, asked):
    assert compiled.asked_for(message, 1 * GiB) == int(asked)


# --------------------------------------------------------------------------------------------------------- the search
def test_the_search_ranks_by_arithmetic(monkeypatch):
    monkeypatch.setattr(roofline, "bandwidth", lambda *_: 1e9)
    e = tiny("pretrain_tiny", "mesh=MeshConfig()")
    ranked = search.candidates(e, T, sharding.make_mesh)
    assert all(c.fits for c in ranked) and {c.experiment.mesh.tensor for c in ranked} == {1, 2}
    assert [sum(c.seconds) for c in ranked] == sorted(sum(c.seconds) for c in ranked)
    assert ranked[0].experiment.model.remat == "none" and ranked[0].experiment.train.accumulation == 1
    again = config.changed(e, "pretrain_tiny", (), ranked[-1].settings)
    assert (again.mesh, again.model, again.train.accumulation) == (
        ranked[-1].experiment.mesh, ranked[-1].experiment.model, ranked[-1].experiment.train.accumulation,
    )  # fmt: skip
    small = dataclasses.replace(T, chip=dataclasses.replace(T.chip, hbm=1e5))
    tight = search.candidates(e, small, sharding.make_mesh)
    assert not tight[0].fits and tight[0].bytes == min(c.bytes for c in tight)


def test_a_batch_that_no_mesh_can_share():
    e = dataclasses.replace(tiny("pretrain_tiny"), mesh=MeshConfig())
    odd = config.override(e, {"train.batch_size": 3})
    with pytest.raises(UserError, match=r"no mesh of 8 chips can train this; .*batch_size 3 must be a multiple"):
        search.candidates(odd, T, sharding.make_mesh)


def test_the_search_offers_what_training_takes(monkeypatch):
    monkeypatch.setattr(roofline, "bandwidth", lambda *_: 1e9)
    e = tiny("pretrain_tiny", "mesh=MeshConfig()", "evaluation.batch_size=4")
    assert {c.experiment.mesh.tensor for c in search.candidates(e, T, sharding.make_mesh)} == {2}  # 4 share a batch


def test_microbatches_are_cut_from_minibatches():
    e = tiny("ppo_tiny", "objective.max_tokens=8", "objective.minibatches=2", "train.batch_size=32")
    four = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    assert search.accumulations(e, four) == [1, 2, 4]
    assert search.accumulations(config.override(e, {"objective.minibatches": 32}), four) == [1]
    assert search.accumulations(tiny("pretrain_tiny", "train.batch_size=24"), four) == [1, 2, 4]


# ---------------------------------------------------------------------------------------------------------- the mesh
def test_slices_are_replicas():
    """Devices of two slices: only `replica` goes from one to the other."""

    def device(i):
        return types.SimpleNamespace(platform="tpu", slice_index=i // 4, id=i)

    parts = sharding._slices([device(i) for i in (4, 0, 5, 1, 2, 3, 6, 7)])
    assert [[d.id for d in part] for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(UserError, match=r"mesh\.replica 1 must be a multiple of the 2 slices"):
        sharding.make_mesh(MeshConfig(), [device(i) for i in range(8)])


def test_the_platform_is_the_meshs():
    assert sharding.platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    mesh = sharding.make_mesh(MeshConfig()).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        assert sharding.platform() == "tpu"
