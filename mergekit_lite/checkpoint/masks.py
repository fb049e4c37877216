"""Reads the mask of one task from a mask store, `STORE#TASK`: what is known of it without reading a weight. No torch.

A store is the folder of a base model with two more kinds of files: multi_task.safetensors holds a multi-task vector,
`multi_task/NAME` for the base's tensor NAME; mask-TASK.safetensors holds for each of these `TASK/NAME`, bytes (U8) of
which every bit tells whether the task uses an entry, the first eight entries in the first byte, the first of them in
its lowest bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mergekit_lite.checkpoint.header import Header, read_header
from mergekit_lite.checkpoint.hub import look
from mergekit_lite.checkpoint.inside import inside, is_plain_name
from mergekit_lite.checkpoint.meta import BIT, MERGEABLE, Checkpoint, Masks, Remote, TensorMeta
from mergekit_lite.checkpoint.remote import headers_at
from mergekit_lite.errors import InputError, did_you_mean

MULTI = "multi_task"
MULTI_FILE = f"{MULTI}.safetensors"
_AGAIN = "the files of the store belong to different runs: make it again"


def mask_file(task: str) -> str:
    """The name of the file that holds the mask of a task."""
    return f"mask-{task}.safetensors"


def split_task(location: str) -> tuple[str, str | None]:
    """`STORE#TASK` as its two parts; any other text, and what lies on this disk by that name, is a location alone."""
    store, sign, task = location.rpartition("#")
    if not sign or not store or os.path.exists(os.path.expanduser(location)):
        return location, None
    return store, task


def with_masks(store: Checkpoint, task: str) -> Checkpoint:
    """The base of a store with the multi-task vector and the mask of `task` to be added to it. Raises InputError where
    the location holds no such store, or no such task, or where these do not fit one another."""
    tasks = tasks_of(store)
    if not tasks:
        hint = "`#` stands before the name of a task in a store that `save: {as: masks}` has written"
        raise InputError(f"`{store.location}` is no mask store", hint=hint)
    if task not in tasks or not is_plain_name(mask_file(task)):
        near = did_you_mean(task, tasks)
        hint = f"did you mean `{near}`?" if near else f"it has {', '.join(f'`{name}`' for name in tasks[:20])}"
        raise InputError(f"the mask store `{store.location}` has no task `{task}`", hint=hint)
    wanted = [MULTI_FILE, mask_file(task)]
    remote = _remote(store)
    if remote is not None:
        multi, used = headers_at(remote.repo, look(remote.repo, remote.commit), wanted)
    else:
        multi, used = (_header(store, name) for name in wanted)
    vector = dict(_named(multi, MULTI, store))
    return replace(
        store,
        shards=(*store.shards, multi.shard, used.shard),
        masks=Masks(task, vector, _bits(used, task, vector, store)),
    )


def tasks_of(store: Checkpoint) -> list[str]:
    """The tasks of a mask store, in order; none where it is none."""
    if store.listed is not None:
        names = sorted(store.listed)
    else:
        names = sorted(os.listdir(store.folder)) if store.folder is not None else []
    tasks = [name[5:-12] for name in names if name.startswith("mask-") and name.endswith(".safetensors")]
    return tasks if MULTI_FILE in names else []


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
