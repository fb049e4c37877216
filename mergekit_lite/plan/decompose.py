"""Saves of `decompose`: tensors of which the run tells how much low rank and rows would save, and what they lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_lite.checkpoint.meta import DTYPE_BITS
from mergekit_lite.methods.decompose import FIGURES, Parts, decompose, parts_of, telling
from mergekit_lite.plan.graph import Builder
from mergekit_lite.plan.model import Node, Output, OutTensor, Plan

Figures = Mapping[str, Mapping[str, Sequence[float]]]


def with_figures(builder: Builder, output: Output) -> Output:
    """The output whose tensors that `decompose` makes come with figures; those that it leaves as they are, are copied
    from its input."""
    if not any(tensor.node.method is decompose for tensor in output.tensors):
        return output
    shards = [replace(s, tensors=tuple(_telling(builder, tensor) for tensor in s.tensors)) for s in output.shards]
    return replace(output, shards=tuple(shards))


def _telling(builder: Builder, tensor: OutTensor) -> OutTensor:
    node = tensor.node
    if node.method is not decompose:
        return tensor
    if _parts(node) is None:
        return replace(tensor, node=node.inputs[0])
    return replace(tensor, node=builder.again(node, telling()))


def _parts(node: Node) -> Parts | None:
    params = dict(node.params)
    return parts_of(node.inputs[0].shape, params["rank"], params["share"])


def decomposed(plan: Plan, figures: Figures) -> dict[str, dict[str, Any]]:
    """What a run tells of its decomposed tensors, by output folder: `bytes` of their parts, `of` those of the whole
    tensors, and `modules` with the rank, the rows that are kept and the stable ranks before and after; None where that
    is no number. `figures` are those of tensors by the number of the output."""
    found: dict[str, dict[str, Any]] = {}
    for number, output in enumerate(plan.outputs):
        modules, nbytes, whole = {}, 0, 0
        for tensor in output.tensors:
            told = figures.get(str(number), {}).get(tensor.name)
            if tensor.node.method is not telling() or told is None or len(told) != FIGURES:
                continue
            parts = _parts(tensor.node)
            assert parts is not None
            ranks = [float(f"{rank:.6g}") if math.isfinite(rank) else None for rank in told[2:]]
            name = tensor.name.removesuffix(".weight")
            modules[name] = {"rank": parts.rank, "rows": parts.kept, "stable_rank": ranks}
            nbytes += parts.nbytes(DTYPE_BITS[tensor.dtype] // 8)
            whole += tensor.nbytes
        if modules:
            found[output.to] = {"bytes": nbytes, "of": whole, "modules": modules}
    return found
