"""Flags of the programs that offer tools to a model."""

from absl import flags

UNSAFE_PYTHON = flags.DEFINE_bool(
    "unsafe_python",
    False,
    "Where nothing isolates Python, run what the model writes as this user, who can lose files by it.",
)
