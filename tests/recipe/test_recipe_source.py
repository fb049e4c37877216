"""YAML text as nodes: numbers under YAML 1.2, places, and everything that is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_lite.errors import Problem
from mergekit_lite.recipe import source
from mergekit_lite.recipe.node import ListNode, MapNode, Node, ScalarNode, plain_value
from mergekit_lite.recipe.source import MAX_BYTES, MAX_DEPTH, MAX_NODES, load

# A busy machine must not fail a test by being slow.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(text: str) -> Node:
    problems: list[Problem] = []
    node = load(text, "r.yaml", problems)
    assert problems == []
    assert node is not None
    return node


def refuse(text: str) -> Problem:
    """The only problem with a text."""
    problems: list[Problem] = []
    load(text, "r.yaml", problems)
    assert len(problems) == 1, [problem.render() for problem in problems]
    problems[0].render()
    return problems[0]


def data(node: Node) -> Any:
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, ListNode):
        return [data(item) for item in node.items]
    return {key: data(entry.value) for key, entry in node.entries.items()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1.5E3", 1500.0),
        ("+1", 1),
        (".5", 0.5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-0", 0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1e999", math.inf),
        ("true", True),
        ("TRUE", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
    ]
    + [(word, word) for word in ("on", "off", "yes", "no", "y", "n", "On", "NO", "1:30", "1_000", "2024-01-01")]
    + [
        (word, word)
        for word in ("tRUE", "nUll", "0b1", "0o8", "0x", "-0x1F", "1e", "e5", ".", "+", "1.2.3", ".e1", "=")
    ]
    + [(word, word) for word in ("inf", "nan", "Infinity", "+.nan", "١")],
)
def test_what_an_unquoted_scalar_means(text: str, value: object) -> None:
    node = read(f"a: {text}")
    assert isinstance(node, MapNode)
    found = data(node)["a"]
    assert (found, type(found)) == (value, type(value))


def test_not_a_number_is_a_float() -> None:
    found = plain_value(".nan")
    assert isinstance(found, float) and math.isnan(found)


@patient
@given(st.text("0123456789+-.eE", min_size=1, max_size=14))
def test_numbers_are_those_of_python_float(text: str) -> None:
    """Over these characters YAML 1.2 and Python's `float` agree on what a number is and what it is worth."""
    try:
        expected: object = float(text)
    except ValueError:
        expected = text
    found = plain_value(text)
    if isinstance(expected, float):
        assert isinstance(found, int if re.fullmatch("[-+]?[0-9]*", text) else float)
    assert found == expected


@patient
@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**40), 10**40)))
def test_python_numbers_read_back(number: float) -> None:
    assert plain_value(repr(number)) == number
    assert type(plain_value(repr(number))) is type(number)


@patient
@given(st.integers(0, 10**40))
def test_octal_and_hexadecimal(number: int) -> None:
    assert plain_value(f"0o{number:o}") == plain_value(f"0x{number:X}") == number


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=5), st.floats(-9, 9, width=16))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@patient
@given(TREES, st.booleans())
def test_agrees_with_pyyaml_on_quoted_text(tree: object, flow: bool) -> None:
    """Where text is quoted and numbers are plain, YAML 1.1 and 1.2 mean the same."""
    text = yaml.safe_dump(tree, default_flow_style=flow, default_style='"', sort_keys=False)
    # PyYAML tags what it quotes and is not text; the tag's absence is what makes the text ours.
    text = re.sub(r'!!(?:int|float|bool|null) "([^"]*)"', r"\1", text)
    assert data(read(text)) == yaml.safe_load(text)


def test_every_node_knows_its_place() -> None:
    node = read('a: 1\nlong key: [x, "y z"]\nc:\n  d: {e: f}\n')
    assert isinstance(node, MapNode)
    places = {key: (e.mark.line, e.mark.column, e.mark.length) for key, e in node.entries.items()}
    assert places == {"a": (1, 1, 1), "long key": (2, 1, 8), "c": (3, 1, 1)}
    items = node.get("long key")
    assert isinstance(items, ListNode)
    assert (items.mark.column, items.mark.length) == (11, 10)
    assert [(i.mark.column, i.mark.length, i.mark.text) for i in items.items] == [
        (12, 1, 'long key: [x, "y z"]'),
        (15, 5, 'long key: [x, "y z"]'),
    ]


@patient
@given(st.sampled_from(["\n", "\r\n", "\r", "\x85", "\u2028"]))
def test_lines_end_as_yaml_says(newline: str) -> None:
    node = read(f"a: 1{newline}b: 2{newline}")
    assert isinstance(node, MapNode)
    mark = node.entries["b"].mark
    assert (mark.line, mark.column, mark.text) == (2, 1, "b: 2")


def test_an_alias_repeats_a_node_and_copies_nothing() -> None:
    node = read("a: &x [1, 2]\nb: *x\n")
    assert isinstance(node, MapNode)
    assert node.get("a") is node.get("b")


def test_an_alias_means_the_latest_anchor() -> None:
    assert data(read("[&a 1, *a, &a 2, *a]")) == [1, 1, 2, 2]


def bomb(levels: int, width: int = 10) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


def test_aliases_that_multiply_are_refused() -> None:
    assert data(read(bomb(4)))["a3"][0][0][0] == ["x"]
    problem = refuse(bomb(30))
    assert problem.message == f"the text holds more than {MAX_NODES} values"
    # 10**5 values are passed on the sixth level, long before the thirtieth.
    assert problem.mark is not None and problem.mark.line <= 6


def test_deep_aliases_are_refused() -> None:
    assert "levels of nesting" in refuse(bomb(MAX_DEPTH + 2, width=1)).message


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_is_refused(opening: str) -> None:
    assert "levels of nesting" in refuse(opening * 5000).message


def test_many_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_NODES", 100)
    assert len(data(read("[" + "1," * 99 + "]"))) == 99
    assert "more than 100 values" in refuse("[" + "1," * 100 + "]").message
    assert "larger than 1 MiB" in refuse("a: " + "x" * MAX_BYTES).message


def test_a_key_given_twice() -> None:
    problem = refuse("a: 1\nb: {c: 1}\na: 2\n")
    assert problem.mark is not None and problem.mark.line == 3
    assert problem.hint is not None and "line 1" in problem.hint
    assert "given twice" in refuse('a: {on: 1, "on": 2}').message
    assert "given twice" in refuse("&k a: 1\n*k : 2\n").message


@pytest.mark.parametrize(
    ("text", "message", "line", "column"),
    [
        ("", "the file is empty", 1, 1),
        ("# nothing\n", "the file is empty", 1, 1),
        ("\ufeffa: 1", "byte-order mark", 1, 1),
        ("a: 1\nb: \x00", "U+0000", 2, 4),
        ("a: \ud800", "U+D800", 1, 4),
        ("a: 1\n---\nb: 2", "a second YAML document", 2, 1),
        ("a: !!python/object/apply:os.system [ls]", "`!!python/object/apply:os.system` is a tag", 1, 4),
        ("a: !!str 1", "`!!str` is a tag", 1, 4),
        ("a: !mine {b: 1}", "`!mine` is a tag", 1, 4),
        ("a: !ENV ${HOME}", "`!ENV` is a tag", 1, 4),
        ("a: !include /etc/passwd", "`!include` is a tag", 1, 4),
        ("a: !!python/name:os.system", "is a tag", 1, 4),
        ("%TAG !y! tag:yaml.org,2002:python/\n---\na: !y!object/apply:os.system [ls]", "is a tag", 3, 4),
        ("%TAG ! !mine\n---\na: !x 1", "is a tag", 3, 4),
        ("base: &b {x: 1}\na:\n  <<: *b\n", "merge keys", 3, 3),
        ("a: &a [*a]", "`*a` stands inside", 1, 8),
        ("a: *b", "`*b` is an alias of nothing", 1, 4),
        ("a:\n  *.mlp.*: 1", "not valid YAML", 2, 4),
        ("a:\n\tb: 1", "not valid YAML", 2, 1),
        ("a: [1, 2", "not valid YAML", 1, 9),
        ("a: b: c", "not valid YAML", 1, 5),
        ('a: "b', "not valid YAML", 1, 6),
        ('a: "\\UFFFFFFFF"', "not valid YAML", 1, 1),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "not valid YAML", 1, 1),
        ('a: "\\ud83d"', "half a character", 1, 4),
        ("1: a", "a key must be text, but `1`", 1, 1),
        ("true: a", "a key must be text, but `true`", 1, 1),
        ("? [a]\n: b", "not a list or a mapping", 1, 3),
        ("? \n: b", "a key is missing", 1, 2),
        ("a: " + "9" * 301, "more than 300 digits", 1, 4),
        ("a: 0x" + "f" * 290, "more than 300 digits", 1, 4),
    ],
)
def test_refused(text: str, message: str, line: int, column: int) -> None:
    problem = refuse(text)
    assert message in problem.message
    assert problem.mark is not None and (problem.mark.line, problem.mark.column) == (line, column)
    assert problem.hint


FRAGMENTS = [
    "a",
    "b: ",
    ": ",
    "- ",
    "? ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "\n",
    "\n  ",
    "\t",
    "&x ",
    "*x",
    "*x ",
    "!!str ",
    "|\n  ",
    ">-\n",
]
FRAGMENTS += [
    '"',
    "'",
    "#",
    " ",
    "<<",
    "---\n",
    "...\n",
    "%",
    "\\",
    "\\u",
    "1",
    "~",
    "é",
    "\x85",
    "\u2028",
    "\ufeff",
    "\x07",
]


@patient
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join))
def test_any_text_gives_a_tree_or_problems_with_a_place(text: str) -> None:
    problems: list[Problem] = []
    node = load(text, "r.yaml", problems)
    assert node is not None or problems
    for problem in problems:
        mark = problem.mark
        assert mark is not None and mark.line >= 1 and mark.column >= 1 and mark.length >= 1
        assert mark.column + mark.length <= len(mark.text) + 2 or not mark.text
        problem.render()
