"""What a plan is known by: a digest over all that decides the bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint.meta import Checkpoint, Packed
from mergekit_lite.plan.model import Alignment, Node, Output, Unit
from mergekit_lite.plan.order import GRAIN, walk
from mergekit_lite.recipe.model import Recipe

# Part of the digest: a change of a kernel, a statistic or the random masks that changes bytes raises it.
ARITHMETIC = 5


def plan_digest(
    recipe: Recipe,
    outputs: Sequence[Output],
    units: Sequence[Unit],
    pools: Mapping[str, Sequence[Node]],
    alignments: Mapping[str, Alignment],
    checkpoints: Mapping[str, Checkpoint],
    nodes: int,
) -> str:
    """SHA-256 over all that decides the bytes: how each tensor is computed, from what, and where it goes. `nodes` is
    how many there are."""
    # What is hashed is the `repr` of tuples of names, settings and numbers, made of parts that many nodes share.
    files = {
        file.path: f"(({file.nbytes!r}, {file.header_sha256!r}, " for c in checkpoints.values() for file in c.shards
    }
    digest = hashlib.sha256(json.dumps([ARITHMETIC, GRAIN, recipe.compute]).encode())
    uses: dict[Any, tuple[str, str]] = {}  # by method, pool and the id of settings that many nodes share
    place = [-1] * nodes  # by id: where a node comes in what is hashed
    count = 0
    walks = {unit.targets[0][1].node.id: unit.nodes for unit in units if len(unit.targets) == 1}
    pooled = [node for members in pools.values() for node in members]
    looked_at = [node for alignment in alignments.values() for node in alignment.nodes]
    shape: tuple[int, ...] | None = None
    shown = ""
    for root in (*(t.node for o in outputs for t in o.tensors), *pooled, *looked_at):
        if place[root.id] >= 0:
            continue
        texts: list[str] = []
        for node in walks.get(root.id) or walk([root]):
            if place[node.id] >= 0:
                continue
            place[node.id] = count
            count += 1
            if node.shape is not shape:
                shape = node.shape
                shown = repr(shape)
            load, method = node.load, node.method
            if load is not None:
                texts.append(f"{files.get(load.file, '((')}{load.name!r}, {load.dtype!r}), {shown})")
                if load.packed is not None:
                    texts.append(_packed(load.packed, files))
                if load.coded is not None:
                    texts.append(repr((load.coded.tasks, load.coded.place)))
            elif method is not None:
                use = uses.get((method.name, node.pool, id(node.params)))
                if use is None:
                    use = f"(({method.name!r}, {repr(node.params)!r}, ", f", {node.pool!r}, "
                    uses[method.name, node.pool, id(node.params)] = use
                below = tuple([place[n.id] for n in node.inputs])
                texts.append(f"{use[0]}{below!r}, {node.key}{use[1]}{node.pool_index}), {shown})")
        digest.update("".join(texts).encode())
    for output in outputs:
        for shard in output.shards:
            digest.update(repr((shard.file, [(t.start, place[t.node.id]) for t in shard.tensors])).encode())
            digest.update(shard.header)
    for pool, members in pools.items():
        digest.update(repr((pool, [place[node.id] for node in members])).encode())
    for name, alignment in alignments.items():
        spaces = [space for space in alignment.spaces if space.kind in alignment.kinds]
        what: tuple[Any, ...] = (name, alignment.use, alignment.params, alignment.digest, spaces)
        if alignment.layers:
            what = (*what, alignment.layers)
        digest.update(repr((what, [place[node.id] for node in alignment.nodes])).encode())
    return digest.hexdigest()


def _packed(packed: Packed, files: Mapping[str, str]) -> str:
    """How the numbers of a load are worked out."""
    scale = packed.scale
    beside = None if scale is None else (files.get(scale.file), scale.name, scale.dtype, scale.shape)
    return repr((packed.kind, packed.block, packed.group, packed.heads, beside))
