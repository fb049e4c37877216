"""Who is at work in a study's folder: processes, told from those that are no more, and the places they work in."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.errors import StoppedError
from mergekit_lite.limits import hint_for
from mergekit_lite.run.journal import boot

OWNER = "owner.json"


def me() -> dict[str, Any]:
    """This process, told from every other on this machine."""
    return {"host": socket.gethostname(), "boot": boot(), "pid": os.getpid(), "began": _began(os.getpid())}


def is_gone(by: Mapping[str, Any]) -> bool:
    """Whether a process is no more, as far as can be seen from here."""
    if by["host"] != socket.gethostname():
        return False
    return bool(by["boot"] != boot() or by["began"] != _began(by["pid"]))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises StoppedError where the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise StoppedError(f"cannot make `{folder}`: {fault.strerror}", hint=hint_for(fault)) from fault


def make_place(folder: Path) -> Path:
    """A place of this process's own below `folder`, where others may have theirs. Those of processes on this machine
    that are no more are removed: a trial is as large as a model. Raises StoppedError where the disk refuses."""
    for other in folder.glob(f"*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            if is_gone(json.loads(other.read_text(encoding="utf-8"))):
                shutil.rmtree(other.parent, ignore_errors=True)
    place = folder / secrets.token_hex(4)
    make_folder(place)
    try:
        (place / OWNER).write_text(json.dumps(me()), encoding="utf-8")
    except OSError as fault:
        shutil.rmtree(place, ignore_errors=True)
        raise StoppedError(f"cannot write into `{place}`: {fault.strerror}", hint=hint_for(fault)) from fault
    return place


def remove_place(place: Path) -> None:
    """Remove what `make_place` made, and the folder above it where nobody else is at work."""
    shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):
        place.parent.rmdir()


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's own count; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
