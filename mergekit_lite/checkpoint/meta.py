"""What is known of a checkpoint without reading a weight. No torch."""

from __future__ import annotations

import math
import os
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
# How masks lie within U8, which is what files call them: a bit for an element, the first of eight in the lowest.
BIT = "BIT"
STORED_BITS: Mapping[str, int] = {**DTYPE_BITS, BIT: 1}
DTYPE_CODES: Mapping[str, str] = {name: code for code, name in DTYPE_NAMES.items()}
# Floating dtypes that take part in a merge; every other dtype is copied from the base (METHODS: integer buffers).
MERGEABLE = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True, slots=True)
class Packed:
    """How the numbers of a tensor lie in its file where they are worked out as they are read.

    `kind` is what is stored: a safetensors code, or a type of GGUF such as `Q4_K`, of which `group` says how many
    numbers take how many bytes. `saved` is the dtype that an output gets where the recipe names none. Numbers of FP8
    are multiplied by `scale`, one for each block of `block` rows and columns, a scalar for all. With `heads` the rows
    of each of so many heads lie in the order of llama.cpp, pairs of the two halves.
    """

    kind: str
    saved: str
    scale: TensorMeta | None = None
    block: tuple[int, int] = (1, 1)
    group: tuple[int, int] = (1, 1)
    heads: int = 0


@dataclass(frozen=True, slots=True)
class Coded:
    """Where a mask lies among those of `tasks` tasks that are coded together: it is the one at `place`. `sizes` holds
    the bytes of each frame."""

    sizes: TensorMeta
    tasks: int
    place: int


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One tensor of a checkpoint: `file` is the shard's path, `start` the absolute offset of its first byte in it. With
    `packed` the numbers are not stored as `dtype`, but come out in it, always `F32`; `nbytes` are those stored. With
    `coded` it is a mask, and the bytes are those of all masks that are coded with it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int
    nbytes: int
    packed: Packed | None = None
    coded: Coded | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stored(self) -> str:
        """What lies in the file: a safetensors code or a type of GGUF."""
        return self.dtype if self.packed is None else self.packed.kind

    @property
    def saved(self) -> str:
        """The dtype that an output keeps where the recipe names none."""
        return self.dtype if self.packed is None else self.packed.saved

    @property
    def parts(self) -> tuple[TensorMeta, ...]:
        """The stored tensors that it takes to read this one: itself, and its scales, or the sizes of its frames."""
        if self.coded is not None:
            return (self, self.coded.sizes)
        return (self,) if self.packed is None or self.packed.scale is None else (self, self.packed.scale)


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
    is read from the Hub by ranges is `remote`, and has no mtime (0). `within` is the folder, below the checkpoint's,
    that it lies in."""

    path: str
    nbytes: int
    mtime_ns: int
    header_sha256: str
    remote: Remote | None = None
    within: str = ""

    @property
    def name(self) -> str:
        """Its name, relative to the checkpoint's folder."""
        name = os.path.basename(self.path)
        return f"{self.within}/{name}" if self.within else name


@dataclass(frozen=True, slots=True)
class Part:
    """The weights of one folder of a checkpoint: `folder` is relative to the checkpoint's, empty for that itself.

    `prefix` stands before the stored names of its tensors in everything but the files; a file is named `stem`, and
    never divided where `whole`. `kind` is the class that the checkpoint says it is of, empty where it does not;
    `config` its config.json, which an output rewrites.
    """

    folder: str
    prefix: str
    stem: str = "model"
    whole: bool = False
    kind: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Form:
    """How a checkpoint is laid out where it is no folder of transformers.

    `kind` is `diffusers`, `sentence-transformers`, `timm` or `file`. `parts` hold its weights; `beside` are the files,
    relative to its folder, that an output takes over, `metadata` what it takes over of the headers' metadata.
    """

    kind: str
    parts: tuple[Part, ...]
    beside: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The configurations of the parts whose tensors have a prefix, by the prefix."""
        return {part.prefix: part.config for part in self.parts if part.prefix}

    @property
    def pipeline(self) -> bool:
        """Whether it is of several models, not of one with something behind it."""
        return self.kind == "diffusers" and any(part.folder for part in self.parts)


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
    """What an adapter of the kind `LOHA`, `LOKR`, `IA3` or `FLORA` does to one weight: `parts` are its tensors by the
    names that peft gives them, or for FLoRA the published layers, `scale` the factor of what is added. `feedforward`
    tells that (IA)^3 scales inputs, as far as the configuration says."""

    kind: str
    parts: Mapping[str, TensorMeta]
    scale: float
    feedforward: bool | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter seen through its configuration and its header. `kind` is peft's, `LORA`, `LOHA`, `LOKR`, `IA3`, or
    `FLORA`.

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
class Masks:
    """What a mask store keeps of the task `task` beside its base, by the base's tensor names: the multi-task vector,
    and which of its entries the task uses (of dtype BIT)."""

    task: str
    multi: Mapping[str, TensorMeta]
    used: Mapping[str, TensorMeta]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint seen through its headers. `tensors` keeps the order on disk: shard by shard, offset by offset.

    `folder` is where config.json and the tokenizer files lie. `notes` are findings that do not stop a merge but that a
    person may want to see, such as tensors on disk that the index leaves out. With an `adapter`, `tensors` are the
    base's, to which it is added when they are read, and `shards` hold its files too; so it is with `masks`. Where
    `thin`, the folder lies in the Hub's cache and may lack files beside config.json, which `hub.fetch_beside` fetches;
    `listed` are the files that the Hub has there, with their sizes in bytes. `form` is None for the layout of
    transformers.
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
    masks: Masks | None = None
    form: Form | None = None

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """As of its form."""
        return self.form.configs if self.form is not None else {}
