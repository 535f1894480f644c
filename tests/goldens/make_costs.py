"""Writes what XLA says that tiny steps cost: a change that makes a program dearer shows in review, on any machine.

usage, from the project's root: python -m tests.goldens.make_costs
"""

import json
from pathlib import Path

import jax

import experiments  # noqa: F401  registers definitions
from jaxlm import config, sharding
from jaxlm.nn.transformer import ModelConfig
from jaxlm.run import pod

FILE = Path(__file__).parent / "costs.json"
MODEL = ModelConfig(vocab_size=512, layers=2, width=64, heads=4, kv_heads=2, hidden=128, scan=False)
SETTINGS = ("data.context=64", "train.batch_size=8", "mesh=MeshConfig(fsdp=1)", "evaluation.batch_size=8")
PROGRAMS = {
    "pretrain_tiny": ("train", "prefill", "decode"),
    "reward_tiny": ("train",),
    "ppo_tiny": ("score", "values", "critic", "policy"),
}


def costs() -> dict[str, dict[str, float]]:
    """{experiment/stage: figures} on one CPU device.

    flops, bytes: of arithmetic, and read or written by what is left after fusion. temporaries: bytes at the peak beside
    arguments and results. donated: bytes that are updated in place. Prefill and decode are those of a TPU, with the
    layers stacked; a CPU's own, with the layers apart, tests/sample/test_engine.py compares with them.
    """
    found = {}
    for name, programs in PROGRAMS.items():
        e = config.override(config.resolve(name), {"model": MODEL})
        e = pod.bound(config.changed(e, name, (), SETTINGS))
        for stage in pod.stages(e, sharding.make_mesh(e.mesh)):
            if stage.name not in programs:
                continue
            compiled = stage.lower().compile()
            cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
            found[f"{name}/{stage.name}"] = {
                "flops": cost["flops"],
                "bytes": cost["bytes accessed"],
                "temporaries": memory.temp_size_in_bytes,
                "donated": memory.alias_size_in_bytes,
            }
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps({"jax": jax.__version__} | costs(), indent=1) + "\n")
