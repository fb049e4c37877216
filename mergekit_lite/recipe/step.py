"""One step of a recipe: `use` a method `of` inputs, against a `base`, `with` settings."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.model import Input, Ref, Step
from mergekit_lite.recipe.node import Entry, ListNode, MapNode, Node, ScalarNode, describe
from mergekit_lite.recipe.setting import read_value
from mergekit_lite.recipe.value import Rule, Value

STEP_KEYS = ("use", "of", "base", "with", "missing", "rest", "below", "above", "like")
MISSING = ("error", "base", "skip", "zero_delta")
_STEP_EXAMPLE = "for example `merged: {use: linear, of: [math, code]}`"
_OF_EXAMPLE = "for example `of: [math, code]` or `of: {math: {weight: 0.7}, code: {weight: 0.3}}`"


class StepReader:
    """Reads one step. `uses` holds every reference found, whether or not a step can be made of the rest."""

    def __init__(self, name: str, mark: Mark, ref: Callable[[Node, str], Ref | None], problems: list[Problem]):
        self.name = name
        self.mark = mark
        self.problems = problems
        self.uses: list[Ref] = []
        self._ref = ref

    def read(self, node: Node) -> Step | None:
        """The step, or None where it lacks a method or inputs. Findings go to `problems`.

        `like: NAME` beside `use` is short for `with: {like: NAME}`; of all settings it alone is surely a reference.
        """
        if not isinstance(node, MapNode):
            self.add(f"step `{self.name}` must be a mapping, not {describe(node)}", node.mark, _STEP_EXAMPLE)
            return None
        for key, entry in node.entries.items():
            if key not in STEP_KEYS:
                self.add(f"a step has no key `{key}`", entry.mark, self.key_hint(key))
        use, use_mark = self.use(node.entries.get("use"))
        inputs = self.inputs(node.get("of"))
        base = self.ref(node.get("base"), "`base`")
        rest, below, above = (self.ref(node.get(key), f"`{key}`") for key in ("rest", "below", "above"))
        params = self.settings(node)
        missing = self.missing(node.get("missing"))
        if use is None or inputs is None:
            return None
        return Step(self.name, use, tuple(inputs), base, params, self.mark, use_mark, missing, rest, below, above)

    def add(self, message: str, mark: Mark, hint: str | None) -> None:
        self.problems.append(Problem(message, mark, hint))

    def key_hint(self, key: str) -> str | None:
        hint = suggest(key, STEP_KEYS)
        return hint if hint and hint.startswith("did") else f"a setting of the method stands under `with`; {hint}"

    def ref(self, node: Node | None, what: str) -> Ref | None:
        found = None if node is None else self._ref(node, what)
        if found is not None:
            self.uses.append(found)
        return found

    def use(self, entry: Entry | None) -> tuple[str | None, Mark]:
        if entry is None:
            self.add(f"step `{self.name}` does not say which method to `use`", self.mark, _STEP_EXAMPLE)
            return None, self.mark
        node = entry.value
        value = node.value if isinstance(node, ScalarNode) else None
        if isinstance(value, str) and value.strip():
            return value, node.mark
        self.add(f"`use` must name a method, not {describe(node)}", node.mark, "for example `use: linear`")
        return None, node.mark

    def missing(self, node: Node | None) -> str:
        if node is None:
            return MISSING[0]
        if isinstance(node, ScalarNode) and isinstance(node.value, str) and node.value in MISSING:
            return node.value
        hint = (
            "where inputs lack a tensor, `error` stops, `base` keeps the base's, `skip` leaves it out and `zero_delta` "
            "takes the base's for the input that lacks it"
        )
        self.add(f"`missing` must be one of {', '.join(MISSING)}, not {describe(node)}", node.mark, hint)
        return MISSING[0]

    def settings(self, node: MapNode) -> dict[str, Value]:
        params: dict[str, Value] = {}
        group = node.get("with")
        if isinstance(group, MapNode):
            params = self.values(group, {"like"})
        elif group is not None:
            hint = "for example `with: {t: 0.4}`, or leave it out"
            self.add(f"`with` must map settings to values, not be {describe(group)}", group.mark, hint)
        inner = group.entries.get("like") if isinstance(group, MapNode) else None
        outer = node.entries.get("like")
        if inner is not None and outer is not None:
            self.add("`like` stands both beside `use` and under `with`", inner.mark, "keep one of the two")
        chosen = outer or inner
        like = self.ref(chosen.value, "`like`") if chosen else None
        if chosen and like:
            params["like"] = Value((Rule(None, like.name, like.mark),), like.mark, chosen.mark)
        return params

    def values(self, node: MapNode, leave_out: set[str]) -> dict[str, Value]:
        read = {key: read_value(entry, self.problems) for key, entry in node.entries.items() if key not in leave_out}
        return {key: value for key, value in read.items() if value is not None}

    def inputs(self, node: Node | None) -> list[Input] | None:
        if node is None:
            self.add(f"step `{self.name}` does not say what it is `of`", self.mark, _OF_EXAMPLE)
            return None
        if isinstance(node, ScalarNode):
            ref = self.ref(node, "`of`")
            return None if ref is None else [Input(ref)]
        if isinstance(node, ListNode):
            found = [self.listed(item) for item in node.items]
        elif _is_listed(node):
            hint = "an input with settings stands in a list: `of: [{model: math, weight: 0.7}]`"
            self.add("`model: NAME` names an input only inside a list", node.mark, hint)
            return None
        else:
            found = [self.named(entry) for entry in node.entries.values()]
        if not found:
            self.add("`of` is empty", node.mark, _OF_EXAMPLE)
        whole = [item for item in found if item is not None]
        return whole if whole and len(whole) == len(found) else None

    def listed(self, node: Node) -> Input | None:
        """An item of a list: a name, or `{model: NAME, SETTING: VALUE, ...}`."""
        if not isinstance(node, MapNode):
            ref = self.ref(node, "an input")
            return None if ref is None else Input(ref)
        model = node.get("model")
        params = self.values(node, {"model"})
        if model is None:
            hint = "for example `{model: math, weight: 0.7}`"
            self.add("this input does not name its `model`", node.mark, hint)
            return None
        ref = self.ref(model, "`model`")
        return None if ref is None else Input(ref, params)

    def named(self, entry: Entry) -> Input | None:
        """An item of a mapping: `NAME: {SETTING: VALUE, ...}`, or `NAME:` for an input without settings."""
        ref = self.ref(ScalarNode(entry.key, entry.mark), "an input")
        node = entry.value
        if isinstance(node, ScalarNode) and node.value is None:
            return None if ref is None else Input(ref)
        if not isinstance(node, MapNode):
            hint = f"for example `{entry.key}: {{weight: 0.5}}`"
            self.add(f"the settings of an input must be a mapping, not {describe(node)}", node.mark, hint)
            return None
        if "model" in node.entries:
            hint = f"here the key `{entry.key}` names it; leave `model` out"
            self.add("an input is named twice", node.entries["model"].mark, hint)
        params = self.values(node, {"model"})
        return None if ref is None else Input(ref, params)


def _is_listed(node: MapNode) -> bool:
    """True for `{model: NAME, ..}`, which is an item of a list and not a mapping of names to settings."""
    model = node.get("model")
    return isinstance(model, ScalarNode) and isinstance(model.value, str)
