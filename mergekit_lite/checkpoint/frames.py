"""Frames of coded masks: bits to bytes and back, and reading any part of a mask. No torch.

Nothing that a file says of its frames is believed: where they lie is held against the bytes that are there, how large
they are against what so many entries can take, and what comes out against what the shapes say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.checkpoint.coded import FRAME, TOGETHER, library
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.errors import InputError

_LEVEL = 1  # bits of masks have no matches worth a search: higher levels take longer and more bytes
_AGAIN = "the file is damaged: copy it again from where it is whole, or make the store again"

Bytes = NDArray[np.uint8]


class ByteSource(Protocol):
    """Where stored tensors come from."""

    def read_bytes(self, meta: TensorMeta, start_byte: int, stop_byte: int, buffer: memoryview, /) -> None:
        """Stored bytes of a tensor into `buffer`."""
        ...


def joined(bits: Sequence[Bytes]) -> Bytes:
    """The symbols of a frame as bytes. `bits` has an array of zeros and ones for each task, all of one length."""
    tasks = len(bits)
    symbols = np.zeros(len(bits[0]), dtype=np.uint8)
    for place, one in enumerate(bits):
        symbols |= one << np.uint8(place)
    if (per := TOGETHER // tasks) == 1:
        return symbols
    rows = np.zeros((-(-len(symbols) // per), per), dtype=np.uint8)
    rows.reshape(-1)[: len(symbols)] = symbols
    made = rows[:, 0].copy()
    for place in range(1, per):
        made |= rows[:, place] << np.uint8(place * tasks)
    return made


def parted(raw: Bytes, tasks: int, place: int, start: int, stop: int) -> Bytes:
    """The zeros and ones that task number `place` has for the entries [start, stop) of a frame, out of its bytes."""
    per = TOGETHER // tasks
    first = start // per
    part = raw[first : -(-stop // per)]
    bits = np.empty((len(part), per), dtype=np.uint8)
    for number in range(per):
        bits[:, number] = (part >> np.uint8(number * tasks + place)) & np.uint8(1)
    return bits.reshape(-1)[start - first * per : stop - first * per]


def encode(raw: Bytes) -> bytes:
    """The bytes of a frame, coded, with a checksum. The same for the same version of the library."""
    found: bytes = library().ZstdCompressor(level=_LEVEL, write_checksum=True).compress(raw.data)
    return found


def decode(data: memoryview, nbytes: int) -> Bytes:
    """The `nbytes` bytes of a coded frame, neither more nor fewer. Raises ValueError, which says what is wrong; memory
    does not depend on what the frame says of itself."""
    zstd = library()
    try:
        said = zstd.frame_content_size(data)
        if said != nbytes:
            raise ValueError(f"says that it holds {said if said >= 0 else 'any number of'} bytes, not {nbytes}")
        # A window is memory that a frame may ask for; one of ours is no larger than what is in it.
        reader = zstd.ZstdDecompressor(max_window_size=FRAME)
        found = np.frombuffer(reader.decompress(data, max_output_size=nbytes, allow_extra_data=False), dtype=np.uint8)
    except zstd.ZstdError as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    if len(found) != nbytes:
        raise ValueError(f"holds {len(found)} bytes, not {nbytes}")
    return found


def most(nbytes: int) -> int:
    """The bytes that a frame of `nbytes` bytes takes at most: what has no order in it is stored as it is."""
    return nbytes + nbytes // 256 + 128


class Frames:
    """Gives bits of coded masks. Of every file the latest frame is kept, since the blocks of a merge come in order and
    its tasks are read together. For one thread."""

    def __init__(self, source: ByteSource):
        self._source = source
        self._sizes: dict[str, tuple[TensorMeta, NDArray[np.int64]]] = {}  # by file: where frames end
        self._held: dict[str, tuple[int, int, Bytes]] = {}  # by file: where the tensor lies, the frame's number, bytes

    def bits(self, meta: TensorMeta, start: int, stop: int) -> Bytes:
        """Zeros and ones for the entries [start, stop) of a mask. Raises InputError where a frame is damaged."""
        assert meta.coded is not None
        made = np.empty(stop - start, dtype=np.uint8)
        at = start
        while at < stop:
            number, within = divmod(at, FRAME)
            end = min(stop, (number + 1) * FRAME)
            raw = self._frame(meta, number)
            last = within + end - at
            made[at - start : end - start] = parted(raw, meta.coded.tasks, meta.coded.place, within, last)
            at = end
        return made

    def _frame(self, meta: TensorMeta, number: int) -> Bytes:
        held = self._held.get(meta.file)
        if held is not None and held[:2] == (meta.start, number):
            return held[2]
        assert meta.coded is not None
        ends = self._ends(meta, meta.coded.sizes)
        begin, end = int(ends[number]), int(ends[number + 1])
        entries = min(FRAME, meta.numel - number * FRAME)
        nbytes = -(-entries // (TOGETHER // meta.coded.tasks))
        if end - begin > most(nbytes):
            raise _fault(meta, f"frame {number} takes {end - begin} bytes for {nbytes}")
        data = memoryview(bytearray(end - begin))
        self._source.read_bytes(meta, begin, end, data)
        try:
            raw = decode(data, nbytes)
        except ValueError as error:
            raise _fault(meta, f"frame {number} {error}") from error
        self._held[meta.file] = (meta.start, number, raw)
        return raw

    def _ends(self, meta: TensorMeta, sizes: TensorMeta) -> NDArray[np.int64]:
        """Where the frames of a tensor begin and end, from its first byte on: one number more than there are frames."""
        known = self._sizes.get(meta.file)
        if known is not None and known[0] == sizes:
            return known[1]
        raw = np.empty(sizes.nbytes, dtype=np.uint8)
        self._source.read_bytes(sizes, 0, sizes.nbytes, raw.data)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(raw.view("<u4"), dtype=np.int64)])
        if int(ends[-1]) != meta.nbytes:
            raise _fault(meta, f"its frames take {int(ends[-1])} bytes, and {meta.nbytes} are there")
        self._sizes[meta.file] = (sizes, ends)
        return ends


def _fault(meta: TensorMeta, what: str) -> InputError:
    return InputError(f"the masks `{meta.name[:200]}` in `{meta.file}`: {what}", hint=_AGAIN)
