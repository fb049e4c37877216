"""Orders of units that earlier runs have found, so that the next merge of the same models need not search again.

An entry is named by what was searched for and by the digests of the files that were looked at, so it holds wherever the
files lie and whatever else the recipe does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.plan.digest import ARITHMETIC
from mergekit_lite.plan.model import Alignment, Plan
from mergekit_lite.plan.order import walk
from mergekit_lite.run.remembered import cache_folder

if TYPE_CHECKING:
    from mergekit_lite.run.alignment import Solved

FOLDER = "permutations"
MOST = 64  # entries kept, those used last
MAX_BYTES = 1 << 28


def recall(plan: Plan, known: dict[str, str], form: Callable[[list[str]], Mapping[str, str]]) -> dict[str, list[Any]]:
    """What earlier runs have found for the alignments of `plan`, by name, as a journal holds it.

    `known` are digests of files by path; those that are missing are formed by `form` and added, but only where such a
    search was made before.
    """
    folder = _folder()
    recalled: dict[str, list[Any]] = {}
    for name, alignment in plan.alignments.items():
        if folder is None or not _searched(alignment) or not _any(folder, _search(alignment)):
            continue
        missing = [path for path in _files(alignment) if path not in known]
        if missing:
            known.update(form(missing))
        data = _load(folder / _entry(alignment, known))
        if data is not None and _sound(alignment, data):
            recalled[name] = [data]
    return recalled


def remember(plan: Plan, solved: Mapping[str, Solved], digests: Mapping[str, str]) -> None:
    """Keep what was found, for later runs. `digests` are those of all inputs, by path. Never raises: where nothing can
    be kept, nothing is."""
    folder = _folder()
    for name, found in solved.items():
        alignment = plan.alignments[name]
        if folder is not None and _searched(alignment):
            with contextlib.suppress(OSError):
                _store(folder / _entry(alignment, digests), found.as_json())


def _searched(alignment: Alignment) -> bool:
    """Whether an order is searched for in stored tensors or what is computed from them alone: one that a file tells is
    read from it, and one that depends on another is searched for anew."""
    return alignment.searched and not any(node.pool for node in walk(alignment.nodes))


def _any(folder: Path, search: str) -> bool:
    return folder.is_dir() and any(path.name.startswith(search) for path in folder.iterdir())


def _load(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        data = json.loads(path.read_bytes())
        os.utime(path)
        return data
    except (OSError, ValueError, RecursionError):
        return None


def _store(path: Path, found: Mapping[str, Any]) -> None:
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix="new.", dir=path.parent)
    try:
        with open(handle, "w", encoding="ascii") as file:
            json.dump(found, file, separators=(",", ":"))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    entries = sorted(path.parent.iterdir(), key=lambda entry: entry.stat().st_mtime)
    for old in entries[:-MOST]:
        old.unlink(missing_ok=True)


def _folder() -> Path | None:
    place = cache_folder()
    return None if place is None else place / FOLDER


def _search(alignment: Alignment) -> str:
    """What is searched for, as a name: the settings, the spaces, how each tensor is computed from those stored."""
    spaces = [space for space in alignment.spaces if space.kind in alignment.kinds]
    what = (ARITHMETIC, alignment.use, alignment.params, spaces, *alignment.layers)
    digest = hashlib.sha256(repr(what).encode())
    place: dict[int, int] = {}
    for node in walk(alignment.nodes):
        place[node.id] = len(place)
        stored = None if node.load is None else (node.load.name, node.load.dtype)
        method = None if node.method is None else (node.method.name, node.params, node.key, node.pool)
        digest.update(repr((stored, method, node.shape, [place[below.id] for below in node.inputs])).encode())
    tables = alignment.activations or alignment.models
    digest.update(repr([[(name, place[node.id]) for name, node in table.items()] for table in tables]).encode())
    return digest.hexdigest()[:32]


def _files(alignment: Alignment) -> list[str]:
    """The files that are looked at, in the order in which tensors name them, which tells whose is which."""
    return list(dict.fromkeys(node.load.file for node in walk(alignment.nodes) if node.load is not None))


def _entry(alignment: Alignment, digests: Mapping[str, str]) -> str:
    content = hashlib.sha256(repr([digests[path] for path in _files(alignment)]).encode()).hexdigest()[:32]
    return f"{_search(alignment)}-{content}.json"


def _sound(alignment: Alignment, data: Any) -> bool:
    """Whether the entry holds permutations of the spaces: anything may lie in a cache."""
    from mergekit_lite.align.apply import fault
    from mergekit_lite.run.alignment import Solved

    if alignment.layers:
        from mergekit_lite.run.experts import sound

        return sound(alignment, data)
    spaces = {space.name: space for space in alignment.spaces}
    try:
        solved = Solved.from_json(data)
        return len(solved.permutations) == len(alignment.labels) and not any(
            name not in spaces or fault(spaces[name], order)
            for orders in solved.permutations
            for name, order in orders.items()
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return False
