"""The collectives of a compiled program, read from its HLO text: how often each runs, and what it moves.

Only the text says which collectives the compiler made of the shardings. A loop's body stands in it once, so what is in
it counts as often as the loop turns; a loop without a fixed number of turns, such as decoding, counts once.
"""

import dataclasses
import math
import re

import numpy as np

SIZES = {"token": 0, "pred": 1, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "c64": 8, "c128": 16}
OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """bytes: that a device receives, each time. group: partitions that take part together, the first such group.
    times: in one run of the program. loops: turns of the loops around it, the outermost first. overlaps: it is
    asynchronous, so that computation may go on meanwhile. source: where the traced program has it."""

    op: str
    bytes: float
    group: tuple[int, ...]
    times: int
    loops: tuple[int, ...]
    overlaps: bool
    source: str


def _size(dtype: str) -> float:
    return SIZES[dtype] if dtype in SIZES else int(re.sub(r"\D", "", dtype)) / 8


def _shapes(text: str) -> list[float]:
    """Bytes of each array of a type, a tuple's in order."""
    found = _SHAPE.findall(text)
    return [_size(dtype) * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in found]


def first_group(text: str, partitions: int) -> tuple[int, ...]:
    """Of `replica_groups` in any of the forms that XLA prints, or of `source_target_pairs`: who is with partition 0."""
    if found := re.search(r"source_target_pairs=\{\{(.*?)\}\}", text):
        pairs = [tuple(int(x) for x in pair.split(",")) for pair in found[1].split("},{")]
        return _reached(pairs)
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[2])
        return _in_mesh(sizes, taken)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, dims = ([int(x) for x in found[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if found[3]:
            ids = ids.transpose([int(x) for x in found[3].split(",")])
        return tuple(ids.reshape(-1, groups[-1])[0].tolist())
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(x) for x in found[1].split(","))
    return tuple(range(partitions))


def _reached(pairs) -> tuple[int, ...]:
    """The ring that a permutation sends the first source's data around."""
    target, at = dict(pairs), pairs[0][0]
    ring = [at]
    while (at := target.get(at, ring[0])) not in ring:
        ring.append(at)
    return tuple(sorted(ring))


def _in_mesh(sizes: dict[str, int], taken) -> tuple[int, ...]:
    """`taken`: axes of a mesh, or a part of one, as (axis, size before the part, size of the part)."""
    ids, dims, where = np.arange(math.prod(sizes.values())), [], []
    for name, size in sizes.items():
        parts = [(int(a), int(b)) for n, a, b in taken if n == name and a]
        whole = any(n == name and not a for n, a, _ in taken)
        before, part = parts[0] if parts else (1, size)
        dims += [before, part, size // (before * part)]
        where += [False, whole or bool(parts), False]
    index = tuple(slice(None) if w else 0 for w in where)
    return tuple(np.atleast_1d(ids.reshape(dims)[index]).reshape(-1).tolist())


def _received(op: str, whole: list[float], started: bool, scattered: bool, n: int) -> float:
    """Bytes that one of n devices receives, by the best algorithm on a ring."""
    if op == "collective-permute":
        return whole[1] if started else sum(whole)
    if started and op != "all-reduce":  # of an asynchronous one the type holds the operands, too
        whole = whole[len(whole) // 2 :]
    total = sum(whole)
    if scattered:  # an all-reduce of which each device keeps its part
        return total * (n - 1) / n
    factor = {"all-gather": 1 / n, "all-reduce": 2 / n, "reduce-scatter": 1.0}.get(op, 1 / n)
    return total * factor * (n - 1)


def _parse(text: str) -> tuple[dict[str, list], str]:
    """{computation: [(name, type, op, rest of the line)]}, and the entry's name."""
    found, entry, current = {}, "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(instruction.groups())
    return found, entry


def _turns(computations, rest: str) -> int:
    """Of a while loop; 1 where the text does not say."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    body = computations.get(condition[1], []) if condition else []
    constants = {n: int(v[1]) for n, _, op, r in body if op == "constant" and (v := re.match(r"(\d+)\)", r))}
    compared = [r for _, _, op, r in body if op == "compare" and "direction=LT" in r]
    limits = [v for n, v in constants.items() if len(compared) == 1 and re.search(rf"%?{re.escape(n)}\)", compared[0])]
    return limits[0] if len(limits) == 1 else 1


def instructions(text: str, op: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, turns of the loops around it, the outermost first) of every instruction that is this operation."""
    computations, entry = _parse(text)
    out: list[tuple[str, tuple[int, ...]]] = []

    def walk(name: str, loops: tuple[int, ...]):
        for _, shape, found, rest in computations.get(name, []):
            if found == op:
                out.append((shape, loops))
            elif found == "while":
                walk(re.search(r"body=%?([\w.\-]+)", rest)[1], (*loops, _turns(computations, rest)))
            elif found in ("fusion", "call"):
                for called in _CALLED.findall(rest):
                    walk(called, loops)

    walk(entry, ())
    return out


def collectives(text: str, partitions: int, slices: int = 1) -> list[Collective]:
    """Every collective of a program's text, in the order in which they stand in it.

    What goes between TPU slices is no collective in the text: each chip hands its part to the host, which exchanges it
    with the other slices' hosts. It is called `exchange` here, and its group has one chip of each slice.
    """
    computations, entry = _parse(text)
    out: list[Collective] = []
    chains: set[str] = set()

    def walk(name: str, loops: tuple[int, ...], scattered: bool, wrapped: bool):
        for _, shape, op, rest in computations.get(name, []):
            base, started = op.removesuffix("-start"), op.endswith("-start")
            chain = re.search(r'chain_id="(\d+)"', rest)
            if base in OPS and chain and chain[1] in chains:
                continue  # another step of one that stands in all the computations that it runs beside
            if op == "send" and "megascale" in rest:
                group = tuple(range(0, partitions, partitions // slices))
                out.append(Collective("exchange", _shapes(shape)[0], group, math.prod(loops), loops, True, ""))
            elif base in OPS:
                group = first_group(rest, partitions)
                moved = _received(base, _shapes(shape), started, scattered, len(group))
                source = re.search(r'op_name="([^"]*)"', rest)
                kind = "reduce-scatter" if scattered else base
                chains.update([chain[1]] if chain else [])
                overlaps = started or wrapped or bool(chain) or "async_collective_name" in rest
                at = source[1] if source else ""
                out.append(Collective(kind, moved, group, math.prod(loops), loops, overlaps, at))
            elif op == "while":
                inside = re.search(r"body=%?([\w.\-]+)", rest)[1]
                walk(inside, (*loops, _turns(computations, rest)), scattered, wrapped)
            elif op in ("fusion", "call", "async-start", "conditional"):
                names = _CALLED.findall(rest)
                branches = re.search(r"branch_computations=\{(.*?)\}", rest)
                names += [n.strip().lstrip("%") for n in branches[1].split(",")] if branches else []
                for called in names:
                    into = scattered or called.startswith("all-reduce-scatter")
                    walk(called, loops, into, wrapped or op == "async-start")

    walk(entry, (), False, False)
    return [c for c in out if len(c.group) > 1]
