"""Whether an output of ours still is what its lock says: the size and the BLAKE3 digest of every shard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.inside import inside, read_bytes
from mergekit_lite.errors import InputError, MergeError
from mergekit_lite.plan.lock import NAME
from mergekit_lite.recipe.read import parse, read_file
from mergekit_lite.recipe.source import MAX_BYTES
from mergekit_lite.report.check import Check, count, fail, failures, few, ok, warn
from mergekit_lite.run.digest import file_digests

_AGAIN = "the files are damaged or were changed: run the recipe again, or copy the output again from where it is whole"


def check_lock(folder: Path, threads: int) -> Iterator[Check]:
    """The checks of a folder that holds a recipe.lock.yaml; none for one that does not."""
    path = folder / NAME
    if not os.path.lexists(path):
        return
    try:
        read_bytes(inside(folder, NAME), MAX_BYTES)  # refuses a pipe, a device and a link out of the folder
        recipe, problems = parse(read_file(path), str(path))
    except MergeError as error:
        yield from failures("lock", error.problems)
        return
    if recipe is None or problems:
        yield from failures("lock", problems)
        return
    outputs = [_shards(output) for output in (recipe.lock or {}).get("outputs") or []]
    if not outputs:
        yield warn("lock", f"{NAME} does not say what was written", "it is a recipe, not the lock of a finished run")
        return
    # Outputs of one recipe have one lock, and a folder may have been renamed: the output that fits best is meant.
    verdicts = [_compare(folder, shards, threads) for shards in outputs]
    yield from min(verdicts, key=lambda checks: sum(check.verdict == "fail" for check in checks))


def _shards(output: Any) -> dict[str, tuple[object, str]]:
    """What a lock says of an output's files, a list under `shards` or by itself: bytes and BLAKE3 digest by name."""
    files = output["shards"] if isinstance(output, Mapping) else output
    return {shard["file"]: (shard.get("bytes"), shard["blake3"]) for shard in files}


def _compare(folder: Path, shards: Mapping[str, tuple[object, str]], threads: int) -> list[Check]:
    made: list[Check] = []
    present = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    missing = sorted(set(shards) - set(present))
    if missing:
        made.append(fail("lock", f"files of the output are missing: {few(missing)}", _AGAIN))
    resized = [f for f, (nbytes, _) in shards.items() if f in present and nbytes not in (None, present[f])]
    if resized:
        made.append(fail("lock", f"other sizes than the lock says: {few(resized)}", _AGAIN))
    rest = {file: blake3 for file, (_, blake3) in shards.items() if file in present and file not in resized}
    try:
        digests = file_digests([folder / file for file in rest], threads)
    except InputError as error:
        return [*made, *failures("lock", error.problems)]
    changed = [file for file, blake3 in rest.items() if digests[str(folder / file)] != blake3]
    if changed:
        made.append(fail("lock", f"another BLAKE3 digest than the lock says: {few(changed)}", _AGAIN))
    if not made:
        made.append(ok("lock", f"size and BLAKE3 digest of {count(len(shards), 'shard')} are as the lock says"))
    strange = sorted(name for name in present if name.endswith(".safetensors") and name not in shards)
    if strange:
        made.append(warn("lock", f"weights that the run did not write: {few(strange)}", "move them out of the folder"))
    return made
