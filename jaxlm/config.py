"""Experiment definitions as typed Python: registry, named edits, dotted overrides, diff and JSON.

A definition is a tree of frozen dataclasses ("nodes"). A field holds a bool, int, float, str or None, a `Literal`,
a tuple, a node, or a union of these; a choice between components is a union of nodes. Paths are dotted, with an index
into a tuple: `optimizer.lr`, `data.sources.0.weight`. Unset is `None`. Nothing here imports jax.
"""

import ast
import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator

SCHEMA_VERSION = 1


class UserError(Exception):
    """Bad input or a bad definition: one line that says what, where, and what would be right. Exit code 2."""


# ---------------------------------------------------------------------------------------------------- the registry
EXPERIMENTS: dict[str, Callable] = {}
EDITS: dict[str, Callable] = {}


def _register(registry: dict[str, Callable], kind: str, fn: Callable) -> Callable:
    other = registry.get(fn.__name__)
    if other is not None and other.__module__ != fn.__module__:
        raise ValueError(f"{kind} {fn.__name__!r} is defined in {other.__module__} and again in {fn.__module__}")
    registry[fn.__name__] = fn
    return fn


def experiment(fn: Callable) -> Callable:
    """Registers a function without arguments that returns a definition, under the function's name."""
    return _register(EXPERIMENTS, "experiment", fn)


def edit(fn: Callable) -> Callable:
    """Registers a function definition -> definition, an ablation that applies to any experiment with its paths."""
    return _register(EDITS, "edit", fn)


def nearest(name: str, names: Iterable[str]) -> str:
    """The tail of an error: the valid names nearest to `name`, or all of them when none is near."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not close:  # a last segment that is right in a wrong place is the likeliest slip
        close = [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:3]
    if close:
        return "nearest: " + ", ".join(close)
    return ("valid: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")) if names else "there are none"


def _lookup(registry: dict[str, Callable], kind: str, name: str) -> Callable:
    if name not in registry:
        raise UserError(f"unknown {kind} {name!r}; {nearest(name, sorted(registry))}")
    return registry[name]


def resolve(name: str, edits: Iterable[str] = (), sets: Iterable[str] = ()):
    """The definition `name` after its edits, then its `path=value` settings, each in the order given."""
    return changed(_lookup(EXPERIMENTS, "experiment", name)(), name, edits, sets)


def changed(cfg, name: str, edits: Iterable[str], sets: Iterable[str]):
    """A definition after edits and settings; `name` is what errors call it."""
    for e in edits:
        fn = _lookup(EDITS, "edit", e)
        try:
            cfg = fn(cfg)
        except UserError as error:
            raise UserError(f"edit {e!r} does not apply to {name!r}: {error}") from error
    return parse_sets(cfg, sets)


# ------------------------------------------------------------------------------------------------------------ types
@functools.cache
def field_types(cls: type) -> dict[str, object]:
    """Field name -> resolved annotation of a node class."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def is_node(x) -> bool:
    return dataclasses.is_dataclass(x) and not isinstance(x, type)


def _members(annotation) -> tuple:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(m for a in typing.get_args(annotation) for m in _members(a))
    return (annotation,)


def _describe(annotation) -> str:
    def one(t):
        if t is type(None):
            return "none"
        if typing.get_origin(t) is typing.Literal:
            return "|".join(map(str, typing.get_args(t)))
        if typing.get_origin(t) is tuple:
            return "tuple of " + _describe(typing.get_args(t)[0])
        return t.__name__

    return " or ".join(one(m) for m in _members(annotation))


class _Mismatch(Exception):
    pass


def _conform(value, annotation):
    """`value` as `annotation` wants it (an int becomes a float), or `_Mismatch`."""
    for t in _members(annotation):
        origin = typing.get_origin(t)
        if t is type(None):
            if value is None:
                return None
        elif origin is typing.Literal:
            if any(value == a and type(value) is type(a) for a in typing.get_args(t)):
                return value
        elif origin is tuple:
            if isinstance(value, tuple | list):
                item = typing.get_args(t)[0]
                try:
                    return tuple(_conform(v, item) for v in value)
                except _Mismatch:
                    continue
        elif t is float:
            if type(value) in (int, float):
                return float(value)
        elif dataclasses.is_dataclass(t):
            if type(value) is t:
                return value
        elif type(value) is t:
            return value
    raise _Mismatch


def _typed(path: str, value, annotation):
    try:
        return _conform(value, annotation)
    except _Mismatch:
        shown = type(value).__name__ if is_node(value) else repr(value)
        raise UserError(f"{path} must be {_describe(annotation)}, got {shown}") from None


def check(cfg, prefix: str = "") -> None:
    """Raises `UserError` for the first field, at any depth, whose value is not of its declared type."""
    for name, annotation in field_types(type(cfg)).items():
        value, path = getattr(cfg, name), f"{prefix}{name}"
        _typed(path, value, annotation)
        for p, child in [(path, value)] if not isinstance(value, tuple) else _indexed(path, value):
            if is_node(child):
                check(child, f"{p}.")


def _indexed(path: str, value: tuple):
    return [(f"{path}.{i}", v) for i, v in enumerate(value)]


# ------------------------------------------------------------------------------------------------------------ paths
def walk(cfg, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every (path, value) below `cfg`, nodes and tuples of nodes included, parents first."""
    for f in dataclasses.fields(cfg):
        value, path = getattr(cfg, f.name), f"{prefix}{f.name}"
        yield path, value
        nodes = [(path, value)] if is_node(value) else _indexed(path, value) if isinstance(value, tuple) else []
        for p, child in nodes:
            if is_node(child):
                if p != path:
                    yield p, child
                yield from walk(child, f"{p}.")


def leaves(cfg) -> dict[str, object]:
    """Path -> value of everything that is no node; a node's own class shows under its path as `Name()`."""
    out = {}
    for path, value in walk(cfg):
        if is_node(value):
            out[path] = f"{type(value).__name__}()"
        elif not (isinstance(value, tuple) and value and all(map(is_node, value))):
            out[path] = value
    return out


def _set(cfg, root, path: str, done: list[str], todo: list[str], make):
    """Rebuilds the spine of `cfg` along `todo`; `make(annotation)` gives the new value at its end."""
    head, rest, here = todo[0], todo[1:], ".".join([*done, todo[0]])
    if head not in field_types(type(cfg)):
        raise UserError(f"unknown path {path!r}; {nearest(path, [p for p, _ in walk(root)])}")
    annotation, value = field_types(type(cfg))[head], getattr(cfg, head)
    if not rest:
        return dataclasses.replace(cfg, **{head: make(annotation)})
    if is_node(value):
        return dataclasses.replace(cfg, **{head: _set(value, root, path, [*done, head], rest, make)})
    if isinstance(value, tuple) and rest[0].isdigit():
        i = int(rest[0])
        if i >= len(value):
            raise UserError(f"unknown path {path!r}: {here} has {len(value)} entries, numbered from 0")
        item = next(typing.get_args(m)[0] for m in _members(annotation) if typing.get_origin(m) is tuple)
        if len(rest) == 1:
            new = make(item)
        elif is_node(value[i]):
            new = _set(value[i], root, path, [*done, head, rest[0]], rest[1:], make)
        else:
            raise UserError(f"unknown path {path!r}: {here}.{i} has no fields")
        return dataclasses.replace(cfg, **{head: (*value[:i], new, *value[i + 1 :])})
    if value is None:
        raise UserError(f"cannot set {path!r}: its parent {here} is unset; set {here} first ({_describe(annotation)})")
    raise UserError(f"unknown path {path!r}: {here} has no fields; {nearest(path, [p for p, _ in walk(root)])}")


def override(cfg, values: dict[str, object]):
    """`cfg` with each dotted path replaced by a typed Python value; `UserError` for a wrong path or type."""
    for path, value in values.items():
        cfg = _set(cfg, cfg, path, [], path.split("."), functools.partial(_typed, path, value))
    return cfg


def replace_leaves(cfg, values: dict[str, object]):
    """`override` without type checks: puts traced arrays where floats were, inside a compiled step."""
    for path, value in values.items():
        cfg = _set(cfg, cfg, path, [], path.split("."), lambda _, value=value: value)
    return cfg


# ---------------------------------------------------------------------------------------------- settings from text
def _number(text: str, kind: type):
    try:
        value = kind(text)
    except ValueError:
        value = float(text) if kind is int else None
        if value is None or not (math.isfinite(value) and value == int(value)):  # 1e6 is a fine integer, 1.5 is not
            raise
        value = int(value)
    return value


def split_commas(text: str) -> list[str]:
    """Splits at commas outside brackets and quotes."""
    parts, depth, quote, start = [], 0, None, 0
    for i, c in enumerate(text):
        if quote:
            quote = None if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([":
            depth += 1
        elif c in ")]":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]] if p.strip()]


def _unquote(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        try:
            return str(ast.literal_eval(text))
        except (ValueError, SyntaxError):
            return text
    return text


def _parse_node(path: str, text: str, nodes: list[type]):
    name, bracket, inside = text.partition("(")
    node = {n.__name__: n for n in nodes}.get(name.strip())
    if node is None or (bracket and not text.endswith(")")):
        return None
    arguments = {}
    for part in split_commas(inside[:-1]):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or key not in field_types(node):
            raise UserError(f"{path}: {name} takes field=value; {nearest(key, field_types(node))}")
        arguments[key] = _parse(f"{path}.{key}", value.strip(), field_types(node)[key])
    try:
        return node(**arguments)
    except TypeError as e:  # a field without a default was left out
        raise UserError(f"{path}: {e}".replace("__init__() ", "")) from None


def _parse(path: str, text: str, annotation):
    members = _members(annotation)
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    nodes = [m for m in members if dataclasses.is_dataclass(m)]
    if nodes and (node := _parse_node(path, text, nodes)) is not None:
        return node
    for t in members:
        try:
            if typing.get_origin(t) is typing.Literal:
                return next(a for a in typing.get_args(t) if str(a) == _unquote(text))
            if typing.get_origin(t) is tuple:
                inside = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
                return tuple(_parse(path, p, typing.get_args(t)[0]) for p in split_commas(inside))
            if t is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if t in (int, float):
                return _number(text, t)
            if t is str:
                return _unquote(text)
        except (ValueError, StopIteration, OverflowError):
            continue
    valid = f"; {nearest(text, [n.__name__ for n in nodes])}" if nodes else ""
    raise UserError(f"{path} must be {_describe(annotation)}, got {text!r}{valid}")


def parse_sets(cfg, sets: Iterable[str]):
    """Applies `path=value` texts in order. A node is written `Name` or `Name(field=value, ...)`, a tuple `a,b`."""
    for text in sets:
        path, equals, value = text.partition("=")
        path = path.strip()
        if not equals:
            raise UserError(f"--set takes path=value, got {text!r}")
        cfg = _set(cfg, cfg, path, [], path.split("."), functools.partial(_parse, path, value.strip()))
    return cfg


def diff(base, cfg) -> list[str]:
    """One line `path: old -> new` for each difference; a path that only one side has shows `unset` on the other."""
    a, b = leaves(base), leaves(cfg)
    paths = list(dict.fromkeys([*a, *b]))
    rows = [(p, *(repr(d[p]) if p in d else "unset" for d in (a, b))) for p in paths]
    return [f"{p}: {old} -> {new}" for p, old, new in rows if old != new]


# ------------------------------------------------------------------------------------------------------------- JSON
def to_dict(cfg) -> dict:
    """Plain JSON-able dict; each node says its class under `node`."""

    def plain(value):
        if is_node(value):
            return to_dict(value)
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return {"node": type(cfg).__name__} | {f.name: plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}


def from_dict(cls: type, d: dict, path: str = ""):
    """The inverse of `to_dict`; `UserError` names an unknown key, a wrong type or a missing field."""

    def build(value, annotation, p):
        if isinstance(value, dict):
            nodes = {m.__name__: m for m in _members(annotation) if dataclasses.is_dataclass(m)}
            if value.get("node") not in nodes:
                raise UserError(f"{p}: unknown node {value.get('node')!r}; {nearest(str(value.get('node')), nodes)}")
            return from_dict(nodes[value["node"]], value, f"{p}.")
        if isinstance(value, list):
            item = [typing.get_args(m)[0] for m in _members(annotation) if typing.get_origin(m) is tuple]
            if item:
                return tuple(build(v, item[0], f"{p}.{i}") for i, v in enumerate(value))
        return _typed(p, value, annotation)

    known, arguments = field_types(cls), {}
    for name, value in d.items():
        if name == "node":
            continue
        if name not in known:
            raise UserError(f"unknown path {path + name!r}; {nearest(path + name, [path + k for k in known])}")
        arguments[name] = build(value, known[name], path + name)
    try:
        return cls(**arguments)
    except TypeError as e:
        raise UserError(f"{path or cls.__name__}: {e}".replace("__init__() ", "")) from None


def to_json(cfg) -> str:
    return json.dumps({"schema_version": SCHEMA_VERSION, **to_dict(cfg)}, indent=2) + "\n"


def from_json(cls: type, text: str):
    """Reads what `to_json` wrote; refuses a schema that this version does not know."""
    d = json.loads(text)
    if not isinstance(d, dict):
        raise UserError("config is no JSON object")
    version = d.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise UserError(f"config has schema_version {version}, this jaxlm reads {SCHEMA_VERSION}")
    return from_dict(cls, d)
