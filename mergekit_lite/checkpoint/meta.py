"""What is known of a checkpoint without reading a weight. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.errors import Problem

# safetensors dtype code -> bits per element. Sub-byte dtypes are copied, never computed with.
DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
# safetensors dtype code -> its name in torch and in config.json. No torch dtype holds one element of a sub-byte dtype.
DTYPE_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
DTYPE_CODES: Mapping[str, str] = {name: code for code, name in DTYPE_NAMES.items()}
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
class Remote:
    """A file on the Hub at one commit. `etag` is what the Hub tells its versions apart by: the SHA-256 of the whole
    file where it is `large` (in LFS), the id of its git blob otherwise."""

    repo: str
    commit: str
    file: str
    etag: str
    large: bool

    @property
    def path(self) -> str:
        """How the file is named where others have a path: `org/name@COMMIT/model.safetensors`. No path of this disk
        is: those are absolute."""
        return f"{self.repo}@{self.commit}/{self.file}"

    @property
    def digest(self) -> str:
        """What the Hub says of the file's content, with the name of the function before it."""
        return f"{'sha256' if self.large else 'git'}:{self.etag}"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One input file's identity: path, size in bytes, mtime in nanoseconds and the SHA-256 of its header. A file that
    is read from the Hub by ranges is `remote`, and has no mtime (0)."""

    path: str
    nbytes: int
    mtime_ns: int
    header_sha256: str
    remote: Remote | None = None


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one weight: `scale` times the product of `b` and `a`.

    `a` is r x in and `b` is out x r, for convolutions with the kernel's axes behind. `embedding` tells that the weight
    is stored as in x out whatever its shape; `magnitude` are the lengths of DoRA, `bias` what is added to the bias.
    """

    a: TensorMeta
    b: TensorMeta
    scale: float
    embedding: bool = False
    magnitude: TensorMeta | None = None
    bias: TensorMeta | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """What an adapter of the kind `LOHA`, `LOKR` or `IA3` does to one weight: `parts` are its tensors by the names that
    peft gives them, `scale` the factor of what is added."""

    kind: str
    parts: Mapping[str, TensorMeta]
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter seen through its configuration and its header. `kind` is peft's: `LORA`, `LOHA`, `LOKR`, `IA3`.

    `low_rank` has an entry for each module that LoRA adapts, by the module's name, `products` one for each that another
    kind adapts; `whole` are tensors that take the place of the base's, by name. `files` are the weights and the
    configuration, both of which decide the result. `transposed` tells that the weights of linear layers are stored as
    in x out, `retied` that a tied head follows the embedding. `base` is the model that the adapter says it was made
    for.
    """

    location: str
    revision: str | None
    folder: Path
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, TensorMeta]
    files: tuple[ShardFile, ...]
    transposed: bool = False
    retied: bool = False
    base: str | None = None
    products: Mapping[str, Product] = field(default_factory=dict)
    kind: str = "LORA"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint seen through its headers. `tensors` keeps the order on disk: shard by shard, offset by offset.

    `folder` is where config.json and the tokenizer files lie. `notes` are findings that do not stop a merge but that a
    person may want to see, such as tensors on disk that the index leaves out. With an `adapter`, `tensors` are the
    base's, to which it is added when they are read, and `shards` hold its files too. Where `thin`, the folder lies in
    the Hub's cache and may lack files beside config.json, which `hub.fetch_beside` fetches; `listed` are the files
    that the Hub has there, with their sizes in bytes.
    """

    location: str
    revision: str | None
    folder: Path | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorMeta]
    shards: tuple[ShardFile, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[Problem, ...] = ()
    adapter: Adapter | None = None
    thin: bool = False
    listed: Mapping[str, int] | None = None
