"""`merge_experts`: which experts become one is for the run to find; how many are left, under which names and in which
shapes, is known before."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_lite.errors import Mark, MergeError, Problem, RecipeError
from mergekit_lite.family.data import families
from mergekit_lite.family.moe import ExpertLayer, MoeRule, Weight, expert_layers, routing_groups
from mergekit_lite.family.section import assign, lookup, section_of
from mergekit_lite.methods.spec import Method
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.model import Alignment, Node
from mergekit_lite.plan.routing import adaptive_into, statistics_of
from mergekit_lite.plan.settings import constant
from mergekit_lite.plan.steps import Source
from mergekit_lite.recipe.model import Step

_STEP = ("similarity", "align", "weights", "mode", "router", "rows")  # what the search and the means go by
Made = tuple[Table, list[Problem], list[Problem]]


def build_experts(builder: Builder, step: Step, method: Method, source: Source, statistics: Source | None) -> Made:
    """The result of `step`, what is wrong with it and what deserves a warning. `statistics` are what the step names."""
    table = source.table
    problems = _unfit(step, source)
    settings = constant(step, method)
    if problems or settings is None:
        return replace(table, nodes={}), problems, []
    try:
        rule, section = _rule(table, source)
        layers = _layers(step, settings, table, source, rule, section, statistics)
        config, remarks = _config(step, settings, table.config, rule, section, layers)
    except MergeError as fault:
        found = [p if p.mark is not None else replace(p, mark=step.use_mark) for p in fault.problems]
        return replace(table, nodes={}), found, []
    changed = [layer for layer in layers if layer.into < layer.count]
    looked_at = _looked_at(table, changed, settings, statistics)
    builder.alignments[step.name] = Alignment(
        name=step.name,
        use=step.use,
        labels=(source.name,),
        spaces=(),
        kinds=(),
        models=(looked_at,),
        params=tuple((key, settings[key]) for key in _STEP),
        layers=tuple(changed),
        section=section,
    )
    return _table(builder, step, table, changed, settings, config), [], remarks


def _unfit(step: Step, source: Source) -> list[Problem]:
    problems = [
        Problem("this setting is one value for all tensors", value.mark, "give it plainly")
        for value in step.params.values()
        if not value.constant
    ]
    if source.table.space != "weight":
        hint = "add it to its base first: `use: add`"
        problems.append(Problem(f"`{step.use}` takes whole models, `{source.name}` is a delta", source.mark, hint))
    if source.table.quantized:
        hint = "save it in bfloat16 first (transformers: `model.dequantize()`), then merge"
        problems.append(Problem(f"`{source.name}` is quantised: its numbers are codes", source.mark, hint))
    return problems


def _rule(table: Table, source: Source) -> tuple[MoeRule, str]:
    """What the family of the model says of its experts, and the section of config.json that does."""
    model_type, section = section_of(table.config, families())
    rule = families()[model_type].moe if model_type is not None else None
    if rule is None:
        stated = lookup(table.config, "model_type")
        message = f"`{source.name}` has no experts that are known here: its model type is `{stated}`"
        known = ", ".join(sorted(f"`{name}`" for name, data in families().items() if data.moe is not None))
        raise RecipeError(Problem(message, source.mark, f"known are {known}"))
    return rule, section


def _layers(
    step: Step,
    settings: Mapping[str, Any],
    table: Table,
    source: Source,
    rule: MoeRule,
    section: str,
    statistics: Source | None,
) -> list[ExpertLayer]:
    """The layers that have experts, with what is to be left of each."""
    shapes = {name: node.shape for name, node in table.nodes.items()}
    leads = {i: stack.template.format(i=i) for stack in table.family.stacks for i in range(stack.count)}
    groups, _ = routing_groups(rule, table.config, section)
    try:
        layers = expert_layers(rule, leads, shapes, groups, f"`{source.name}`")
    except MergeError as fault:
        raise RecipeError([replace(problem, mark=source.mark) for problem in fault.problems]) from None
    into = settings["into"]
    most = min(layer.count for layer in layers)
    if into > most:
        least = next(layer for layer in layers if layer.count == most)
        message = f"`into: {into}` is more than the {most} experts of `{least.router}`"
        raise RecipeError(Problem(message, _mark(step, "into"), "experts can only become fewer"))
    protected: set[int] = set()
    if settings["protect"] is not None:
        start, stop = settings["protect"]
        depth = max(leads) + 1
        if stop > depth:
            message = f"`{source.name}` has layers 0 to {depth - 1}, `protect` names [{start}, {stop})"
            raise RecipeError(Problem(message, _mark(step, "protect"), "the end is not included"))
        protected = {n for n, layer in enumerate(layers) if start <= layer.layer < stop}
    if statistics is not None:
        statistics_of(statistics, layers, table.family, settings["similarity"] == "router-logits")
    if settings["adaptive"]:
        assert statistics is not None  # the method's check has seen to it
        counts = adaptive_into(statistics, layers, table.family, into, protected, _mark(step, "adaptive"))
    else:
        counts = [layer.count if n in protected else into for n, layer in enumerate(layers)]
    # Only a compact router would lose the groups that it chooses among first.
    groups = groups if settings["router"] == "compact" else 1
    return [replace(layer, into=count, groups=groups) for layer, count in zip(layers, counts, strict=True)]


def _config(
    step: Step,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    rule: MoeRule,
    section: str,
    layers: Sequence[ExpertLayer],
) -> tuple[Mapping[str, Any], list[Problem]]:
    """config.json of the result, and what deserves a warning. Only a compact router changes what it says: the map of a
    mapped one is written once it is found."""
    if settings["router"] != "compact":
        return config, []
    counts = {layer.into for layer in layers}
    if len(counts) > 1:
        name = "adaptive" if settings["adaptive"] else "protect"
        message = f"`router: compact` needs equally many experts in all layers, here are {min(counts)} to {max(counts)}"
        hint = "use `router: alias` or `mapped`, or leave out what makes layers differ"
        raise RecipeError(Problem(message, _mark(step, name), hint))
    into = counts.pop()
    groups, chosen = routing_groups(rule, config, section)
    limited = rule.least or {}
    least = limited.get(str(lookup(config, section + "model_type")), limited.get("else", 1))
    if into % groups or into // groups < least:
        message = f"`into: {into}` does not leave each of {groups} routing groups as many experts, {least} or more"
        if groups == 1:
            message = f"`into: {into}` is fewer than the {least} experts that the code of this model type chooses"
        below, above = max(groups * least, into // groups * groups), max(groups * least, -(-into // groups) * groups)
        hint = f"`into: {below}` or `{above}` does" if below != above else f"`into: {above}` does"
        raise RecipeError(Problem(message, _mark(step, "into"), f"{hint}; so does `router: alias`"))
    made: dict[str, Any] = copy.deepcopy(dict(config))
    present = [key for key in rule.count if lookup(config, section + key) is not None]
    for key in present or rule.count[:1]:
        assign(made, section + key, into)
    most = into // groups * min(chosen, groups)
    remarks = []
    for key in rule.chosen:
        stated = lookup(config, section + key)
        if isinstance(stated, int) and stated > most:
            assign(made, section + key, most)
            message = f"`{key}` falls from {stated} to {most}: a token cannot go to more experts than there are"
            remarks.append(Problem(message, _mark(step, "into"), "`router: alias` keeps the routing as it is"))
    return made, remarks


def _looked_at(
    table: Table, layers: Sequence[ExpertLayer], settings: Mapping[str, Any], statistics: Source | None
) -> dict[str, Node]:
    """The tensors that the search for groups needs, by name."""
    found: dict[str, Node] = {}
    matched = settings["align"] and settings["mode"] == "merge"
    for layer in layers:
        if settings["similarity"] == "router-weight":
            found[layer.gates[0]] = table.nodes[layer.gates[0]]
        if matched or settings["similarity"] == "weight":
            found.update((name, table.nodes[name]) for weight in layer.weights for name in weight.names)
    if statistics is not None:
        named = statistics_of(statistics, layers, table.family, settings["similarity"] == "router-logits")
        for layer, names in zip(layers, named, strict=True):
            for kind, name in names.items():
                found[f"{layer.router}.{kind}"] = statistics.table.nodes[name]
    return found


def _table(
    builder: Builder,
    step: Step,
    table: Table,
    layers: Sequence[ExpertLayer],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Table:
    """The tensors of the result in the order of the model's."""
    made: dict[str, Node | None] = {}  # what takes a tensor's place; None where nothing does
    for number, layer in enumerate(layers):
        slots = layer.count if settings["router"] == "alias" else layer.into
        share = 1.0 if settings["mode"] == "prune" else layer.count / layer.into
        for index, weight in enumerate(layer.weights):
            made.update(_weight(builder, step, table, weight, slots, (number, index), share))
        if settings["router"] == "compact":
            share = layer.count / layer.into if settings["rows"] == "mean" else 1.0
            for index, name in enumerate(layer.gates):
                node = table.nodes[name]
                place = _place(number, -1 - index, None, share)
                made[name] = builder.mix([node], (layer.into, *node.shape[1:]), step.name, place)
    nodes = {name: new for name, old in table.nodes.items() if (new := made.get(name, old)) is not None}
    dtypes = {name: table.dtypes[name] for name in nodes}
    return replace(table, nodes=nodes, dtypes=dtypes, config=config)


def _weight(
    builder: Builder,
    step: Step,
    table: Table,
    weight: Weight,
    slots: int,
    at: tuple[int, int],
    share: float,
) -> dict[str, Node | None]:
    """What takes the place of the tensors of one weight. `share` is how many experts go into a slot on average."""
    below = [table.nodes[name] for name in weight.names]
    if weight.fused:
        shape = (slots, *below[0].shape[1:])
        return {weight.names[0]: builder.mix(below, shape, step.name, _place(*at, None, share))}
    made: dict[str, Node | None] = dict.fromkeys(weight.names)
    for slot, name in enumerate(weight.names[:slots]):
        made[name] = builder.mix(below, below[0].shape, step.name, _place(*at, slot, share))
    return made


def _place(layer: int, weight: int, slot: int | None, members: float) -> tuple[tuple[str, Any], ...]:
    """Which tensor of which layer a node is, for a router the number of the gate from -1 down; the slot where it holds
    one alone."""
    return (("layer", layer), ("weight", weight), ("slot", slot), ("members", members))


def _mark(step: Step, name: str) -> Mark:
    value = step.params.get(name)
    return value.mark if value is not None else step.use_mark
