"""Where every output byte lies: tensors into shards, shards into headers and offsets, the indices beside them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint.meta import DTYPE_BITS, MERGEABLE, Part
from mergekit_lite.checkpoint.writer import encode_header
from mergekit_lite.methods.fp8 import BLOCK
from mergekit_lite.plan.graph import Table
from mergekit_lite.plan.model import Node, Output, OutShard, OutTensor

IN_HEADER = "mergekit_lite.recipe"  # the key of a shard's metadata under which the recipe stands
SCALE = "_scale_inv"  # what the name of an FP8 weight is followed by in that of its scales
Places = Mapping[str, tuple[tuple[str, str, tuple[int, ...], int], int]]
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


def build_output(
    to: str,
    step: str,
    table: Table,
    dtype: str | None,
    shard: int,
    recipe_text: str,
    fp8: Container[str] = (),
    apart: Sequence[tuple[Container[str], str]] = (),
) -> Output:
    """The files of one `save`, a part of the checkpoint after the other. `dtype` (a recipe's name) replaces the stored
    dtype of tensors that hold numbers to merge; integers, booleans and codes keep theirs. `shard` is the most bytes of
    tensors in one file. The tensors `fp8` become FP8 and have their scales in the same file. `apart` are tensors that
    go into files of their own, behind all others, and the recipe's text in those files, as far as files may be divided.
    """
    stored = {name: "F8_E4M3" if name in fp8 else out_dtype(table.dtypes[name], dtype) for name in table.nodes}
    beside = {name: _scales(node.shape) for name, node in table.nodes.items() if name in fp8}
    sizes = {name: nbytes(node, stored[name]) for name, node in table.nodes.items()}
    for name, shape in beside.items():
        sizes[name] += 4 * math.prod(shape)
    # "format" is what transformers looks for; the recipe travels with every shard.
    kept = table.form.metadata if table.form is not None else {}
    shards: list[OutShard] = []
    indices: dict[str, Mapping[str, Any]] = {}
    for part, members in by_part(table):
        total = sum(sizes[name] for name in members)
        groups: list[tuple[list[str], str | None]] = []
        for names, text in _divided(members, () if part.whole else apart):
            filled = _fill({name: sizes[name] for name in names}, total if part.whole else shard)
            groups += [(group, text) for group in filled]
        files = [f"{part.stem}.safetensors"] if len(groups) == 1 else [
            f"{part.stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
        ]  # fmt: skip
        home = f"{part.folder}/" if part.folder else ""
        weight_map: dict[str, str] = {}
        for file, (names, text) in zip(files, groups, strict=True):
            metadata = {**kept, "format": "pt", IN_HEADER: recipe_text if text is None else text}
            rows = [(n, stored[n], table.nodes[n].shape, nbytes(table.nodes[n], stored[n])) for n in names]
            scales = [(f"{n}{SCALE}", "F32", beside[n], 4 * math.prod(beside[n])) for n in names if n in beside]
            if scales:  # the widest numbers first, so that each begins at a multiple of its size
                rows = sorted([*scales, *rows], key=lambda row: -DTYPE_BITS[row[1]])
            header, starts = encode_header([(row[0].removeprefix(part.prefix), *row[1:]) for row in rows], metadata)
            places = {row[0]: (row, start) for row, start in zip(rows, starts, strict=True)}

            def made(name: str, node: Node, number: int, places: Places) -> OutTensor:
                (_, code, shape, size), start = places[name]
                scale = made(f"{name}{SCALE}", node, number, places) if name in beside else None
                return OutTensor(name, shape, code, node, number, start, size, scale)

            tensors = tuple(made(name, table.nodes[name], len(shards), places) for name in names)
            size = len(header) + sum(row[3] for row in rows)
            shards.append(OutShard(home + file, header, size, tensors, apart=text is not None))
            weight_map |= {t.name.removeprefix(part.prefix): file for tensor in tensors for t in tensor.parts}
        if len(groups) > 1:
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


def _divided(members: list[str], apart: Sequence[tuple[Container[str], str]]) -> list[tuple[list[str], str | None]]:
    """The tensors that do not go into files of their own, then those of each group that does, with the group's text."""
    # In this order, because what is read first of a checkpoint's metadata holds for the whole of it.
    found: list[tuple[list[str], str | None]] = [
        ([name for name in members if not any(name in group for group, _ in apart)], None)
    ]
    for group, text in apart:
        found.append(([name for name in members if name in group], text))
    return [pair for pair in found if pair[0]] or [(members, None)]


def _scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in shape)


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
