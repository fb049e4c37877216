"""Where every output byte lies: tensors into shards, shards into headers and offsets, the index beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint.meta import DTYPE_BITS, MERGEABLE
from mergekit_lite.checkpoint.writer import encode_header
from mergekit_lite.plan.graph import Table
from mergekit_lite.plan.model import Node, Output, OutShard, OutTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Names of dtypes as recipes write them -> safetensors codes.
SAVE_DTYPES: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def build_output(to: str, step: str, table: Table, dtype: str | None, shard: int, recipe_text: str) -> Output:
    """The files of one `save`. `dtype` (a recipe's name) replaces the stored dtype of tensors that hold numbers to
    merge; integers, booleans and codes keep theirs. `shard` is the most bytes of tensors in one file."""
    stored = {name: out_dtype(table.dtypes[name], dtype) for name in table.nodes}
    sizes = {name: nbytes(node, stored[name]) for name, node in table.nodes.items()}
    groups = _fill(sizes, shard)
    files = [SINGLE] if len(groups) == 1 else [
        f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
    ]  # fmt: skip
    # "format" is what transformers looks for; the recipe travels with every shard.
    metadata = {"format": "pt", "mergekit_lite.recipe": recipe_text}
    shards: list[OutShard] = []
    for number, (file, names) in enumerate(zip(files, groups, strict=True)):
        rows = [(name, stored[name], table.nodes[name].shape, sizes[name]) for name in names]
        header, starts = encode_header(rows, metadata)
        tensors = tuple(
            OutTensor(name, shape, code, table.nodes[name], number, start, size)
            for (name, code, shape, size), start in zip(rows, starts, strict=True)
        )
        shards.append(OutShard(file, header, len(header) + sum(size for *_, size in rows), tensors))
    index: dict[str, Any] | None = None
    if len(shards) > 1:
        weight_map = {t.name: s.file for s in shards for t in s.tensors}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return Output(to, step, tuple(shards), index, dict(table.config), table.donor)


def out_dtype(stored: str, dtype: str | None) -> str:
    """The dtype on disk of what is stored so, where a save asks for `dtype`."""
    return SAVE_DTYPES[dtype] if dtype and stored in MERGEABLE else stored


def nbytes(node: Node, dtype: str) -> int:
    """Bytes of the node's tensor stored as `dtype` (a safetensors code)."""
    return node.numel * DTYPE_BITS[dtype] // 8


def _fill(sizes: Mapping[str, int], limit: int) -> Sequence[list[str]]:
    """Names in order, a new group where the next tensor would lift one over `limit` bytes."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups
