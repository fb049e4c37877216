"""Digests of inputs that an earlier run has formed, so that the next merge of the same files does not read them twice.

A file is taken for the same one if device, inode, size, mtime and ctime are the same: no program can write to a file,
or set its mtime back, and leave its ctime as it was. Clocks of file systems are coarse, so that a write right after the
digest could leave no trace; therefore a digest is remembered only of files that had been at rest for a while when it
was begun. A run never holds a lock against what is remembered; `merge plan --check`, which reads no weights if it
can, does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mergekit_lite import sandbox

SWITCH = "MERGEKIT_LITE_CACHE"  # an environment variable: 0 leaves the cache alone
FILE = "digests.json"
FORMAT = 1
REST = 2_000_000_000  # nanoseconds
MOST = 4096  # files remembered, those of the latest runs
MAX_BYTES = 1 << 21  # of a cache of so many files; a larger one is none of this program's

_KEY = re.compile(r"\d+(:-?\d+){4}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Remembered:
    """What is known of `paths` before they are read. `known` gives digests, in hexadecimal digits, by path. Never
    raises: where the cache cannot be read or written it is empty."""

    def __init__(self, paths: Iterable[str]):
        folder = cache_folder()
        self._place = None if folder is None else folder / FILE
        self._seen: dict[str, str] = {}
        self._young: set[str] = set()
        self.known: dict[str, str] = {}
        if self._place is None:
            return
        began = time.time_ns()
        for path in paths:
            with contextlib.suppress(OSError):
                found = os.stat(path)
                self._seen[path] = _key(found)
                if max(found.st_mtime_ns, found.st_ctime_ns) > began - REST:
                    self._young.add(path)
        digests = _load(self._place)
        self.known = {path: digests[key] for path, key in self._seen.items() if key in digests}

    def keep(self, digests: Mapping[str, str]) -> None:
        """Remember the digests of files that were formed since, by path, where the files are what they were."""
        fresh: dict[str, str] = {}
        for path, key in self._seen.items():
            with contextlib.suppress(OSError):
                if path in digests and path not in self._young and _key(os.stat(path)) == key:
                    fresh[key] = digests[path]
        if self._place is not None and fresh.items() - self._known_by_key().items():
            with contextlib.suppress(OSError):
                _store(self._place, fresh)

    def _known_by_key(self) -> dict[str, str]:
        return {self._seen[path]: digest for path, digest in self.known.items()}


def _key(found: os.stat_result) -> str:
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def cache_folder() -> Path | None:
    """The folder of what this program keeps between runs, which may not exist yet; None where it is to keep nothing."""
    if os.environ.get(SWITCH) == "0" or sandbox.current() is not None:
        return None
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.expanduser("~/.cache")
    return Path(cache) / "mergekit_lite" if os.path.isabs(cache) else None


def _load(place: Path) -> dict[str, str]:
    """What the cache holds, the oldest first; nothing where it is damaged or somebody else's."""
    try:
        with open(os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            shared = found.st_uid != os.geteuid() or found.st_mode & 0o022
            if shared or not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
                return {}
            cache = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    digests = cache.get("digests") if isinstance(cache, dict) and cache.get("format") == FORMAT else None
    if not isinstance(digests, dict):
        return {}
    sound = all(isinstance(d, str) and _DIGEST.fullmatch(d) and _KEY.fullmatch(key) for key, d in digests.items())
    return digests if sound else {}


def _store(place: Path, fresh: Mapping[str, str]) -> None:
    """Add to the cache, in one step: who reads at the same time finds it as it was or as it is now. Who adds waits for
    the others, so that nothing is lost."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(place.parent):
        digests = {key: digest for key, digest in _load(place).items() if key not in fresh} | dict(fresh)
        kept = dict(list(digests.items())[-MOST:])
        handle, name = tempfile.mkstemp(prefix="digests.", dir=place.parent)
        try:
            with open(handle, "w", encoding="ascii") as file:
                json.dump({"format": FORMAT, "digests": kept}, file, separators=(",", ":"))
            os.replace(name, place)
        except BaseException:
            os.unlink(name)
            raise


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; where file systems have none, what another process adds meanwhile may be lost, which
    costs that a file is digested again."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
