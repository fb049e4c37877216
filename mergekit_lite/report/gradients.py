"""Where the losses of several tasks pull one model: cosines of their gradients, by tensor, by layer, in all.

The share-or-split score of few-shot NAS by gradient matching (ICLR 2022, arXiv 2203.15207), whose data-free form
task_vectors.py has: the mean cosine over all pairs of tasks, of gradients at the point that they would share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mergekit_lite.checkpoint.meta import MERGEABLE, Checkpoint, TensorMeta
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.errors import InputError, Problem
from mergekit_lite.family.home import by_home
from mergekit_lite.plan.words import few
from mergekit_lite.plan.words import shape as sizes
from mergekit_lite.report.stream import BLOCK, Advance, blocks, each, opened
from mergekit_lite.report.task_vectors import TOGETHER, Overlap, compared, overlap_of, together

_MAKE = "make each with `merge stats MERGED --collect gradient`, MERGED being one model and the data a task's"


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of `files` against each other, of tensors and layers by name and of all; a tensor without a
    gradient, such as a running mean, is missing."""

    files: tuple[str, ...]
    tensors: Mapping[str, Overlap]
    layers: Mapping[str, Overlap]
    whole: Overlap

    def as_json(self) -> dict[str, object]:
        def one(found: Overlap) -> dict[str, object]:
            pairs = found.pairs_as_json(self.files)
            return {"cosine": found.cosine, "pairs": [{k: p[k] for k in ("a", "b", "cosine")} for p in pairs]}

        return {
            "files": list(self.files),
            "all": one(self.whole) | {"undefined": self.whole.undefined},
            "layers": [{"name": name, **one(found)} for name, found in self.layers.items()],
            "tensors": [{"name": name, **one(found)} for name, found in self.tensors.items()],
        }


def check_gradients(base: Checkpoint, models: Sequence[Checkpoint], files: Sequence[Checkpoint]) -> None:
    """Raises InputError with every fault of the files: those that hold no gradients, that were gathered at another
    model than the first, or that lack a tensor which the models are compared by, where they do not say why."""
    _, names, _ = compared(base, models)
    problems = [
        Problem(f"`{file.location}` holds no gradients", None, _MAKE) for file in files if not _holds_gradients(file)
    ]
    if problems:
        raise InputError(problems)
    for file in files:
        if _model(file) != _model(files[0]):
            message = f"`{file.location}` was gathered at another model than `{files[0].location}`"
            problems.append(Problem(message, None, _MAKE))
        said = _mapping(file, "skipped")
        lacking = [name for name in names if name not in file.tensors and name not in said]
        if lacking:
            message = f"`{file.location}` has no gradient of {few(lacking)}"
            problems.append(Problem(message, None, "gather it at a model with the tensors of the base"))
        for name in names:
            found = file.tensors.get(name)
            if found is None:
                continue
            has, wanted = sizes(found.shape), sizes(base.tensors[name].shape)
            if found.dtype not in MERGEABLE:
                problems.append(Problem(f"`{name}` of `{file.location}` is {found.dtype}, no gradient", None, _MAKE))
            elif has != wanted:
                message = f"`{name}` of `{file.location}` is {has}, the base's {wanted}"
                problems.append(Problem(message, None, "gather it at a model with the shapes of the base"))
    if problems:
        raise InputError(list(dict.fromkeys(problems)))


def _holds_gradients(file: Checkpoint) -> bool:
    return file.metadata.get("kind") == "gradient" and bool(_model(file))


def _model(file: Checkpoint) -> list[str]:
    """The digests of the files of the model that was differentiated."""
    return sorted(_mapping(file, "model_digests").values())


def _mapping(file: Checkpoint, key: str) -> dict[str, str]:
    try:
        found = json.loads(file.metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def gradients(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    files: Sequence[Checkpoint],
    *,
    threads: int = 1,
    advance: Advance = lambda nbytes: None,
    block: int = BLOCK,
) -> Gradients:
    """Compare the gradients in two or more `files`, which `check_gradients` has looked at, over the tensors that
    `models` are compared by. `advance` hears of the first file's bytes. Memory is a block of every file for each
    thread. Raises InputError where a file cannot be read, and where none of these tensors has a gradient."""
    family, names, _ = compared(base, models)
    names = [name for name in names if all(name in file.tensors for file in files)]
    if not names:
        raise InputError(f"`{files[0].location}` has no gradient of any tensor that is compared", hint=_MAKE)
    with opened({s.path: s for file in files for s in file.shards}.values(), threads) as reader:

        def one(name: str) -> Overlap:
            return _tensor(reader, [file.tensors[name] for file in files], advance, block)

        found = dict(zip(names, each(reader, one, names, threads), strict=True))
    layers = {home: together([found[name] for name in own]) for home, own in by_home(family, names).items()}
    return Gradients(tuple(file.location for file in files), found, layers, together(list(found.values())))


def _tensor(reader: Source, metas: Sequence[TensorMeta], advance: Advance, block: int) -> Overlap:
    parts: list[Overlap] = []
    for values in zip(*(blocks(reader, meta, block) for meta in metas), strict=True):
        parts.append(overlap_of(torch.zeros_like(values[0]), values))
        advance(values[0].nbytes)
        if len(parts) == TOGETHER:
            parts = [together(parts)]
    return together(parts)
