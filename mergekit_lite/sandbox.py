"""`--sandbox DIR`: a command on files from strangers reads and writes inside DIR only, and uses no network.

Two walls. The first is ours: every location that a recipe or an option names is resolved, links, `..` and `~` followed,
and refused where it lies outside; all of them come together, before anything is opened (`Sandbox.refusal`, asked by
plan/confine.py and the commands). The second is Python's: an audit hook that sees whatever Python code opens, moves,
connects to or starts, and raises where that leaves DIR. It is there for what the first one forgot, and for a link that
is exchanged after the first has looked.

Reading is also allowed where Python and its packages lie, of code on Python's path, and of a few files of the system;
writing to /dev/null. What no audit hook sees: `stat`, and what native code does by itself. A hard link inside DIR is a
file inside DIR. Against native code that has been taken over, use a container as well.
"""

from __future__ import annotations

import contextlib
import os
import site
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.errors import InputError, MergeError, Problem, StoppedError, UsageError

# Files of the system that Python's library and torch read: the machine's memory, cores, time zone, libraries.
_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/bin", "/sbin", "/sys", "/System/Library", "/opt/homebrew"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/filesystems", "/proc/sys/kernel"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
    *("/etc/localtime", "/etc/ld.so.cache", "/etc/os-release", "/etc/mime.types", "/etc/nsswitch.conf"),
)
_OWN_PROCESS = ("maps", "smaps", "status", "stat", "statm", "cgroup", "mountinfo", "mounts", "cmdline")
_SOCKETS = ("connect", "bind", "sendto", "sendmsg", "getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo",
            "sethostname")  # fmt: skip
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
             "os.kill", "os.killpg", "os.startfile", "pty.spawn")  # fmt: skip
_WRITABLE = ("/dev/null",)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A folder, links followed, that nothing may leave."""

    root: str

    def holds(self, path: str | Path) -> bool:
        """Whether `path`, with `~`, `..` and links followed, lies in the folder or is the folder. `link/..` must do so
        in both readings: that of the system, and as text."""
        text = os.path.expanduser(os.fspath(path))
        return all(_within(os.path.realpath(one), self.root) for one in (text, os.path.abspath(text)))

    def refusal(self, place: str | Path, *, hub: bool = False) -> Problem | None:
        """Why `place`, as a recipe or an option writes it, is refused; None where it lies inside. `hub` says that what
        is no path has the form of an id on the Hub."""
        inside = self.holds(place)
        if inside and not (hub and not os.path.lexists(os.path.expanduser(place))):
            return None
        if hub:
            hint = f"download the model into `{self.root}` first and name that folder; a sandbox has no network"
            return Problem(f"`{place}` is no folder in the sandbox, and the Hub is out of its reach", None, hint)
        hint = f"put it into `{self.root}`, or leave out `--sandbox` if you trust the recipe"
        return Problem(f"`{place}` lies outside the sandbox", None, hint)


def current() -> Sandbox | None:
    """The sandbox that this process works in now; None where there is none."""
    return _current


@contextlib.contextmanager
def confined(folder: str | Path) -> Iterator[Sandbox]:
    """Work in the sandbox `folder` within the block. Raises UsageError as `enter` does."""
    box = enter(folder)
    try:
        yield box
    finally:
        leave()


def enter(folder: str | Path) -> Sandbox:
    """From now on, this process with all its threads reads and writes inside `folder` alone and reaches no network.

    The audit hook cannot be taken out again; after `leave` it allows everything. Raises UsageError where there is no
    such folder, it is the root of the file system, or a sandbox is at work already.
    """
    global _current, _readable, _imported, _before
    root = os.path.realpath(os.path.expanduser(os.fspath(folder)))
    if not os.path.isdir(root):
        raise UsageError(f"there is no folder `{folder}` for the sandbox", hint="make it, and put the inputs into it")
    if root == os.path.dirname(root):
        raise UsageError(f"a sandbox in `{folder}` holds nothing back", hint="name the folder of the inputs")
    if _current is not None:
        raise UsageError("a sandbox within a sandbox", hint="leave the first one before")
    _before = sys.dont_write_bytecode, list(sys.path), tempfile.tempdir
    _readable = _of_python()
    # A module that a stranger has put beside the recipe is not to be imported.
    sys.path[:] = [entry for entry in sys.path if not _within(os.path.realpath(entry), root) or _is_pythons(entry)]
    _imported = tuple(os.path.realpath(entry) for entry in sys.path)
    sys.dont_write_bytecode = True
    tempfile.tempdir = root
    _install()
    _current = Sandbox(root)
    return _current


def leave() -> None:
    """End what `enter` began, if anything."""
    global _current
    if _current is not None:
        _current = None
        sys.dont_write_bytecode, sys.path[:], tempfile.tempdir = _before


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """Within the block, temporary files and folders of libraries, which never remove them, lie in a folder of their own
    in the sandbox, which is removed at the end. Without a sandbox nothing changes."""
    if _current is None:
        yield
        return
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".merge-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


_current: Sandbox | None = None
_before: tuple[bool, list[str], str | None] = (False, [], None)
_installed = False
_readable: tuple[str, ...] = ()
_imported: tuple[str, ...] = ()


def _of_python() -> tuple[str, ...]:
    """Where the interpreter, its packages and this one lie, links followed."""
    homes = [sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(), *site.getsitepackages()]
    homes += [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    homes += [entry for entry in sys.path if entry.endswith(".zip")]
    found = {os.path.realpath(home) for home in homes} | {os.path.dirname(os.path.realpath(__file__))}
    return tuple(home for home in found if home != os.path.dirname(home))


def _is_pythons(entry: str) -> bool:
    real = os.path.realpath(entry)
    return any(_within(real, home) for home in _readable)


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root + os.sep)


def _install() -> None:
    global _installed
    if not _installed:
        sys.addaudithook(_hear)
        _installed = True


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _current is not None:
        rule = _RULES.get(event)
        if rule is not None:
            rule(_current, event, arguments)


def _refuse(what: str, box: Sandbox, kind: type[MergeError] = StoppedError) -> None:
    hint = "a file of the inputs, or a package, has asked for it: look at it before you leave out `--sandbox`"
    raise kind(f"the sandbox `{box.root}` has stopped this command: {what}", hint=hint)


def _open(box: Sandbox, event: str, arguments: tuple[Any, ...]) -> None:
    path, mode, flags = arguments
    if isinstance(path, int):
        return  # opened already
    writes = any(sign in mode for sign in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITES)
    (_write if writes else _read)(box, path)


def _read(box: Sandbox, path: Any) -> None:
    if path is None or isinstance(path, int):
        return
    real = os.path.realpath(os.fsdecode(path))
    if _within(real, box.root) or any(_within(real, home) for home in (*_readable, *_SYSTEM)):
        return
    if _is_code(real):
        return
    own = f"/proc/{os.getpid()}/"
    if real.startswith(own) and real[len(own) :].partition("/")[0] in _OWN_PROCESS:
        return
    _refuse(f"reading `{real}`", box, InputError)


def _is_code(real: str) -> bool:
    """Whether it is code, or a note of an installer's, where Python looks for such: a method of the user's own."""
    code = real.endswith((".py", ".pyc", ".so", ".pyd")) or ".dist-info/" in real or ".egg-info/" in real
    return code and any(_within(real, home) for home in _imported)


def _write(box: Sandbox, path: Any) -> None:
    real = os.path.realpath(os.fsdecode(path))
    if not _within(real, box.root) and real not in _WRITABLE:
        _refuse(f"writing `{real}`", box)


def _list(box: Sandbox, event: str, arguments: tuple[Any, ...]) -> None:
    path = arguments[0]
    # Python lists the folders that it imports from, and the packages in them.
    if path is not None and not isinstance(path, int):
        real = os.path.realpath(os.fsdecode(path))
        if any(_within(real, home) for home in _imported):
            return
    _read(box, "." if path is None else path)


def _entry(box: Sandbox, path: Any, folder: Any = -1) -> None:
    """A change of an entry of a folder: of a link itself, not of what it leads to."""
    if isinstance(path, int):
        return
    text = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    home, name = os.path.split(text.rstrip(os.sep))
    real = os.path.realpath(home or os.curdir)
    if not _within(real, box.root) or name == os.pardir:
        _refuse(f"changing `{os.path.join(real, name)}`", box)


def _one(box: Sandbox, event: str, arguments: tuple[Any, ...]) -> None:
    _entry(box, arguments[0], arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1)


def _two(box: Sandbox, event: str, arguments: tuple[Any, ...]) -> None:
    source, target, *folders = arguments
    _entry(box, target, folders[-1] if folders else -1)
    if event == "os.symlink":
        text = os.fsdecode(source)
        _read(box, os.path.join(os.path.dirname(os.path.abspath(os.fsdecode(target))), text))
        return
    _entry(box, source, folders[0] if folders else -1)
    if event == "os.link":
        _read(box, source)


def _change(box: Sandbox, event: str, arguments: tuple[Any, ...]) -> None:
    if not isinstance(arguments[0], int):
        _write(box, arguments[0])


def _library(box: Sandbox, event: str, arguments: tuple[Any, ...]) -> None:
    name = arguments[0]
    if name is None or os.sep not in os.fsdecode(name):
        return
    real = os.path.realpath(os.fsdecode(name))
    if not any(_within(real, home) for home in (*_readable, *_SYSTEM)):
        _refuse(f"loading the library `{real}`", box)


def _network(box: Sandbox, event: str, arguments: tuple[Any, ...]) -> None:
    _refuse(f"using the network ({event})", box)


def _process(box: Sandbox, event: str, arguments: tuple[Any, ...]) -> None:
    _refuse(f"starting or stopping another program ({event})", box)


_RULES: dict[str, Callable[[Sandbox, str, tuple[Any, ...]], None]] = {
    "open": _open,
    **dict.fromkeys(("os.listdir", "os.scandir"), _list),
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir"), _one),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), _two),
    **dict.fromkeys(
        ("os.truncate", "os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr", "os.removexattr"), _change
    ),
    "sqlite3.connect": _change,
    "ctypes.dlopen": _library,
    **dict.fromkeys((f"socket.{name}" for name in _SOCKETS), _network),
    **dict.fromkeys(_PROGRAMS, _process),
}
