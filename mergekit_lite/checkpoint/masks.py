"""Reads the mask of one task from a mask store, `STORE#TASK`: what is known of it without reading a weight. No torch.

A store is the folder of a base model with two more kinds of files: multi_task.safetensors holds a multi-task vector,
`multi_task/NAME` for the base's tensor NAME; mask-TASK.safetensors holds for each of these `TASK/NAME`, bytes (U8) of
which every bit tells whether the task uses an entry, the first eight entries in the first byte, the first of them in
its lowest bit. In place of the latter a store may have files of several tasks whose masks are coded (coded.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mergekit_lite.checkpoint.coded import frames_of, is_coded_file, library, tasks_in
from mergekit_lite.checkpoint.header import Header, read_header
from mergekit_lite.checkpoint.hub import look
from mergekit_lite.checkpoint.inside import inside, is_plain_name
from mergekit_lite.checkpoint.meta import BIT, MERGEABLE, Checkpoint, Coded, Masks, Remote, TensorMeta
from mergekit_lite.checkpoint.remote import headers_at
from mergekit_lite.errors import InputError, did_you_mean

MULTI = "multi_task"
MULTI_FILE = f"{MULTI}.safetensors"
_AGAIN = "the files of the store belong to different runs: make it again"


def mask_file(task: str) -> str:
    """The name of the file that holds the mask of a task."""
    return f"mask-{task}.safetensors"


def is_of_masks(file: str) -> bool:
    """Whether a file of this name in a store holds masks."""
    return is_coded_file(file) or (file.startswith("mask-") and file.endswith(".safetensors"))


def prefix_of(tasks: Sequence[str]) -> str:
    """What stands before the names of masks that are coded together."""
    return "+".join(tasks)


def sizes_name(prefix: str, name: str) -> str:
    """The stored name of the sizes of the frames of a tensor's masks."""
    return f"{prefix}:frames/{name}"


def split_task(location: str) -> tuple[str, str | None]:
    """`STORE#TASK` as its two parts; any other text, and what lies on this disk by that name, is a location alone."""
    store, sign, task = location.rpartition("#")
    if not sign or not store or os.path.exists(os.path.expanduser(location)):
        return location, None
    return store, task


def with_masks(store: Checkpoint, task: str) -> Checkpoint:
    """The base of a store with the multi-task vector and the mask of `task` to be added to it. Raises InputError where
    the location holds no such store, or no such task, or where these do not fit one another."""
    homes = _homes(store)
    tasks = list(homes)
    if not tasks:
        hint = "`#` stands before the name of a task in a store that `save: {as: masks}` has written"
        raise InputError(f"`{store.location}` is no mask store", hint=hint)
    if task not in tasks or not is_plain_name(homes[task]):
        near = did_you_mean(task, tasks)
        hint = f"did you mean `{near}`?" if near else f"it has {', '.join(f'`{name}`' for name in tasks[:20])}"
        raise InputError(f"the mask store `{store.location}` has no task `{task}`", hint=hint)
    multi, used = _headers(store, [MULTI_FILE, homes[task]])
    vector = dict(_named(multi, MULTI, store))
    read = _coded_bits if is_coded_file(homes[task]) else _bits
    return replace(
        store,
        shards=(*store.shards, multi.shard, used.shard),
        masks=Masks(task, vector, read(used, task, vector, store)),
    )


def tasks_of(store: Checkpoint) -> list[str]:
    """The tasks of a mask store, in order; none where it is none. Raises InputError where a header that tells of them
    cannot be read."""
    return list(_homes(store))


def _homes(store: Checkpoint) -> dict[str, str]:
    """The files that hold the masks of a store, by task, in order."""
    if store.listed is not None:
        names = sorted(store.listed)
    else:
        names = sorted(os.listdir(store.folder)) if store.folder is not None else []
    if MULTI_FILE not in names:
        return {}
    coded = [name for name in names if is_coded_file(name)]
    found = {name[5:-12]: name for name in names if is_of_masks(name) and name not in coded}
    for name, header in zip(coded, _headers(store, coded), strict=True):
        found |= dict.fromkeys(_together(header, store), name)
    return dict(sorted(found.items()))


def _headers(store: Checkpoint, names: Sequence[str]) -> list[Header]:
    remote = _remote(store)
    if remote is None or not names:
        return [_header(store, name) for name in names]
    return headers_at(remote.repo, look(remote.repo, remote.commit), names)


def _together(header: Header, store: Checkpoint) -> list[str]:
    """The tasks whose masks are coded together in a file."""
    first = header.tensors[0].name if header.tensors else ""
    tasks = tasks_in(first)
    if not tasks:
        message = f"`{Path(header.shard.path).name}` of `{store.location}` names no tasks: `{first[:200]}`"
        raise InputError(message, hint=_AGAIN)
    return tasks


def _remote(store: Checkpoint) -> Remote | None:
    return next((shard.remote for shard in store.shards if shard.remote is not None), None)


def _header(store: Checkpoint, name: str) -> Header:
    folder = store.folder or Path()
    return read_header(inside(folder, name), os.path.join(store.location, name))


def _named(header: Header, prefix: str, store: Checkpoint) -> Iterator[tuple[str, TensorMeta]]:
    """The tensors of a file by the base's names. Raises InputError where one has none."""
    shown = f"`{Path(header.shard.path).name}` of `{store.location}`"
    for meta in header.tensors:
        name = meta.name.removeprefix(f"{prefix}/")
        base = store.tensors.get(name)
        if base is None or name == meta.name:
            raise InputError(f"{shown}: the base has no tensor for `{meta.name[:200]}`", hint=_AGAIN)
        if prefix == MULTI and (base.shape != meta.shape or meta.dtype not in MERGEABLE):
            raise InputError(f"{shown}: `{meta.name[:200]}` does not fit the base's tensor", hint=_AGAIN)
        yield name, meta


def _bits(header: Header, task: str, vector: dict[str, TensorMeta], store: Checkpoint) -> dict[str, TensorMeta]:
    """The masks by the base's names, each of as many bits as the vector has entries."""
    found = dict(_named(header, task, store))
    for name, meta in vector.items():
        mask = found.get(name)
        if mask is None or mask.dtype != "U8" or mask.shape != ((meta.numel + 7) // 8,) or len(found) != len(vector):
            message = f"the mask of `{task}` in `{store.location}` does not fit the multi-task vector: `{name[:200]}`"
            raise InputError(message, hint=_AGAIN)
        found[name] = replace(mask, shape=meta.shape, dtype=BIT)
    return found


def _coded_bits(header: Header, task: str, vector: dict[str, TensorMeta], store: Checkpoint) -> dict[str, TensorMeta]:
    """As `_bits`, of masks that are coded together. What is in the frames is known when they are read."""
    library()  # says at once what is lacking
    tasks = _together(header, store)
    prefix, place = prefix_of(tasks), tasks.index(task)
    stored = {meta.name: meta for meta in header.tensors}
    found: dict[str, TensorMeta] = {}
    for name, meta in vector.items():
        frames, sizes = stored.get(f"{prefix}/{name}"), stored.get(sizes_name(prefix, name))
        fits = (
            frames is not None
            and sizes is not None
            and (frames.dtype, len(frames.shape)) == ("U8", 1)
            and (sizes.dtype, sizes.shape) == ("U32", (frames_of(meta.numel),))
            and len(stored) == 2 * len(vector)
        )
        if frames is None or sizes is None or not fits:
            shown = f"`{Path(header.shard.path).name}` of `{store.location}`"
            raise InputError(f"the masks in {shown} do not fit the multi-task vector: `{name[:200]}`", hint=_AGAIN)
        found[name] = replace(frames, shape=meta.shape, dtype=BIT, coded=Coded(sizes, len(tasks), place))
    return found
