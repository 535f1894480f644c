"""The flags that choose TPUs."""

from absl import flags

from jaxlm.config import UserError
from launch import tpus

ACCELERATOR = flags.DEFINE_string("accelerator", None, "Slice by name, such as v5p-256 or v6e-16.")
SLICES = flags.DEFINE_integer("slices", 1, "So many slices together.")
SPOT = flags.DEFINE_bool("spot", False, "Cheaper, and may be preempted at any time.")


def chosen() -> tpus.Tpu:
    """What --accelerator and --slices name; `UserError` when there is no such thing."""
    if not ACCELERATOR.value:
        raise UserError("--accelerator is missing: --accelerator=v5p-256 for 128 chips on 32 hosts")
    return tpus.find(ACCELERATOR.value, SLICES.value)
