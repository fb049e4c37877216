"""Finds a checkpoint, on disk or on the Hub, and reads its headers. No torch, and never a byte of a tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mergekit_lite.checkpoint import forms
from mergekit_lite.checkpoint.forms import MODULES, PIPELINE, Chosen, Files, choose_all, single_file
from mergekit_lite.checkpoint.gguf import SUFFIX, gguf_files, open_gguf, parts_of
from mergekit_lite.checkpoint.header import Header, read_header
from mergekit_lite.checkpoint.hub import Listing as HubListing
from mergekit_lite.checkpoint.hub import Unreachable, cached, fetch, fetch_beside, is_hub_id, is_offline, look
from mergekit_lite.checkpoint.inside import inside, read_object
from mergekit_lite.checkpoint.listing import CONVERT, INDEX, KINDS, PICKLED, PICKLES, Listing, few
from mergekit_lite.checkpoint.listing import AdapterFound as AdapterFound
from mergekit_lite.checkpoint.masks import split_task, with_masks
from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta
from mergekit_lite.checkpoint.quantized import with_numbers
from mergekit_lite.checkpoint.remote import headers_at
from mergekit_lite.errors import InputError, Mark, Problem, did_you_mean

_MAX_CONFIG_BYTES = 16 * 2**20


def open_checkpoint(
    location: str,
    revision: str | None,
    *,
    mark: Mark | None = None,
    offline: bool = False,
    pickled: bool = False,
    stream: bool = False,
) -> Checkpoint:
    """The checkpoint at `location`: an existing folder or .safetensors file, otherwise a Hub id with its `revision`;
    with `#TASK` behind it the model of that task in a mask store.

    A folder holds model.safetensors, or shards with an index, or nothing but a consistent set of .safetensors files, or
    one GGUF model; such a file may be named too. FP8 weights with scales beside them are read as numbers.
    `pickled` reads pytorch_model.bin or its shards too, where there is none of those, and a .bin or .pt file by name.
    The checkpoint's `revision` is the commit that a Hub model was resolved to. `offline` looks at the Hub's cache only.
    `stream` downloads no weights: headers that the cache lacks are read by ranges, and the shards are `remote`. Raises
    InputError, with `mark` in every problem, for whatever is missing, unreachable or corrupt.
    """
    try:
        store, task = split_task(location)
        found = _open(store, revision, offline, pickled, stream)
        return found if task is None else with_masks(found, task)
    except InputError as error:
        raise type(error)([replace(problem, mark=problem.mark or mark) for problem in error.problems]) from error


def _open(location: str, revision: str | None, offline: bool, pickled: bool, stream: bool) -> Checkpoint:
    path = Path(os.path.abspath(os.path.expanduser(location)))
    if location and os.path.exists(path):
        if revision is not None:
            hint = f"leave out `@{revision}`, or rename the folder if the model on the Hub is meant"
            raise InputError(f"`{location}` is on this disk, where there are no revisions", hint=hint)
        if path.suffix == SUFFIX and not path.is_dir():
            shown = str(Path(location).parent)
            return open_gguf(location, path.parent, parts_of(path.name), shown, linked=True)
        if path.is_dir() and (found := gguf_files(path, location)) is not None:
            return open_gguf(location, path, found, location)
        if path.is_dir():
            return _read_folder(location, None, path, location, pickled)
        if path.suffix != ".safetensors" and not (pickled and path.suffix in PICKLES):
            raise InputError(f"`{location}` is not a .safetensors file", hint=CONVERT)
        chosen = forms.plain(Listing((path.name,), pickled=pickled))
        return _read(location, None, path.parent, chosen, str(Path(location).parent), linked=True)
    if not is_hub_id(location):
        raise InputError(f"there is no checkpoint at `{location}`", hint=_siblings(path, location) or KINDS)
    try:
        if not is_offline(offline):
            return _open_hub(location, revision, pickled, stream)
        folder, commit = _cached(location, revision)
    except InputError as error:
        # `out/mine` may be a model on the Hub or a misspelt folder: name what lies beside it too.
        near = _siblings(path, location)
        if near is None:
            raise
        raise InputError([replace(p, hint=f"{p.hint}; on this disk: {near}") for p in error.problems]) from error
    return _read_folder(location, commit, folder, str(folder), pickled)


def _read_folder(location: str, commit: str | None, folder: Path, shown: str, pickled: bool) -> Checkpoint:
    return _read(location, commit, folder, choose_all(folder, _on_disk(folder, location), location, pickled), shown)


def _on_disk(folder: Path, location: str) -> Files:
    """Lists the files of the checkpoint's folder, and of the folders in it."""

    def names(within: str) -> list[str] | None:
        home = inside(folder, within) if within else folder
        if within and not home.is_dir():
            return None
        try:
            return sorted(os.listdir(home))
        except OSError as error:
            raise InputError(
                f"cannot read the folder `{os.path.join(location, within) if within else location}`: {error.strerror}"
            ) from error

    return names


def _at_hub(seen: HubListing) -> Files:
    """Lists the files of a model on the Hub by its folders."""
    homes: dict[str, list[str]] = {"": []}
    for name in sorted(seen.files):
        home, _, file = name.rpartition("/")
        homes.setdefault(home, []).append(file)
    return homes.get


def _cached(location: str, revision: str | None) -> tuple[Path, str | None]:
    """The model's folder in the cache, and its commit, without asking the Hub. Raises InputError."""
    try:
        return fetch(location, revision, offline=True)
    except InputError:
        # Of a pipeline only the components' files were fetched, and whether they are there is seen when it is read.
        folder, commit = fetch(location, revision, offline=True, names=[PIPELINE, MODULES])
        if not any((folder / name).exists() for name in (PIPELINE, MODULES)):
            raise
        return folder, commit


def _open_hub(location: str, revision: str | None, pickled: bool, stream: bool) -> Checkpoint:
    """A model on the Hub: with `stream` by its headers, otherwise downloaded whole; from the cache where that has the
    weights, or nothing else can be reached."""
    try:
        seen = look(location, revision)
    except Unreachable as error:
        try:
            folder, commit = _cached(location, revision)
        except InputError:
            raise error from None
        return _read_folder(location, commit, folder, str(folder), pickled)
    files = _at_hub(seen)
    names = files("") or ()
    first = [name for name in (PIPELINE, MODULES, "config.json") if name in names]
    if not stream and not {PIPELINE, MODULES} & set(names):
        folder, commit = fetch(location, revision)
        if pickled and not any(name.endswith(".safetensors") for name in names):
            folder, commit = fetch(location, revision, more=[f"{PICKLED}*.bin"])
        return _read_folder(location, commit, folder, str(folder), pickled)
    folder = fetch_beside(location, seen.commit, first or ["config.json"])
    homes = forms.folders_named(folder, first, location)
    more = [
        f"{home}/{name}".lstrip("/")
        for home in ("", *homes)
        for name in files(home) or ()
        if name in ("config.json", forms.ROUTER) or ".index." in name
    ]
    if set(more) - set(first):
        folder = fetch_beside(location, seen.commit, more)
    chosen = choose_all(folder, files, location, pickled)
    listed = {name: file.nbytes for name, file in seen.files.items() if "/" not in name}
    if stream and not chosen.pickled:
        if cached(location, seen.commit, chosen.files):
            return replace(_read(location, seen.commit, folder, chosen, str(folder)), thin=True, listed=listed)
        headers = headers_at(location, seen, chosen.files)
        return replace(_checkpoint(location, seen.commit, folder, chosen, headers), thin=True, listed=listed)
    if stream:
        note = Problem(f"`{location}` holds pickled weights, which cannot be read in parts: it was downloaded whole")
        chosen = replace(chosen, notes=(*chosen.notes, note))
    wanted = [*first, *more, *chosen.files, *(chosen.form.beside if chosen.form is not None else ())]
    folder, commit = fetch(location, revision, names=wanted)
    if commit != seen.commit:  # the branch has moved meanwhile
        folder, _ = fetch(location, seen.commit, names=wanted)
    return _read(location, seen.commit, folder, chosen, str(folder))


def _read(
    location: str, revision: str | None, folder: Path, chosen: Chosen, shown: str, *, linked: bool = False
) -> Checkpoint:
    """Reads config and headers. `shown` names the folder in messages; `linked` allows a weight file to be a link, since
    the user named that file."""
    headers: list[Header] = []
    problems: list[Problem] = []
    for file in chosen.files:
        try:
            path = folder / file if linked else inside(folder, file)
            headers.append(_header(path, os.path.join(shown, file), chosen.pickled))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return _checkpoint(location, revision, folder, chosen, headers)


def _checkpoint(
    location: str, revision: str | None, folder: Path, chosen: Chosen, headers: Sequence[Header]
) -> Checkpoint:
    tensors: dict[str, TensorMeta] = {}
    notes = list(chosen.notes)
    left = list(headers)
    for part, listing in chosen.parts:
        own, left = left[: len(listing.files)], left[len(listing.files) :]
        shown = os.path.join(location, part.folder) if part.folder else location
        found, remarks = _collect(shown, listing, own)
        notes += [*listing.notes, *remarks]
        named = {f"{part.prefix}{n}": m for n, m in found.items()} if part.prefix else found
        both = sorted(tensors.keys() & named)
        if both:
            raise InputError(f"`{location}` holds tensors twice: {few(both)}", hint=f"look into `{part.folder}`")
        tensors |= {n: replace(m, name=n) for n, m in named.items()} if part.prefix else named
    if not tensors:
        raise InputError(f"`{location}` holds no tensors", hint="download it again")
    config: Mapping[str, object] = {}
    form = chosen.form
    if os.path.lexists(folder / "config.json") and not (form is not None and form.pipeline):
        config = read_object(inside(folder, "config.json"), _MAX_CONFIG_BYTES)
    config, tensors = with_numbers(config, tensors)
    metadata = {key: value for header in reversed(headers) for key, value in header.metadata.items()}
    if form is None and len(chosen.files) == 1:
        form = single_file(chosen.files[0], config, tensors, metadata)
        config = {} if form is not None else config
    homes = [part.folder for part, listing in chosen.parts for _ in listing.files]
    return Checkpoint(
        location=location,
        revision=revision,
        folder=folder,
        config=config,
        tensors=tensors,
        shards=tuple(replace(header.shard, within=home) for header, home in zip(headers, homes, strict=True)),
        metadata=metadata,
        notes=tuple(notes),
        form=form,
    )


def _header(path: Path, shown: str, pickled: bool) -> Header:
    if not pickled or path.suffix == ".safetensors":
        return read_header(path, shown)
    from mergekit_lite.checkpoint.pickled import read_pickled

    return read_pickled(path, shown)


def _collect(location: str, listing: Listing, headers: Sequence[Header]) -> tuple[dict[str, TensorMeta], list[Problem]]:
    """The tensors of all shards by name, in order of shard and offset; the index decides where there is one."""
    tensors: dict[str, TensorMeta] = {}
    twice: list[str] = []
    unlisted = 0
    for file, header in zip(listing.files, headers, strict=True):
        for meta in header.tensors:
            if listing.index is not None and listing.index.get(meta.name) != file:
                unlisted += meta.name not in listing.index
            elif meta.name in tensors:
                twice.append(f"{meta.name} ({file} and {os.path.basename(tensors[meta.name].file)})")
            else:
                tensors[meta.name] = meta
    if twice:
        hint = "name the one .safetensors file that is meant, or add an index that says which file holds which tensor"
        raise InputError(f"`{location}` holds {len(twice)} tensors in two files each: {few(twice)}", hint=hint)
    if listing.index is None:
        return tensors, []
    absent = [f"{name} ({file})" for name, file in listing.index.items() if name not in tensors]
    if absent:
        problem = f"{INDEX} of `{location}` promises {len(absent)} tensors that its shards lack: {few(absent)}"
        raise InputError(problem, hint="index and shards belong to different versions: download all of them again")
    note = f"{unlisted} tensors in the shards of `{location}` are not in its index and take no part"
    return tensors, [Problem(note)] if unlisted else []


def _siblings(path: Path, location: str) -> str | None:
    """What stands in the parent folder that `location` may have meant; None where that folder does not exist."""
    try:
        with os.scandir(path.parent) as entries:
            names = sorted(e.name for e in entries if e.name.endswith((".safetensors", SUFFIX)) or e.is_dir())
    except OSError:
        return None
    parent = os.path.dirname(location)
    near = did_you_mean(path.name, names)
    if near is not None:
        return f"did you mean `{os.path.join(parent, near)}`?"
    return f"`{parent or '.'}` holds {few(names)}" if names and location else None
