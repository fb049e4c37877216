"""Reads the header of a GGUF file: metadata, names, shapes, types and offsets, never a byte of a tensor.

The gguf library maps the file and trusts what it says of itself. Here every count is held against the bytes that are
left before it is used, so that a damaged or hostile file is one error; what was checked is then read with the library's
tables. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mergekit_lite.checkpoint.header import MAX_HEADER_BYTES
from mergekit_lite.checkpoint.inside import at_once
from mergekit_lite.checkpoint.meta import ShardFile
from mergekit_lite.errors import InputError, printable
from mergekit_lite.limits import hint_for

_AGAIN = "the file is damaged or was not written as GGUF: download it again"
_STRING, _ARRAY = 8, 9
# The types of metadata that are not texts or lists: as `struct` knows them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_NAME = 64 * 4  # llama.cpp has room for 63 bytes; others have written longer names
_MAX_KEY = 65535
_MAX_TEXT = 1 << 16  # of a text that is kept: names and settings, not chat templates
_MAX_RANK = 4
_MAX_LIST = 1 << 10  # numbers of a list that is kept
Value = int | float | bool | str | tuple[int | float | bool, ...] | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as the header tells of it: `shape` with the longest strides first, as in torch, `kind` the number of its
    type, `start` the absolute offset of its first byte."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header of one file says. `metadata` has None for long texts and for lists that are not of a few numbers;
    `lengths` has the lengths of all lists."""

    metadata: Mapping[str, Value]
    lengths: Mapping[str, int]
    entries: tuple[Entry, ...]
    shard: ShardFile


class _Cursor:
    """Reads the header from the start, no further than it may reach, and digests it."""

    def __init__(self, file: IO[bytes], size: int, shown: str):
        self._file, self._shown = file, shown
        self.size = size
        self.at = 0
        self._limit = min(size, MAX_HEADER_BYTES)
        self.digest = hashlib.sha256()

    def bad(self, what: str) -> InputError:
        return InputError(f"`{self._shown}`: {what}", hint=_AGAIN)

    def room(self, count: int, each: int, what: str) -> None:
        """Raises InputError where `count` things of at least `each` bytes cannot follow."""
        if count * each > self._limit - self.at:
            if count * each <= self.size - self.at:
                raise self.bad(f"its header exceeds {MAX_HEADER_BYTES:,} bytes at {what}")
            raise self.bad(f"it promises {count:,} {what} and has {self.size - self.at:,} bytes left")

    def take(self, count: int, what: str) -> bytes:
        self.room(count, 1, f"bytes of {what}")
        data = self._file.read(count)
        if len(data) < count:
            raise self.bad(f"it became shorter while it was read, at {what}")
        self.at += count
        self.digest.update(data)
        return data

    def number(self, code: str, what: str) -> int | float | bool:
        found: int | float | bool = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]
        return found

    def count(self, code: str, what: str) -> int:
        return int(self.number(code, what))

    def text(self, most: int, what: str) -> str | None:
        """A text; None where it is longer than `most` bytes. Raises InputError where it is not UTF-8."""
        length = self.count("Q", what)
        if length > most:
            self.skip(length, what)
            return None
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8") from error

    def skip(self, count: int, what: str) -> None:
        self.room(count, 1, f"bytes of {what}")
        while count:
            count -= len(self.take(min(count, 1 << 20), what))


def read_gguf_header(path: Path, shown: str, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """The header of the GGUF file at `path`, checked against the file's size. `sizes` gives, by the number of a type,
    how many numbers take how many bytes. `shown` is how messages name the file. Raises InputError for a file that
    cannot be read or is no whole, valid GGUF file of little-endian numbers."""
    try:
        with open(path, "rb", opener=at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"`{shown}` is not a regular file", hint="name a .gguf file")
            cursor = _Cursor(file, found.st_size, shown)
            metadata, lengths, entries = _header(cursor, sizes)
    except OSError as error:
        raise InputError(f"cannot read `{shown}`: {error.strerror}", hint=hint_for(error)) from error
    shard = ShardFile(str(path), found.st_size, found.st_mtime_ns, cursor.digest.hexdigest())
    return GgufHeader(metadata, lengths, entries, shard)


def _header(
    cursor: _Cursor, sizes: Mapping[int, tuple[int, int]]
) -> tuple[dict[str, Value], dict[str, int], tuple[Entry, ...]]:
    if cursor.take(4, "the first four bytes") != b"GGUF":
        raise cursor.bad("it does not begin with `GGUF`")
    version = cursor.count("I", "the version")
    if version not in (2, 3):
        other = version and version & 0xFFFF == 0
        what = "its numbers are big-endian" if other else f"it is of version {version}, not 2 or 3"
        raise cursor.bad(f"{what}, which is not read")
    tensors, keys = cursor.count("Q", "the number of tensors"), cursor.count("Q", "the number of keys")
    cursor.room(keys, 13, "keys")
    cursor.room(tensors, 24, "tensors")
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(keys):
        key = cursor.text(_MAX_KEY, "a key")
        if key is None:
            raise cursor.bad(f"a key has more than {_MAX_KEY:,} bytes")
        if key in metadata:
            raise cursor.bad(f"the key `{printable(key[:200])}` stands in it twice")
        metadata[key] = _value(cursor, key, lengths)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.bad(f"`general.alignment` is {printable(str(alignment)[:50])}, not a power of two from 8 on")
    told: list[tuple[str, tuple[int, ...], int, int]] = []
    names: set[str] = set()
    for _ in range(tensors):
        told.append(_tensor(cursor))
        if told[-1][0] in names:
            raise cursor.bad(f"the tensor `{printable(told[-1][0])}` stands in it twice")
        names.add(told[-1][0])
    first = -(-cursor.at // alignment) * alignment
    return metadata, lengths, _placed(cursor, told, first, alignment, sizes)


def _value(cursor: _Cursor, key: str, lengths: dict[str, int]) -> Value:
    what = f"`{printable(key[:200])}`"
    kind = cursor.count("I", what)
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], what)
    if kind == _STRING:
        return cursor.text(_MAX_TEXT, what)
    if kind != _ARRAY:
        raise cursor.bad(f"{what} is of an unknown type, {kind}")
    kind, count = cursor.count("I", what), cursor.count("Q", what)
    if kind == _STRING:
        cursor.room(count, 8, f"texts of {what}")
        for _ in range(count):
            cursor.skip(cursor.count("Q", what), what)
    elif kind in _SCALARS:
        code = _SCALARS[kind]
        each = struct.calcsize(f"<{code}")
        cursor.room(count, each, f"numbers of {what}")
        if count <= _MAX_LIST:
            lengths[key] = count
            return tuple(struct.unpack(f"<{count}{code}", cursor.take(count * each, what)))
        cursor.skip(count * each, what)
    else:
        raise cursor.bad(f"{what} is a list of an unknown type, {kind}")
    lengths[key] = count
    return None


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text(_MAX_NAME, "the name of a tensor")
    if not name:
        what = "is empty" if name == "" else f"has more than {_MAX_NAME} bytes"
        raise cursor.bad(f"the name of a tensor {what}")
    what = f"the tensor `{printable(name)}`"
    rank = cursor.count("I", what)
    if rank > _MAX_RANK:
        raise cursor.bad(f"{what} has {rank:,} dimensions; GGUF knows {_MAX_RANK}")
    shape = tuple(cursor.count("Q", what) for _ in range(rank))
    return name, shape[::-1], cursor.count("I", what), cursor.count("Q", what)


def _placed(
    cursor: _Cursor,
    told: list[tuple[str, tuple[int, ...], int, int]],
    first: int,
    alignment: int,
    sizes: Mapping[int, tuple[int, int]],
) -> tuple[Entry, ...]:
    """The tensors in the order of their offsets, each inside the file and none over another."""
    entries: list[Entry] = []
    end, before = first, "the header"
    for name, shape, kind, offset in sorted(told, key=lambda entry: entry[3]):
        what = f"the tensor `{printable(name)}`"
        if kind not in sizes:
            raise cursor.bad(f"{what} is of an unknown type, {kind}")
        numbers, nbytes = sizes[kind]
        numel = 1
        for size in shape:
            numel *= size
            if size == 0 or numel > 1 << 62:
                fault = "is empty" if size == 0 else "overflows"
                raise cursor.bad(f"{what} has the shape {list(shape)}, which {fault}")
        if (shape[-1] if shape else 1) % numbers:
            raise cursor.bad(f"{what} has rows of {shape[-1] if shape else 1}, not in groups of {numbers}")
        if offset % alignment:
            raise cursor.bad(f"{what} begins at {offset:,}, which is no multiple of {alignment}")
        start = first + offset
        if start < end:
            raise cursor.bad(f"{what} overlaps {before}")
        end, before = start + numel // numbers * nbytes, what
        if end > cursor.size:
            raise cursor.bad(f"{what} ends at byte {end:,}, and the file has {cursor.size:,}")
        entries.append(Entry(name, shape, kind, start))
    return tuple(entries)
