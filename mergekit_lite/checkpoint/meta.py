"""What is known of a checkpoint without reading a weight. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# safetensors dtype code -> bits per element. Sub-byte dtypes are copied, never computed with.
DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
# Floating dtypes that take part in a merge; every other dtype is copied from the base (METHODS: integer buffers).
MERGEABLE = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One tensor of a checkpoint: `file` is the shard's path, `start` the absolute offset of its first byte in it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One input file's identity: path, size in bytes, mtime in nanoseconds and the SHA-256 of its header."""

    path: str
    nbytes: int
    mtime_ns: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint seen through its headers. `tensors` keeps the order on disk: shard by shard, offset by offset."""

    location: str
    revision: str | None
    folder: Path | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorMeta]
    shards: tuple[ShardFile, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
