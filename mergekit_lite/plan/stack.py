"""`stack`: layers of several models one above the other. Works on names alone; the tensors are copied as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergekit_lite.errors import Problem
from mergekit_lite.family.family import Stack, family_of, restacked_config
from mergekit_lite.plan.graph import Table
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.steps import Source
from mergekit_lite.recipe.model import Step
from mergekit_lite.recipe.value import NO_VALUE


def build_stack(step: Step, sources: Sequence[Source], rest: Source | None) -> tuple[Table, list[Problem]]:
    """The model made of the inputs' layers in the order of `of`; tensors outside the layers come from `rest`, or from
    the first input. Layers are numbered anew from 0, and the configuration follows."""
    lead = rest or sources[0]
    problems: list[Problem] = []
    picked: list[tuple[Source, int]] = []
    for item, source in zip(step.of, sources, strict=True):
        stack = _stack(source)
        if stack is None:
            hint = "`stack` needs layers numbered from 0 in one stack, such as `model.layers.{i}.`"
            problems.append(Problem(f"`{source.name}` has not one stack of layers", source.mark, hint))
            continue
        value = item.params.get("layers")
        span = value.at("", None) if value is not None else (0, stack.count)
        if span is NO_VALUE or not isinstance(span, tuple):
            continue  # A fault of the setting itself, found before.
        start, stop = int(str(span[0])), int(str(span[1]))
        if stop > stack.count:
            mark = value.mark if value is not None else source.mark
            message = f"`{source.name}` has layers 0 to {stack.count - 1}, `layers` asks for [{start}, {stop})"
            problems.append(Problem(message, mark, f"the end is not included: [0, {stack.count}] takes them all"))
            continue
        picked += [(source, index) for index in range(start, stop)]
        if source.table.space != lead.table.space:
            message = f"`{source.name}` is a {source.table.space}, `{lead.name}` is a {lead.table.space}"
            problems.append(Problem(message, source.mark, "stack whole models only"))
    lead_stack = _stack(lead)
    if problems or lead_stack is None:
        return replace(lead.table, nodes={}), problems

    nodes: dict[str, Node] = {}
    dtypes: dict[str, str] = {}
    below, above = _outside(lead)
    order: list[tuple[str, Source, str]] = [(name, lead, name) for name in below]
    for number, (source, index) in enumerate(picked):
        order += [
            (lead_stack.template.format(i=number) + layer.rest, source, name)
            for name in source.table.nodes
            if (layer := source.table.family.layer(name)) is not None and layer.index == index
        ]
    order += [(name, lead, name) for name in above]
    for new, source, old in order:
        nodes[new] = source.table.nodes[old]
        dtypes[new] = source.table.dtypes[old]
    config = restacked_config(lead.table.config, lead_stack, [(source.table.config, index) for source, index in picked])
    return replace(lead.table, nodes=nodes, dtypes=dtypes, config=config, family=family_of(config, nodes)), []


def _stack(source: Source) -> Stack | None:
    stacks = source.table.family.stacks
    return stacks[0] if len(stacks) == 1 else None


def _outside(lead: Source) -> tuple[list[str], list[str]]:
    """The tensors outside the layers that stand before the first layer's, and the others."""
    below: list[str] = []
    above: list[str] = []
    seen_layer = False
    for name in lead.table.nodes:
        if lead.table.family.layer(name) is not None:
            seen_layer = True
        else:
            (above if seen_layer else below).append(name)
    return below, above
