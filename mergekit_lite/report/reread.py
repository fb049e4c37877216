"""One read of a file for all that is asked of its bytes: their digest, the numbers that are not finite. No torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.errors import InputError
from mergekit_lite.run.nonfinite import nonfinite

CHUNK = 1 << 22  # bytes in memory at once, and of a tensor: a multiple of every number's size
Advance = Callable[[int], None]  # is told of every few bytes read, from any thread
Part = tuple[TensorMeta | None, int, int]  # bytes [start, stop) of a file, of a tensor or of what is none


@dataclass(slots=True)
class Seen:
    """What one read of a file found: its BLAKE3 digest, NaNs and infinities by tensor where there are some, and the
    digests of single tensors that were asked for."""

    nbytes: int
    blake3: str = ""
    nonfinite: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)


def reread(path: Path, tensors: Sequence[TensorMeta], single: Container[str], threads: int, advance: Advance) -> Seen:
    """Read a file to its end. `tensors` are those of its header in the order of their offsets, none where it is no
    safetensors file; `single` names those that get a digest of their own. `threads` form the digest.

    Raises InputError where the file cannot be read, or becomes shorter meanwhile.
    """
    whole, alone = blake3(max_threads=threads), {meta.name: blake3() for meta in tensors if meta.name in single}
    buffer = memoryview(bytearray(CHUNK))
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"`{path}` is not a regular file")
            seen = Seen(found.st_size)
            for group in _groups(tensors, found.st_size):
                begin, end = group[0][1], group[-1][2]
                _fill(file, buffer[: end - begin], begin, path)
                whole.update(buffer[: end - begin])
                for meta, start, stop in group:
                    if meta is None:
                        continue
                    part = buffer[start - begin : stop - begin]
                    count = nonfinite(meta.dtype, part)
                    if count:
                        seen.nonfinite[meta.name] = seen.nonfinite.get(meta.name, 0) + count
                    if meta.name in alone:
                        alone[meta.name].update(part)
                advance(end - begin)
        finally:
            os.close(file)
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error
    seen.blake3 = whole.hexdigest()
    seen.tensors = {name: digest.hexdigest() for name, digest in alone.items()}
    return seen


def _fill(file: int, buffer: memoryview, start: int, path: Path) -> None:
    place = 0
    while place < len(buffer):
        count = os.preadv(file, [buffer[place:]], start + place)
        if not count:
            raise InputError(f"`{path}` became shorter while it was read")
        place += count


def _groups(tensors: Sequence[TensorMeta], nbytes: int) -> Iterator[list[Part]]:
    """A file from its beginning to its end in parts that follow one another, as many at once as fit in a chunk."""
    group: list[Part] = []
    for part in _parts(tensors, nbytes):
        if group and part[2] - group[0][1] > CHUNK:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _parts(tensors: Sequence[TensorMeta], nbytes: int) -> Iterator[Part]:
    first = tensors[0].start if tensors else nbytes
    spans = [(None, 0, first), *((meta, meta.start, meta.start + meta.nbytes) for meta in tensors)]
    for meta, start, stop in spans:
        for begin in range(start, stop, CHUNK):
            yield meta, begin, min(stop, begin + CHUNK)
