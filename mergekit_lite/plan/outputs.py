"""The saves of a recipe become outputs: models, or adapters of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.plan.check import check_places, check_pushes
from mergekit_lite.plan.decompose import with_figures
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.layout import build_output
from mergekit_lite.plan.lock import pinned
from mergekit_lite.plan.lowrank import Ranks, adapter_output, fault_of, measured_output, parts_of
from mergekit_lite.plan.masks import mask_output
from mergekit_lite.plan.model import Output
from mergekit_lite.plan.parts import output_faults
from mergekit_lite.plan.quantize import in_fp8
from mergekit_lite.plan.share import Group, groups_of, link, what_to_say
from mergekit_lite.plan.vocabulary import Remapped, beside
from mergekit_lite.recipe.links import final_step
from mergekit_lite.recipe.model import Recipe, Ref, Save
from mergekit_lite.recipe.places import in_header
from mergekit_lite.recipe.write import dump


def saved_name(recipe: Recipe, save: Save) -> str:
    """The step or model that a save writes."""
    return save.step.name if save.step else final_step(recipe)


def make_outputs(
    recipe: Recipe,
    tables: Mapping[str, Table],
    checkpoints: Mapping[str, Checkpoint],
    out: Path | None,
    check_output: bool,
    vocabulary: Remapped | None,
    problems: list[Problem],
    adapters: Adapters,
) -> tuple[Output, ...]:
    outputs: list[Output] = []
    groups: dict[str, list[Group]] = {}
    alike: set[int] = set()  # outputs whose tensors are to have one dtype
    saved_steps = [saved_name(recipe, save) for save in recipe.saves]
    places = []
    for number, save in enumerate(recipe.saves):
        if adapters.measure not in (None, number):
            continue
        step = saved_name(recipe, save)
        place = out if out is not None else Path(os.path.expanduser(save.to)) if save.to is not None else None
        if place is None:
            problems.append(Problem("no output folder is named", save.mark, "give `to` under `save`, or `--out DIR`"))
            continue
        places.append((save, place))
        table = tables.get(step)
        if table is None:
            continue
        # Folders and repository stay out of the shards: the same merge gives the same bytes wherever it is put and
        # wherever its inputs lie. Commits go in: a lock, which names them, gives the same bytes again.
        saved = replace(save, step=Ref(step, save.mark), to=None, push=None)
        text = adapters.header
        if text is None:
            text = _header_text(recipe, checkpoints, saved)
        faults = list(output_faults(step, table, save)) if table.nodes else []
        if faults:
            problems += faults
        elif save.lora is not None:
            outputs += adapters.output(str(place), number, save, step, table, text)
        elif save.masks is not None:
            if all(ref.name in tables for ref in save.beside):
                store = mask_output(adapters.builder, str(place), save, step, tables, text, problems)
                outputs += [store] if store is not None else []
        elif table.space != "weight":
            hint = "add it to its base first: `use: add`, or save it as an adapter: `as: lora`"
            problems.append(Problem(f"`{step}` is a delta, not a model to save", save.mark, hint))
        elif table.quantized is not None and (save.dtype is not None or save.quantize is not None):
            hint = "leave out `dtype` and `quantize`: the tensors are copied as they are"
            problems.append(Problem(f"`{step}` {table.quantized.says}", save.mark, hint))
        elif not table.nodes:
            problems.append(Problem(f"`{step}` has no tensors", save.mark, "look at its inputs with `merge inspect`"))
        else:
            codes: frozenset[str] = frozenset()
            if save.quantize is not None:
                found, remarks = in_fp8(adapters.builder, save, step, table, problems)
                table, codes = found.table, found.codes
                adapters.warnings.extend(remarks)
            # Nothing in a file that outputs share tells them apart: to its tensors, what is saved is their source.
            groups[step] = groups_of(step, saved_steps, adapters.builder.taken)
            apart = [
                (group.names, _header_text(recipe, checkpoints, replace(saved, step=Ref(group.source, save.mark))))
                for group in groups[step]
            ]
            made = build_output(str(place), step, table, save.dtype, save.shard, text, codes, apart)
            made = with_figures(adapters.builder, made)
            if save.dtype is not None or save.quantize is not None:
                alike.add(len(outputs))
            try:
                outputs.append(beside(made, save, recipe, checkpoints, vocabulary, table.adopted))
            except RecipeError as fault:
                problems += fault.problems
    problems += check_pushes(recipe.saves)
    if check_output:
        problems += check_places(places, checkpoints)
    outputs = link(outputs)
    if not problems:
        adapters.warnings.extend(what_to_say(recipe, outputs, groups, adapters.builder.taken, alike))
    return tuple(outputs)


def _header_text(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], save: Save) -> str:
    return dump(in_header(replace(pinned(recipe, checkpoints), saves=(save,))))


@dataclass(frozen=True, slots=True)
class Adapters:
    """Makes the outputs of saves as adapters."""

    builder: Builder
    recipe: Recipe
    tables: Mapping[str, Table]
    checkpoints: Mapping[str, Checkpoint]
    ranks: Mapping[int, Ranks]
    measure: int | None
    problems: list[Problem]
    warnings: list[Problem]
    header: str | None = None  # in place of the recipe in the shards' headers

    def output(self, to: str, number: int, save: Save, step: str, table: Table, text: str) -> list[Output]:
        """The output, in a list; none where something is at fault."""
        assert save.lora is not None
        name = save.lora.base.name
        base = self.tables.get(name)
        if base is None:
            return []
        for what, is_base in ((base, True), (table, False)):
            fault = fault_of(what, name if is_base else step, save.lora.base.mark if is_base else save.mark, is_base)
            if fault is not None:
                self.problems.append(fault)
                return []
        before = len(self.problems)
        parts, remarks = parts_of(self.builder, save, step, table, base, self.problems)
        if len(self.problems) > before:
            return []
        self.warnings.extend(remarks)
        if self.measure is not None:
            return [measured_output(self.builder, save, step, parts, base)]
        ranks = self.ranks.get(number)
        return [adapter_output(self.builder, to, save, step, parts, base, self.checkpoints.get(name), ranks, text)]
