"""A score: a command that is given a checkpoint's folder and prints a number, or JSON that holds it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from mergekit_lite.errors import StoppedError, UsageError, did_you_mean
from mergekit_lite.limits import hint_for

PLACE = "{model}"
FILES = "{out}"
TASK = "{task}"  # of a mask store
LAST_LINES = 5  # of what a failed command said
LOOK = 0.05  # seconds between two looks at a command that is at work
MOST = 1 << 24  # bytes that are read of what a command printed or wrote
Taken = TypeVar("Taken")
Take = Callable[[Any, Path | None], Taken]
SHOWN = 8  # numbers that are named where the wanted one is not there
TRIED = 100  # lines of what it printed, from the end, at which its JSON may begin


class ScoreFailed(StoppedError):
    """A score command failed, took too long or gave no number."""


@dataclass(frozen=True, slots=True)
class Score:
    """`command` as one would type it, with `{model}` where the folder goes; it is not run by a shell. `metric` is the
    dotted path of the number in the JSON that it prints, `*` standing for the only entry of an object; None where it
    prints a number alone. With `{out}` in the command, which stands for a folder of its own, the newest JSON file that
    it writes there is read in place of what it prints: the results of lm-evaluation-harness, in which `task.metric`
    names a number as its tables do, `task.metric,filter` where a task has several filters. `timeout` in seconds."""

    command: str
    metric: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not any(PLACE in part for part in self._parts()):
            raise UsageError(f"the score command `{self.command}` has no `{PLACE}`", hint=f"python score.py {PLACE}")

    def of(self, folder: Path, log: Path | None = None, check: Callable[[], None] = lambda: None) -> float:
        """The score of a checkpoint. All that the command says is kept in the files `log`.out and `log`.err. `check` is
        called now and then, and stops the command by what it raises. Raises ScoreFailed, with the
        end of what the command said, where it fails, takes too long or gives no such number."""
        return self.read(folder, lambda said, files: None, log, check)[0]

    def read(
        self, folder: Path, take: Take[Taken], log: Path | None = None, check: Callable[[], None] = lambda: None
    ) -> tuple[float, Taken]:
        """As `of`, and what `take` makes of the JSON that the number stands in and of the folder `{out}`, None where
        the command has none; the folder is gone afterwards."""
        with contextlib.ExitStack() as stack:
            files = None
            if any(FILES in part for part in self._parts()):
                # What the command has left at work may still write there.
                made = tempfile.TemporaryDirectory(prefix="merge-score-", ignore_cleanup_errors=True)
                files = Path(stack.enter_context(made))
            told = {PLACE: str(folder), FILES: str(files)}
            # At once: a folder's own name may hold such a word.
            command = [re.sub(r"\{model\}|\{out\}", lambda found: told[found[0]], part) for part in self._parts()]
            printed = stack.enter_context(_output(log, ".out"))
            said = stack.enter_context(_output(log, ".err"))
            code = self._run(command, printed, said, check)
            output = _text(printed)
            if code:
                lines = (_text(said) or output).strip().splitlines()[-LAST_LINES:]
                hint = f"run it by hand: `{shlex.join(command)}`" + (
                    f"; all that it said is in `{log}.*`" if log else ""
                )
                message = f"the score command failed with exit code {code}: {' | '.join(lines) or 'it says nothing'}"
                raise ScoreFailed(message, hint=hint)
            text, how = (output, "printed") if files is None else (_newest(files), "wrote")
            found = _json(text)
            return self._number(found, text, how), take(found, files)

    def _run(self, command: list[str], printed: IO[bytes], said: IO[bytes], check: Callable[[], None]) -> int:
        """The exit code of a command. What it starts ends with it: after a time-out, and on Ctrl-C."""
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=said, start_new_session=True
            )
        except OSError as error:
            raise ScoreFailed(f"cannot start `{command[0]}`: {error.strerror}", hint="check the command") from None
        began = time.monotonic()
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(LOOK)
                check()
                if self.timeout is not None and time.monotonic() - began > self.timeout:
                    raise ScoreFailed(f"the score command took more than {self.timeout:g} s", hint="raise the limit")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _parts(self) -> list[str]:
        try:
            return shlex.split(self.command)
        except ValueError as error:
            raise UsageError(f"the score command `{self.command}` cannot be read: {error}") from None

    def _number(self, found: Any, printed: str, how: str) -> float:
        """The number in the JSON that the command printed or wrote."""
        value = entry_at(found, self.metric)
        results = _in_results(found.get("results")) if isinstance(found, Mapping) else {}
        if value is None and self.metric:
            value = _named(results, self.metric)
        with contextlib.suppress(OverflowError):
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        what = f"no number `{self.metric}`" if self.metric else "no number"
        known = list(results or _numbers(found))
        if not known:
            end = repr(printed.strip()[-200:]) if printed.strip() else "nothing at all"
            raise ScoreFailed(f"the score command {how} {what}: {end}")
        wanted = self.metric or ""
        alike = [name for name in known if wanted and name.partition(",")[0] == wanted]
        near = list(filter(None, [did_you_mean(wanted, known)]))
        shown = ", ".join(f"`{name}`" for name in (alike or near or known)[:SHOWN])
        hint = "name the number in its JSON with `--metric a.b`, in a recipe with `metric: a.b`"
        raise ScoreFailed(f"the score command {how} {what}, but {shown}", hint=hint)


def _json(text: str) -> Any:
    """The JSON that a text is, or the last in it that begins a line and reaches to the end or over one line; None where
    there is none."""
    lines = text.strip().splitlines()
    begun = range(len(lines) - 1, max(-1, len(lines) - 1 - TRIED), -1)
    whole = [i for i in begun if lines[i].startswith(("{", "["))]
    for tried in [text, *("\n".join(lines[i:]) for i in whole), *reversed(lines)]:
        try:
            return json.loads(tried)
        except (ValueError, RecursionError):
            continue
    return None


def entry_at(found: Any, path: str | None) -> Any:
    """The entry of JSON at keys joined by dots, `*` being the only key of an object; None where there is none."""
    for part in path.split(".") if path else []:
        if not isinstance(found, Mapping):
            return None
        found = next(iter(found.values())) if part == "*" and len(found) == 1 else found.get(part)
    return found


def _in_results(results: Any) -> dict[str, Any]:
    """All numbers in the results of lm-evaluation-harness, by `task.metric,filter`."""
    found: dict[str, Any] = {}
    for task, entry in results.items() if isinstance(results, Mapping) else ():
        if isinstance(entry, Mapping):
            found |= {f"{task}.{key}": value for key, value in entry.items() if isinstance(value, int | float)}
    return found


def _numbers(found: Any) -> dict[str, Any]:
    """The first numbers in what was printed, by their paths."""
    paths: dict[str, Any] = {}
    below = [("", found)]
    while below and len(paths) < TRIED:
        path, value = below.pop()
        if isinstance(value, Mapping):
            below += [(f"{path}.{key}" if path else str(key), one) for key, one in reversed(list(value.items()))]
        elif path and isinstance(value, int | float):
            paths[path] = value
    return paths


def _named(numbers: Mapping[str, Any], metric: str) -> Any:
    """The number that is called so, its filter left out where there is only one; else None."""
    if metric in numbers:
        return numbers[metric]
    found = [value for name, value in numbers.items() if name.rpartition(",")[0] == metric]
    return found[0] if len(found) == 1 else None


@contextlib.contextmanager
def _output(log: Path | None, ending: str) -> Iterator[IO[bytes]]:
    """A file for what a command writes: a part of the log, or one without a name. Not a pipe: what a command leaves
    behind could hold that open."""
    try:
        file: IO[bytes] = tempfile.TemporaryFile() if log is None else open(f"{log}{ending}", "w+b")  # noqa: SIM115
    except OSError as fault:
        where = f"{log}{ending}" if log is not None else tempfile.gettempdir()
        raise StoppedError(f"cannot write `{where}`: {fault.strerror}", hint=hint_for(fault)) from fault
    with file:
        yield file


def _text(file: IO[bytes]) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - MOST))
    return file.read().decode("utf-8", errors="replace")


def _newest(folder: Path) -> str:
    """The newest JSON file below a folder; empty where there is none."""
    found = [path for path in folder.rglob("*.json") if path.is_file()]
    if not found:
        return ""
    with max(found, key=lambda path: path.stat().st_mtime_ns).open("rb") as file:
        return _text(file)
