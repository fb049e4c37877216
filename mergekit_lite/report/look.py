"""What a checkpoint is, from its headers and its config.json alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta
from mergekit_lite.errors import InputError, Problem
from mergekit_lite.family.family import Family, family_of
from mergekit_lite.family.section import lookup
from mergekit_lite.recipe.read import split_location
from mergekit_lite.report.stats import is_floating

_VOCABULARY = ("vocab_size",)
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "n_embed")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Sections of a config.json that describe the part of the model that has a vocabulary.
_SECTIONS = ("", "text_config.", "llm_config.", "language_config.")
_BESIDE = (".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken", ".yaml", ".md")


@dataclass(frozen=True, slots=True)
class StackLook:
    """A stack of layers: `layers` by the tensors' names, `stated` by the key `key` of config.json."""

    name: str
    layers: int
    key: str | None
    stated: int | None


@dataclass(frozen=True, slots=True)
class DtypeLook:
    """What a checkpoint holds in one dtype."""

    dtype: str
    tensors: int
    numbers: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ShardLook:
    """One weight file: its size, and the tensors of it that belong to the checkpoint."""

    file: str
    bytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class TieLook:
    """Two names of one tensor; `stored` names those of them that the files hold."""

    alias: str
    canonical: str
    stored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """A checkpoint at a glance. `parameters` counts the elements of floating tensors, `others` those of integer and
    boolean ones; `bytes` are the tensors'. `beside` are files beside the weights, with their sizes."""

    location: str
    revision: str | None
    family: str
    model_type: str | None
    architectures: tuple[str, ...]
    stacks: tuple[StackLook, ...]
    tensors: int
    parameters: int
    others: int
    bytes: int
    dtypes: tuple[DtypeLook, ...]
    shards: tuple[ShardLook, ...]
    tied: tuple[TieLook, ...]
    vocabulary: int | None
    hidden: int | None
    experts: int | None
    beside: Mapping[str, int]
    metadata: Mapping[str, str]
    notes: tuple[Problem, ...]

    def as_json(self) -> dict[str, object]:
        made = {name: getattr(self, name) for name in self.__slots__}
        for name in ("stacks", "dtypes", "shards", "tied"):
            made[name] = [asdict(entry) for entry in made[name]]
        made["notes"] = [note.as_json() for note in self.notes]
        return made


def open_location(text: str, offline: bool = False, pickled: bool = False, stream: bool = False) -> Checkpoint:
    """The checkpoint at a location as it stands on a command line: a folder, a file, or `org/name[@revision]`.
    `pickled` allows for what `torch.save` wrote; `stream` downloads no weights, only headers.

    Raises InputError for whatever is missing, unreachable or corrupt.
    """
    location, revision = (text, None) if os.path.exists(os.path.expanduser(text)) else split_location(text)
    opened = open_checkpoint(location, revision, offline=offline, pickled=pickled, stream=stream)
    if opened.masks is not None:
        hint = f"make it a model with a recipe: `models: {{m: {location}}}` and `save: {{step: m, to: DIR}}`"
        raise InputError(f"`{text}` is a task of a mask store, whose weights are put together by a run", hint=hint)
    return opened


def look(checkpoint: Checkpoint) -> Look:
    """All that headers and configuration tell. No weight is read."""
    family = family_of(checkpoint.config, checkpoint.tensors, checkpoint.configs)
    metas = list(checkpoint.tensors.values())
    architectures = checkpoint.config.get("architectures")
    model_type = checkpoint.config.get("model_type")
    return Look(
        location=checkpoint.location,
        revision=checkpoint.revision,
        family=family.name,
        model_type=model_type if isinstance(model_type, str) else None,
        architectures=tuple(a for a in architectures if isinstance(a, str)) if isinstance(architectures, list) else (),
        stacks=tuple(_stacks(checkpoint, family)),
        tensors=len(metas),
        parameters=sum(meta.numel for meta in metas if is_floating(meta.dtype)),
        others=sum(meta.numel for meta in metas if not is_floating(meta.dtype)),
        bytes=sum(meta.nbytes for meta in metas),
        dtypes=tuple(_dtypes(metas)),
        shards=tuple(_shards(checkpoint)),
        tied=tuple(
            TieLook(alias, canonical, tuple(name for name in (canonical, alias) if name in checkpoint.tensors))
            for alias, canonical in family.tied
        ),
        vocabulary=stated(checkpoint.config, _VOCABULARY),
        hidden=stated(checkpoint.config, _HIDDEN),
        experts=_experts(checkpoint, family),
        beside=dict(_beside(checkpoint)),
        metadata=checkpoint.metadata,
        notes=checkpoint.notes,
    )


def stated(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of `keys` that the configuration states as a whole number, at its top or in its part for text."""
    for section in _SECTIONS:
        for key in keys:
            value = lookup(config, section + key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """The number of tokens that the configuration states; None for a model without text."""
    return stated(config, _VOCABULARY)


def _stacks(checkpoint: Checkpoint, family: Family) -> Iterator[StackLook]:
    for stack in family.stacks:
        count = lookup(checkpoint.config, stack.count_key) if stack.count_key is not None else None
        known = count if isinstance(count, int) and not isinstance(count, bool) else None
        yield StackLook(stack.name, stack.count, stack.count_key, known)


def _dtypes(metas: list[TensorMeta]) -> Iterator[DtypeLook]:
    """The largest share of the bytes first."""
    groups: dict[str, list[TensorMeta]] = {}
    for meta in metas:
        groups.setdefault(meta.stored, []).append(meta)
    for dtype, group in sorted(groups.items(), key=lambda item: (-sum(meta.nbytes for meta in item[1]), item[0])):
        yield DtypeLook(dtype, len(group), sum(meta.numel for meta in group), sum(meta.nbytes for meta in group))


def _shards(checkpoint: Checkpoint) -> Iterator[ShardLook]:
    tensors: dict[str, int] = {}
    for meta in checkpoint.tensors.values():
        tensors[meta.file] = tensors.get(meta.file, 0) + 1
    for shard in checkpoint.shards:
        yield ShardLook(shard.name, shard.nbytes, tensors.get(shard.path, 0))


def _experts(checkpoint: Checkpoint, family: Family) -> int | None:
    """The number of experts of a layer: by the names, or where experts share one tensor by the configuration."""
    numbers = [number for number in map(family.expert, checkpoint.tensors) if number is not None]
    return max(numbers) + 1 if numbers else stated(checkpoint.config, _EXPERTS)


def _beside(checkpoint: Checkpoint) -> Iterator[tuple[str, int]]:
    if checkpoint.listed is not None:
        yield from ((name, nbytes) for name, nbytes in sorted(checkpoint.listed.items()) if name.endswith(_BESIDE))
    elif checkpoint.folder is not None:
        for name in sorted(os.listdir(checkpoint.folder)):
            path = checkpoint.folder / name
            if name.endswith(_BESIDE) and path.is_file():
                yield name, path.stat().st_size
