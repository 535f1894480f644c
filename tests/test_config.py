"""Definitions: typed overrides, edits, diff and JSON, over a small tree of nodes that has every kind of field."""

import dataclasses
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.config import UserError


@dataclasses.dataclass(frozen=True)
class Left:
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Right:
    depth: int
    inner: Left | None = None


@dataclasses.dataclass(frozen=True)
class Root:
    flag: bool = False
    count: int = 3
    scale: float | None = None
    name: str = "a"
    mode: Literal["pre", "post"] = "pre"
    part: Left | Right = Left()
    limits: tuple[int, ...] = (1, 2)
    parts: tuple[Left | Right, ...] = (Left(), Right(2))
    missing: Right | None = None


names = st.text(max_size=12).filter(lambda s: s == s.strip())
floats = st.floats(allow_nan=False)
lefts = st.builds(Left, rate=floats)
rights = st.builds(Right, depth=st.integers(), inner=st.none() | lefts)
roots = st.builds(
    Root,
    flag=st.booleans(),
    count=st.integers(),
    scale=st.none() | floats,
    name=names,
    mode=st.sampled_from(["pre", "post"]),
    part=lefts | rights,
    limits=st.lists(st.integers(), max_size=3).map(tuple),
    parts=st.lists(lefts | rights, max_size=3).map(tuple),
    missing=st.none() | rights,
)


@given(roots)
def test_json_round_trip(cfg):
    assert config.from_json(Root, config.to_json(cfg)) == cfg
    config.check(cfg)


@given(roots, roots)
def test_diff_lists_exactly_the_differing_paths(a, b):
    changed = {line.split(":")[0] for line in config.diff(a, b)}
    la, lb = config.leaves(a), config.leaves(b)
    assert changed == {p for p in la.keys() | lb.keys() if p not in la or p not in lb or repr(la[p]) != repr(lb[p])}
    assert bool(changed) == (a != b or repr(a) != repr(b))


@given(roots, roots)
def test_overriding_every_field_of_one_with_the_other_gives_the_other(a, b):
    values = {f.name: getattr(b, f.name) for f in dataclasses.fields(b)}
    assert config.override(a, values) == b


@given(roots)
def test_texts_of_settings_parse_back_to_the_value(cfg):
    def text(value):
        if config.is_node(value):
            inside = ", ".join(f"{f.name}={text(getattr(value, f.name))}" for f in dataclasses.fields(value))
            return f"{type(value).__name__}({inside})"
        if isinstance(value, tuple):
            return "(" + ", ".join(map(text, value)) + ")"
        return repr(value)

    sets = [f"{f.name}={text(getattr(cfg, f.name))}" for f in dataclasses.fields(cfg)]
    assert config.parse_sets(Root(), sets) == cfg


@given(roots, st.data())
def test_an_override_changes_its_path_and_nothing_else(cfg, data):
    path = data.draw(st.sampled_from(["count", "name", "flag"]))
    value = {"count": 71, "name": "other", "flag": not cfg.flag}[path]
    after = config.override(cfg, {path: value})
    assert getattr(after, path) == value
    assert config.override(after, {path: getattr(cfg, path)}) == cfg


@pytest.mark.parametrize(
    "text, value",
    [
        ("count=1e6", 1_000_000),
        ("scale=3", 3.0),
        ("scale=none", None),
        ("flag=TRUE", True),
        ("name='with, comma'", "with, comma"),
        ("name=plain text", "plain text"),
        ("limits=4,5", (4, 5)),
        ("limits=()", ()),
        ("part=Right(depth=4, inner=Left(rate=.25))", Right(4, Left(0.25))),
        ("parts=Left,Right(depth=1)", (Left(), Right(1))),
    ],
)
def test_settings_by_example(text, value):
    got = getattr(config.parse_sets(Root(), [text]), text.split("=")[0])
    assert got == value and type(got) is type(value)


def test_paths_reach_into_nodes_and_tuples():
    cfg = config.parse_sets(
        Root(), ["part.rate=2", "parts.1.depth=9", "limits.0=7", "part=Right(depth=3)", "part.depth=5"]
    )
    assert cfg == Root(part=Right(5), parts=(Left(), Right(9)), limits=(7, 2))


@pytest.mark.parametrize(
    "text, words",
    [
        ("cuont=1", ["unknown path 'cuont'", "count"]),
        ("part.rat=1", ["unknown path 'part.rat'", "part.rate"]),
        ("rate=1", ["unknown path 'rate'", "part.rate"]),
        ("count=1.5", ["count must be int", "'1.5'"]),
        ("count=true", ["count must be int"]),
        ("flag=1", ["flag must be bool"]),
        ("mode=sandwich", ["mode must be pre|post"]),
        ("missing.depth=1", ["parent missing is unset"]),
        ("part=Lift()", ["part must be Left or Right", "Left"]),
        ("part=Left(rat=1)", ["Left takes field=value", "rate"]),
        ("part=Right()", ["part:", "depth"]),
        ("count.x=1", ["count has no fields"]),
        ("parts.7.rate=1", ["has 2 entries"]),
        ("count", ["path=value"]),
    ],
)
def test_bad_settings_say_what_is_wrong_and_what_is_near(text, words):
    with pytest.raises(UserError) as e:
        config.parse_sets(Root(), [text])
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize("values", [{"count": 1.0}, {"count": True}, {"part": 3}, {"limits": (1, "x")}, {"name": None}])
def test_python_values_of_the_wrong_type_are_refused(values):
    with pytest.raises(UserError, match="must be"):
        config.override(Root(), values)


def test_an_int_in_python_becomes_the_declared_float():
    assert type(config.override(Root(), {"scale": 2}).scale) is float


def test_check_finds_a_wrong_value_at_any_depth():
    with pytest.raises(UserError, match=r"parts\.0\.rate must be float"):
        config.check(Root(parts=(Left("fast"),)))


def test_json_of_another_schema_or_with_unknown_fields_is_refused():
    text = config.to_json(Root())
    for other in ("[]", "null"):
        with pytest.raises(UserError, match="config is no JSON object"):
            config.from_json(Root, other)
    with pytest.raises(UserError, match="schema_version 99"):
        config.from_json(Root, text.replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(UserError, match=r"unknown path 'coumt'.*count"):
        config.from_json(Root, text.replace('"count"', '"coumt"'))


def test_registry_names_the_nearest(monkeypatch):
    monkeypatch.setattr(config, "EXPERIMENTS", {"small": Root})
    monkeypatch.setattr(
        config,
        "EDITS",
        {
            "faster": lambda c: config.override(c, {"part.rate": 9.0}),
            "gone": lambda c: config.override(c, {"part.depth": 1}),
        },
    )
    assert config.resolve("small", ["faster"], ["part.rate=1"]).part.rate == 1
    with pytest.raises(UserError, match=r"unknown experiment 'smal'; nearest: small"):
        config.resolve("smal")
    with pytest.raises(UserError, match=r"unknown edit 'fast'; nearest: faster"):
        config.resolve("small", ["fast"])
    with pytest.raises(UserError, match=r"edit 'gone' does not apply to 'small': unknown path"):
        config.resolve("small", ["gone"])
