"""Where a model's experts and their routers lie, layer by layer. Data only, no torch.

The part `moe` of a family file:

    count     keys of config.json that state the number of experts of a layer, and so the rows of its router
    chosen    keys that state to how many of them a token goes
    least     optional; how many experts the model's code needs (where routing is limited: in each group), by model
              type with `else`
    limited   optional; routing in groups of neighbours: groups and chosen (keys)
    layouts   ways of storing the experts, of which the first whose router is found in a layer holds: router (tensors
              with an entry for every expert, the first of which must be there), rows and columns (weights of the
              experts whose rows, or columns, are hidden units). A name with `{e}` stands for one tensor an expert, one
              without for a tensor of all of them; rows may hold several pieces of a unit (gate and up) one after the
              other. All names without what stands before them in a layer

docs/families.md explains it with an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_lite.errors import InputError
from mergekit_lite.family.layout import FileFault
from mergekit_lite.family.section import lookup

Shapes = Mapping[str, tuple[int, ...]]
_HINT = "describe them under `moe` in a family file (docs/families.md)"


@dataclass(frozen=True, slots=True)
class LayoutRule:
    """One way of storing experts: templates of tensor names inside a layer."""

    router: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MoeRule:
    """The part `moe` of a family file."""

    count: tuple[str, ...]
    chosen: tuple[str, ...]
    layouts: tuple[LayoutRule, ...]
    groups: str | None = None
    groups_chosen: str | None = None
    least: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of every expert of a layer: a matrix (rows, width) for each. `names` are the tensors, one for each
    expert, or one that holds all of them. The hidden units are the matrix's `units`; of rows there are `pieces` times
    as many as units, piece after piece."""

    names: tuple[str, ...]
    units: Literal["rows", "columns"]
    rows: int
    width: int
    pieces: int = 1

    @property
    def fused(self) -> bool:
        return len(self.names) == 1

    @property
    def numel(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer. `router` is the name of the module that chooses among them, `gates` its tensors with an
    entry for every expert, `count` how many experts there are, with `units` hidden units each, in `groups` groups of
    neighbours that routing chooses among first. `into` is how many are to be left."""

    router: str
    layer: int
    count: int
    units: int
    gates: tuple[str, ...]
    weights: tuple[Weight, ...]
    groups: int = 1
    into: int = 0

    @property
    def numel(self) -> int:
        """Elements of one expert."""
        return sum(weight.numel for weight in self.weights)


def parse_moe(raw: Any, file: str) -> MoeRule:
    """The part `moe` of a family file. FileFault names the file and what is wrong in it."""
    top = _mapping(raw, file, "`moe`", {"count", "chosen", "layouts"}, {"least", "limited"})
    limited = top.get("limited")
    if limited is not None:
        limited = _mapping(limited, file, "`limited` of `moe`", {"groups", "chosen"}, set())
    layouts = top["layouts"]
    if not isinstance(layouts, list) or not layouts:
        raise FileFault(f"{file}: `layouts` of `moe` is a list of ways of storing experts")
    return MoeRule(
        _words(top["count"], file, "count"),
        _words(top["chosen"], file, "chosen"),
        tuple(_layout(entry, file) for entry in layouts),
        None if limited is None else str(limited["groups"]),
        None if limited is None else str(limited["chosen"]),
        _least(top["least"], file) if "least" in top else None,
    )


def _least(raw: Any, file: str) -> Mapping[str, int]:
    if not isinstance(raw, dict) or "else" not in raw or not all(type(number) is int for number in raw.values()):
        raise FileFault(f"{file}: `least` of `moe` has a whole number for each model type, and for `else`", "least")
    return raw


def _layout(raw: Any, file: str) -> LayoutRule:
    entry = _mapping(raw, file, "a layout of `moe`", {"router", "rows", "columns"}, set())
    made = LayoutRule(*(_words(entry[key], file, key) for key in ("router", "rows", "columns")))
    several = {"{e}" in name for name in (*made.rows, *made.columns)}
    if len(several) > 1:
        raise FileFault(f"{file}: the weights of a layout of `moe` all have `{{e}}` in their names, or none has")
    return made


def _words(raw: Any, file: str, key: str) -> tuple[str, ...]:
    found = raw if isinstance(raw, list) else [raw]
    if not found or not all(isinstance(word, str) for word in found):
        raise FileFault(f"{file}: `{key}` of `moe` is one text or a list of texts", key)
    return tuple(found)


def _mapping(raw: Any, file: str, what: str, needed: set[str], optional: set[str]) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise FileFault(f"{file}: {what} is a mapping, not {raw!r}")
    for key in raw:
        if key not in needed | optional:
            raise FileFault(f"{file}: {what} has no key `{key}`", key)
    if missing := needed - set(raw):
        raise FileFault(f"{file}: {what} lacks {', '.join(f'`{key}`' for key in sorted(missing))}")
    return raw


def routing_groups(rule: MoeRule, config: Mapping[str, Any], section: str) -> tuple[int, int]:
    """In how many groups a router's experts lie, and how many of these a token may go to; 1 and 1 where they lie in
    none."""
    found = []
    for key in (rule.groups, rule.groups_chosen):
        value = None if key is None else lookup(config, section + key)
        found.append(value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1)
    return found[0], found[1]


def expert_layers(
    rule: MoeRule, leads: Mapping[int, str], shapes: Shapes, groups: int, what: str
) -> tuple[ExpertLayer, ...]:
    """The layers that have experts. `leads` is what stands before the names of each layer's tensors, `what` the model
    in messages.

    InputError where there are none, where a router is missing, and where router and experts do not fit together.
    """
    found = [layer for i, lead in leads.items() if (layer := _layer(rule, i, lead, shapes, groups, what)) is not None]
    if not found:
        lone = next(_orphans(rule, leads, shapes), None)
        if lone is not None:
            raise InputError(f"{what} has experts, but no router: `{lone}`", hint="is the checkpoint whole?")
        raise InputError(f"{what} has no experts", hint="take a model with a mixture of experts in its layers")
    there = {layer.layer for layer in found}
    lone = next(_orphans(rule, {i: lead for i, lead in leads.items() if i not in there}, shapes), None)
    if lone is not None:
        raise InputError(f"{what} has experts in a layer without a router: `{lone}`", hint="is the checkpoint whole?")
    return tuple(found)


def _orphans(rule: MoeRule, leads: Mapping[int, str], shapes: Shapes) -> Iterator[str]:
    """Weights of experts in these layers."""
    for lead in leads.values():
        for layout in rule.layouts:
            for name in (*layout.rows, *layout.columns):
                if (full := lead + name.replace("{e}", "0")) in shapes:
                    yield full


def _layer(rule: MoeRule, i: int, lead: str, shapes: Shapes, groups: int, what: str) -> ExpertLayer | None:
    for layout in rule.layouts:
        gate = lead + layout.router[0]
        first = lead + layout.columns[0].replace("{e}", "0")
        if gate in shapes and first in shapes:
            break
    else:
        return None
    count = shapes[gate][0] if shapes[gate] else 0
    gates = tuple(lead + name for name in layout.router if lead + name in shapes)
    for name in gates:
        if not shapes[name] or shapes[name][0] != count:
            raise InputError(f"{what}: `{name}` has other than {count} rows, one for each expert", hint=_HINT)
    units = shapes[first][-1] if shapes[first] else 0
    weights = [
        _weight(lead + name, "rows" if name in layout.rows else "columns", count, units, shapes, what)
        for name in (*layout.rows, *layout.columns)
    ]
    if groups > 1 and count % groups:
        raise InputError(f"{what}: {count} experts of `{gate}` do not lie in {groups} groups", hint=_HINT)
    return ExpertLayer(gate.removesuffix(".weight"), i, count, units, gates, tuple(weights), groups)


def _weight(
    template: str, axis: Literal["rows", "columns"], count: int, units: int, shapes: Shapes, what: str
) -> Weight:
    several = "{e}" in template
    names = tuple(template.replace("{e}", str(e)) for e in range(count)) if several else (template,)
    lacking = [name for name in names if name not in shapes]
    if lacking:
        raise InputError(f"{what} lacks `{lacking[0]}`: its router has {count} rows", hint="is the checkpoint whole?")
    if several and template.replace("{e}", str(count)) in shapes:
        message = (
            f"{what} has more experts than the {count} rows of its router: `{template.replace('{e}', str(count))}`"
        )
        raise InputError(message, hint="experts that share a row of the router cannot be merged any more")
    shape = shapes[names[0]]
    odd = next((name for name in names if shapes[name] != shape), None)
    if odd is not None:
        raise InputError(
            f"{what}: `{odd}` has another shape than `{names[0]}`", hint="experts of a layer must be alike"
        )
    matrix = shape if several else shape[1:]
    fits = len(matrix) == 2 and units > 0 and (several or shape[0] == count)
    if not fits or (axis == "columns" and matrix[1] != units) or (axis == "rows" and matrix[0] % units):
        raise InputError(f"{what}: `{names[0]}` has a shape {shape} that is not that of {count} experts", hint=_HINT)
    return Weight(names, axis, matrix[0], matrix[1], matrix[0] // units if axis == "rows" else 1)
