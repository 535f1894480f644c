"""Compiles every stage of an experiment for a TPU slice, on any machine: does it fit, what does it move, how fast.

usage:
  python -m launch.compile --experiment=NAME --topology=v5p-1024 [--slices=N] [--edit=E]... [--set=PATH=VALUE]...

No TPU is needed and none is touched: libtpu's compiler runs here (pip install -e '.[tpu]'), on the very programs that
training calls. Slices are named as Google Cloud names them: v5e-16 (or v5litepod-16) and v6e-256 count chips, v5p-1024
counts TensorCores and has 512 chips. --slices=N takes N of them, with data parallelism (mesh.replica) between them.

Stages: pretraining, fine-tuning and reward models have their gradient step; those that predict tokens also the
decoder's prefill and one step of it. PPO and GRPO have prefill and decode (the rollout), the scoring of what was
sampled, and the updates of critic and policy; what stays on the devices beside a stage (reference, critic, reward
model) counts with it. --stages=train,decode compiles only these.

Printed for each, and saved by --out=DIR (table.txt, compile.json):
  GiB a chip     parameters, optimizer, cache, batch, temporaries (activations, gathered weights), against the HBM
  to make it fit what would: remat policy, microbatches, chips; each with what it would then take
  donation       what is updated in place; anything less than all of it doubles the state
  collectives    by mesh axis, as the compiled program has them, beside the least that the scheme needs
  FLOPs          by the 6N + 12LDT convention, and what remat makes again
  roofline       seconds at least and at most (no collective overlaps with computation), with the assumptions

A definition that leaves its model to a parent takes --model=SIZE (experiments/sizes.py), and where no tokenizer says
the vocabulary, --set=model.vocab_size=N; a reward model or critic that is not there yet is taken to be of that size.
Schemes are edits: fsdp, fsdp_tensor, context. --search ranks meshes, remat policies and microbatches by arithmetic,
then compiles the gradient step of the best --search_compiles and ranks those by what the compiler made of them.

examples:
  python -m launch.compile --experiment=pretrain_124m --topology=v5e-4 --set=train.accumulation=32
  python -m launch.compile --experiment=pretrain_70b --topology=v5p-1024 --out=compiled/70b
  python -m launch.compile --experiment=ppo_70b --topology=v5p-2048 --stages=decode,policy
  python -m launch.compile --experiment=sft_tiny --model=1.3b --set=model.vocab_size=32768 --edit=fsdp --topology=v6e-8
  python -m launch.compile --experiment=pretrain_8b --topology=v6e-256 --search

Exit codes: 0 every stage fits; 1 one does not; 2 bad definition or input.
"""

import dataclasses
import importlib.metadata
import time

import jax
from absl import flags

import experiments  # noqa: F401  registers definitions and edits
from experiments.sizes import SIZES
from jaxlm import config, sharding, storage
from jaxlm.config import UserError
from jaxlm.run import compiled, exits, pod, roofline, search, topology
from jaxlm.run.topology import GiB
from launch import common

EXIT_TOO_LARGE = 1

EXPERIMENT = flags.DEFINE_string("experiment", None, "Name of the definition; launch.train --list shows them.")
EDIT = flags.DEFINE_multi_string("edit", [], "Named ablation, applied before --set; may be repeated.")
SET = flags.DEFINE_multi_string("set", [], "path=value in the definition; may be repeated.")
MODEL = flags.DEFINE_string("model", None, "Size in experiments/sizes.py, in the place of the definition's model.")
TOPOLOGY = flags.DEFINE_string("topology", None, "The slice, such as v5e-16, v6e-256, v5p-1024.")
SLICES = flags.DEFINE_integer("slices", 1, "How many of them, joined by the data-center network.")
STAGES = flags.DEFINE_list("stages", [], "Only these stages, such as train,decode. Default: every one.")
OUT = flags.DEFINE_string("out", None, "Folder for table.txt and compile.json.")
KEEP_HLO = flags.DEFINE_bool("keep_hlo", False, "Also keep the compiled programs' text in --out.")
SEARCH = flags.DEFINE_bool("search", False, "Rank meshes, remat policies and microbatches for the gradient step.")
SEARCH_COMPILES = flags.DEFINE_integer("search_compiles", 3, "How many of the ranked ones --search compiles.")


def definition():
    """The experiment after --model, edits and settings, with its vocabulary; a slice is a replica at the least."""
    if EXPERIMENT.value is None:
        raise UserError("--experiment=NAME is missing; python -m launch.train --list shows the names")
    if TOPOLOGY.value is None:
        raise UserError("--topology=NAME is missing: a slice such as v5e-16, v6e-256 or v5p-1024")
    e = config.resolve(EXPERIMENT.value)
    if MODEL.value is not None:
        if MODEL.value not in SIZES:
            raise UserError(f"--model: there is no size {MODEL.value!r}; {config.nearest(MODEL.value, SIZES)}")
        e = config.override(e, {"model": SIZES[MODEL.value]})
    e = config.changed(e, EXPERIMENT.value, EDIT.value, SET.value)
    if SLICES.value > 1 and e.mesh.replica == 1:
        e = config.override(e, {"mesh.replica": SLICES.value})
    return pod.bound(e)


def chosen(stages: list[pod.Stage]) -> list[pod.Stage]:
    names = [s.name for s in stages]
    for name in STAGES.value:
        if name not in names:
            raise UserError(f"--stages: the experiment has no stage {name!r}; it has {', '.join(names)}")
    return [s for s in stages if not STAGES.value or s.name in STAGES.value]


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "libtpu")}


class Report:
    """What is printed, kept for --out together with `about`. Saved as it grows: what has been compiled stays."""

    def __init__(self, about: dict):
        self.lines: list[str] = []
        self.about, self.began = about, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def save(self, result: dict) -> None:
        if OUT.value is None:
            return
        root = storage.make_dir(OUT.value)
        storage.write_text(root / "table.txt", "".join(f"{line}\n" for line in self.lines))
        storage.write_json(root / "compile.json", self.about | {"seconds": self.seconds} | result)


def compile_one(stage: pod.Stage, e, t: topology.Topology, mesh) -> tuple[dict, list[str]]:
    """A stage's record, and what would make it fit."""

    def keep(text: str) -> None:
        storage.write_text(storage.make_dir(OUT.value) / f"{stage.name}.hlo.txt", text)

    r = compiled.measure(stage, t, mesh, keep if KEEP_HLO.value else None)
    return r, compiled.advice(r, stage.work, dict(mesh.shape), e.model.precision.moments)


def compile_stages(e, t: topology.Topology, devices: list, report: Report) -> dict:
    mesh = sharding.make_mesh(e.mesh, devices)
    pod.check(e, mesh)
    spread = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one chip"
    unused = f"; {t.size - mesh.size} chips are left out" if mesh.size < t.size else ""
    report.say(f"mesh: {spread}{unused}")
    records = []
    for stage in chosen(pod.stages(e, mesh)):
        r, tips = compile_one(stage, e, t, mesh)
        records.append(r | {"advice": tips})
        report.say("\n" + compiled.as_text(r, tips))
        report.save({"mesh": dict(mesh.shape), "stages": records})
    return {"mesh": dict(mesh.shape), "stages": records}


def search_schemes(e, t: topology.Topology, devices: list, report: Report) -> dict:
    if SEARCH_COMPILES.value < 0:
        raise UserError(f"--search_compiles must be at least 0, got {SEARCH_COMPILES.value}")
    ranked = search.candidates(e, t, lambda m: sharding.make_mesh(m, devices))
    report.say("by arithmetic, a gradient step:")
    for c in ranked:
        fits = "" if c.fits else "  does not fit"
        least, most = c.seconds
        report.say(f"  {least:8.3g} to {most:8.3g} s, {c.bytes / GiB:6.1f} GiB a chip{fits}  {' '.join(c.settings)}")
    told = {"candidates": [{"settings": c.settings, "bytes": c.bytes, "seconds": c.seconds} for c in ranked]}
    out = []
    report.save(told | {"stages": out})
    for c in ranked[: SEARCH_COMPILES.value]:
        mesh = sharding.make_mesh(c.experiment.mesh, devices)
        r, tips = compile_one(search.gradient_step(pod.stages(c.experiment, mesh)), c.experiment, t, mesh)
        out.append(r | {"settings": c.settings, "arithmetic": {"bytes": c.bytes, "seconds": c.seconds}, "advice": tips})
        report.say(f"\n{' '.join(c.settings)}\n{compiled.as_text(r, tips)}")
        report.save(told | {"stages": out})
    out.sort(key=lambda r: (not r["fits"], r["estimate"]["least"] + r["estimate"]["most"]))
    if out:
        report.say("\nas compiled, the best first:")
    for r in out:
        e, fits = r["estimate"], "fits" if r["fits"] else "does not fit"
        took = f"{e['least']:8.3g} to {e['most']:8.3g} s, {r['total'] / GiB:6.1f} GiB a chip, {fits}"
        report.say(f"  {took}  {' '.join('--set=' + repr(s) for s in r['settings'])}")
    return told | {"stages": out}


def main() -> int:
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU that this machine has is left alone
    if KEEP_HLO.value and OUT.value is None:
        raise UserError("--keep_hlo keeps the programs' text in --out=DIR, which is missing")
    e, t = definition(), topology.parse(TOPOLOGY.value, SLICES.value)
    devices = topology.devices(t)
    found = versions()
    about = {"experiment": config.to_dict(e), "topology": dataclasses.asdict(t), "versions": found}
    report = Report(about | {"assumptions": roofline.ASSUMPTIONS})
    report.say(f"{EXPERIMENT.value} on {t.about}; " + ", ".join(f"{k} {v}" for k, v in found.items()))
    result = (search_schemes if SEARCH.value else compile_stages)(e, t, devices, report)
    too_large = [r["stage"] for r in result["stages"] if not r["fits"]]
    report.say("\nassumed:\n" + "\n".join(f"  - {a}" for a in roofline.ASSUMPTIONS))
    verdict = f"does not fit: {', '.join(too_large)}" if too_large else "everything fits"
    report.say(f"{verdict}; {report.seconds:.0f} s in all")
    report.save(result)
    return EXIT_TOO_LARGE if too_large else exits.EXIT_DONE


if __name__ == "__main__":
    common.run(main)
