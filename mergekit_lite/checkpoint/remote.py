"""Reads tensors' bytes from the Hub, as reader.py does from the disk, and nothing of them stays.

Files are fetched in blocks of a fixed size on a fixed grid, each by one request, and kept in memory until others take
their place: what lies side by side, such as small tensors or the parts that two threads work on, is fetched once. The
block behind the one that is read is fetched ahead. Where a plan reads tensors several times, or their rows in another
order, a nameless file beside the output holds the blocks of the tensors at work (the spool), so that their bytes are
fetched once too. No torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mergekit_lite.checkpoint.header import Header, header_of, header_text, text_digest
from mergekit_lite.checkpoint.hub import Listing
from mergekit_lite.checkpoint.meta import Remote, ShardFile, TensorMeta
from mergekit_lite.checkpoint.ranges import RangeFile
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.checkpoint.spool import Key, Spool

T = TypeVar("T")
U = TypeVar("U")
AHEAD = 1 << 24  # bytes held for each thread, those fetched ahead included
_LEAST, _MOST = 1 << 18, 1 << 22  # bytes of a block
_GUESS = 1 << 16  # bytes fetched of a file for its header; more where the header is longer
_TOGETHER = 8  # headers that are fetched at once


def read_headers(files: Iterable[tuple[Remote, int]]) -> list[Header]:
    """The headers of files on the Hub, given with their sizes in bytes, in their order. Raises InputError."""
    wanted, stop = list(files), threading.Event()

    def text(file: tuple[Remote, int]) -> bytes:
        return header_text(_Beginning(RangeFile(*file, stop)), file[1], file[0].path)

    texts = _together(text, wanted, stop)
    return [
        header_of(text, ShardFile(remote.path, nbytes, 0, text_digest(text), remote), remote.path)
        for (remote, nbytes), text in zip(wanted, texts, strict=True)
    ]


def headers_at(repo: str, seen: Listing, names: Iterable[str]) -> list[Header]:
    """The headers of these files of a model, of which `seen` is what the Hub says. Raises InputError."""
    files = [(name, seen.files[name]) for name in names]
    return read_headers((Remote(repo, seen.commit, name, f.etag, f.large), f.nbytes) for name, f in files)


def _together(work: Callable[[T], U], items: Iterable[T], stop: threading.Event) -> list[U]:
    """`work` of all items, some at once. An error, or Ctrl-C, sets `stop`: nobody is to wait for the network then."""
    with ThreadPoolExecutor(_TOGETHER) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            stop.set()
            raise


class _Beginning:
    """A file on the Hub from its beginning on, for one thread."""

    def __init__(self, file: RangeFile):
        self._file = file
        self._at = 0
        self._have = b""

    def read(self, count: int) -> bytes:
        stop = min(self._file.nbytes, self._at + count)
        if stop > len(self._have):
            more = bytearray(min(self._file.nbytes, max(stop, _GUESS)) - len(self._have))
            self._file.read_into(len(self._have), memoryview(more))
            self._have += more
        part = self._have[self._at : stop]
        self._at = stop
        return part


class RemoteReader(Source):
    """Reads from files on the Hub. `threads` read at once, each from up to `streams` places in turn. `spool` bytes of
    the folder `beside` hold what does not fit into memory. A context manager; the interface is that of Reader."""

    def __init__(
        self, shards: Iterable[ShardFile], threads: int, streams: int, spool: int = 0, beside: Path | None = None
    ):
        self._stop = threading.Event()
        self._files = {s.path: RangeFile(s.remote, s.nbytes, self._stop) for s in shards if s.remote is not None}
        self._size = block_size(streams)
        self._most = threads * held(streams) // self._size
        self._blocks: OrderedDict[Key, Future[memoryview]] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()
        self._ahead = ThreadPoolExecutor(threads, "ahead")
        self._spool: Spool | None = None
        self._spool_bytes, self._beside = (spool if beside is not None else 0), beside

    def close(self) -> None:
        """Ends what is being fetched, and lets go of all that was."""
        self.abort()
        self._ahead.shutdown(cancel_futures=True)
        with self._lock:
            self._blocks.clear()
        if self._spool is not None:
            self._spool.close()

    def abort(self) -> None:
        """Have every thread that waits for the network stop waiting."""
        self._stop.set()

    @property
    def fetched(self) -> int:
        """Bytes fetched so far."""
        return sum(file.fetched for file in self._files.values())

    def check(self) -> None:
        """Raises InputError where a file is not what it was when its header was read, or cannot be had."""
        _together(RangeFile.check, self._files.values(), self._stop)

    def read_bytes(self, meta: TensorMeta, start_byte: int, stop_byte: int, buffer: memoryview) -> None:
        """Fills `buffer`, writable and of `stop_byte - start_byte` bytes, with that range of the tensor's bytes.

        Raises InputError where the file changed or cannot be read.
        """
        if not 0 <= start_byte <= stop_byte <= meta.nbytes:
            raise ValueError(f"bytes [{start_byte}, {stop_byte}) of a tensor of {meta.nbytes}")
        if buffer.format != "B":
            buffer = buffer.cast("B")
        start, stop = meta.start + start_byte, meta.start + stop_byte
        last = (meta.start + meta.nbytes - 1) // self._size
        at = start
        while at < stop:
            number, within = divmod(at, self._size)
            count = min(self._size - within, stop - at)
            part = buffer[at - start : at - start + count]
            if number < last:
                self._begin((meta.file, number + 1))
            if self._spool is None or not self._spool.read((meta.file, number), within, part):
                block, mine = self._take((meta.file, number))
                if mine:
                    self._fill((meta.file, number), block)
                part[:] = block.result()[within : within + count]
            at += count

    def _opened_spool(self) -> Spool | None:
        """The spool, made once the run has made its folder."""
        with self._lock:
            if self._spool is None and self._spool_bytes and self._beside is not None and self._beside.is_dir():
                with suppress(OSError):
                    self._spool = Spool(self._beside, self._size, self._spool_bytes)
            return self._spool

    def _begin(self, key: Key) -> None:
        """Have a block fetched, unless it is there."""
        if self._spool is not None and self._spool.holds(key):
            return
        block, mine = self._take(key)
        if mine:
            self._ahead.submit(self._fill, key, block)

    def _take(self, key: Key) -> tuple[Future[memoryview], bool]:
        """The block, and whether the caller is to fill it."""
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
                return block, False
            block = self._blocks[key] = Future()
            if len(self._blocks) > self._most:
                idle = next((old for old, one in self._blocks.items() if one.done()), None)
                if idle is not None:
                    del self._blocks[idle]
            return block, True

    def _fill(self, key: Key, block: Future[memoryview]) -> None:
        path, number = key
        try:
            file = self._files[path]
            start = number * self._size
            data = memoryview(bytearray(min(self._size, file.nbytes - start)))
            file.read_into(start, data)
            if (spool := self._opened_spool()) is not None:
                spool.write(key, data)
        except BaseException as fault:
            with self._lock:
                self._blocks.pop(key, None)  # the next who asks tries again
            block.set_exception(fault)
        else:
            block.set_result(data)


class Inputs(Source):
    """Files of which some lie on this disk and some on the Hub."""

    def __init__(self, local: Reader, remote: RemoteReader):
        self._local, self._remote = local, remote
        self._far = set(remote._files)

    def close(self) -> None:
        self._local.close()
        self._remote.close()

    def abort(self) -> None:
        self._remote.abort()

    @property
    def fetched(self) -> int:
        return self._remote.fetched

    @property
    def touched(self) -> tuple[str, ...]:
        """As of Reader; what the Hub says of a file is asked anew by `check`."""
        return self._local.touched

    def check(self) -> None:
        self._local.check()
        self._remote.check()

    def read_bytes(self, meta: TensorMeta, start_byte: int, stop_byte: int, buffer: memoryview) -> None:
        source: Source = self._remote if meta.file in self._far else self._local
        source.read_bytes(meta, start_byte, stop_byte, buffer)


def block_size(streams: int) -> int:
    """Bytes of a block where a thread reads from `streams` places in turn: two of each fit into its share."""
    size = _MOST
    while size > _LEAST and 2 * streams * size > AHEAD:
        size //= 2
    return size


def held(streams: int) -> int:
    """Bytes that are held for each thread, which reads from `streams` places in turn."""
    return max(AHEAD, 2 * streams * block_size(streams))
