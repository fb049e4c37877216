"""Holes of a recipe: values that a search fills by a score.

    {search: [0, 1]}                 a number between two; `step: 0.1` puts it on a grid, `log: true` on a log scale
    {choice: [ties, dare_ties]}      one of these values, whatever they are
    of: {greedy: [a, b, c]}          those inputs that a greedy soup takes
    of: {learned: [a, b, c]}         these inputs, with weights that are learned from data
    from: {learned: ste}             permutations that are learned from data

A hole is filled like a setting of the command line (`--set PATH=VALUE`), so that a filled recipe can be had by hand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_lite.errors import Mark, Problem
from mergekit_lite.recipe import learned
from mergekit_lite.recipe.learned import Learning, LearningOrder, read_learning, read_order
from mergekit_lite.recipe.node import ListNode, MapNode, Node, ScalarNode, describe

Kind = Literal["search", "choice", "greedy", "learned", "order"]
_KEYS: Mapping[str, tuple[str, ...]] = {
    "search": ("search", "step", "log"),
    "choice": ("choice",),
    "greedy": ("greedy", "accept"),
    "learned": learned.KEYS,
    "order": learned.ORDER_KEYS,
}
ACCEPT = ("ge", "gt")
_EXAMPLES = {
    "search": "for example `{search: [0, 1]}`, `{search: [1, 8], step: 1}` or `{search: [1e-4, 1], log: true}`",
    "choice": "for example `{choice: [0.2, 0.5]}`",
    "greedy": "for example `of: {greedy: [a, b, c], accept: gt}`",
    "learned": learned.EXAMPLE,
    "order": learned.ORDER_EXAMPLE,
}
_DATA = "from data (`--text`, `--data`)"
_BY = {"learned": _DATA, "order": _DATA}
_BARE = re.compile(r"[^\s.\"=]+")


@dataclass(frozen=True, slots=True)
class Hole:
    """A value to be found. `path` is where it stands, as `--set` writes it. Of `search`, `low`, `high` and `step` are
    whole numbers only where all of them are and there is a step; `values` are those to choose among, of `greedy` and
    `learned` the names of the inputs; `accept` tells whether an input that leaves the score as it is goes in (`ge`) or
    not (`gt`), `learning` how weights, or of `order` the permutations, are learned."""

    path: str
    kind: Kind
    mark: Mark
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    values: tuple[Any, ...] = ()
    accept: str = ACCEPT[0]
    learning: Learning | LearningOrder | None = None

    def ends(self) -> list[Any]:
        """Values at which a fault of the setting would show: both ends, or all choices."""
        return [self.low, self.high] if self.kind == "search" else list(self.values)


def points(hole: Hole) -> tuple[Any, ...] | None:
    """All values that a hole may have; None where they are endless."""
    if hole.kind == "choice":
        return hole.values
    if hole.kind in ("greedy", "learned", "order") or hole.step is None:
        return None
    return tuple(hole.low + i * hole.step for i in range(1 + int((hole.high - hole.low) / hole.step + 1e-9)))


def find_holes(root: Node, problems: list[Problem]) -> list[Hole]:
    """The holes below `root`, in the order of the text; what is wrong with them goes to `problems`."""
    return list(_below(root, (), problems))


def unfilled(holes: Sequence[Hole]) -> list[Problem]:
    """The findings of a recipe that is to be run and has holes."""
    return [
        Problem(
            f"`{hole.path}` is to be found by a search",
            hole.mark,
            f"`merge search` fills it {_BY.get(hole.kind, 'by a score')}; by hand: `--set '{hole.path}=VALUE'`",
        )
        for hole in holes
    ]


def setting(path: str, value: Any) -> str:
    """The text that `--set` takes to fill the hole at `path`."""
    return f"{path}={json.dumps(value)}"  # JSON is YAML


def _below(node: Node, above: tuple[str, ...], problems: list[Problem]) -> Iterator[Hole]:
    if isinstance(node, ListNode):
        for number, item in enumerate(node.items):
            yield from _below(item, (*above, str(number)), problems)
    elif isinstance(node, MapNode):
        kind = _kind(node, above)
        if kind is not None:
            hole = _hole(node, kind, above, problems)
            if hole is not None:
                yield hole
            return
        for key, entry in node.entries.items():
            yield from _below(entry.value, (*above, key), problems)


def _kind(node: MapNode, above: tuple[str, ...]) -> Kind | None:
    """What kind of hole a mapping is. A model or a step may be called `search`, a setting not."""
    if len(above) < 2 and above[:1] != ("seed",):
        return None
    kinds: tuple[Kind, ...] = ("search", "choice", "greedy", "learned")
    for kind in kinds:
        entry = node.entries.get(kind)
        if entry is None or isinstance(entry.value, MapNode):
            continue
        if kind in ("greedy", "learned"):
            if above[-1] == "of":
                return kind
            if kind == "learned" and above[:1] + above[2:] == ("steps", "with", "from"):
                return "order"
        elif isinstance(entry.value, ListNode) or above[-1] not in ("of", "models", "steps"):
            return kind
    return None


def _hole(node: MapNode, kind: Kind, above: tuple[str, ...], problems: list[Problem]) -> Hole | None:
    before = len(problems)
    for key, entry in node.entries.items():
        if key not in _KEYS[kind]:
            said = "learned" if kind == "order" else kind
            problems.append(Problem(f"`{said}` has no key `{key}` beside it", entry.mark, _EXAMPLES[kind]))
    path = _path(above)
    if path is None:
        message = 'a value below a key that holds `"` or `=` cannot be searched'
        problems.append(Problem(message, node.mark, "name the tensors by another glob"))
        return None
    if kind == "order":
        hole = Hole(path, kind, node.mark, learning=read_order(node, problems))
        return hole if len(problems) == before else None
    items = node.entries[kind].value
    if not isinstance(items, ListNode) or not items.items:
        problems.append(Problem(f"`{kind}` needs a list, not {describe(items)}", items.mark, _EXAMPLES[kind]))
        return None
    if kind == "search":
        hole = _range(node, path, items, problems)
    elif kind == "choice":
        values = tuple(plain(item) for item in items.items)
        twice = next((i for i, v in enumerate(values) if any(_same(v, w) for w in values[:i])), None)
        if twice is not None:
            problems.append(Problem("this choice is listed twice", items.items[twice].mark, "remove one of them"))
        hole = Hole(path, kind, node.mark, values=values)
    elif kind == "learned":
        learning, names = read_learning(node, items, problems)
        hole = Hole(path, kind, node.mark, values=names, learning=learning)
    else:
        hole = _greedy(node, path, items, problems)
    return hole if len(problems) == before else None


def _range(node: MapNode, path: str, items: ListNode, problems: list[Problem]) -> Hole:
    ends = [_number(item) for item in items.items]
    low, high = (ends[0], ends[-1]) if len(ends) == 2 else (None, None)
    if low is None or high is None or not low < high:
        message = "`search` needs two numbers, the smaller one first"
        problems.append(Problem(message, items.mark, _EXAMPLES["search"]))
        return Hole(path, "search", node.mark)
    step_node, log_node = node.get("step"), node.get("log")
    step = None if step_node is None else _number(step_node)
    log = isinstance(log_node, ScalarNode) and log_node.value is True
    if step_node is not None and (step is None or not 0 < step <= high - low):
        message = f"`step` must be a number above 0 and at most {high - low:g}, not {describe(step_node)}"
        problems.append(Problem(message, step_node.mark, _EXAMPLES["search"]))
    if log_node is not None and not (isinstance(log_node, ScalarNode) and isinstance(log_node.value, bool)):
        problems.append(Problem(f"`log` is true or false, not {describe(log_node)}", log_node.mark, None))
    elif log and (low <= 0 or step is not None):
        message = "a log scale has no `step`" if step is not None else "a log scale begins above 0"
        problems.append(Problem(message, node.entries["log"].mark, _EXAMPLES["search"]))
    if step is None or not all(isinstance(n, int) for n in (low, high, step)):
        low, high = float(low), float(high)
    return Hole(path, "search", node.mark, low, high, step, log)


def _greedy(node: MapNode, path: str, items: ListNode, problems: list[Problem]) -> Hole:
    accept = node.get("accept")
    chosen = accept.value if isinstance(accept, ScalarNode) else None
    if accept is not None and chosen not in ACCEPT:
        hint = "`ge` takes an input in that leaves the score as it is, `gt` only one that betters it"
        problems.append(Problem(f"`accept` is ge or gt, not {describe(accept)}", accept.mark, hint))
    if len(items.items) < 2:
        problems.append(Problem("a greedy soup needs at least two inputs", items.mark, _EXAMPLES["greedy"]))
    values = tuple(plain(item) for item in items.items)
    return Hole(path, "greedy", node.mark, values=values, accept=str(chosen or ACCEPT[0]))


def plain(node: Node) -> Any:
    """The node as plain data."""
    if isinstance(node, ListNode):
        return [plain(item) for item in node.items]
    if isinstance(node, MapNode):
        return {key: plain(entry.value) for key, entry in node.entries.items()}
    return node.value


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _number(node: Node) -> float | int | None:
    value = node.value if isinstance(node, ScalarNode) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _path(parts: Sequence[str]) -> str | None:
    """The keys as `--set` writes them; None where it cannot."""
    written = []
    for part in parts:
        if '"' in part or "=" in part or not part:
            return None
        written.append(part if _BARE.fullmatch(part) else f'"{part}"')
    return ".".join(written)
