"""`mix_widths`: a weighted sum of leading slices, each with zeros around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_lite.align.keep import Kept, kept_spans
from mergekit_lite.errors import MergeError, Problem
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.methods.spec import Call, Method, Slot
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.settings import constant
from mergekit_lite.plan.slice import KINDS, family_named, one_value, plainly, resized_model
from mergekit_lite.plan.steps import Source, labels_of, listed
from mergekit_lite.recipe.model import Step


def build_mix(builder: Builder, step: Step, method: Method, sources: Sequence[Source]) -> tuple[Table, list[Problem]]:
    """The result of `step` and what is wrong with it. Sizes and zeros are settled here; the run adds up."""
    lead = sources[0].table
    settings = constant(plainly(step, KINDS), method)
    problems = [p for params in (step.params, *(item.params for item in step.of)) for p in one_value(method, params)]
    problems += _unfit(sources)
    if problems or settings is None:
        return replace(lead, nodes={}), problems
    try:
        kept = _kept(step, sources, settings)
    except MergeError as fault:
        found = [p if p.mark is not None else replace(p, mark=step.use_mark) for p in fault.problems]
        return replace(lead, nodes={}), found
    methods = all_methods()
    labels = labels_of(builder, sources)
    nodes: dict[str, Node] = {}
    calls: dict[Any, Call] = {}
    for name, node in lead.nodes.items():
        parts = tuple(one.get(name, ()) for one in kept)
        if (node.shape, parts) not in calls:
            inputs = [
                methods["padded"](Slot(number), kept=part, shape=node.shape) if part else Slot(number)
                for number, part in enumerate(parts)
            ]
            weights = {"weight": settings["weight"], "normalize": settings["normalize"]}
            calls[node.shape, parts] = methods["linear"](*inputs, **weights)
        given = [source.table.nodes[name] for source in sources]
        nodes[name] = builder.call(calls[node.shape, parts], given, labels, step.name, name)
    return replace(lead, nodes=nodes), []


def _unfit(sources: Sequence[Source]) -> list[Problem]:
    problems: list[Problem] = []
    lead = sources[0]
    shapes = {name: node.shape for name, node in lead.table.nodes.items()}
    for source in sources:
        codes = source.table.quantized
        if codes is not None:
            problems.append(Problem(f"`{source.name}` {codes.says}", source.mark, codes.hint))
        if source.table.space != lead.table.space:
            message = f"`{source.name}` is a {source.table.space}, `{lead.name}` is a {lead.table.space}"
            problems.append(Problem(message, source.mark, "mix whole models, or deltas"))
        own = {name: node.shape for name, node in source.table.nodes.items()}
        other = [name for name in {**shapes, **own} if shapes.get(name) != own.get(name)]
        if other:
            message = f"`{source.name}` and `{lead.name}` do not have, in one shape, {listed(other)}"
            problems.append(Problem(message, source.mark, "only checkpoints of one architecture can be mixed"))
    return problems


def _kept(step: Step, sources: Sequence[Source], settings: Mapping[str, Any]) -> list[Mapping[str, Kept]]:
    """What each input keeps of every tensor that it does not keep whole."""
    data = family_named(settings["family"], step) if settings["family"] else None
    found: list[Mapping[str, Kept]] = []
    for source, item in zip(sources, step.of, strict=True):
        given = {**step.params, **item.params}
        wanted = {kind: given[name] for name, kind in KINDS.items() if name in given}
        if not wanted:
            found.append({})
            continue
        made = resized_model(source, source.table, wanted, data, source.mark)
        found.append(kept_spans(made.spaces, made.keep, {n: node.shape for n, node in source.table.nodes.items()}))
    return found
