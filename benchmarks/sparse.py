"""Checkpoints of safetensors files: headers, indices, and files that are nothing but a header and a hole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mergekit_lite.checkpoint.writer import encode_header

Shape = tuple[int, ...]
INDEX = "model.safetensors.index.json"


def shards_of(shapes: Mapping[str, Shape], limit: int) -> dict[str, dict[str, Shape]]:
    """The bfloat16 tensors of every file, in their order, at most `limit` bytes a file where a tensor is not larger."""
    groups: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if groups[-1] and size + nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def shell(folder: Path, shapes: Mapping[str, Shape], limit: int, config: Mapping[str, Any]) -> Path:
    """A checkpoint whose files end with their headers. Without `config` there is no config.json. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for file, tensors in shards_of(shapes, limit).items():
        listed = [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in tensors.items()]
        (folder / file).write_bytes(encode_header(listed, {"format": "pt"})[0])
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def write_sparse(folder: Path, shapes: Mapping[str, Shape], limit: int, config: Mapping[str, Any]) -> None:
    """A checkpoint of zeros that takes no disk where the file system knows holes."""
    shell(folder, shapes, limit, config)
    for file, tensors in shards_of(shapes, limit).items():
        with (folder / file).open("ab") as handle:
            handle.truncate(handle.tell() + sum(2 * math.prod(shape) for shape in tensors.values()))


def write_files(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def many_tensors(folder: Path, count: int) -> None:
    """A sparse checkpoint of `count` small tensors with names like a Llama's, 2,000 a file."""
    if not (folder / "config.json").exists():
        shapes: dict[str, Shape] = {f"model.layers.{i // 9}.part{i % 9}.weight": (64, 64) for i in range(count)}
        write_sparse(folder, shapes, 2000 * 2 * 64 * 64, {"model_type": "synthetic"})
