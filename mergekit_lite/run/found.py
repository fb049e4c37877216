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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite.plan.build import ARITHMETIC
from mergekit_lite.plan.model import Alignment, Plan
from mergekit_lite.plan.order import walk
from mergekit_lite.run.remembered import cache_folder

FOLDER = "permutations"
MOST = 64  # entries kept, those used last
MAX_BYTES = 1 << 28


def searched(alignment: Alignment) -> bool:
    """Whether an order is searched for in stored tensors or what is computed from them alone: one that a file tells is
    read from it, and one that depends on another is searched for anew."""
    return alignment.use != "known" and not any(node.pool for node in walk(alignment.nodes))


def files_of(alignment: Alignment) -> list[str]:
    """The files that are looked at, each once."""
    return sorted({node.load.file for node in walk(alignment.nodes) if node.load is not None})


def look(plan: Plan, name: str, digests: Mapping[str, str]) -> list[Any] | None:
    """What an earlier run has found for this alignment, as a journal holds it; None where there is nothing. `digests`
    are those of `files_of`, by path."""
    folder = _folder()
    if folder is None:
        return None
    path = folder / _entry(plan.alignments[name], digests)
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        data = json.loads(path.read_bytes())
        os.utime(path)
    except (OSError, ValueError, RecursionError):
        return None
    return [data] if _sound(plan.alignments[name], data) else None


def may_hold(plan: Plan, name: str) -> bool:
    """Whether a look is worth the digests of the files: something was found for such a search before."""
    folder = _folder()
    prefix = _search(plan.alignments[name])
    return folder is not None and folder.is_dir() and any(p.name.startswith(prefix) for p in folder.iterdir())


def keep(plan: Plan, name: str, found: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Keep what was found, for later runs. Never raises: where nothing can be kept, nothing is."""
    folder = _folder()
    if folder is None:
        return
    path = folder / _entry(plan.alignments[name], digests)
    with contextlib.suppress(OSError):
        if path.exists():
            return
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix="new.", dir=folder)
        try:
            with open(handle, "w", encoding="ascii") as file:
                json.dump(found, file, separators=(",", ":"))
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        entries = sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime)
        for old in entries[:-MOST]:
            old.unlink(missing_ok=True)


def _folder() -> Path | None:
    place = cache_folder()
    return None if place is None else place / FOLDER


def _search(alignment: Alignment) -> str:
    """What is searched for, as a name: the settings, the spaces, how each tensor is computed from those stored."""
    spaces = [space for space in alignment.spaces if space.kind in alignment.kinds]
    digest = hashlib.sha256(repr((ARITHMETIC, alignment.use, alignment.params, spaces)).encode())
    place: dict[int, int] = {}
    for node in walk(alignment.nodes):
        place[node.id] = len(place)
        stored = None if node.load is None else (node.load.name, node.load.dtype)
        method = None if node.method is None else (node.method.name, node.params, node.key, node.pool)
        digest.update(repr((stored, method, node.shape, [place[below.id] for below in node.inputs])).encode())
    tables = alignment.activations or alignment.models
    digest.update(repr([[(name, place[node.id]) for name, node in table.items()] for table in tables]).encode())
    return digest.hexdigest()[:32]


def _entry(alignment: Alignment, digests: Mapping[str, str]) -> str:
    # Which file is whose is told by the order in which the tensors name them.
    order: Sequence[str] = list(
        dict.fromkeys(node.load.file for node in walk(alignment.nodes) if node.load is not None)
    )
    content = hashlib.sha256(repr([digests[path] for path in order]).encode()).hexdigest()[:32]
    return f"{_search(alignment)}-{content}.json"


def _sound(alignment: Alignment, data: Any) -> bool:
    """Whether the entry holds permutations of the spaces: anything may lie in a cache."""
    from mergekit_lite.align.apply import fault
    from mergekit_lite.run.alignment import Solved

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
