"""What several models have changed in one base, against each other: cosines, signs, supports; by tensor, layer, in all.

All models are read once, block by block. The mean cosine of a layer is the share-or-split score of few-shot NAS by
gradient matching (ICLR 2022, arXiv 2203.15207) with task vectors in place of gradients, which needs no data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lite.checkpoint.meta import MERGEABLE, Checkpoint, TensorMeta
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.errors import InputError
from mergekit_lite.family.family import Family, family_of
from mergekit_lite.family.home import by_home
from mergekit_lite.plan.words import shape as sizes
from mergekit_lite.report.stream import BLOCK, Advance, blocks, check_numbers, each, opened

TOGETHER = 64  # blocks of a tensor whose figures are kept before they are added up


@dataclass(frozen=True, slots=True)
class Overlap:
    """The task vectors of T models over `count` numbers.

    `gram` are their inner products, T x T, in float64. `support` counts, T x T, the entries that both models change, on
    the diagonal those that one does; `conflicts` those of them that they change in opposite directions. `changed` are
    entries that any model changes, `shared` those that several do, `contested` those of `shared` that not all of them
    change in one direction, `undefined` those where a model or the base is NaN or infinite, which count nowhere else.
    """

    count: int
    gram: tuple[tuple[float, ...], ...]
    support: tuple[tuple[int, ...], ...]
    conflicts: tuple[tuple[int, ...], ...]
    changed: int
    shared: int
    contested: int
    undefined: int

    @property
    def cosine(self) -> float | None:
        """The mean cosine over all pairs of models that both change something; None where there is no such pair."""
        return _mean(self.pair_cosine(i, j) for i, j in self.pairs)

    @property
    def overlap(self) -> float | None:
        """The mean over pairs of |A and B| / |A or B| of the entries that they change."""
        return _mean(self.pair_overlap(i, j) for i, j in self.pairs)

    @property
    def conflict(self) -> float | None:
        """The share of the entries that several models change in which they do not agree on the sign."""
        return self.contested / self.shared if self.shared else None

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(itertools.combinations(range(len(self.gram)), 2))

    def pair_cosine(self, i: int, j: int) -> float | None:
        norms = math.sqrt(self.gram[i][i]) * math.sqrt(self.gram[j][j])
        return max(-1.0, min(1.0, self.gram[i][j] / norms)) if norms else None

    def pair_overlap(self, i: int, j: int) -> float | None:
        either = self.support[i][i] + self.support[j][j] - self.support[i][j]
        return self.support[i][j] / either if either else None

    def pair_conflict(self, i: int, j: int) -> float | None:
        return self.conflicts[i][j] / self.support[i][j] if self.support[i][j] else None

    def as_json(self) -> dict[str, object]:
        return {
            "count": self.count,
            "norms": [math.sqrt(row[i]) for i, row in enumerate(self.gram)],
            "cosine": self.cosine,
            "conflict": self.conflict,
            "overlap": self.overlap,
            "changed": self.changed,
            "undefined": self.undefined,
        }

    def pairs_as_json(self, labels: Sequence[str]) -> list[dict[str, object]]:
        return [
            {
                "a": labels[i],
                "b": labels[j],
                "cosine": self.pair_cosine(i, j),
                "conflict": self.pair_conflict(i, j),
                "overlap": self.pair_overlap(i, j),
            }
            for i, j in self.pairs
        ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def together(parts: Sequence[Overlap]) -> Overlap:
    """The task vectors over all numbers of `parts`, at least one; in any order, since the sums are exact."""
    indices = range(len(parts[0].gram))

    def counted(name: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sum(getattr(p, name)[i][j] for p in parts) for j in indices) for i in indices)

    return Overlap(
        sum(p.count for p in parts),
        tuple(tuple(math.fsum(p.gram[i][j] for p in parts) for j in indices) for i in indices),
        counted("support"),
        counted("conflicts"),
        *(sum(getattr(p, name) for p in parts) for name in ("changed", "shared", "contested", "undefined")),
    )


def overlap_of(base: Tensor, models: Sequence[Tensor]) -> Overlap:
    """The figures of one block: the base's numbers and each model's, 1-D and equally long, of any floating dtypes."""
    deltas = torch.stack([model.to(torch.float64) for model in models]).sub_(base.to(torch.float64))
    undefined = 0
    # With a NaN or an infinity anywhere, or where a square is out of range, the sum is not finite.
    if not math.isfinite(float(deltas.view(-1).dot(deltas.view(-1)))):
        sound = torch.isfinite(deltas).all(dim=0)
        undefined = int((~sound).sum())
        deltas = torch.where(sound, deltas, 0.0)
    positive, negative = deltas > 0, deltas < 0
    # Counts up to a block's size are exact as floating numbers, whose products are quick.
    up, down = positive.to(torch.float64), negative.to(torch.float64)
    crossed = up @ down.T
    used = up + down
    how_many = used.sum(dim=0)
    shared = how_many > 1
    contested = shared & positive.any(dim=0) & negative.any(dim=0)
    return Overlap(
        base.numel(),
        _rows(deltas @ deltas.T),
        _counts(used @ used.T),
        _counts(crossed + crossed.T),
        int((how_many > 0).sum()),
        int(shared.sum()),
        int(contested.sum()),
        undefined,
    )


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, matrix.tolist()))


def _counts(matrix: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in matrix.tolist())


@dataclass(frozen=True, slots=True)
class TaskVectors:
    """What was found: of `tensors` by name, of `layers` by what stands before the rest of their tensors' names, and of
    all. Tensors outside of the layers are by module among `layers`. `left` tells why a tensor takes no part."""

    base: str
    models: tuple[str, ...]
    tensors: Mapping[str, Overlap]
    layers: Mapping[str, Overlap]
    members: Mapping[str, int]
    whole: Overlap
    left: Mapping[str, str]

    def as_json(self) -> dict[str, object]:
        return {
            "base": self.base,
            "models": list(self.models),
            "all": self.whole.as_json() | {"pairs": self.whole.pairs_as_json(self.models)},
            "layers": [
                {"name": name, "tensors": self.members[name], **found.as_json()} for name, found in self.layers.items()
            ],
            "tensors": [
                {"name": name, **found.as_json(), "pairs": found.pairs_as_json(self.models)}
                for name, found in self.tensors.items()
            ],
            "left": [{"name": name, "why": why} for name, why in self.left.items()],
        }


def task_vectors(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    threads: int = 1,
    advance: Advance = lambda nbytes: None,
    block: int = BLOCK,
) -> TaskVectors:
    """Compare what two or more `models` have changed in `base`, over the tensors that hold numbers to merge and have
    one shape in all. `advance` hears of the base's bytes. Memory is a block of every model for each thread. Raises
    InputError where a file cannot be read, where numbers are codes, or where no tensor is in all of them."""
    family, names, left = compared(base, models)
    shards = {shard.path: shard for checkpoint in (base, *models) for shard in checkpoint.shards}
    with opened(shards.values(), threads) as reader:

        def one(name: str) -> Overlap:
            return _tensor(reader, base.tensors[name], [m.tensors[name] for m in models], advance, block)

        found = dict(zip(names, each(reader, one, names, threads), strict=True))
    groups = by_home(family, names)
    layers = {home: together([found[name] for name in members]) for home, members in groups.items()}
    return TaskVectors(
        base.location,
        tuple(model.location for model in models),
        found,
        layers,
        {home: len(members) for home, members in groups.items()},
        together(list(found.values())),
        left,
    )


def compared(base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[Family, list[str], dict[str, str]]:
    """The base's family, the tensors that are compared, and of the others why they are not. Raises InputError where
    numbers are codes, or where no tensor is left."""
    for checkpoint in (base, *models):
        check_numbers(checkpoint)
    family = family_of(base.config, base.tensors, base.configs)
    left = dict(_left_out(base, models, dict(family.tied)))
    names = [name for name in base.tensors if name not in left]
    if not names:
        hint = "are they models of one kind? `merge inspect --tensors` shows names and shapes"
        raise InputError(f"no tensor of the base `{base.location}` is in all models, by name and shape", hint=hint)
    return family, names, left


def _tensor(reader: Source, base: TensorMeta, models: Sequence[TensorMeta], advance: Advance, block: int) -> Overlap:
    parts: list[Overlap] = []
    for start, *others in zip(*(blocks(reader, meta, block) for meta in (base, *models)), strict=True):
        parts.append(overlap_of(start, others))
        advance(start.nbytes)
        if len(parts) == TOGETHER:
            parts = [together(parts)]
    return together(parts)


def _left_out(base: Checkpoint, models: Sequence[Checkpoint], tied: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The tensors that take no part, and why."""
    for name in dict.fromkeys(name for checkpoint in (base, *models) for name in checkpoint.tensors):
        metas = [checkpoint.tensors.get(name) for checkpoint in (base, *models)]
        lacking = next((c for c, m in zip((base, *models), metas, strict=True) if m is None), None)
        here = [meta for meta in metas if meta is not None]
        if tied.get(name) in base.tensors:
            yield name, f"is tied to {tied[name]}"
        elif lacking is not None:
            yield name, f"is missing in {lacking.location}"
        elif len({meta.shape for meta in here}) > 1:
            yield name, "has several shapes: " + ", ".join(dict.fromkeys(sizes(meta.shape) for meta in here))
        elif any(meta.dtype not in MERGEABLE for meta in here):
            yield name, "holds no numbers to merge"
        elif not here[0].numel:
            yield name, "is empty"
