"""A folder of ours after one read of its files: what is there, digests, headers, numbers that are not finite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_lite.checkpoint.header import Header, read_header
from mergekit_lite.checkpoint.inside import inside, read_list, read_object
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.errors import InputError, Problem
from mergekit_lite.family.family import family_of
from mergekit_lite.report.reread import Advance, Seen, reread

LIMIT = 100_000_000  # bytes of a JSON file that are read at most


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is not as it should be: in which file and, where it lies in one, in which tensor."""

    file: str
    message: str
    tensor: str | None = None
    hint: str | None = None

    def as_json(self) -> dict[str, object]:
        return {"file": self.file, "tensor": self.tensor, "message": self.message, "hint": self.hint}


@dataclass
class Look:
    """What is known of a folder after one read of its files. `faults` holds those of single files, by name; a name
    without `seen` could not be read or is not there."""

    folder: Path
    present: set[str]
    headers: dict[str, Header] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)

    def add(self, file: str, problems: Sequence[Problem]) -> None:
        self.faults.setdefault(file, []).extend(Fault(file, p.message, None, p.hint) for p in problems)


def read_folder(
    folder: Path, names: Sequence[str], all_json: bool, threads: int, start: Callable[[int], Advance]
) -> Look:
    """Read the files of these names, relative to the folder, as far as they are there, and with `all_json` those that
    end so. `start` is called with their bytes and gives what hears of them."""
    places = {"", *(name.rpartition("/")[0] for name in names)}
    look = Look(folder, {name for place in places for name in _listed(folder, place)})
    if all_json:
        names = [*names, *(n for n in sorted(look.present) if n not in names and n.endswith(".json"))]
    paths: dict[str, Path] = {}
    for name in names:
        if name not in look.present:
            continue
        try:
            paths[name] = inside(folder, name)
            if name.endswith(".safetensors"):
                look.headers[name] = read_header(paths[name], name)
            elif name == "modules.json":
                read_list(paths[name], LIMIT)
            elif name.endswith(".json"):
                read_object(paths[name], LIMIT)
        except InputError as error:
            look.add(name, error.problems)
    tied = {name for pair in tied_pairs(look, look.headers) for name in pair}
    total = sum(path.stat().st_size for path in paths.values() if path.is_file())
    advance, each = start(total), max(1, threads // max(1, sum(name in look.headers for name in paths)))

    def read(name: str) -> Seen | InputError:
        try:
            return reread(paths[name], _tensors(look, name), tied, each, advance)
        except InputError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        for name, seen in zip(paths, pool.map(read, paths), strict=True):
            if isinstance(seen, InputError):
                look.add(name, seen.problems)
            else:
                look.seen[name] = seen
    return look


def _listed(folder: Path, place: str) -> Iterator[str]:
    """The files in a folder below `folder`, links among them, relative to it."""
    if (folder / place).is_dir():
        for entry in sorted(os.scandir(folder / place), key=lambda entry: entry.name):
            if entry.is_symlink() or not entry.is_dir():
                yield f"{place}/{entry.name}" if place else entry.name


def _tensors(look: Look, name: str) -> Sequence[TensorMeta]:
    return look.headers[name].tensors if name in look.headers else ()


def tied_pairs(look: Look, shards: Mapping[str, Header]) -> list[tuple[str, str]]:
    """The tied names of which both are stored."""
    names = {meta.name for header in shards.values() for meta in header.tensors}
    try:
        config = read_object(inside(look.folder, "config.json"), LIMIT) if "config.json" in look.present else {}
    except InputError:
        return []
    metas = {meta.name: meta for header in shards.values() for meta in header.tensors}
    return [pair for pair in family_of(config, metas).tied if names.issuperset(pair)]
