"""Mask stores: a save that becomes one, and a task of one that becomes a model again. No torch.

Source: TALL-masks, ICML 2024, arXiv 2405.07813.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from mergekit_lite.checkpoint.coded import library
from mergekit_lite.checkpoint.masks import MULTI, MULTI_FILE, mask_file
from mergekit_lite.checkpoint.meta import BIT, MERGEABLE, Checkpoint
from mergekit_lite.checkpoint.writer import encode_header
from mergekit_lite.errors import InputError, Mark, Problem
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.methods.spec import Method, Slot
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.layout import build_output, nbytes, out_dtype
from mergekit_lite.plan.lowrank import fault_of
from mergekit_lite.plan.model import Node, Output, OutShard, OutTensor
from mergekit_lite.plan.steps import Faults
from mergekit_lite.plan.words import shape as sizes
from mergekit_lite.recipe.model import Save


def unmasked(builder: Builder, name: str, checkpoint: Checkpoint, table: Table) -> Table:
    """The table of the model `name` with what its task uses of the store's multi-task vector added to the base."""
    masks = checkpoint.masks
    if masks is None:
        return table
    methods = all_methods()
    call = methods["add"](methods["keep_shared"](Slot(0), Slot(1), k=1), Slot(2))
    nodes = dict(table.nodes)
    for place, meta in masks.multi.items():
        if place in nodes:  # a tied alias has no node of its own
            inputs = [builder.load(meta), builder.load(masks.used[place]), nodes[place]]
            nodes[place] = builder.call(call, inputs, [name] * 3, name, place)
    return replace(table, nodes=nodes)


def mask_output(
    builder: Builder,
    to: str,
    save: Save,
    step: str,
    tables: Mapping[str, Table],
    recipe_text: str,
    problems: list[Problem],
) -> Output | None:
    """The files of a mask store. None where something is at fault, which goes to `problems`; the tables of all that is
    named are there."""
    masks = save.masks
    assert masks is not None
    if masks.compress is not None:
        try:
            library()
        except InputError as refused:
            problems += [replace(problem, mark=masks.mark) for problem in refused.problems]
            return None
    methods = all_methods()
    base = tables[masks.base.name]
    for ref, table in ((masks.base, base), *((r, tables[r.name]) for r in masks.tasks.values())):
        fault = fault_of(table, ref.name, ref.mark, ref is masks.base)
        if fault is not None:
            problems.append(fault)
            return None
    faults = Faults()
    hint = f"`{step}` must be the sum of changes from `{masks.base.name}`, such as a step of `use: linear` over deltas"
    vector = _changes(builder, step, tables[step], base, methods, masks.mark, faults, hint)
    if not vector and not faults.problems():
        problems.append(Problem(f"`{step}` changes nothing of `{masks.base.name}`", masks.mark, hint))
        return None
    parts = [(MULTI, MULTI_FILE, vector)]
    for task, ref in masks.tasks.items():
        own = _changes(builder, ref.name, tables[ref.name], base, methods, ref.mark, faults, "name a fine-tune of it")
        lacking = [name for name in vector if name not in own]
        for name in lacking:
            faults.add(f"`{ref.name}` lacks tensors that `{step}` changes", ref.mark, "name a whole model", name)
        call = methods["mask_bits"](
            methods["tall_masks"](Slot(0), Slot(1), threshold=masks.thresholds[task], output="mask")
        )
        used = {
            name: builder.call(call, [own[name], node], [ref.name, step], step, name)
            for name, node in vector.items()
            if name in own
        }
        parts.append((task, mask_file(task), used))
    if faults.problems():
        problems += faults.problems()
        return None
    made = build_output(to, step, base, None, save.shard, recipe_text)
    shards = list(made.shards)
    for prefix, file, nodes in parts:
        dtypes = {n: out_dtype(base.dtypes[n], save.dtype) if prefix == MULTI else BIT for n in nodes}
        shards.append(_shard(prefix, file, nodes, dtypes, len(shards), recipe_text))
    return replace(made, shards=tuple(shards), store=tuple(masks.tasks), compress=masks.compress)


def _changes(
    builder: Builder,
    step: str,
    table: Table,
    base: Table,
    methods: Mapping[str, Method],
    mark: Mark,
    faults: Faults,
    hint: str,
) -> dict[str, Node]:
    """What a model or step changes of the base, tensor by tensor. What is no number to merge is left to the base."""
    found: dict[str, Node] = {}
    delta = methods["delta"](Slot(0), Slot(1))
    for name, node in table.nodes.items():
        same = base.nodes.get(name)
        if same is None or same.shape != node.shape:
            what = "is not in" if same is None else f"has another shape ({sizes(node.shape)}) than in"
            faults.add(f"what `{step}` has {what} the base", mark, hint, name)
        elif table.dtypes[name] in MERGEABLE and base.dtypes[name] in MERGEABLE and node is not same:
            found[name] = node if table.space == "delta" else builder.call(delta, [node, same], [step] * 2, step, name)
    return found


def _shard(
    prefix: str, file: str, nodes: Mapping[str, Node], dtypes: Mapping[str, str], number: int, recipe_text: str
) -> OutShard:
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    for name, node in nodes.items():
        if dtypes[name] == BIT:
            size = math.ceil(node.numel / 8)
            rows.append((f"{prefix}/{name}", "U8", (size,), size))
        else:
            rows.append((f"{prefix}/{name}", dtypes[name], node.shape, nbytes(node, dtypes[name])))
    header, starts = encode_header(rows, {"format": "pt", "mergekit_lite.recipe": recipe_text})
    # Under the base's names: what is of one tensor is computed together.
    tensors = tuple(
        OutTensor(name, node.shape, dtypes[name], node, number, start, size)
        for (name, node), start, (*_, size) in zip(nodes.items(), starts, rows, strict=True)
    )
    return OutShard(file, header, len(header) + sum(size for *_, size in rows), tensors)
