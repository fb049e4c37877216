"""How two checkpoints differ, tensor by tensor, both streamed block by block. They may be sharded differently."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.report.stream import BLOCK, Advance, blocks, each, has_numbers, opened

STATES = ("same", "differs", "dtype", "shape", "only_a", "only_b")
# Notes that transformers leaves in config.json about itself: no part of the model.
NOT_THE_MODEL = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDE = frozenset({torch.int64, torch.uint64})


@dataclass(frozen=True, slots=True)
class Gap:
    """How far b is from a. `differing` counts numbers whose bits differ (across dtypes: whose values differ),
    `undefined` those of them where either is NaN or infinite; the rest is about pairs of finite numbers, in float64:
    the largest |a-b|, the L2 norms of a, b and a-b, squared, and the inner product."""

    differing: int = 0
    undefined: int = 0
    max_abs: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    dd: float = 0.0
    ab: float = 0.0

    @property
    def relative(self) -> float:
        """||a-b|| / ||a||: infinite where a is all zeros and b is not."""
        if self.dd == 0.0:
            return 0.0
        return math.sqrt(self.dd) / math.sqrt(self.aa) if self.aa else math.inf

    @property
    def cosine(self) -> float:
        """The cosine of the angle between a and b: NaN where either is all zeros."""
        if not (self.aa and self.bb):
            return math.nan
        return max(-1.0, min(1.0, self.ab / math.sqrt(self.aa) / math.sqrt(self.bb)))

    def __add__(self, other: Gap) -> Gap:
        return Gap(
            self.differing + other.differing,
            self.undefined + other.undefined,
            max(self.max_abs, other.max_abs),
            self.aa + other.aa,
            self.bb + other.bb,
            self.dd + other.dd,
            self.ab + other.ab,
        )


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One name: `state` is one of STATES. `a` and `b` are None where that side lacks it, `gap` where the shapes
    differ or a dtype has no numbers; then only whether the bytes are the same is known."""

    name: str
    state: str
    a: TensorMeta | None
    b: TensorMeta | None
    gap: Gap | None = None

    def within(self, tolerance: float) -> bool:
        """Whether the tensors count as equal: the same bits, or with a tolerance no |a-b| above it."""
        if self.state == "same":
            return True
        gap = self.gap
        return tolerance > 0 and gap is not None and not gap.undefined and gap.max_abs <= tolerance

    def as_json(self) -> dict[str, object]:
        made: dict[str, object] = {"name": self.name, "state": self.state}
        for side, meta in (("a", self.a), ("b", self.b)):
            made[side] = None if meta is None else {"shape": list(meta.shape), "dtype": meta.dtype}
        gap = self.gap
        if gap is not None:
            made["differing"] = gap.differing
            made["undefined"] = gap.undefined
            made |= {key: _known(getattr(gap, key)) for key in ("max_abs", "relative", "cosine")}
        return made


@dataclass(frozen=True, slots=True)
class ConfigDiff:
    """One dotted key of config.json: both values as JSON text, None where that side lacks the key."""

    key: str
    a: str | None
    b: str | None

    def as_json(self) -> dict[str, object]:
        return {"key": self.key, "a": self.a, "b": self.b}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints compared. The configurations are compared where both have one."""

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    config: tuple[ConfigDiff, ...]
    lacks_config: tuple[str, ...]
    tolerance: float = 0.0

    @property
    def equal(self) -> bool:
        return not self.config and all(tensor.within(self.tolerance) for tensor in self.tensors)

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of tensors by state, those of STATES that occur."""
        found = Counter(tensor.state for tensor in self.tensors)
        return {state: found[state] for state in STATES if found[state]}

    def ranked(self, by: str, everything: bool = False) -> list[TensorDiff]:
        """The tensors that differ, with `everything` all, by `name`, by `max` (largest |a-b|) or `rel` (relative norm).

        The largest come first, and before them what no number tells; equals stand in the order of their names.
        """
        chosen = [tensor for tensor in self.tensors if everything or tensor.state != "same"]
        if by == "name":
            return sorted(chosen, key=lambda tensor: tensor.name)
        return sorted(chosen, key=lambda tensor: (-_weight(tensor, by), tensor.name))

    def as_json(self) -> dict[str, object]:
        """All but the tensors, which `ranked` gives."""
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "tolerance": self.tolerance,
            "counts": dict(self.counts),
            "max_abs": _known(max((t.gap.max_abs for t in self.tensors if t.gap is not None), default=0.0)),
            "config": [entry.as_json() for entry in self.config],
            "lacks_config": list(self.lacks_config),
        }


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    tolerance: float = 0.0,
    threads: int = 1,
    advance: Advance = lambda nbytes: None,
    block: int = BLOCK,
) -> Comparison:
    """Compare two checkpoints. `advance` hears of the bytes of `a` as they are compared. `tolerance` is the largest
    |a-b| that still counts as equal. Raises InputError where a file cannot be read."""
    names = list(dict.fromkeys([*a.tensors, *b.tensors]))
    # Tensors that differ are read from their start again once the first difference is found.
    pairs = [meta.nbytes + b.tensors[name].nbytes for name, meta in a.tensors.items() if name in b.tensors]
    with opened([*a.shards, *b.shards], threads, sum(sorted(pairs)[-threads:])) as reader:

        def one(name: str) -> TensorDiff:
            return _tensor(reader, name, a.tensors.get(name), b.tensors.get(name), advance, block)

        tensors = tuple(each(reader, one, names, threads))
    lacks = tuple(side.location for side in (a, b) if not side.config)
    config = () if lacks else tuple(config_diff(a.config, b.config))
    return Comparison(a.location, b.location, tensors, config, lacks, tolerance)


def config_diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[ConfigDiff]:
    """The dotted keys whose values differ, in the order of `a`, without what transformers notes about itself."""
    left, right = dict(_flat(a)), dict(_flat(b))
    for key in dict.fromkeys([*left, *right]):
        if left.get(key) != right.get(key) and key.rpartition(".")[2] not in NOT_THE_MODEL:
            yield ConfigDiff(key, left.get(key), right.get(key))


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            # As text, since to Python true is 1 and NaN differs from itself.
            yield f"{before}{key}", json.dumps(value, sort_keys=True)


def _tensor(
    reader: Source, name: str, a: TensorMeta | None, b: TensorMeta | None, advance: Advance, block: int
) -> TensorDiff:
    if a is None or b is None or a.shape != b.shape:
        advance(0 if a is None else a.nbytes)
        return TensorDiff(name, "only_b" if a is None else "only_a" if b is None else "shape", a, b)
    if a.dtype == b.dtype and same_bytes(reader, a, b, block):
        advance(a.nbytes)
        return TensorDiff(name, "same", a, b)
    state = "differs" if a.dtype == b.dtype else "dtype"
    numbers = has_numbers(a.dtype) and has_numbers(b.dtype)
    if not numbers or (a.dtype == "C64") != (b.dtype == "C64"):
        advance(a.nbytes)
        return TensorDiff(name, state, a, b)
    total = Gap()
    for x, y in zip(blocks(reader, a, block), blocks(reader, b, block), strict=True):
        total = total + gap(x, y)
        advance(x.nbytes)
    return TensorDiff(name, state, a, b, total)


def same_bytes(reader: Source, a: TensorMeta, b: TensorMeta, block: int = BLOCK) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes; reads up to the first block that differs."""
    pairs = zip(blocks(reader, a, block), blocks(reader, b, block), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def gap(a: Tensor, b: Tensor) -> Gap:
    """The gap between two blocks of real numbers, 1-D and equally long, of any dtypes that torch converts."""
    x, y = a.to(torch.float64), b.to(torch.float64)
    if a.dtype == b.dtype:
        bits = _BITS[a.element_size()]
        changed = a.view(bits) != b.view(bits)
    else:
        changed = (x != y) & ~(torch.isnan(x) & torch.isnan(y))
    undefined = 0
    apart = _wide_difference(a, b) if a.dtype == b.dtype and a.dtype in _WIDE else x - y
    aa, bb = float(x.dot(x)), float(y.dot(y))
    # With a NaN or an infinity anywhere a sum of squares is not finite.
    if not (math.isfinite(aa) and math.isfinite(bb)):
        finite = torch.isfinite(x) & torch.isfinite(y)
        undefined = int((changed & ~finite).sum())
        zero = torch.zeros((), dtype=torch.float64)
        x, y, apart = (torch.where(finite, values, zero) for values in (x, y, apart))
        aa, bb = float(x.dot(x)), float(y.dot(y))
    return Gap(
        differing=int(torch.count_nonzero(changed)),
        undefined=undefined,
        max_abs=float(apart.abs().max()) if apart.numel() else 0.0,
        aa=aa,
        bb=bb,
        dd=float(apart.dot(apart)),
        ab=float(x.dot(y)),
    )


def _wide_difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b of 64-bit integers, rounded once: their neighbours beyond 2^53 are one number in float64."""

    def halves(values: Tensor) -> tuple[Tensor, Tensor]:
        signed = values.view(torch.int64)
        high = signed >> 32
        if values.dtype == torch.uint64:
            high = high & 0xFFFFFFFF
        return high, signed & 0xFFFFFFFF

    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return (a_high - b_high).to(torch.float64) * 2.0**32 + (a_low - b_low).to(torch.float64)


def _weight(tensor: TensorDiff, by: str) -> float:
    if tensor.state == "same":
        return -1.0
    if tensor.gap is None or tensor.gap.undefined:
        return math.inf
    return tensor.gap.max_abs if by == "max" else tensor.gap.relative


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None
