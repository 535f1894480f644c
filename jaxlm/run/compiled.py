"""What a compiled stage takes and moves, beside what it must, and what to change where it does not fit."""

import collections
import dataclasses
import math
import re
import time

import jax

from jaxlm.run import hlo, roofline
from jaxlm.run.pod import Stage, device_bytes
from jaxlm.run.roofline import Work
from jaxlm.run.topology import GiB, Topology

KINDS = ("parameters", "optimizer", "cache", "batch", "temporaries", "other")
COMFORT = 0.9  # of the HBM: above it a program fits, with nothing to spare


def measure(stage: Stage, t: Topology, mesh, keep_text=None) -> dict:
    """Compiles a stage and says what came of it; see `record` for the fields. keep_text: gets the program's HLO text.

    A program that is too large for the HBM is a result, not an error: its `fits` is false.
    """
    began = time.perf_counter()
    lowered = stage.lower()
    lowered_at = time.perf_counter()
    text, memory, refused = "", None, None
    try:
        compiled = lowered.compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        refused = str(e)
    seconds = {"lower": lowered_at - began, "compile": time.perf_counter() - lowered_at}
    if keep_text is not None:
        keep_text(text)
    return record(stage, t, mesh, text, memory, refused, seconds)


def record(stage: Stage, t: Topology, mesh, text: str, memory, refused: str | None, seconds: dict) -> dict:
    """All that is reported of a stage, ready for JSON.

    bytes: on one device, by kind; `other` is padding, code, and outputs that take no argument's place. donated: bytes
    of what is updated in place, and of what the compiler did put there. collectives, least: see `moved`.
    """
    work, sizes = stage.work, dict(mesh.shape)
    held = {kind: device_bytes(stage.given.get(kind)) + device_bytes(stage.beside.get(kind)) for kind in KINDS[:4]}
    given = device_bytes(stage.given)
    if memory is not None:
        spare = memory.argument_size_in_bytes - given + memory.output_size_in_bytes - memory.alias_size_in_bytes
        held |= {
            "temporaries": memory.temp_size_in_bytes,
            "other": max(0, spare) + memory.generated_code_size_in_bytes,
        }
    else:
        held |= {"temporaries": asked_for(refused or "", given), "other": 0}
    total = sum(held.values())
    found = moved(hlo.collectives(text, mesh.size, t.slices), work, mesh, t)
    least = {axis: dataclasses.asdict(x) for axis, x in roofline.minimum(work, sizes).items()}
    state = device_bytes(stage.donated)
    bytes_moved = roofline.hbm_bytes(work, sizes, state if work.update else 0.0)
    network = sum(row["seconds"] for row in found)
    waiting = network - sum(row["overlapping_seconds"] for row in found)
    return {
        "stage": stage.name,
        "about": stage.about,
        "seconds": seconds,
        "bytes": held,
        "total": total,
        "hbm": t.chip.hbm,
        "fits": refused is None and total <= t.chip.hbm,
        "refused": refused,
        "donated": {"state": state, "aliased": 0 if memory is None else memory.alias_size_in_bytes},
        "collectives": found,
        "least": least,
        "microbatches": work.microbatches,
        "layers": work.model.layers,
        "flops": {"model": work.flops, "recomputed": work.recomputed},
        "hbm_traffic": bytes_moved,
        "estimate": dataclasses.asdict(roofline.estimate(work, t.chip, mesh.size, bytes_moved, network, waiting)),
    }


def asked_for(message: str, given: int) -> int:
    """Bytes of temporaries that a refusal for want of HBM names, or 0 where it names none. given: of the arguments."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"temporaries \(([\d.]+)([KMGT])\)", message):
        return int(float(found[1]) * units[found[2]])
    if found := re.search(r"(?:Total hbm usage >=|Used) ([\d.]+)([KMGT])", message):
        return max(0, int(float(found[1]) * units[found[2]]) - given)
    return 0


def moved(found: list[hlo.Collective], work: Work, mesh, t: Topology) -> list[dict]:
    """The collectives of a program by mesh axes and kind, the slowest first: how often, and how many bytes a device
    receives, for one layer and for all outside the layers; the seconds that they take in all, and those of them in
    which computation may go on."""
    rows: dict[tuple, dict] = {}
    devices, layers = list(mesh.devices.flat), work.model.layers
    turns = layers // len(work.model.slots)
    for c in found:
        axes = "+".join(roofline.spans(c.group, mesh)) or "none"
        inside = "Block" in c.source or (not c.source and turns > 1 and turns in c.loops)
        row = rows.setdefault((axes, c.op), collections.Counter(dict.fromkeys(FIELDS, 0.0)))
        where, share = ("layer", layers) if inside else ("outside", 1)
        row[f"{where}_count"] += c.times / share
        row[f"{where}_bytes"] += c.times * c.bytes / share
        seconds = c.times * c.bytes / roofline.bandwidth(c.group, devices, t.chip, t.shape)
        row["seconds"] += seconds
        row["overlapping_seconds"] += seconds * c.overlaps
    out = [{"axes": axes, "op": op, **{k: row[k] for k in FIELDS}} for (axes, op), row in rows.items()]
    return sorted(out, key=lambda row: -row["seconds"])


FIELDS = ("layer_count", "layer_bytes", "outside_count", "outside_bytes", "seconds", "overlapping_seconds")


# ------------------------------------------------------------------------------------------------------- the advice
def advice(r: dict, work: Work, mesh: dict[str, int], moments: str = "float32") -> list[str]:
    """What would make a stage fit, each with the bytes that it would then take, by the figures of `r`."""
    if r["fits"] and r["total"] <= COMFORT * r["hbm"]:
        return []
    held, hbm, out = r["bytes"], r["hbm"], []

    def say(what: str, total: float):
        verdict = "fits" if total <= hbm else f"{(total - hbm) / GiB:.1f} GiB too much"
        out.append(f"{what}: about {total / GiB:.1f} GiB a chip, {verdict}")

    m, temporaries = work.model, held["temporaries"]
    rest = r["total"] - temporaries
    if work.update:
        now = roofline.kept_activations(work, mesh, m.remat)
        for policy in {"none": ("dots", "full"), "dots": ("full",), "full": ()}[m.remat]:
            then = roofline.kept_activations(work, mesh, policy)
            say(f"--set=model.remat={policy}", rest + temporaries - min(temporaries, now) + then)
        rows = work.tokens / (work.length * mesh.get("replica", 1) * mesh.get("fsdp", 1))
        need = temporaries / max(hbm * COMFORT - rest, 1.0)
        cut = min(2 ** math.ceil(math.log2(max(need, 2))), int(rows))
        if rest < hbm * COMFORT and cut >= 2:
            accumulation = work.microbatches * cut
            say(
                f"--set=train.accumulation={accumulation} (the same batch in more microbatches)",
                rest + temporaries / cut,
            )
        if moments == "float32" and held["optimizer"]:
            say("--set=model.precision.moments=bfloat16 (Adam's first moment)", r["total"] - held["optimizer"] / 2)
    if held["cache"] and held["cache"] + temporaries > 0.2 * hbm:
        say(
            "half as many slots (objective.slots)",
            r["total"] - (held["cache"] + temporaries) / 2,
        )
    state = held["parameters"] + held["optimizer"]
    if (shards := 2 ** math.ceil(math.log2(max(1.0, r["total"] / (hbm * COMFORT))))) > 1 and state:
        say(f"{shards} times the chips, as many rows in all", r["total"] / shards)
    return out


# ---------------------------------------------------------------------------------------------------------- the text
def as_text(r: dict, tips: list[str]) -> str:
    """A stage's record as it is printed."""

    def gib(n):
        return f"{n / GiB:.2f}" if n else "-"

    mega = lambda n: f"{n / 1e6:.2f}"  # noqa: E731
    lines = [f"{r['stage']}: {r['about']}"]
    share = r["total"] / r["hbm"]
    verdict = "does not fit" if not r["fits"] else "fits" if share <= COMFORT else "fits, with nothing to spare"
    parts = ", ".join(f"{kind} {gib(r['bytes'][kind])}" for kind in KINDS)
    lines.append(f"  GiB a chip    {parts}")
    lines.append(f"                together {gib(r['total'])} of {gib(r['hbm'])} ({share:.0%}): {verdict}")
    lines += [f"  to make it fit  {tip}" for tip in tips]
    if r["refused"]:
        lines.append(f"  the compiler  {r['refused'].strip().splitlines()[0][:150]}")
        return "\n".join(lines)
    if state := r["donated"]["state"]:
        kept = r["donated"]["aliased"]
        word = "in place" if kept >= 0.98 * state else "NOT all in place"
        lines.append(f"  donation      {gib(kept)} of {gib(state)} GiB updated {word}")
    if r["collectives"]:
        lines.append("  collectives   MB that a chip receives:  a layer and microbatch    outside layers, a microbatch")
    many = r["microbatches"]
    for row in r["collectives"]:
        inside = f"{row['layer_count'] / many:8.1f} x {mega(row['layer_bytes'] / many):>10}"
        outside = f"{row['outside_count'] / many:8.1f} x {mega(row['outside_bytes'] / many):>10}"
        overlap = row["overlapping_seconds"] / row["seconds"]
        took = f"{row['seconds']:.3g} s in all, {overlap:.0%} of it asynchronous"
        lines.append(f"    {row['axes']:16} {row['op']:20} {inside:24} {outside:24} {took}")
    for axis, x in r["least"].items():
        inside, outside = (f"{mega(x[k] / many):>21}" for k in ("layer", "outside"))
        lines.append(f"    {axis:16} {'the least':20} {inside:24} {outside:24}")
    e = r["estimate"]
    again = r["flops"]["recomputed"] / r["flops"]["model"]
    lines.append(f"  FLOPs         {r['flops']['model']:.3g}, and {again:.0%} made again")
    lines.append(
        f"  roofline      compute {e['compute']:.3g} s, HBM {e['hbm']:.3g} s, network {e['network']:.3g} s: "
        f"{e['least']:.3g} to {e['most']:.3g} s, utilization {e['utilization'][0]:.0%} to {e['utilization'][1]:.0%}"
    )
    lines.append(f"  compiled in   {r['seconds']['compile']:.0f} s, after {r['seconds']['lower']:.0f} s of tracing")
    return "\n".join(lines)
