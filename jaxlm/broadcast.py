"""What process 0 has found out, told to all: a decision of the host must be the same everywhere, or collectives wait.

Tools and foreign functions are asked by process 0 alone: asked twice, they may say two things.
"""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.config import UserError

T = TypeVar("T")


def from_first(ask: Callable[[], T]) -> T:
    """Process 0's `ask()`, plain JSON, on every process; where it raises `UserError`, all do.

    Every process calls it, from the thread of its other collectives and at the same place among them. One process alone
    just asks.
    """
    if jax.process_count() == 1:
        return ask()
    said, error = {}, None
    if jax.process_index() == 0:
        try:
            said = {"value": ask()}
        except UserError as e:
            said, error = {"error": str(e)}, e
    text = json.dumps(said).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # A power of two, so that few shapes compile.
    words = np.zeros(1 << (-(-size // 4) - 1).bit_length(), np.uint32)
    if jax.process_index() == 0:
        words.view(np.uint8)[:size] = np.frombuffer(text, np.uint8)
    words = np.asarray(multihost_utils.broadcast_one_to_all(words), np.uint32)
    said = json.loads(words.view(np.uint8)[:size].tobytes())
    if "error" in said:
        raise error or UserError(f"on process 0: {said['error']}")
    return said["value"]
