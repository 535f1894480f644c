"""TPU slices by the names that users know, such as v5p-256: the one place that knows which there are.

The names count what Google Cloud's do: chips of v5e and v6e, TensorCores of v4 and v5p, of which a chip has two.
"""

import dataclasses
import math
import re

from jaxlm.config import UserError, nearest

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8", "8x8x12", "8x8x16")
CUBES += ("8x12x16", "8x16x16", "12x16x16", "16x16x16")
SHAPES = {"v4": CUBES, "v5e": FLAT, "v5p": (*CUBES, "16x16x24"), "v6e": FLAT}  # that can be asked for
CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}  # what one chip adds to the number in a name
ALIASES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A generation, and chips along each dimension."""

    generation: str
    shape: str

    @property
    def chips(self) -> int:
        return math.prod(int(n) for n in self.shape.split("x"))

    @property
    def number(self) -> int:
        """What stands in its name."""
        return self.chips * CORES[self.generation]

    @property
    def name(self) -> str:
        return f"{self.generation}-{self.number}"


def by_name() -> dict[str, Slice]:
    """Every slice, the smallest of a generation first."""
    found = [Slice(generation, shape) for generation, shapes in SHAPES.items() for shape in shapes]
    return {s.name: s for s in found}


def find(name: str) -> Slice:
    """`v5e-16` (or `v5litepod-16`), `v6e-256`, `v5p-1024` (512 chips); `UserError` with the nearest for other names."""
    known = by_name()
    parsed = re.fullmatch(r"([a-z]\w*?)-(\d+)", name.strip().lower())
    generation = ALIASES.get(parsed[1], parsed[1]) if parsed else None
    if generation not in SHAPES:
        raise UserError(f"unknown TPU slice {name!r}, a generation and a size such as v5p-128; {nearest(name, known)}")
    number = int(parsed[2])
    if (found := known.get(f"{generation}-{number}")) is not None:
        return found
    sizes = [s.number for s in known.values() if s.generation == generation]
    close = sorted(sorted(sizes, key=lambda n: abs(n - number))[:2])
    counted = "chips" if CORES[generation] == 1 else f"TensorCores, {CORES[generation]} a chip"
    there = ", ".join(f"{generation}-{n}" for n in close)
    raise UserError(f"there is no slice {name!r}: {generation} counts {counted}; nearest: {there}")
