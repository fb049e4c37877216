"""`slice`: a smaller model cut out of a larger one. Sizes and configuration are worked out here; which units are kept
is for the run to find, where it goes by their importance."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_lite.align.keep import kept_shape, kept_spans
from mergekit_lite.errors import Mark, MergeError, Problem, RecipeError, suggest
from mergekit_lite.family.data import FamilyData, load_family
from mergekit_lite.family.family import family_of, restacked_config
from mergekit_lite.family.resize import CannotResize, Count, Resized, check_resized, resized
from mergekit_lite.family.section import assign, lookup
from mergekit_lite.methods.spec import Method
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.model import LEADING, Alignment
from mergekit_lite.plan.settings import constant
from mergekit_lite.plan.steps import Source, listed
from mergekit_lite.recipe.model import Step
from mergekit_lite.recipe.value import Rule, Value, glob_matches

# Keys that say how many of the first layers are of another sort.
BOUNDS = ("first_k_dense_replace", "max_window_layers")
# What a setting is about.
KINDS = {"width": "residual", "heads": "heads", "d_ff": "mlp", "channels": "channels"}


def build_slice(builder: Builder, step: Step, method: Method, source: Source) -> tuple[Table, list[Problem]]:
    """The result of `step` and what is wrong with it. Full sizes leave every tensor the node that it was."""
    table = source.table
    problems = [*one_value(method, step.params), *_unfit(source)]
    settings = constant(plainly(step, KINDS), method)
    if problems or settings is None:
        return replace(table, nodes={}), problems
    try:
        if settings["layers"] is not None:
            table = _shallow(step, source, settings["layers"])
        wanted = {kind: step.params[name] for name, kind in KINDS.items() if name in step.params}
        if wanted:
            table = _narrow(builder, step, source, table, settings, wanted)
    except MergeError as fault:
        found = [p if p.mark is not None else replace(p, mark=step.use_mark) for p in fault.problems]
        return replace(source.table, nodes={}), found
    return table, []


def one_value(method: Method, params: Mapping[str, Value]) -> list[Problem]:
    """What is wrong with settings that differ from tensor to tensor; some may differ from space to space."""
    by_space = {param.name for param in method.params if param.by_space}
    return [
        Problem("this setting is one value for all tensors", value.mark, "give it plainly")
        for name, value in params.items()
        if name not in by_space and not value.constant
    ]


def plainly(step: Step, without: Container[str]) -> Step:
    """`step` without these settings."""
    items = (replace(item, params={n: v for n, v in item.params.items() if n not in without}) for item in step.of)
    return replace(step, of=tuple(items), params={n: v for n, v in step.params.items() if n not in without})


def _unfit(source: Source) -> list[Problem]:
    problems: list[Problem] = []
    codes, form = source.table.quantized, source.table.form
    if codes is not None:
        problems.append(Problem(f"`{source.name}` {codes.says}", source.mark, codes.hint))
    if form is not None and form.pipeline:
        hint = "cut its component by itself"
        problems.append(Problem(f"`{source.name}` is a pipeline of several models", source.mark, hint))
    return problems


def _shallow(step: Step, source: Source, layers: int | Sequence[int]) -> Table:
    """The model with these layers alone, numbered anew. Raises a MergeError where it does not have them."""
    table, kept = source.table, (layers,) if isinstance(layers, int) else tuple(layers)
    if len(table.family.stacks) != 1:
        hint = "`layers` needs layers numbered from 0 in one stack, such as `model.layers.{i}.`"
        raise RecipeError(Problem(f"`{source.name}` has not one stack of layers", source.mark, hint))
    stack = table.family.stacks[0]
    if kept[-1] >= stack.count:
        message = f"`{source.name}` has layers 0 to {stack.count - 1}, `layers` names {kept[-1]}"
        raise RecipeError(Problem(message, _mark(step, "layers"), "layers are counted from 0"))
    if kept == tuple(range(stack.count)):
        return table
    new = {old: number for number, old in enumerate(kept)}
    names: dict[str, str] = {}  # by the new name
    for name in table.nodes:
        layer = table.family.layer(name)
        if layer is None:
            names[name] = name
        elif layer.index in new:
            names[table.family.renumbered(name, new[layer.index])] = name
    config = restacked_config(table.config, stack, [(table.config, index) for index in kept])
    section = (stack.count_key or "").rpartition(".")[0]
    for key in BOUNDS:
        place = f"{section}.{key}" if section else key
        bound = lookup(table.config, place)
        if isinstance(bound, int):
            assign(config, place, sum(index < bound for index in kept) + max(0, bound - stack.count))
    return replace(
        table,
        nodes={name: table.nodes[old] for name, old in names.items()},
        dtypes={name: table.dtypes[old] for name, old in names.items()},
        config=config,
        family=family_of(config, names, table.form.configs if table.form is not None else None),
    )


def _narrow(
    builder: Builder, step: Step, source: Source, table: Table, settings: Mapping[str, Any], wanted: Mapping[str, Value]
) -> Table:
    """`table` with fewer units in its spaces. Raises a MergeError where that cannot be."""
    data = family_named(settings["family"], step) if settings["family"] else None
    shapes = {name: node.shape for name, node in table.nodes.items()}
    made = resized_model(source, table, wanted, data, step.use_mark)
    if not made.keep:
        return replace(table, config=made.config)
    kept = kept_spans(made.spaces, made.keep, shapes)
    _check(step, source, made, {name: kept_shape(s, kept.get(name, ())) for name, s in shapes.items()}, data)
    alignment = _alignment(step, source, settings, made, table)
    builder.alignments[step.name] = alignment
    nodes = dict(table.nodes)
    # An order by importance moves tensors too of which nothing is cut: what stands in a slot goes with the slot.
    for name in dict.fromkeys([*kept, *alignment.models[0]]):
        cut = kept.get(name, ())
        if not cut and alignment.use == LEADING:
            continue
        node = table.nodes[name]
        place = (("tensor", name), ("among", (name,)), ("model", 0), ("invert", False), ("kept", cut))
        nodes[name] = builder.gather([node], step.name, alignment.name, place, kept_shape(node.shape, cut))
    return replace(table, nodes=nodes, config=made.config)


def resized_model(
    source: Source, table: Table, wanted: Mapping[str, Value], data: FamilyData | None, lead: Mark
) -> Resized:
    """`table` of `source` with `wanted` units by kind. Raises a MergeError where that cannot be; RecipeError where its
    sizes are to blame, at the mark of the setting, or at `lead`."""
    shapes = {name: node.shape for name, node in table.nodes.items()}
    counts = {kind: _BySpace(value) for kind, value in wanted.items()}
    try:
        made = resized(table.config, shapes, {kind: one.count for kind, one in counts.items()}, data)
    except CannotResize as fault:
        name = next((name for name, kind in KINDS.items() if kind == fault.kind and kind in wanted), None)
        mark = lead if name is None else wanted[fault.kind].mark
        what = f"`{source.name}` cannot be cut so" if name is None else f"`{name}` does not fit `{source.name}`"
        raise RecipeError(Problem(f"{what}: {fault}", mark, fault.hint)) from None
    for kind, one in counts.items():
        for rule in one.idle:
            names = [space.name for space in made.spaces if space.kind == kind]
            raise RecipeError(
                Problem(f"`{rule.glob}` is no space of `{source.name}`", rule.mark, suggest(str(rule.glob), names))
            )
    return made


class _BySpace:
    """A setting as a number for all spaces, or as one by the name of each; `idle` are rules that named no space."""

    def __init__(self, value: Value):
        self._value, self._named = value, set[str]()
        self.count: Count = int(str(value.rules[0].value)) if value.constant else self._of

    def _of(self, name: str) -> int | None:
        self._named.add(name)
        found = self._value.at(name, None)
        return found if isinstance(found, int) else None

    @property
    def idle(self) -> list[Rule]:
        return [
            rule
            for rule in self._value.rules
            if rule.glob is not None and not any(glob_matches(rule.glob, name) for name in self._named)
        ]


def _check(
    step: Step, source: Source, made: Resized, shapes: Mapping[str, tuple[int, ...]], data: FamilyData | None
) -> None:
    """Raises RecipeError where the family does not find its tensors in the sizes that config.json now states."""
    empty = [name for name, shape in shapes.items() if 0 in shape and made.keep]
    try:
        check_resized(made.config, shapes, data)
    except MergeError as fault:
        message = f"`{source.name}` cannot be cut so: {fault.problems[0].message}"
        hint = "let `width` and `heads` fall by the same factor, so that the size of a head stays"
        raise RecipeError(Problem(message, step.use_mark, hint)) from None
    if empty:
        message = f"nothing would be left of {listed(empty)}"
        raise RecipeError(Problem(message, step.use_mark, "keep more units"))


def _alignment(step: Step, source: Source, settings: Mapping[str, Any], made: Resized, table: Table) -> Alignment:
    chosen = [space for space in made.spaces if space.name in made.keep]
    used = dict.fromkeys(use.tensor for space in chosen for use in space.uses)
    return Alignment(
        name=step.name,
        use=LEADING if settings["order"] == "leading" else step.use,
        labels=(source.name,),
        spaces=made.spaces,
        kinds=tuple(dict.fromkeys(space.kind for space in chosen)),
        models=({name: table.nodes[name] for name in used},),
        params=(("keep", tuple(made.keep.items())),),
    )


def family_named(path: str, step: Step) -> FamilyData:
    """The family that the step's `family` names. Raises RecipeError."""
    try:
        return load_family(os.path.expanduser(path))
    except MergeError as fault:
        raise RecipeError([p if p.mark else replace(p, mark=_mark(step, "family")) for p in fault.problems]) from None


def _mark(step: Step, name: str) -> Mark:
    value = step.params.get(name)
    return value.mark if value is not None else step.use_mark
