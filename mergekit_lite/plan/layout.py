"""Where every output byte lies: tensors into shards, shards into headers and offsets, the indices beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint.meta import DTYPE_BITS, MERGEABLE, Part
from mergekit_lite.checkpoint.writer import encode_header
from mergekit_lite.plan.graph import Table
from mergekit_lite.plan.model import Node, Output, OutShard, OutTensor

# Names of dtypes as recipes write them -> safetensors codes.
SAVE_DTYPES: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_PLAIN = (Part("", ""),)


def build_output(to: str, step: str, table: Table, dtype: str | None, shard: int, recipe_text: str) -> Output:
    """The files of one `save`, a part of the checkpoint after the other. `dtype` (a recipe's name) replaces the stored
    dtype of tensors that hold numbers to merge; integers, booleans and codes keep theirs. `shard` is the most bytes of
    tensors in one file."""
    stored = {name: _out_dtype(table.dtypes[name], dtype) for name in table.nodes}
    sizes = {name: nbytes(node, stored[name]) for name, node in table.nodes.items()}
    # "format" is what transformers looks for; the recipe travels with every shard.
    kept = table.form.metadata if table.form is not None else {}
    metadata = {**kept, "format": "pt", "mergekit_lite.recipe": recipe_text}
    shards: list[OutShard] = []
    indices: dict[str, Mapping[str, Any]] = {}
    for part, members in by_part(table):
        total = sum(sizes[name] for name in members)
        groups = _fill({name: sizes[name] for name in members}, total if part.whole else shard)
        files = [f"{part.stem}.safetensors"] if len(groups) == 1 else [
            f"{part.stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
        ]  # fmt: skip
        home = f"{part.folder}/" if part.folder else ""
        for file, names in zip(files, groups, strict=True):
            rows = [(n.removeprefix(part.prefix), stored[n], table.nodes[n].shape, sizes[n]) for n in names]
            header, starts = encode_header(rows, metadata)
            tensors = tuple(
                OutTensor(name, shape, code, table.nodes[name], len(shards), start, size)
                for name, (_, code, shape, size), start in zip(names, rows, starts, strict=True)
            )
            shards.append(OutShard(home + file, header, len(header) + sum(size for *_, size in rows), tensors))
        if len(groups) > 1:
            weight_map = {
                name.removeprefix(part.prefix): file
                for file, names in zip(files, groups, strict=True)
                for name in names
            }
            name = f"{home}{part.stem}.safetensors.index.json"
            indices[name] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return Output(to, step, tuple(shards), indices, dict(table.config), table.donor)


def by_part(table: Table) -> list[tuple[Part, list[str]]]:
    """The names of a table's tensors by the part of the checkpoint that they belong to, parts without tensors too."""
    parts = _PLAIN if table.form is None else table.form.parts
    found: dict[str, list[str]] = {part.prefix: [] for part in parts}
    for name in table.nodes:
        home = max((prefix for prefix in found if name.startswith(prefix)), key=len, default=None)
        if home is not None:
            found[home].append(name)
    return [(part, found[part.prefix]) for part in parts]


def _out_dtype(stored: str, dtype: str | None) -> str:
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
