"""A score: a command that is given a checkpoint's folder and prints a number, or JSON that holds it."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.errors import StoppedError, UsageError

PLACE = "{model}"
LAST_LINES = 5  # of what a failed command said


@dataclass(frozen=True, slots=True)
class Score:
    """`command` as one would type it, with `{model}` where the folder goes; it is not run by a shell. `metric` is the
    dotted path of the number in the JSON that it prints, `*` standing for the only entry of an object; None where it
    prints a number alone. `timeout` in seconds."""

    command: str
    metric: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not any(PLACE in part for part in self._parts()):
            raise UsageError(f"the score command `{self.command}` has no `{PLACE}`", hint=f"python score.py {PLACE}")

    def of(self, folder: Path) -> float:
        """The score of a checkpoint. Raises StoppedError, with the end of what the command said, where it fails, takes
        too long or prints no such number."""
        command = [part.replace(PLACE, str(folder)) for part in self._parts()]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=self.timeout)
        except subprocess.TimeoutExpired:
            raise StoppedError(f"the score command took more than {self.timeout:g} s", hint="raise the limit") from None
        except OSError as error:
            raise StoppedError(f"cannot start `{command[0]}`: {error.strerror}", hint="check the command") from None
        if ran.returncode:
            said = " | ".join((ran.stderr or ran.stdout).strip().splitlines()[-LAST_LINES:])
            hint = f"run it by hand: `{shlex.join(command)}`"
            message = f"the score command failed with exit code {ran.returncode}: {said or 'it says nothing'}"
            raise StoppedError(message, hint=hint)
        return self._number(ran.stdout)

    def _parts(self) -> list[str]:
        try:
            return shlex.split(self.command)
        except ValueError as error:
            raise UsageError(f"the score command `{self.command}` cannot be read: {error}") from None

    def _number(self, printed: str) -> float:
        """The number in what the command printed: the last line that is JSON, or all of it."""
        found: Any = None
        for text in [printed, *reversed(printed.strip().splitlines())]:
            try:
                found = json.loads(text)
                break
            except ValueError:
                continue
        value = found
        for part in self.metric.split(".") if self.metric else ():
            if not isinstance(value, Mapping):
                value = None
            elif part == "*" and len(value) == 1:
                value = next(iter(value.values()))
            else:
                value = value.get(part)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            what = f"no number `{self.metric}`" if self.metric else "no number"
            hint = "let it print JSON and name the number with `--metric a.b`" if isinstance(found, Mapping) else None
            raise StoppedError(f"the score command printed {what}: {printed.strip()[-200:]!r}", hint=hint)
        return float(value)
