"""Finds a checkpoint, on disk or on the Hub, and reads its headers. No torch, and never a byte of a tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_lite.checkpoint.header import Header, read_header
from mergekit_lite.checkpoint.hub import Unreachable, cached, fetch, fetch_beside, is_hub_id, is_offline, look
from mergekit_lite.checkpoint.inside import inside, is_plain_name, read_object
from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta
from mergekit_lite.checkpoint.remote import headers_at
from mergekit_lite.errors import InputError, Mark, Problem, did_you_mean

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_INDEX_BYTES = 100_000_000
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_STEM = "pytorch_model"
_CONVERT = (
    "pickled weights can run code, so they are read only with `--allow-pickle`, and then as plain data; or load the "
    "model once with transformers, `from_pretrained(...)`, and save it with `save_pretrained(...)`"
)


def open_checkpoint(
    location: str,
    revision: str | None,
    *,
    mark: Mark | None = None,
    offline: bool = False,
    pickled: bool = False,
    stream: bool = False,
) -> Checkpoint:
    """The checkpoint at `location`: an existing folder or .safetensors file, otherwise a Hub id with its `revision`.

    A folder holds model.safetensors, or shards with an index, or nothing but a consistent set of .safetensors files.
    `pickled` reads pytorch_model.bin or its shards too, where there is none of those, and a .bin or .pt file by name.
    The checkpoint's `revision` is the commit that a Hub model was resolved to. `offline` looks at the Hub's cache only.
    `stream` downloads no weights: headers that the cache lacks are read by ranges, and the shards are `remote`. Raises
    InputError, with `mark` in every problem, for whatever is missing, unreachable or corrupt.
    """
    try:
        return _open(location, revision, offline, pickled, stream)
    except InputError as error:
        raise type(error)([replace(problem, mark=problem.mark or mark) for problem in error.problems]) from error


class AdapterFound(InputError):
    """The location holds an adapter where a whole model is asked for."""


def _open(location: str, revision: str | None, offline: bool, pickled: bool, stream: bool) -> Checkpoint:
    path = Path(os.path.abspath(os.path.expanduser(location)))
    if location and os.path.exists(path):
        if revision is not None:
            hint = f"leave out `@{revision}`, or rename the folder if the model on the Hub is meant"
            raise InputError(f"`{location}` is on this disk, where there are no revisions", hint=hint)
        if path.is_dir():
            return _read(location, None, path, _list_folder(path, location, pickled), location)
        if path.suffix != ".safetensors" and not (pickled and path.suffix in _PICKLES):
            raise InputError(f"`{location}` is not a .safetensors file", hint=_CONVERT)
        listing = _Listing((path.name,), pickled=pickled)
        return _read(location, None, path.parent, listing, str(Path(location).parent), linked=True)
    if not is_hub_id(location):
        raise InputError(f"there is no checkpoint at `{location}`", hint=_siblings(path, location) or _KINDS)
    try:
        if stream and not is_offline(offline):
            return _open_remote(location, revision, pickled)
        folder, commit = fetch(location, revision, offline=offline)
        if pickled and not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            folder, commit = fetch(location, revision, offline=offline, more=[f"{_STEM}*.bin"])
    except InputError as error:
        # `out/mine` may be a model on the Hub or a misspelt folder: name what lies beside it too.
        near = _siblings(path, location)
        if near is None:
            raise
        raise InputError([replace(p, hint=f"{p.hint}; on this disk: {near}") for p in error.problems]) from error
    return _read(location, commit, folder, _list_folder(folder, location, pickled), str(folder))


def _open_remote(location: str, revision: str | None, pickled: bool) -> Checkpoint:
    """A model on the Hub by its headers; from the cache where that has the weights, or nothing else can be reached."""
    try:
        seen = look(location, revision)
    except Unreachable as error:
        try:
            folder, commit = fetch(location, revision, offline=True)
        except InputError:
            raise error from None
        return _read(location, commit, folder, _list_folder(folder, location, pickled), str(folder))
    names = sorted(name for name in seen.files if "/" not in name)
    indices = [INDEX, f"{_STEM}.bin.index.json"]
    folder = fetch_beside(
        location, seen.commit, [n for n in ("config.json", *indices) if n in names] or ["config.json"]
    )
    listing = _choose(folder, names, location, pickled)
    if listing.pickled:
        note = Problem(f"`{location}` holds pickled weights, which cannot be read in parts: it was downloaded whole")
        folder, _ = fetch(location, seen.commit, more=[f"{_STEM}*.bin"])
        return _read(location, seen.commit, folder, replace(listing, notes=(*listing.notes, note)), str(folder))
    listed = {name: seen.files[name].nbytes for name in names}
    if cached(location, seen.commit, listing.files):
        return replace(_read(location, seen.commit, folder, listing, str(folder)), thin=True, listed=listed)
    headers = headers_at(location, seen, listing.files)
    return replace(_checkpoint(location, seen.commit, folder, listing, headers), thin=True, listed=listed)


_KINDS = "give an existing folder, a .safetensors file, or a Hub id such as `organisation/name`"


@dataclass(frozen=True, slots=True)
class _Listing:
    """Which files of a folder make up the checkpoint. `index` maps tensors to files; None: take every tensor. `pickled`
    tells that they may be what `torch.save` wrote."""

    files: tuple[str, ...]
    index: Mapping[str, str] | None = None
    notes: tuple[Problem, ...] = field(default=())
    pickled: bool = False


def _list_folder(folder: Path, location: str, pickled: bool) -> _Listing:
    """Chooses the weight files of a folder as transformers does, and any consistent set where it would find none."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read the folder `{location}`: {error.strerror}") from error
    return _choose(folder, names, location, pickled)


def _choose(folder: Path, names: Sequence[str], location: str, pickled: bool) -> _Listing:
    """The weight files among `names`; an index is read from `folder`."""
    if INDEX in names:
        listing = _read_index(folder, location, INDEX)
        if SINGLE in names and SINGLE not in listing.files:
            note = f"`{location}` holds both {SINGLE} and {INDEX}; as in transformers, {SINGLE} is read"
            return _Listing((SINGLE,), notes=(Problem(note),))
        return _all_there(listing, names, location)
    if SINGLE in names:
        return _Listing((SINGLE,))
    files = [
        name
        for name in names
        if name.endswith(".safetensors") and not name.startswith("consolidated") and name != "adapter_model.safetensors"
    ]
    if files:
        _check_numbers(files, location)
        return _Listing(tuple(files))
    if "adapter_config.json" in names or "adapter_model.safetensors" in names:
        hint = f"name it with its base: `{{path: BASE, adapter: {location}}}` under `models`"
        raise AdapterFound(f"`{location}` holds an adapter, not a whole model", hint=hint)
    if pickled and f"{_STEM}.bin" in names:
        return _Listing((f"{_STEM}.bin",), pickled=True)
    if pickled and f"{_STEM}.bin.index.json" in names:
        listing = _read_index(folder, location, f"{_STEM}.bin.index.json")
        return replace(_all_there(listing, names, location), pickled=True)
    if any(name.endswith(_PICKLES) for name in names):
        raise InputError(f"`{location}` holds pickled weights and no .safetensors file", hint=_CONVERT)
    raise InputError(f"`{location}` holds no .safetensors file", hint=f"{_KINDS}; {_CONVERT}")


def _all_there(listing: _Listing, names: Sequence[str], location: str) -> _Listing:
    missing = sorted(set(listing.files) - set(names))
    if missing:
        raise InputError(_missing(missing, len(listing.files), location))
    return listing


def _read_index(folder: Path, location: str, index: str) -> _Listing:
    """The files that the index names. Raises InputError where one has a name that leads out of the folder."""
    shown = os.path.join(location, index)
    weight_map = read_object(inside(folder, index), _MAX_INDEX_BYTES, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"`{shown}` has no `weight_map` from tensor names to file names", hint="download it again")
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if not is_plain_name(file)]
    if outside:
        hint = "an index may name files of its own folder only; do not use a checkpoint that tries otherwise"
        raise InputError(
            [Problem(f"`{shown}` names a file outside its folder: `{f[:200]}`", hint=hint) for f in outside]
        )
    return _Listing(tuple(files), weight_map)


def _check_numbers(files: Iterable[str], location: str) -> None:
    """Raises InputError where files named -00001-of-00003 and so on are not all there."""
    present = set(files)
    # Each set of shards once: to ask for all the others at each of a hundred thousand files would take days.
    for stem, digits in dict.fromkeys((m["stem"], m["count"]) for m in map(_NUMBERED.fullmatch, files) if m):
        width, count = len(digits), int(digits)
        if count > 100_000:
            hint = "download it again; no model has so many files"
            raise InputError(f"a file `{stem}-...` in `{location}` claims to be one of {count} shards", hint=hint)
        wanted = [f"{stem}-{i:0{width}d}-of-{digits}.safetensors" for i in range(1, count + 1)]
        missing = sorted(set(wanted) - present)
        if missing:
            raise InputError(_missing(missing, count, location))


def _missing(missing: Sequence[str], count: int, location: str) -> Problem:
    return Problem(
        f"`{location}` lacks {len(missing)} of its {count} shards: {_few(missing)}",
        hint="download the missing files into the folder; `hf download ID --local-dir FOLDER` goes on where it stopped",
    )


def _read(
    location: str, revision: str | None, folder: Path, listing: _Listing, shown: str, *, linked: bool = False
) -> Checkpoint:
    """Reads config and headers. `shown` names the folder in messages; `linked` allows a weight file to be a link, since
    the user named that file."""
    headers: list[Header] = []
    problems: list[Problem] = []
    for file in listing.files:
        try:
            path = folder / file if linked else inside(folder, file)
            headers.append(_header(path, os.path.join(shown, file), listing.pickled))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return _checkpoint(location, revision, folder, listing, headers)


def _checkpoint(
    location: str, revision: str | None, folder: Path, listing: _Listing, headers: Sequence[Header]
) -> Checkpoint:
    tensors, notes = _collect(location, listing, headers)
    if not tensors:
        raise InputError(f"`{location}` holds no tensors", hint="download it again")
    config = {}
    if os.path.lexists(folder / "config.json"):
        config = read_object(inside(folder, "config.json"), _MAX_CONFIG_BYTES)
    return Checkpoint(
        location=location,
        revision=revision,
        folder=folder,
        config=config,
        tensors=tensors,
        shards=tuple(header.shard for header in headers),
        metadata={key: value for header in reversed(headers) for key, value in header.metadata.items()},
        notes=(*listing.notes, *notes),
    )


def _header(path: Path, shown: str, pickled: bool) -> Header:
    if not pickled or path.suffix == ".safetensors":
        return read_header(path, shown)
    from mergekit_lite.checkpoint.pickled import read_pickled

    return read_pickled(path, shown)


def _collect(
    location: str, listing: _Listing, headers: Sequence[Header]
) -> tuple[dict[str, TensorMeta], list[Problem]]:
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
        raise InputError(f"`{location}` holds {len(twice)} tensors in two files each: {_few(twice)}", hint=hint)
    if listing.index is None:
        return tensors, []
    absent = [f"{name} ({file})" for name, file in listing.index.items() if name not in tensors]
    if absent:
        problem = f"{INDEX} of `{location}` promises {len(absent)} tensors that its shards lack: {_few(absent)}"
        raise InputError(problem, hint="index and shards belong to different versions: download all of them again")
    note = f"{unlisted} tensors in the shards of `{location}` are not in its index and take no part"
    return tensors, [Problem(note)] if unlisted else []


def _few(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    shown = ", ".join(name[:200] for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _siblings(path: Path, location: str) -> str | None:
    """What stands in the parent folder that `location` may have meant; None where that folder does not exist."""
    try:
        with os.scandir(path.parent) as entries:
            names = sorted(e.name for e in entries if e.name.endswith(".safetensors") or e.is_dir())
    except OSError:
        return None
    parent = os.path.dirname(location)
    near = did_you_mean(path.name, names)
    if near is not None:
        return f"did you mean `{os.path.join(parent, near)}`?"
    return f"`{parent or '.'}` holds {_few(names)}" if names and location else None
