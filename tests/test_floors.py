"""A file imports only from its own floor or lower ones, and never in a circle."""

import ast
import graphlib

import pytest

from tests.source import ROOT, import_graph, imports

FLOORS = (
    (
        "jaxlm.config",
        "jaxlm.storage",
        "jaxlm.tree",
        "jaxlm.masked",
        "jaxlm.estimates",
        "jaxlm.sharding",
        "jaxlm.rng",
        "jaxlm.broadcast",
    ),
    ("jaxlm.nn", "jaxlm.optim", "jaxlm.losses", "jaxlm.rl"),
    ("jaxlm.data", "jaxlm.sample", "jaxlm.tools", "jaxlm.feedback"),
    ("jaxlm.steps",),
    ("jaxlm.run",),
    ("jaxlm.interop", "jaxlm.serve"),
    ("experiments",),
    ("launch",),
)


def floor(module: str) -> int:
    for level, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS in tests/test_floors.py")


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)})"
        for module, others in graph.items()
        for other in others
        if "jaxlm" not in (module, other) and floor(other) > floor(module)
    ]


def test_imports_go_down():
    assert not upward(import_graph())


def test_no_cycles():
    tuple(graphlib.TopologicalSorter(import_graph()).static_order())


def test_definitions_need_no_jax():
    tree = ast.parse((ROOT / "jaxlm" / "config.py").read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not [name for name in names if name.split(".")[0] in ("jax", "flax", "optax", "orbax")]


def test_the_test_sees_a_planted_breach():
    modules = {"jaxlm.nn.rope", "jaxlm.run", "jaxlm.run.loop", "jaxlm.nn"}
    for source in (
        "from jaxlm.run import loop",
        "import jaxlm.run.loop",
        "def f():\n    from ..run.loop import train",
        "from ..run import loop",
    ):
        found = imports(ast.parse(source), "jaxlm.nn.rope", modules)
        assert found == {"jaxlm.run.loop"}, source
        assert upward({"jaxlm.nn.rope": found})
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
    with pytest.raises(AssertionError, match="no floor"):
        floor("jaxlm.utils")
