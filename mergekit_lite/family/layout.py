"""The part of a family file that says what lies along the axes of its tensors, read and checked.

    sizes       optional; sizes by name, as arithmetic over keys of config.json
    spaces      by word: name (default: the word), kind (default: the word), size (default: as the tensors have it),
                also (further keys of config.json that state the size), groups ({word: number of groups}), member (the
                placeholder that numbers its groups, or its units where there are none), of (the space in whose groups
                it lies), last: fixed (the last one of its kind is the output of the network)
    axes        by tensor name: one entry per axis (`...`: the others are fixed), or `fixed` for all of them
    statistics  optional; the same for tensors that move along but say nothing of which units belong together
    cases       optional; what holds instead under conditions, the first case that names a tensor first: architecture,
                model_types, config (values of keys), has, lacks (tensor names) are the conditions, all of which must
                hold; axes and statistics as above, fixed (words that may not be permuted) and refuse (why the
                spaces are unknown) what follows

docs/families.md explains them with examples.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.errors import MergeError, suggest
from mergekit_lite.family import expression
from mergekit_lite.family.expression import Axis, Word
from mergekit_lite.family.template import placeholders

FIXED = "fixed"
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


class FileFault(MergeError):
    """A family file is wrong. `at` is the text in the file that is to blame."""

    def __init__(self, message: str, at: object = None, *, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.at = at


@dataclass(frozen=True, slots=True)
class SpaceRule:
    """One kind of space. `name` is a template over the numbers in the names of the tensors that use it."""

    word: str
    name: str
    kind: str
    size: str | None = None
    groups: tuple[str, str] | None = None
    member: str | None = None
    of: str | None = None
    last_fixed: bool = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AxisRule:
    """What lies along the axes of a tensor. `axes` is None where all are fixed; `rest`: axes beyond them are fixed."""

    axes: tuple[Axis, ...] | None
    rest: bool = False
    weighed: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """What holds under conditions."""

    architecture: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    rules: tuple[tuple[str, AxisRule], ...] = ()
    fixed: tuple[str, ...] = ()
    refuse: str | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The spaces of a family. `rules` are (tensor name template, axes) in the order of the file."""

    sizes: Mapping[str, str]
    spaces: Mapping[str, SpaceRule]
    rules: tuple[tuple[str, AxisRule], ...]
    cases: tuple[Case, ...]

    def space_of(self, word: str) -> SpaceRule | None:
        """The space that a word means, itself or its groups; None for a size or `fixed`."""
        grouped = (space for space in self.spaces.values() if space.groups and space.groups[0] == word)
        return self.spaces.get(word) or next(grouped, None)


def parse_layout(top: Mapping[str, Any], file: str) -> Layout | None:
    """The layout in a family file; None where it has none. FileFault names the file and what is wrong in it."""
    if "spaces" not in top and "axes" not in top:
        for key in ("sizes", "statistics", "cases"):
            if key in top:
                raise FileFault(f"{file}: `{key}` needs `spaces` and `axes` beside it", key)
        return None
    sizes = {str(word): str(text) for word, text in _mapping(top.get("sizes", {}), file, "sizes").items()}
    for text in sizes.values():
        _checked(expression.check_size, text, file, "sizes")
    spaces = {
        str(word): _space(str(word), raw, file) for word, raw in _mapping(top.get("spaces", {}), file, "spaces").items()
    }
    layout = Layout(
        sizes,
        spaces,
        tuple(_rules(top, file)),
        tuple(_case(raw, file) for raw in _list(top.get("cases", []), file, "cases")),
    )
    _check(layout, file)
    return layout


def _space(word: str, raw: Any, file: str) -> SpaceRule:
    what = f"the space `{word}`"
    known = ["name", "kind", "size", "also", "groups", "member", "of", "last"]
    entry = _mapping(raw, file, what)
    for key in entry:
        if key not in known:
            raise FileFault(f"{file}: {what} has no key `{key}`", key, hint=suggest(str(key), known))
    if entry.get("last", FIXED) != FIXED:
        raise FileFault(f"{file}: `last` of {what} is `fixed` or left out", entry["last"])
    size, groups = entry.get("size"), None
    if size is not None:
        _checked(expression.check_size, size, file, what)
    if "groups" in entry:
        pairs = list(_mapping(entry["groups"], file, f"`groups` of {what}").items())
        if len(pairs) != 1:
            raise FileFault(f"{file}: `groups` of {what} is one word with the number of groups", "groups")
        groups = (str(pairs[0][0]), str(pairs[0][1]))
        _checked(expression.check_size, groups[1], file, what)
    return SpaceRule(
        word,
        str(entry.get("name", word)),
        str(entry.get("kind", word)),
        None if size is None else str(size),
        groups,
        entry.get("member"),
        entry.get("of"),
        "last" in entry,
        _strings(entry.get("also", ())),
    )


def _rules(raw: Mapping[str, Any], file: str) -> Iterator[tuple[str, AxisRule]]:
    for key, weighed in (("axes", True), ("statistics", False)):
        for template, axes in _mapping(raw.get(key, {}), file, f"`{key}`").items():
            rule = _axes(axes, str(template), file, weighed)
            for one in _choices(str(template)):
                names = placeholders(one)
                if len(set(names)) < len(names):
                    raise FileFault(f"{file}: `{template}` has one placeholder twice", template)
                yield one, rule


def _axes(raw: Any, template: str, file: str, weighed: bool) -> AxisRule:
    if raw == FIXED:
        return AxisRule(None)
    if not isinstance(raw, list):
        raise FileFault(f"{file}: `{template}` has a list of axes or `fixed`, not {raw!r}", template)
    rest = bool(raw) and raw[-1] == "..."
    texts = raw[:-1] if rest else raw
    return AxisRule(tuple(_checked(expression.axis, text, file, f"`{template}`") for text in texts), rest, weighed)


def _case(raw: Any, file: str) -> Case:
    entry = _mapping(raw, file, "a case")
    conditions = ["architecture", "model_types", "config", "has", "lacks"]
    results = ["axes", "statistics", "fixed", "refuse"]
    for key in entry:
        if key not in conditions + results:
            raise FileFault(f"{file}: a case has no key `{key}`", key, hint=suggest(str(key), conditions + results))
    if not any(key in entry for key in conditions) or not any(key in entry for key in results):
        raise FileFault(f"{file}: a case has a condition and what follows from it", next(iter(entry), "cases"))
    several = {key: _strings(entry.get(key, ())) for key in ("architecture", "model_types", "has", "lacks", "fixed")}
    return Case(
        several["architecture"],
        several["model_types"],
        _mapping(entry.get("config", {}), file, "`config` of a case"),
        tuple(one for template in several["has"] for one in _choices(template)),
        tuple(one for template in several["lacks"] for one in _choices(template)),
        tuple(_rules(entry, file)),
        several["fixed"],
        entry.get("refuse"),
    )


def _check(layout: Layout, file: str) -> None:
    """Every word must mean one thing, and every number in the name of a space must be known where it is used."""
    grouped = {space.groups[0]: word for word, space in layout.spaces.items() if space.groups}
    known = [*layout.spaces, *grouped, *layout.sizes, FIXED]
    for named in known:
        if known.count(named) > 1 or not named.isidentifier():
            raise FileFault(f"{file}: `{named}` must be a word, and mean one thing only", named)
    for space in layout.spaces.values():
        if space.of is None:
            continue
        parent = layout.spaces.get(space.of)
        if parent is None or parent.member is None or parent.of is not None:
            raise FileFault(
                f"{file}: `of: {space.of}` of `{space.word}` names no space that has a `member` and no `of`", space.of
            )
    for case in layout.cases:
        for named in case.fixed:
            if named not in layout.spaces:
                raise FileFault(f"{file}: `fixed: {named}` names no space", named, hint=suggest(named, layout.spaces))
    for template, rule in itertools.chain(layout.rules, *(case.rules for case in layout.cases)):
        for node in rule.axes or ():
            for word, outer in expression.nested(node):
                if word.name not in known:
                    message = f"{file}: `{word.name}` of `{template}` is no space, groups or size"
                    raise FileFault(message, template, hint=suggest(word.name, known))
                _check_numbers(layout, template, word, outer, file)


def _check_numbers(layout: Layout, template: str, word: Word, outer: frozenset[str], file: str) -> None:
    space, bound = layout.space_of(word.name), set(placeholders(template))
    if word.index is not None:
        if space is None or len(placeholders(space.name)) != 1:
            raise FileFault(f"{file}: `{word.name}` of `{template}` takes no number in brackets", template)
        if word.index[0] is not None and word.index[0] not in bound:
            raise FileFault(f"{file}: `{template}` has no number `{word.index[0]}`", template)
        return
    if space is None:
        return
    parent = layout.spaces[space.of] if space.of is not None else None
    if parent is not None and parent.member is not None and parent.member not in bound:
        if outer.isdisjoint({parent.word, *(parent.groups or ())[:1]}):
            raise FileFault(f"{file}: `{space.word}` of `{template}` does not stand inside `{parent.word}`", template)
        if space.size is None:
            raise FileFault(
                f"{file}: the space `{space.word}` lies inside `{parent.word}` and needs a size", space.word
            )
        bound.add(parent.member)
    if missing := set(placeholders(space.name)) - bound:
        raise FileFault(f"{file}: `{template}` lacks the number `{min(missing)}` of the space `{space.word}`", template)


def _choices(template: str) -> Iterator[str]:
    # `{weight,bias}` stands for both names.
    parts = _CHOICE.split(template)
    for chosen in itertools.product(*(part.split(",") for part in parts[1::2])):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::2], chosen, fillvalue="")))


def _checked(check: Any, text: Any, file: str, what: str) -> Any:
    try:
        return check(text)
    except ValueError as fault:
        raise FileFault(f"{file}: {what}: {fault}", text) from None


def _mapping(raw: Any, file: str, what: str) -> Mapping[Any, Any]:
    if not isinstance(raw, dict):
        raise FileFault(f"{file}: {what} is a mapping, not {raw!r}", raw if isinstance(raw, str) else None)
    return raw


def _list(raw: Any, file: str, what: str) -> list[Any]:
    if not isinstance(raw, list):
        raise FileFault(f"{file}: {what} is a list, not {raw!r}", raw if isinstance(raw, str) else None)
    return raw


def _strings(raw: str | Iterable[str]) -> tuple[str, ...]:
    return (raw,) if isinstance(raw, str) else tuple(str(text) for text in raw)
