"""Small wrongs put into the source, to see that a check notices them.

A mutation replaces one piece of a module's text and swaps the code of the functions that it changes, in place: whoever
holds one of them, by whatever name or in whatever table, runs the mutant. Classes and constants stay what they are. A
check is a function without arguments that raises AssertionError; it must trace afresh (a lambda of its own inside
`jax.jit`), or be marked `compiled`, which clears every compiled program before and after.
"""

import contextlib
import dataclasses
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import pytest


@dataclasses.dataclass(frozen=True)
class Mutation:
    name: str
    module: types.ModuleType
    old: str  # occurs once in the module's source
    new: str
    check: Callable[[], None]  # must fail on the mutant
    compiled: bool = False  # the check calls programs that were compiled before


def functions(names: dict, module: str) -> Iterator[tuple[str, types.FunctionType]]:
    for name, x in names.items():
        x = x.fget if isinstance(x, property) else inspect.unwrap(x) if callable(x) else x
        if getattr(x, "__module__", None) != module:
            continue
        if isinstance(x, types.FunctionType):
            yield name, x
        elif isinstance(x, type):
            yield from ((f"{name}.{k}", f) for k, f in functions(dict(vars(x)), module))


def _code_without_lines(code: types.CodeType):
    inner = [_code_without_lines(c) if isinstance(c, types.CodeType) else (type(c), c) for c in code.co_consts]
    return code.co_code, code.co_names, inner


@contextlib.contextmanager
def mutated(module: types.ModuleType, old: str, new: str, compiled: bool = False):
    """The module with `old` replaced by `new` in its source, until the context ends."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{source.count(old)} places in {module.__name__} read {old!r}"
    scratch = {"__name__": module.__name__, "__file__": module.__file__}
    exec(compile(source.replace(old, new), module.__file__, "exec"), scratch)
    originals, mutants = (dict(functions(names, module.__name__)) for names in (vars(module), scratch))
    before = {name: f.__code__ for name, f in originals.items() if name in mutants}
    changed = [n for n, code in before.items() if _code_without_lines(code) != _code_without_lines(mutants[n].__code__)]
    assert changed or old == new, f"no function of {module.__name__} changes with {new!r}"
    try:
        for name in before:
            originals[name].__code__ = mutants[name].__code__
        if compiled:
            jax.clear_caches()
        yield
    finally:
        for name, code in before.items():
            originals[name].__code__ = code
        if compiled:
            jax.clear_caches()


def assert_caught(mutation: Mutation):
    """The check fails on the mutant, by an assertion: a mutant that merely crashes is no evidence."""
    with mutated(mutation.module, mutation.old, mutation.new, mutation.compiled), pytest.raises(AssertionError):
        mutation.check()


def assert_harmless(mutations: Iterable[Mutation]):
    """The control: the same swaps with nothing replaced leave every check passing."""
    with contextlib.ExitStack() as stack:
        for module in {m.module for m in mutations}:
            source = Path(module.__file__).read_text(encoding="utf-8")
            stack.enter_context(mutated(module, source, source))
        for check in {m.check for m in mutations}:
            check()


def mutation_tests(mutations: Iterable[Mutation]) -> tuple[Callable, Callable]:
    """(a test for each mutation that its check notices it, the test of the control), for a module to name."""

    @pytest.mark.parametrize("mutation", mutations, ids=lambda m: m.name)
    def is_noticed(mutation):
        assert_caught(mutation)

    return is_noticed, lambda: assert_harmless(mutations)
