"""How an unfinished folder becomes the finished one: in one step where the file system renames folders, file by file
with the lock last where it does not. A folder with a lock is whole; one without is not."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mergekit_lite.errors import StoppedError
from mergekit_lite.limits import hint_for
from mergekit_lite.plan.lock import NAME as LOCK
from mergekit_lite.plan.model import Plan
from mergekit_lite.run.journal import NAME as JOURNAL
from mergekit_lite.run.sink import partial

MOVING = ".merge-moving"  # in a finished folder that is filled file by file; holds the plan's digest
# What file systems say that rename no folders; the name is not taken then, and the folder is there.
_NO_RENAME = (errno.EPERM, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES, errno.EISDIR)


def publish(folder: Path, to: Path, plan: str, last: bool) -> None:
    """Give `folder`, whose files are whole and safe, the name `to`, which is free or an empty folder; `plan` is the
    plan's digest, and `last` says that no other output follows. The journal goes last. Raises StoppedError."""
    try:
        try:
            os.rename(folder, to)
        except OSError as fault:
            if fault.errno not in _NO_RENAME:
                raise
            _move(folder, to, plan)
    except OSError as fault:
        message = f"cannot rename `{folder}` to `{to}`: {fault.strerror}"
        if (to / MOVING).exists():
            raise StoppedError(message, hint=f"{hint_for(fault)}; then `--resume` goes on") from fault
        hint = f"the merged checkpoint is whole in `{folder}`: move it where you want it"
        raise StoppedError(message, hint=hint) from fault
    try:
        # Only now: a crash before the rename leaves a run that can be resumed.
        (to / JOURNAL).unlink(missing_ok=True)
        fsync_folder(to)
        fsync_folder(to.resolve().parent)
    except OSError as fault:
        hint = hint_for(fault)
        if last:
            hint += f"; `{to}` is whole, but the system has not said that it is safe from a power cut"
        raise StoppedError(f"cannot flush `{to}`: {fault.strerror}", hint=hint) from fault


def take_back(plan: Plan) -> None:
    """Undo what a run of `plan` had published when it was stopped before its last output was whole. Raises StoppedError
    where files cannot be moved back; leaves everything that this plan did not write. For the holder of the journal."""
    for output in plan.outputs:
        folder, to = partial(output.to), Path(output.to)
        try:
            if _is_moving(to, plan.digest):
                _move_back(folder, to)
            elif not any(_files(folder)) and f"\n  plan: {plan.digest}\n" in _text(to / LOCK):
                (to / MOVING).write_text(plan.digest, encoding="ascii")
                folder.mkdir(exist_ok=True)
                _move_back(folder, to)
        except OSError as fault:
            raise StoppedError(f"cannot move `{to}` back: {fault.strerror}", hint=hint_for(fault)) from fault


def fsync_folder(folder: Path) -> None:
    """Return when the names in `folder` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as fault:
        if fault.errno != errno.EINVAL:  # a file system that flushes no folders
            raise
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)


def fsync_folders(folder: Path) -> None:
    """Return when the names in `folder`, and in the folders below it, are on the disk."""
    for home in [*_below(folder), folder]:
        fsync_folder(home)


def _below(folder: Path) -> list[Path]:
    """The folders below `folder`, the innermost first."""
    return sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True)


def _move(folder: Path, to: Path, plan: str) -> None:
    """As a rename, in several steps. Where one fails what was moved is moved back, as far as that is possible."""
    to.mkdir(exist_ok=True)
    try:
        with (to / MOVING).open("w", encoding="ascii") as file:
            file.write(plan)
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(to)
        for name in _files(folder):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            if name == Path(LOCK):
                fsync_folders(to)  # nothing that the lock speaks of may come after it
            os.rename(folder / name, to / name)
        fsync_folder(to)
        (to / MOVING).unlink()
    except OSError:
        with contextlib.suppress(OSError):
            _move_back(folder, to)
        raise
    with contextlib.suppress(OSError):  # the output is whole
        (folder / JOURNAL).unlink(missing_ok=True)
        for inner in (*_below(folder), folder):
            inner.rmdir()


def _is_moving(to: Path, plan: str) -> bool:
    """Whether `to` is filled by a run of this plan, or has just been made to be: the digest may not be whole then."""
    if not os.path.lexists(to / MOVING):
        return False
    told = _text(to / MOVING)
    return told == plan or (plan.startswith(told) and os.listdir(to) == [MOVING])


def _move_back(folder: Path, to: Path) -> None:
    names = [name for name in _files(to) if name.name != MOVING]
    for name in reversed(names):  # the lock first
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(to / name, folder / name)
    for inner in _below(to):
        inner.rmdir()
    (to / MOVING).unlink(missing_ok=True)
    to.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, relative to it, without the journal, the lock last."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != JOURNAL]
    yield from sorted(found, key=lambda name: (name == Path(LOCK), name))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
