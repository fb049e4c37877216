"""YAML text as a tree of nodes that know their place. What misleads a reader is an error.

The tree is built from PyYAML's parse events, so no tag ever constructs an object. Unlike `yaml.safe_load`, scalars
follow YAML 1.2 (see `node.plain_value`), and these are errors: a key given twice, a tag, a merge key `<<`, a second
document where one is expected, an alias inside the thing it names, aliases that multiply into a huge tree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NoReturn

import yaml

from mergekit_lite.errors import Mark, Problem
from mergekit_lite.recipe.node import Entry, ListNode, MapNode, Node, ScalarNode, plain_value

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 40
_SHOWN_COLUMNS = 240

_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SYNTAX_HINTS = (
    ("'\\t'", "indent with spaces, not with tabs"),
    ("an alias", 'a text that starts with `*` needs quotes: `"*.mlp.*": 0.4`'),
    ("found unknown escape", "in double quotes a backslash starts an escape; use single quotes for a plain backslash"),
    ("mapping values are not allowed", "text that holds `: ` needs quotes, and so does a key that follows on one line"),
    ("'@'", "text that starts with `@` needs quotes"),
    ("'`'", "text that starts with a backtick needs quotes"),
    ("'%'", "text that starts with `%` needs quotes"),
    ("while scanning a quoted scalar", "a closing quote is missing"),
    ("flow sequence", "a `,` or a closing `]` is missing"),
    ("flow mapping", "a `,` or a closing `}` is missing"),
    ("expected <block end>", "check the indentation: keys of one mapping start in one column"),
    ("could not find expected ':'", "a key needs a `:` and a space after it"),
)
_SYNTAX_HINT = "look at the indentation, quotes and brackets here and on the line above"


def load(text: str, file: str, problems: list[Problem]) -> Node | None:
    """The tree of the YAML document `text`; findings go to `problems`, None where no tree can be made.

    `file` stands in the marks. A key given twice keeps its first value; a key that is not text keeps its spelling.
    """
    documents = load_all(text, file, problems, lambda first: False)
    return documents[0] if documents else None


def load_all(text: str, file: str, problems: list[Problem], several: Callable[[Node], bool]) -> list[Node]:
    """The trees of all documents in `text`, an empty list where they cannot be read; otherwise as `load`.

    A second document is an error unless `several` is true of the first. Documents that hold nothing are left out.
    """
    return _Builder(text, _Places(text, file), problems).documents(several)


def load_value(text: str, file: str, line: str, shift: int, problems: list[Problem]) -> Node | None:
    """The tree of a YAML value that begins at column `shift` (0-based) of the text `line`. Empty text is null."""
    places = _Places(line, file, shift)
    if not text.strip():
        return ScalarNode(None, places.at(0, 0))
    documents = _Builder(text, places, problems).documents(lambda first: False)
    return documents[0] if documents else None


class _Stop(Exception):
    """The text cannot be read any further; the problem is already recorded."""


class _Places:
    """Makes marks. `shift` is added to the columns of the first line."""

    def __init__(self, text: str, file: str, shift: int = 0):
        self.lines = _LINE_BREAK.split(text)
        self.file = file
        self.shift = shift

    def at(self, line: int, column: int, length: int = 1) -> Mark:
        """The mark of a 0-based place. Lines too long to print are left out of it."""
        text = self.lines[line] if line < len(self.lines) else ""
        column += self.shift if line == 0 else 0
        length = max(1, min(length, len(text.rstrip()) - column))
        shown = text[:_SHOWN_COLUMNS] if column + length <= _SHOWN_COLUMNS else ""
        return Mark(self.file, line + 1, column + 1, shown, length)

    def span(self, event: yaml.Event, last: yaml.Event | None = None) -> Mark:
        """The mark from the start of `event` to the end of `last`, or to the end of the line where that is further."""
        start, end = event.start_mark, (last or event).end_mark
        assert start is not None and end is not None
        return self.at(start.line, start.column, end.column - start.column if end.line == start.line else 1 << 30)

    def word(self, event: yaml.Event) -> Mark:
        """The mark from the start of `event` to the next blank."""
        start = event.start_mark
        assert start is not None
        line = self.lines[start.line] if start.line < len(self.lines) else ""
        column = start.column + (self.shift if start.line == 0 else 0)
        words = line[column:].split(maxsplit=1)
        return self.at(start.line, start.column, len(words[0]) if words else 1)


class _Anchor:
    """What `&name` stands for: a node, its size in nodes with aliases written out, its height in levels."""

    __slots__ = ("count", "height", "node")

    def __init__(self, node: Node, count: int, height: int):
        self.node = node
        self.count = count
        self.height = height


class _Builder:
    def __init__(self, text: str, places: _Places, problems: list[Problem]):
        self.text = text
        self.places = places
        self.problems = problems
        self.count = 0
        # None: the anchor's node is not finished, so an alias to it stands inside it.
        self.anchors: dict[str, _Anchor | None] = {}
        self.events: Iterator[yaml.Event] = iter(())

    def documents(self, several: Callable[[Node], bool]) -> list[Node]:
        start = self.places.at(0, 0)
        try:
            if len(self.text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
                self.stop(f"the text is larger than {MAX_BYTES >> 20} MiB", start, "a recipe is a page or two of YAML")
            if self.text.startswith("\ufeff"):
                self.stop("the text starts with a byte-order mark", start, "save the file as UTF-8 without one")
            self.events = iter(yaml.parse(self.text, Loader=yaml.SafeLoader))
            return self.roots(several)
        except _Stop:
            return []
        except yaml.reader.ReaderError as error:
            self.problems.append(self.unprintable(error))
        except yaml.MarkedYAMLError as error:
            self.problems.append(self.syntax(error))
        except (yaml.YAMLError, ValueError, OverflowError):
            # PyYAML lets these through for a `\U` escape beyond Unicode and for an endless number in `%YAML`.
            hint = "look for a `\\U` escape or a `%YAML` line"
            self.problems.append(Problem("not valid YAML: a number is out of range", start, hint))
        return []

    def roots(self, several: Callable[[Node], bool]) -> list[Node]:
        next(self.events)
        if isinstance(next(self.events), yaml.StreamEndEvent):
            hint = "a recipe starts with `version: 1` and has `steps`"
            self.stop("the file is empty", self.places.at(0, 0), hint)
        found: list[Node] = []
        while True:
            node, _ = self.node(next(self.events), 0)
            if not found or not isinstance(node, ScalarNode) or node.value is not None:
                found.append(node)
            next(self.events)
            event = next(self.events)
            if isinstance(event, yaml.StreamEndEvent):
                return found
            if not several(found[0]):
                mark = self.places.span(event)
                self.stop("a second YAML document begins here", mark, "keep one recipe in one file")
            self.anchors.clear()

    def node(self, event: yaml.Event, depth: int) -> tuple[Node, int]:
        """The node that begins with `event`, and its height in levels."""
        mark = self.places.span(event)
        if isinstance(event, yaml.AliasEvent):
            assert event.anchor is not None
            return self.alias(event.anchor, mark, depth)
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        before = self.count
        self.grow(1, 1, depth, mark)
        anchor = event.anchor
        if event.tag is not None:
            shown = event.tag.replace("tag:yaml.org,2002:", "!!")
            hint = 'tags are not read; quotes make a text of a number: `"1"`'
            self.problems.append(Problem(f"`{shown}` is a tag", self.places.word(event), hint))
        if anchor:
            self.anchors[anchor] = None
        if isinstance(event, yaml.MappingStartEvent):
            node, height = self.mapping(event, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            node, height = self.sequence(event, depth)
        else:
            assert isinstance(event, yaml.ScalarEvent)
            node, height = self.scalar(event, mark), 1
        if anchor:
            self.anchors[anchor] = _Anchor(node, self.count - before, height)
        return node, height

    def alias(self, name: str, mark: Mark, depth: int) -> tuple[Node, int]:
        if name not in self.anchors:
            hint = f'a text that starts with `*` needs quotes: `"*{name}"`'
            self.stop(f"`*{name}` is an alias of nothing: there is no `&{name}` above it", mark, hint)
        anchor = self.anchors[name]
        if anchor is None:
            self.stop(f"`*{name}` stands inside the `&{name}` that it repeats", mark, "a recipe cannot contain itself")
        self.grow(anchor.count, anchor.height, depth, mark)
        return anchor.node, anchor.height

    def scalar(self, event: yaml.ScalarEvent, mark: Mark) -> Node:
        if _SURROGATE.search(event.value):
            self.problems.append(Problem("this text holds half a character", mark, "write `\\U0001F600`, not a pair"))
            return ScalarNode("", mark)
        try:
            return ScalarNode(plain_value(event.value) if event.style is None else event.value, mark)
        except ValueError as error:
            self.problems.append(Problem(f"this number has {error}", mark, "quotes make a text of it"))
            return ScalarNode(0, mark)

    def sequence(self, start: yaml.SequenceStartEvent, depth: int) -> tuple[Node, int]:
        items: list[Node] = []
        height = 1
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            item, levels = self.node(event, depth + 1)
            items.append(item)
            height = max(height, levels + 1)
        mark = self.places.span(start, event if start.flow_style else None)
        return ListNode(tuple(items), mark), height

    def mapping(self, start: yaml.MappingStartEvent, depth: int) -> tuple[Node, int]:
        entries: dict[str, Entry] = {}
        height = 1
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            mark = self.places.span(event)
            key_node, _ = self.node(event, depth + 1)
            key = self.key(event, key_node, mark)
            value, levels = self.node(next(self.events), depth + 1)
            height = max(height, levels + 1)
            if key is None:
                continue
            if key in entries:
                hint = f"it stands first on line {entries[key].mark.line}; keep one of the two"
                self.problems.append(Problem(f"the key `{key}` is given twice", mark, hint))
            else:
                entries[key] = Entry(key, mark, value)
        if start.flow_style:
            mark = self.places.span(start, event)
        else:
            mark = next((entry.mark for entry in entries.values()), self.places.word(start))
        return MapNode(entries, mark), height

    def key(self, event: yaml.Event, node: Node, mark: Mark) -> str | None:
        """The key as text, or None where it must be left out."""
        if not isinstance(node, ScalarNode):
            self.problems.append(Problem("a key must be text, not a list or a mapping", mark, "give the key a name"))
            return None
        spelling = event.value if isinstance(event, yaml.ScalarEvent) else str(node.value)
        if spelling == "<<" and isinstance(event, yaml.ScalarEvent) and event.style is None:
            hint = "write the settings out, or repeat a whole value with `&name` and `*name`"
            self.problems.append(Problem("merge keys (`<<`) are not read", mark, hint))
            return None
        if isinstance(node.value, str):
            return node.value
        if node.value is None and not spelling:
            self.problems.append(Problem("a key is missing before `:`", mark, "give the key a name"))
            return None
        message = f"a key must be text, but `{spelling}` is a number or a word of YAML"
        self.problems.append(Problem(message, mark, f'put it in quotes: `"{spelling}"`'))
        return spelling

    def grow(self, nodes: int, height: int, depth: int, mark: Mark) -> None:
        self.count += nodes
        if self.count > MAX_NODES:
            hint = "aliases count as often as they are used" if self.anchors else "a recipe is a page or two of YAML"
            self.stop(f"the text holds more than {MAX_NODES} values", mark, hint)
        if depth + height > MAX_DEPTH:
            self.stop(f"more than {MAX_DEPTH} levels of nesting", mark, "a recipe needs fewer than ten")

    def stop(self, message: str, mark: Mark, hint: str) -> NoReturn:
        self.problems.append(Problem(message, mark, hint))
        raise _Stop

    def unprintable(self, error: yaml.reader.ReaderError) -> Problem:
        before = _LINE_BREAK.split(self.text[: error.position])
        mark = self.places.at(len(before) - 1, len(before[-1]))
        code = error.character if isinstance(error.character, int) else ord(error.character)
        return Problem(f"the character U+{code:04X} does not belong in a text file", mark, "is this file YAML at all?")

    def syntax(self, error: yaml.MarkedYAMLError) -> Problem:
        place = error.problem_mark or error.context_mark
        mark = self.places.at(0, 0) if place is None else self.places.at(place.line, place.column)
        said = f"{error.context or ''} {error.problem or ''}"
        hint = next((hint for sign, hint in _SYNTAX_HINTS if sign in said), _SYNTAX_HINT)
        opened = error.context_mark
        if opened is not None and place is not None and opened.line != place.line:
            note = f"it began on line {opened.line + 1}"
            hint = f"{hint}; {note}"
        return Problem(f"not valid YAML: {error.problem or error.context}", mark, hint)
