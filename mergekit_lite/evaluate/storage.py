"""The file of a study: opened where it is one, locked, and what goes wrong with it in words."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from mergekit_lite.errors import StoppedError
from mergekit_lite.recipe.model import Scoring

if TYPE_CHECKING:
    import optuna

NAME = "merge"
WARM_UP = 5  # so many trials are seen to the end before one is given up early
PATIENCE = 60  # seconds for which another process may hold the file
_FOREIGN = "choose another folder with `--out`, or move this file away to start anew"


def open_study(path: Path | None, scores: Sequence[Scoring]) -> optuna.Study:
    """The study in the file `path`, made where there is none; None: in memory. Raises StoppedError where the file is no
    study, or cannot be read and written."""
    if path is None:
        return _open(None, scores)
    if not _check(path):
        # Tables that a full disk or a kill has left half made would look like those of another program.
        new = path.with_name(path.name + ".new")
        new.unlink(missing_ok=True)
        _open(new, scores)
        new.replace(path)
    return _open(path, scores)


def _open(path: Path | None, scores: Sequence[Scoring]) -> optuna.Study:
    import optuna
    from sqlalchemy.pool import NullPool

    storage = None
    if path is not None:
        # Not as an address: its signs may stand in the path, and releases of SQLAlchemy read them in different ways.
        where = os.path.abspath(path)
        how = {
            "creator": lambda: sqlite3.connect(where, timeout=PATIENCE, check_same_thread=False),
            "poolclass": NullPool,  # no connection outlives its use
        }
        storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs=how)
    return optuna.create_study(
        storage=storage,
        study_name=NAME,
        load_if_exists=True,
        directions=["maximize" if score.goal == "max" else "minimize" for score in scores],
        pruner=optuna.pruners.PercentilePruner(50.0, n_startup_trials=WARM_UP),
    )


@contextlib.contextmanager
def told(path: Path | None) -> Iterator[None]:
    """Have what goes wrong with the file raise StoppedError."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.OptunaError, SQLAlchemyError, sqlite3.Error) as fault:
        why: BaseException = fault
        while why.__cause__ is not None and not isinstance(why, sqlite3.Error):
            why = why.__cause__
        reason = (str(why).splitlines() or [type(why).__name__])[0]
        hint = "make room on the disk, see that the folder may be written to; the same command goes on with the study"
        if "malformed" in reason or "not a database" in reason:
            hint = _FOREIGN
        raise StoppedError(f"`{path}` cannot be used as a study: {reason}", hint=hint) from fault


@contextlib.contextmanager
def alone(path: Path | None) -> Iterator[bool]:
    """While this is held no other process opens the study or takes a trial of it. False: nobody can tell, as the file
    system has no locks."""
    if path is None:
        yield True
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        held = False
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
            held = True
        yield held
    finally:
        os.close(folder)


def _check(path: Path) -> bool:
    """Whether there is a study. Raises StoppedError where the file is another program's: nothing is to be written into
    that."""
    try:
        if not path.exists():
            return False
        regular, size = path.is_file(), path.stat().st_size
    except OSError as fault:
        raise StoppedError(f"cannot read `{path}`: {fault.strerror}", hint="choose another folder") from fault
    if not regular:
        raise StoppedError(f"`{path}` is not a file", hint=_FOREIGN)
    if not size:
        return False
    address = f"file:{quote(os.path.abspath(path))}?mode=rw"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=PATIENCE)) as file:
        tables = {name for (name,) in file.execute("select name from sqlite_master where type = 'table'")}
    if not {"studies", "trials", "version_info"} <= tables:
        raise StoppedError(f"`{path}` is the file of another program", hint=_FOREIGN)
    return True
