"""Models of several parts, such as the components of a pipeline: whether those of a step's inputs go together, and
whether an output has them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mergekit_lite.checkpoint.meta import Part
from mergekit_lite.errors import Problem
from mergekit_lite.plan.graph import Table
from mergekit_lite.plan.layout import by_part
from mergekit_lite.recipe.model import Save, Step

if TYPE_CHECKING:
    from mergekit_lite.plan.steps import Source


def part_faults(step: Step, sources: Sequence[Source], base: Source | None) -> Iterator[Problem]:
    """What an input lacks of the parts that others have, unless the step says what to do then, and parts of one name
    that are of different classes."""
    lead = base or sources[0]
    everyone = [*sources, *([base] if base is not None else [])]
    if all(source.table.form is None for source in everyone):
        return
    parts = {id(source): _parts(source.table) for source in everyone}
    named = dict.fromkeys(prefix for source in everyone for prefix in parts[id(source)])
    for source in everyone:
        own = parts[id(source)]
        lacking = [prefix for prefix in named if prefix not in own]
        if lacking and step.missing == "error":
            other = next(one for one in everyone if lacking[0] in parts[id(one)])
            few = ", ".join(f"`{_shown(prefix)}`" for prefix in lacking)
            hint = "`missing: skip` in the step leaves it out, with a base `missing: base` keeps the base's"
            yield Problem(f"`{source.name}` has no {few}, which `{other.name}` has", source.mark, hint)
        for prefix, part in own.items():
            leading = parts[id(lead)].get(prefix)
            if leading is not None and part.kind and leading.kind and part.kind != leading.kind:
                what = f"`{_shown(prefix)}` of `{source.name}`" if prefix else f"`{source.name}`"
                message = f"{what} is a `{part.kind[:100]}`, that of `{lead.name}` a `{leading.kind[:100]}`"
                yield Problem(message, source.mark, "only models of one class can be merged")


def output_faults(step: str, table: Table, save: Save) -> Iterator[Problem]:
    """Why a table with the form of a checkpoint of several parts cannot be saved as one."""
    if table.form is None:
        return
    parts = by_part(table)
    empty = [f"`{_shown(part.prefix)}`" for part, names in parts if not names]
    if empty:
        hint = f"`{table.donor}` gives the layout, which has it: take its tensors along, or another base"
        yield Problem(f"`{step}` has no tensors of {', '.join(empty)}", save.mark, hint)
    homes = {name for _, names in parts for name in names}
    strange = [name for name in table.nodes if name not in homes]
    if strange:
        hint = f"`{table.donor}` gives the layout: a base that has it, or `missing: base` or `skip`"
        yield Problem(f"`{strange[0]}` of `{step}` belongs to no part of `{table.donor}`", save.mark, hint)
    if save.lora is not None and table.form.pipeline:
        yield Problem("an adapter is one of a model, not of a pipeline", save.mark, "save it whole, without `as: lora`")
    elif save.quantize is not None and table.form.pipeline:
        yield Problem("FP8 with scales is for models of transformers", save.mark, "leave out `quantize`")
    elif save.masks is not None:
        hint = "save a model of transformers' layout, or several models with `tall_masks`"
        yield Problem("a mask store is a folder as transformers lays one out", save.mark, hint)
    elif save.tokenizer is not None and table.form.pipeline:
        yield Problem("a chat template is for language models, not for pipelines", save.mark, "leave it out")


def _parts(table: Table) -> dict[str, Part]:
    return {part.prefix: part for part in table.form.parts} if table.form is not None else {"": Part("", "")}


def _shown(prefix: str) -> str:
    """A part by the name of its folder."""
    return prefix.rstrip(".") or "model"
