"""Masks of several tasks, coded together: how they lie in a file. frames.py reads and writes them. No torch.

Up to eight tasks share a file. The bits that they have for one entry are one symbol, since tasks agree more often than
chance has it; symbols are put into bytes (eight for one task, four for two, two for three or four, one for more) and
coded in frames of FRAME entries, each a frame of Zstandard by itself. The file is one of safetensors: for the tensor
NAME `a+b+c/NAME` holds the frames, `a+b+c:frames/NAME` the bytes that each of them takes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from types import ModuleType

from mergekit_lite.errors import InputError

FRAME = 1 << 18  # entries of a frame; part of the format
TOGETHER = 8  # tasks of a file at most: a symbol fits into a byte
_FILE = re.compile(r"masks-zstd-([1-9][0-9]{0,3})\.safetensors")
_TASK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_EXTRA = "`pip install 'mergekit_lite[masks]'`"


def groups_of(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """The tasks by the file that they share: as few files as can be, of about as many tasks, in order."""
    count = -(-len(tasks) // TOGETHER)
    cuts = [number * len(tasks) // count for number in range(count + 1)] if count else []
    return [tuple(tasks[start:stop]) for start, stop in itertools.pairwise(cuts)]


def coded_file(number: int) -> str:
    """The name of the file of the group of this number, from 1 on."""
    return f"masks-zstd-{number}.safetensors"


def coded_files(tasks: Sequence[str]) -> list[str]:
    """The files of a store of these tasks."""
    return [coded_file(number) for number, _ in enumerate(groups_of(tasks), start=1)]


def is_coded_file(name: str) -> bool:
    """Whether a file of this name holds masks that are coded together."""
    return _FILE.fullmatch(name) is not None


def tasks_in(name: str) -> list[str]:
    """The tasks that the stored name of a tensor tells of; none where it is no name of coded masks."""
    tasks = name.partition("/")[0].partition(":")[0].split("+")
    sound = all(map(_TASK.fullmatch, tasks)) and len(set(tasks)) == len(tasks) <= TOGETHER
    return tasks if sound else []


def library() -> ModuleType:
    """The library that codes. Raises InputError where it is not installed."""
    try:
        import zstandard
    except ImportError as error:
        message = "masks are coded with the library `zstandard`, which is not installed"
        raise InputError(message, hint=_EXTRA) from error
    found: ModuleType = zstandard
    return found


def frames_of(numel: int) -> int:
    """How many frames the masks of a tensor of `numel` entries have."""
    return -(-numel // FRAME)
