"""Reads a safetensors header: names, shapes, dtypes and offsets, never a byte of a tensor. No torch.

Accepts what the `safetensors` library accepts, save for a few spellings that no writer makes and that two readers may
take in two ways: duplicate keys, an empty tensor name, fields other than dtype, shape and data_offsets, entries written
as arrays, and white space before the first brace.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.inside import at_once
from mergekit_lite.checkpoint.meta import DTYPE_BITS, ShardFile, TensorMeta
from mergekit_lite.errors import InputError, did_you_mean
from mergekit_lite.limits import hint_for

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_SIZE = 2**64 - 1  # what the library's usize holds
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_AGAIN = "the file is damaged or was not written as safetensors: download it again"


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one file says. `tensors` stand in the order of their offsets, without holes or overlaps."""

    tensors: tuple[TensorMeta, ...]
    metadata: dict[str, str]
    shard: ShardFile


# Headers by their SHA-256, with their bytes: a fine-tune's file most often has the header of its base's.
_KNOWN: dict[str, tuple[int, Header]] = {}
_MOST_KNOWN = 1 << 24  # bytes of all, which take some twenty times as much in memory


def read_header(path: Path, shown: str) -> Header:
    """The header of the safetensors file at `path`, checked against the file's size.

    `shown` is how messages name the file. Raises InputError for a file that cannot be read or that is no whole, valid
    safetensors file.
    """
    try:
        with open(path, "rb", buffering=0, opener=at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"`{shown}` is not a regular file", hint="name a .safetensors file")
            text = header_text(file, found.st_size, shown)
    except OSError as error:
        raise InputError(f"cannot read `{shown}`: {error.strerror}", hint=hint_for(error)) from error
    return header_of(text, ShardFile(str(path), found.st_size, found.st_mtime_ns, text_digest(text)), shown)


def text_digest(text: bytes) -> str:
    """The SHA-256 by which a header is known."""
    return hashlib.sha256(text).hexdigest()


def header_of(text: bytes, shard: ShardFile, shown: str) -> Header:
    """What the JSON text of a header says of the file `shard`, checked against the file's size. Raises InputError. Not
    for several threads at once."""
    digest = shard.header_sha256
    _, twin = _KNOWN.get(digest, (0, None))
    if twin is not None and twin.shard.nbytes == shard.nbytes:
        moved = [TensorMeta(t.name, t.shape, t.dtype, shard.path, t.start, t.nbytes) for t in twin.tensors]
        return Header(tuple(moved), dict(twin.metadata), shard)
    entries = _object(text, shown)
    metadata = _metadata(entries.pop("__metadata__", None), shown)
    first = PREFIX_BYTES + len(text)
    tensors = [_tensor(name, entry, shard.path, first, shown) for name, entry in entries.items()]
    # A zero-size tensor shares its start with its neighbour: the end breaks the tie, then the order in the header.
    tensors.sort(key=lambda meta: (meta.start, meta.start + meta.nbytes))
    _check_offsets(tensors, first, shard.nbytes, shown)
    header = Header(tuple(tensors), metadata, shard)
    if len(text) <= _MOST_KNOWN:
        if sum(nbytes for nbytes, _ in _KNOWN.values()) + len(text) > _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[digest] = (len(text), header)
    return header


def header_text(file: Any, size: int, shown: str) -> bytes:
    """The JSON text of the header of a file that has `size` bytes, by `file.read(count)`; no length is trusted before
    it is compared with the size. Raises InputError."""
    if size < PREFIX_BYTES:
        raise InputError(f"`{shown}` has {size} bytes, too few for a safetensors file", hint=_AGAIN)
    length = int.from_bytes(_exactly(file, PREFIX_BYTES, shown), "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"`{shown}` claims a header of {length} bytes; more than {MAX_HEADER_BYTES} is not allowed", hint=_AGAIN
        )
    if length > size - PREFIX_BYTES:
        short = length - (size - PREFIX_BYTES)
        raise InputError(f"`{shown}` is truncated inside its header: {short} bytes are missing", hint=_AGAIN)
    return _exactly(file, length, shown)


def _exactly(file: Any, count: int, shown: str) -> bytes:
    parts = []
    while count:
        part = file.read(count)
        if not part:
            raise InputError(f"`{shown}` became shorter while it was read", hint=_AGAIN)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class _Malformed(ValueError):
    """The header text is JSON of a kind that is not accepted; the message says why."""


def _object(text: bytes, shown: str) -> dict[str, Any]:
    """The header's JSON object, without duplicate keys or strings that are not Unicode."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) < len(found):
            twice = Counter(key for key, _ in found).most_common(1)[0][0]
            raise _Malformed(f"the key `{_short(twice)}` stands in it twice")
        return made

    def constant(word: str) -> None:
        raise _Malformed(f"`{word}` is not JSON")

    def integer(digits: str) -> float:
        # Longer numbers overflow 64 bits, and -0 is a float to the library: as floats both are rejected further on.
        return int(digits) if len(digits) <= 20 and digits != "-0" else math.inf

    try:
        if not text.startswith(b"{"):
            raise _Malformed("it does not start with `{`")
        decoded = text.decode("utf-8")
        made = _plain(decoded)
        if made is None:
            made = json.loads(decoded, object_pairs_hook=pairs, parse_constant=constant, parse_int=integer)
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        reason = f"it is not JSON: {error.msg} at character {error.pos}"
    except _Malformed as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    else:
        return dict(made)
    raise InputError(f"the header of `{shown}` cannot be read: {reason}", hint=_AGAIN)


def _plain(text: str) -> dict[str, Any] | None:
    """The JSON object that is written as `text` without any white space, save for blanks at the end, as all writers of
    safetensors do. None for all else; then nothing was lost in reading: no key twice, no `-0`, no long number."""
    try:
        made = json.loads(text)
        written = json.dumps(made, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) and written == text.rstrip(" ") else None


def _metadata(value: Any, shown: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"`__metadata__` in the header of `{shown}` is not an object", hint=_AGAIN)
    for key, text in value.items():
        if not isinstance(text, str):
            raise InputError(f"`__metadata__` in the header of `{shown}` maps `{_short(key)}` to no text", hint=_AGAIN)
        if not (_is_unicode(key) and _is_unicode(text)):
            raise InputError(f"`__metadata__` in the header of `{shown}` holds half of a surrogate pair", hint=_AGAIN)
    return value


def _tensor(name: str, entry: Any, file: str, first: int, shown: str) -> TensorMeta:
    """One entry of the header as a TensorMeta with an absolute offset; `first` is where the tensors' bytes begin."""

    def bad(what: str) -> InputError:
        return InputError(f"tensor `{_short(name)}` in `{shown}`: {what}", hint=_AGAIN)

    if not name:
        raise InputError(f"a tensor in `{shown}` has an empty name", hint="give it a name and save the file again")
    if not _is_unicode(name):
        raise InputError(f"a tensor name in `{shown}` holds half of a surrogate pair: `{_short(name)}`", hint=_AGAIN)
    if not isinstance(entry, dict):
        raise bad("its entry is not an object")
    if entry.keys() != _FIELDS:
        missing = sorted(_FIELDS - entry.keys())
        raise bad(f"`{missing[0]}` is missing" if missing else f"unknown field `{_short(min(entry.keys() - _FIELDS))}`")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise bad("its dtype is not text")
    if dtype not in DTYPE_BITS:
        near = did_you_mean(dtype, DTYPE_BITS)
        hint = f"known dtypes: {', '.join(DTYPE_BITS)}" + (f"; did you mean `{near}`?" if near else "")
        raise InputError(f"tensor `{_short(name)}` in `{shown}`: there is no dtype `{_short(dtype)}`", hint=hint)
    if not (isinstance(shape, list) and all(map(_is_size, shape))):
        raise bad("its shape is not a list of non-negative 64-bit integers")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
        raise bad("its data_offsets are not two non-negative 64-bit integers")
    begin, end = offsets
    if end < begin:
        raise bad(f"it ends at byte {end}, before it begins at byte {begin}")
    bits = _bits(shape, DTYPE_BITS[dtype])
    if bits is None:
        raise bad(f"shape {_short(str(shape))} of {dtype} overflows 64 bits")
    if bits % 8:
        raise bad(f"shape {_short(str(shape))} of {dtype} does not fill whole bytes")
    if end - begin != bits // 8:
        raise bad(
            f"shape {_short(str(shape))} of {dtype} takes {bits // 8} bytes, but its data_offsets span {end - begin}"
        )
    return TensorMeta(name, tuple(shape), dtype, file, first + begin, end - begin)


def _short(text: str) -> str:
    """`text`, cut where a message cannot hold it: a broken header may hold a name of megabytes."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _is_unicode(text: str) -> bool:
    """False where `text` holds half of a surrogate pair, which JSON's escapes can spell and UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _bits(shape: list[int], bits: int) -> int | None:
    """The size in bits, or None where it overflows on the way; `[2**63, 2, 0]` does, though it holds no element."""
    numel = 1
    for size in shape:
        numel *= size
        if numel > _MAX_SIZE:
            return None
    return None if numel * bits > _MAX_SIZE else numel * bits


def _check_offsets(tensors: list[TensorMeta], first: int, size: int, shown: str) -> None:
    """Tensors follow one another from the end of the header to the end of the file."""
    place = first
    for meta in tensors:
        if meta.start != place:
            fault = "leaves a hole after" if meta.start > place else "overlaps"
            before = "the tensor before it" if place > first or meta.start < place else "the header"
            raise InputError(
                f"tensor `{_short(meta.name)}` in `{shown}` {fault} {before}: "
                f"it begins at byte {meta.start - first} of the data, not at {place - first}",
                hint=_AGAIN,
            )
        place = meta.start + meta.nbytes
    if place > size:
        raise InputError(f"`{shown}` is truncated: {place - size} of {place} bytes are missing", hint=_AGAIN)
    if place < size:
        raise InputError(f"`{shown}` has {size - place} bytes after its last tensor", hint=_AGAIN)
