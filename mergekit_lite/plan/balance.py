"""`bang`: temperatures from files of confidence, which the plan reads, and the head that they go into."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.methods.spec import Method
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.steps import Source, build_step
from mergekit_lite.recipe.model import Input, Step
from mergekit_lite.recipe.value import Value

_MADE = "make it with `merge stats --collect confidence` of data with labels, or give `temperature`"
_FORMS = {"F64": "<d", "F32": "<f"}
_NARROWEST, _WIDEST = 1 / 8, 8.0  # the temperatures that `merge stats` looks at


def build_bang(
    builder: Builder,
    step: Step,
    method: Method,
    sources: Sequence[Source],
    references: Mapping[str, Source],
    delta: Method,
    add: Method,
) -> tuple[Table, list[Problem]]:
    """The result of `step` and what is wrong with it. `references` are the files of confidence by name."""
    problems = _head(step, sources)
    inputs = []
    for item in step.of:
        try:
            inputs.append(_with_temperature(builder, step, item, references))
        except RecipeError as fault:
            problems += fault.problems
    if problems:
        return replace(sources[0].table, nodes={}), list(dict.fromkeys(problems))
    params = {key: value for key, value in step.params.items() if key != "confidence"}
    balanced = replace(step, of=tuple(inputs), params=params)
    return build_step(builder, balanced, method, sources, None, (), delta, add)


def _head(step: Step, sources: Sequence[Source]) -> list[Problem]:
    head = step.params["head"]
    if head.constant:
        hint = 'name the last layer: `head: {"lm_head.*": linear, else: none}`'
        return [Problem("`head` is one value for all tensors", head.mark, hint)]
    found = []
    for source in sources:
        for alias, canonical in source.table.family.tied:
            if canonical in source.table.nodes and {head.at(alias, None), head.at(canonical, None)} & {"linear"}:
                message = f"`{alias}` of `{source.name}` is tied to `{canonical}`, so its temperature would change both"
                found.append(Problem(message, head.mark, "untie the head first, or use `interpolate`"))
    return found


def _with_temperature(builder: Builder, step: Step, item: Input, references: Mapping[str, Source]) -> Input:
    """The input with the temperature that its file of confidence holds, if it has one."""
    named = item.params.get("confidence", step.params.get("confidence"))
    if named is None:
        return item
    given = item.params.get("temperature", step.params.get("temperature"))
    if given is not None:
        message = f"`confidence` gives the temperature of `{item.ref.name}`"
        raise RecipeError(Problem(message, given.mark, "leave out `temperature`, or put it beside another input"))
    source = references[str(named.rules[0].value)]
    node = source.table.nodes.get("temperature")
    if node is None or "confidence" not in source.table.nodes or node.load is None:
        raise RecipeError(Problem(f"`{source.name}` holds no temperature of a model's confidence", named.mark, _MADE))
    meta = node.load
    try:
        if meta.shape != () or meta.dtype not in _FORMS:
            raise ValueError("it is no single number")
        with open(meta.file, "rb") as file:
            file.seek(meta.start)
            (number,) = struct.unpack(_FORMS[meta.dtype], file.read(meta.nbytes))
        if not 0 < number < math.inf:
            raise ValueError(f"it is {number:g}")
    except (OSError, struct.error, ValueError) as fault:
        message = f"the temperature in `{source.name}` is read when the plan is made, and cannot be used: {fault}"
        raise RecipeError(Problem(message, named.mark, _MADE)) from None
    if not _NARROWEST < number < _WIDEST:
        message = f"the temperature in `{source.name}`, {number:g}, lies at an end of what `merge stats` looks at"
        builder.remarks.append(Problem(message, named.mark, "are its labels those of this model?"))
    others = {key: value for key, value in item.params.items() if key != "confidence"}
    return replace(item, params={**others, "temperature": Value.plain(number, named.mark)})
