"""Files of an untrusted checkpoint folder: each must lie inside the folder. No torch."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from mergekit_lite.errors import InputError

# huggingface_hub marks its cache-wide store of deduplicated files with this file.
_SHARED_BLOBS_MARKER = ".huggingface-shared-blobs"
_AGAIN = "download the file again"


def is_plain_name(name: str) -> bool:
    """True where `name` is a file name without a folder: no separator of any system, no `..`, no drive, no NUL."""
    return bool(name) and name not in {".", ".."} and not any(c in name for c in "/\\:\0")


def inside(folder: Path, name: str) -> Path:
    """`folder / name` where it, links followed, stays inside `folder`.

    `name` may hold `/` if the caller wrote it; a name from a file is checked with `is_plain_name` first. In a snapshot
    of the Hub's cache the files are links to the cache's blobs, which is fine. Raises InputError for a link that leads
    elsewhere.
    """
    path = folder / name
    try:
        real = path.resolve()
    except RuntimeError as error:  # what Python before 3.13 makes of a circle of links
        raise InputError(
            f"`{path}` is a link that leads back to itself", hint="put the file itself in its place"
        ) from error
    if not any(real.is_relative_to(home) for home in _homes(folder.resolve())):
        raise InputError(
            f"`{path}` is a link to `{real}`, outside its folder",
            hint="put the file itself into the folder; a checkpoint may not point at other files of this machine",
        )
    return path


def _homes(folder: Path) -> list[Path]:
    """The folders in which the files of `folder` may really lie."""
    homes = [folder]
    repo = folder.parent.parent
    if folder.parent.name == "snapshots" and repo.name.startswith("models--"):
        homes.append(repo / "blobs")
        shared = repo.parent / "blobs"
        if (shared / _SHARED_BLOBS_MARKER).is_file():
            homes.append(shared)
    return homes


def at_once(path: str, flags: int) -> int:
    """An opener for `open` that does not wait, as it would at a pipe until there is a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The bytes of the regular file at `path`, `limit` at most. Raises InputError for a larger one, a pipe, a device, a
    folder and whatever cannot be read."""
    hint = "put the right file there, or download it again"
    try:
        with open(path, "rb", buffering=0, opener=at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"`{path}` is not a regular file", hint=hint)
            parts = [b""]
            left = limit + 1
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}", hint=hint) from error
    if not left:
        raise InputError(f"`{path}` has more than {limit} bytes, too many for a file of its kind", hint=hint)
    return b"".join(parts)


def read_object(path: Path, limit: int, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in the file at `path`, which may have `limit` bytes at most. Raises InputError as `read_bytes`
    and `parse_object` do."""
    return parse_object(read_bytes(path, limit), path, unique=unique)


def read_list(path: Path, limit: int) -> list[Any]:
    """The JSON list in the file at `path`, otherwise as `read_object`."""
    made = _parsed(read_bytes(path, limit), path, unique=True)
    if not isinstance(made, list):
        raise InputError(f"`{path}` is not a JSON list", hint=_AGAIN)
    return made


def parse_object(text: bytes, path: Path, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object that `text`, read from `path`, writes.

    NaN and Infinity are accepted, since transformers writes them. A key that stands twice in an object has its last
    value, as in transformers, or with `unique` is an error. Raises InputError for anything else than an object.
    """
    made = _parsed(text, path, unique)
    if not isinstance(made, dict):
        raise InputError(f"`{path}` is not a JSON object", hint=_AGAIN)
    return made


def _parsed(text: bytes, path: Path, unique: bool) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) < len(found):
            twice = Counter(key for key, _ in found).most_common(1)[0][0]
            raise InputError(
                f"`{twice[:200]}` stands twice in `{path}`, and two readers may take two values", hint=_AGAIN
            )
        return made

    try:
        made = json.loads(text.decode("utf-8-sig"), object_pairs_hook=pairs if unique else None)
    except UnicodeDecodeError as error:
        raise InputError(f"`{path}` is not UTF-8 at byte {error.start}", hint=_AGAIN) from error
    except RecursionError as error:
        raise InputError(f"`{path}` is nested too deeply", hint=_AGAIN) from error
    except json.JSONDecodeError as error:
        message = f"`{path}` is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise InputError(message, hint=_AGAIN) from error
    except ValueError as error:  # an integer of more digits than Python turns into a number
        raise InputError(f"`{path}` holds a number that is too long", hint=_AGAIN) from error
    if not _is_shallow(made):
        raise InputError(f"`{path}` is nested too deeply", hint=_AGAIN)
    return made


def _is_shallow(value: Any, limit: int = 64) -> bool:
    """True where objects and lists are nested `limit` deep at most, so that what walks or writes them may recurse."""
    level = [value]
    for _ in range(limit):
        level = [
            item
            for each in level
            if isinstance(each, (dict, list))
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return True
    return False
