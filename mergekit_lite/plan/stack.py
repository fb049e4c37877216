"""`stack`: layers of several models one above the other. Works on names alone; the tensors are copied as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mergekit_lite.errors import Problem
from mergekit_lite.family.family import Stack, family_of, restacked_config
from mergekit_lite.plan.graph import Table
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.steps import Source
from mergekit_lite.recipe.model import Step
from mergekit_lite.recipe.value import NO_VALUE

_WHOLE = "stack whole models only"
# Input embeddings of any kind and their norms; the output embedding of GPT-NeoX (`embed_out`) stands above the layers.
EMBEDDING = re.compile(r"(?:^|[._])(?:wte|wpe|\w*(?<!un)embed(?!_out)\w*)(?:[._]|$)")


def build_stack(
    step: Step,
    sources: Sequence[Source],
    rest: Source | None,
    lower: Source | None = None,
    upper: Source | None = None,
) -> tuple[Table, list[Problem]]:
    """The model made of the inputs' layers in the order of `of`; tensors outside the layers come from `rest`, or from
    the first input: with `lower` the embeddings come from there, with `upper` the others. Layers are numbered anew from
    0, and the configuration follows."""
    lead = rest or sources[0]
    problems = [
        Problem(f"`{other.name}` is a {other.table.space}, `{lead.name}` is a {lead.table.space}", other.mark, _WHOLE)
        for other in (lower, upper)
        if other is not None and other.table.space != lead.table.space
    ]
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
            problems.append(Problem(message, source.mark, _WHOLE))
    lead_stack = _stack(lead)
    if problems or lead_stack is None:
        return replace(lead.table, nodes={}), problems

    nodes: dict[str, Node] = {}
    dtypes: dict[str, str] = {}
    below, above = _outside(lead, lower or lead, upper or lead)
    order: list[tuple[str, Source, str]] = [(name, source, name) for source, name in below]
    for number, (source, index) in enumerate(picked):
        order += [
            (lead_stack.template.format(i=number) + layer.rest, source, name)
            for name in source.table.nodes
            if (layer := source.table.family.layer(name)) is not None and layer.index == index
        ]
    order += [(name, source, name) for source, name in above]
    for new, source, old in order:
        nodes[new] = source.table.nodes[old]
        dtypes[new] = source.table.dtypes[old]
    config = restacked_config(lead.table.config, lead_stack, [(source.table.config, index) for source, index in picked])
    parts = lead.table.form.configs if lead.table.form is not None else None
    return replace(lead.table, nodes=nodes, dtypes=dtypes, config=config, family=family_of(config, nodes, parts)), []


def _stack(source: Source) -> Stack | None:
    stacks, form = source.table.family.stacks, source.table.form
    # The configuration of a component would have to follow.
    return stacks[0] if len(stacks) == 1 and not (form is not None and form.pipeline) else None


def _outside(lead: Source, lower: Source, upper: Source) -> tuple[list[tuple[Source, str]], list[tuple[Source, str]]]:
    """The tensors outside the layers that are written before the layers, and the others, each with its source.

    Where one source gives them all, they are written where it has them; otherwise the embeddings are written first.
    """
    if lower.table is lead.table and upper.table is lead.table:
        outside = _without_layers(lead)
        first = next((n for n, name in enumerate(lead.table.nodes) if lead.table.family.layer(name) is not None), 0)
        early = set(list(lead.table.nodes)[:first])
        return [(lead, n) for n in outside if n in early], [(lead, n) for n in outside if n not in early]
    below = [(lower, name) for name in _without_layers(lower) if EMBEDDING.search(name)]
    return below, [(upper, name) for name in _without_layers(upper) if not EMBEDDING.search(name)]


def _without_layers(source: Source) -> list[str]:
    return [name for name in source.table.nodes if source.table.family.layer(name) is None]
