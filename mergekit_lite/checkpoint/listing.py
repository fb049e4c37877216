"""Which files of a folder make up its weights, by their names and by an index. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_lite.checkpoint.inside import inside, is_plain_name, read_object
from mergekit_lite.errors import InputError, Problem

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_INDEX_BYTES = 100_000_000
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PICKLED = "pytorch_model"
STEMS = ("diffusion_pytorch_model", "model")  # of the files in the folders of a pipeline
KINDS = "give an existing folder, a .safetensors file, or a Hub id such as `organisation/name`"
CONVERT = (
    "pickled weights can run code, so they are read only with `--allow-pickle`, and then as plain data; or load the "
    "model once with transformers, `from_pretrained(...)`, and save it with `save_pretrained(...)`"
)


class AdapterFound(InputError):
    """The location holds an adapter where a whole model is asked for."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Which files of a folder make up the checkpoint. `index` maps tensors to files; None: take every tensor. `pickled`
    tells that they may be what `torch.save` wrote."""

    files: tuple[str, ...]
    index: Mapping[str, str] | None = None
    notes: tuple[Problem, ...] = field(default=())
    pickled: bool = False


def list_folder(folder: Path, location: str, pickled: bool) -> Listing:
    """Chooses the weight files of a folder as transformers does, and any consistent set where it would find none."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read the folder `{location}`: {error.strerror}") from error
    return choose(folder, names, location, pickled)


def choose(folder: Path, names: Sequence[str], location: str, pickled: bool) -> Listing:
    """The weight files among `names`; an index is read from `folder`."""
    if INDEX in names:
        listing = _read_index(folder, location, INDEX)
        if SINGLE in names and SINGLE not in listing.files:
            note = f"`{location}` holds both {SINGLE} and {INDEX}; as in transformers, {SINGLE} is read"
            return Listing((SINGLE,), notes=(Problem(note),))
        return _all_there(listing, names, location)
    if SINGLE in names:
        return Listing((SINGLE,))
    files = [
        name
        for name in names
        if name.endswith(".safetensors") and not name.startswith("consolidated") and name != "adapter_model.safetensors"
    ]
    if files:
        _check_numbers(files, location)
        return Listing(tuple(files))
    if "adapter_config.json" in names or "adapter_model.safetensors" in names:
        hint = f"name it with its base: `{{path: BASE, adapter: {location}}}` under `models`"
        raise AdapterFound(f"`{location}` holds an adapter, not a whole model", hint=hint)
    if pickled and f"{PICKLED}.bin" in names:
        return Listing((f"{PICKLED}.bin",), pickled=True)
    if pickled and f"{PICKLED}.bin.index.json" in names:
        listing = _read_index(folder, location, f"{PICKLED}.bin.index.json")
        return replace(_all_there(listing, names, location), pickled=True)
    if any(name.endswith(PICKLES) for name in names):
        raise InputError(f"`{location}` holds pickled weights and no .safetensors file", hint=CONVERT)
    raise InputError(f"`{location}` holds no .safetensors file", hint=f"{KINDS}; {CONVERT}")


def choose_part(folder: Path, names: Sequence[str], shown: str, pickled: bool) -> tuple[str, Listing] | None:
    """The weight files of a component's folder, which libraries find by their names alone, and the name that an output
    gives them, without its ending; None where it holds none. An index is read from `folder`.

    Where only a variant is there, such as fp16, that is taken. Raises InputError where several are, or where the
    weights have other names or are pickled.
    """
    for stem in STEMS:
        variants = _variants(names, stem)
        if "" not in variants and len(variants) > 1:
            found = ", ".join(f"`{variant}`" for variant in sorted(variants))
            hint = f"keep one of them there, as {stem}.safetensors"
            raise InputError(f"`{shown}` holds several variants of its weights: {found}", hint=hint)
        if variants:
            file = variants.get("") or next(iter(variants.values()))
            if file.endswith(".safetensors"):
                return stem, Listing((file,))
            return stem, _all_there(_read_index(folder, shown, file), names, shown)
    for stem, written in ((PICKLED, "model"), (STEMS[0], STEMS[0])):
        if pickled and f"{stem}.bin" in names:
            return written, Listing((f"{stem}.bin",), pickled=True)
        if pickled and f"{stem}.bin.index.json" in names:
            listing = _read_index(folder, shown, f"{stem}.bin.index.json")
            return written, replace(_all_there(listing, names, shown), pickled=True)
    if any(name.endswith(".safetensors") for name in names):
        hint = f"libraries look for {STEMS[1]}.safetensors or {STEMS[0]}.safetensors there, or for their index"
        raise InputError(f"`{shown}` holds .safetensors files of other names", hint=hint)
    if any(name.endswith(PICKLES) for name in names):
        raise InputError(f"`{shown}` holds pickled weights and no .safetensors file", hint=CONVERT)
    return None


def _variants(names: Iterable[str], stem: str) -> dict[str, str]:
    """The file that holds the weights of each variant, or its index; the plain ones are the variant ``."""
    pattern = re.compile(
        rf"{stem}(\.(?P<file>\w+))?\.safetensors|{stem}\.safetensors\.index(\.(?P<index>\w+))?\.json", re.ASCII
    )
    found: dict[str, str] = {}
    for match in filter(None, map(pattern.fullmatch, names)):
        variant = match["file"] or match["index"] or ""
        if match[0].endswith(".safetensors") or variant not in found:
            found[variant] = match[0]
    return found


def _all_there(listing: Listing, names: Sequence[str], location: str) -> Listing:
    missing = sorted(set(listing.files) - set(names))
    if missing:
        raise InputError(_missing(missing, len(listing.files), location))
    return listing


def _read_index(folder: Path, location: str, index: str) -> Listing:
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
    return Listing(tuple(files), weight_map)


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
        f"`{location}` lacks {len(missing)} of its {count} shards: {few(missing)}",
        hint="download the missing files into the folder; `hf download ID --local-dir FOLDER` goes on where it stopped",
    )


def few(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    shown = ", ".join(name[:200] for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
