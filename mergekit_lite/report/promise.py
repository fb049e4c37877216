"""What the lock in a folder says of an output of ours, and for `merge doctor` whether its shards still are that."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.inside import inside, is_plain_name, read_bytes
from mergekit_lite.errors import InputError, MergeError, RecipeError
from mergekit_lite.plan.lock import NAME
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse, read_file
from mergekit_lite.recipe.source import MAX_BYTES
from mergekit_lite.report.check import Check, count, fail, failures, few, ok, warn
from mergekit_lite.run.digest import file_digests

AGAIN = "the files are damaged or were changed: run the recipe again, or copy the output again from where it is whole"
Promised = Mapping[str, tuple[object, str]]  # bytes and BLAKE3 digest by file name


@dataclass(frozen=True, slots=True)
class Promise:
    """What a lock says of one output. `files` are those beside the shards, None where an earlier version, which said
    nothing of them, wrote the lock."""

    to: str
    shards: Promised
    files: Promised | None

    @property
    def names(self) -> list[str]:
        return [*self.shards, *(self.files or ())]


def read_promises(folder: Path) -> tuple[Recipe, list[Promise]]:
    """The recipe in the lock of a folder, and what the lock says of each output; no outputs where it is a recipe and no
    more. Raises InputError where the file cannot be read and RecipeError where it is no lock."""
    path = inside(folder, NAME)
    read_bytes(path, MAX_BYTES)  # refuses a pipe and a device
    recipe, problems = parse(read_file(path), str(path))
    if recipe is None or problems:
        raise RecipeError(problems)
    return recipe, [_promise(output) for output in (recipe.lock or {}).get("outputs") or []]


def is_below(name: str) -> bool:
    """Whether a name that a lock gives is one of a file in the folder, or in a folder below it."""
    return len(name) <= 1000 and all(map(is_plain_name, name.split("/")))


def check_lock(folder: Path, threads: int) -> Iterator[Check]:
    """The checks of a folder that holds a recipe.lock.yaml; none for one that does not."""
    if not os.path.lexists(folder / NAME):
        return
    try:
        _, promises = read_promises(folder)
    except MergeError as error:
        yield from failures("lock", error.problems)
        return
    if not promises:
        yield warn("lock", f"{NAME} does not say what was written", "it is a recipe, not the lock of a finished run")
        return
    # Outputs of one recipe have one lock, and a folder may have been renamed: the output that fits best is meant.
    verdicts = [_compare(folder, promise.shards, threads) for promise in promises]
    yield from min(verdicts, key=lambda checks: sum(check.verdict == "fail" for check in checks))


def _promise(output: Any) -> Promise:
    """What a lock says of an output: a list of shards under `shards` or by itself, `files` beside them."""
    if not isinstance(output, Mapping):
        return Promise("", _listed(output), None)
    files = output.get("files")
    return Promise(str(output.get("to", "")), _listed(output["shards"]), None if files is None else _listed(files))


def _listed(files: Any) -> Promised:
    return {file["file"]: (file.get("bytes"), file["blake3"]) for file in files}


def _compare(folder: Path, shards: Promised, threads: int) -> list[Check]:
    made: list[Check] = []
    homes = {"", *(name.rpartition("/")[0] for name in shards if is_below(name))}
    present = {
        f"{home}/{entry.name}".lstrip("/"): entry.stat().st_size
        for home in homes
        if (folder / home).is_dir()
        for entry in os.scandir(inside(folder, home) if home else folder)
        if entry.is_file()
    }
    missing = sorted(set(shards) - set(present))
    if missing:
        made.append(fail("lock", f"files of the output are missing: {few(missing)}", AGAIN))
    resized = [f for f, (nbytes, _) in shards.items() if f in present and nbytes not in (None, present[f])]
    if resized:
        made.append(fail("lock", f"other sizes than the lock says: {few(resized)}", AGAIN))
    rest = {file: blake3 for file, (_, blake3) in shards.items() if file in present and file not in resized}
    try:
        digests = file_digests([folder / file for file in rest], threads)
    except InputError as error:
        return [*made, *failures("lock", error.problems)]
    changed = [file for file, blake3 in rest.items() if digests[str(folder / file)] != blake3]
    if changed:
        made.append(fail("lock", f"another BLAKE3 digest than the lock says: {few(changed)}", AGAIN))
    if not made:
        made.append(ok("lock", f"size and BLAKE3 digest of {count(len(shards), 'shard')} are as the lock says"))
    strange = sorted(name for name in present if name.endswith(".safetensors") and name not in shards)
    if strange:
        made.append(warn("lock", f"weights that the run did not write: {few(strange)}", "move them out of the folder"))
    return made
