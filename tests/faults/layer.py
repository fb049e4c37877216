"""Commands run under faults of the operating system: `preload.c` compiled, and processes that have it loaded.

faults = Layer(folder)                                     # raises NoCompiler
faults.run(["run", "r.yaml"], "calls=fsync at=2 errno=5")  # a process of its own
with faults.forks() as fork:                               # the same from a process that has imported the program
    fork(["run", "r.yaml"], "path=/out/ from=9 errno=28")
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("preload.c")
ROOT = Path(__file__).parents[2]
SECONDS = 60  # after which a command counts as hanging

# A fork of this process runs a command in some milliseconds. SIGALRM ends one that hangs.
SERVER = f"""
import ctypes, json, os, signal, sys, traceback
from mergekit_lite.cli.app import main
import mergekit_lite.merge, mergekit_lite.plan.build, mergekit_lite.plan.lock, mergekit_lite.methods.registry
import mergekit_lite.run.start, mergekit_lite.run.finish, mergekit_lite.run.peers, mergekit_lite.run.plain
import blake3, numpy, rich.console
mergekit_lite.methods.registry.all_methods()
if sys.argv[1] == "torch":
    import mergekit_lite.run.compute
    import torch
    torch.set_num_threads(1)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm({SECONDS})
        os.chdir(order["folder"])
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv = ["merge", *order["arguments"]]
        ctypes.CDLL(None).faults_set(order["rules"].encode(), order["log"].encode())
        code = 99
        try:
            main()
        except SystemExit as leave:
            code = leave.code or 0
        except BaseException:
            traceback.print_exc()
        ctypes.CDLL(None).faults_set(b"", b"")
        sys.stderr.flush()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class NoCompiler(Exception):
    """There is no C compiler `cc` here."""


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code (negative: the signal that ended it), stdout and stderr, and the calls that its
    rules apply to, `NAME PATH` each."""

    code: int
    out: str
    err: str
    calls: tuple[str, ...] = ()


class Layer:
    """`folder` is for the library and for files of its own; it stays out of every rule's path."""

    def __init__(self, folder: Path):
        if shutil.which("cc") is None:
            raise NoCompiler("there is no C compiler `cc`")
        self.folder = folder
        self.shared_object = folder / "preload.so"
        made = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(self.shared_object), str(SOURCE), "-ldl"]
        subprocess.run([*made, "-pthread"], check=True)

    def environ(self, rules: str, log: Path | None = None, **more: str) -> dict[str, str]:
        """The environment of a process that has the faults."""
        return os.environ | {
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
            "LD_PRELOAD": str(self.shared_object),
            "FAULTS": rules,
            "FAULTS_LOG": "" if log is None else str(log),
            **more,
        }

    def start(
        self,
        arguments: Sequence[str],
        rules: str = "",
        *,
        folder: Path | None = None,
        limit: Callable[[], None] | None = None,
        log: Path | None = None,
        program: Sequence[str] = ("-m", "mergekit_lite"),
        **more: str,
    ) -> subprocess.Popen[str]:
        """A command in a process of its own, in `folder`. `limit` is called in it first, `more` are variables."""
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=folder,
            env=self.environ(rules, log, **more),
            preexec_fn=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: Sequence[str], rules: str = "", **more: object) -> Ran:
        """As `start`, to its end."""
        log = self.folder / "calls"
        log.unlink(missing_ok=True)
        process = self.start(arguments, rules, log=log, **more)  # type: ignore[arg-type]
        out, err = process.communicate(timeout=SECONDS)
        return Ran(process.returncode, out, err, _calls(log))

    @contextlib.contextmanager
    def forks(self, torch: bool = False) -> Iterator[Callable[..., Ran]]:
        """`fork(arguments, rules, folder)` runs commands, quickly, in forks of one process that has imported what
        they need, torch only where it is asked for."""
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, "torch" if torch else ""],
            env=self.environ(""),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        out, err, log = (self.folder / name for name in ("out.txt", "err.txt", "calls"))

        def fork(arguments: Sequence[str], rules: str = "", folder: Path | None = None) -> Ran:
            log.unlink(missing_ok=True)
            order = {"arguments": list(arguments), "rules": rules, "folder": str(folder or Path.cwd())}
            assert server.stdin is not None and server.stdout is not None
            print(
                json.dumps(order | {"out": str(out), "err": str(err), "log": str(log)}), file=server.stdin, flush=True
            )
            code = int(server.stdout.readline())
            return Ran(code, out.read_text(errors="replace"), err.read_text(errors="replace"), _calls(log))

        try:
            yield fork
        finally:
            server.communicate()


def _calls(log: Path) -> tuple[str, ...]:
    return tuple(log.read_text().splitlines()) if log.exists() else ()
