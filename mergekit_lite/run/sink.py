"""Where finished blocks go: shard files under `out.partial/`, or tensors in memory."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mergekit_lite.checkpoint.meta import BIT
from mergekit_lite.checkpoint.writer import ShardFileWriter
from mergekit_lite.errors import Problem, StoppedError
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.limits import hint_for
from mergekit_lite.plan.model import Output, OutShard, OutTensor
from mergekit_lite.plan.words import size
from mergekit_lite.run.journal import Journal


class Sink(Protocol):
    def write(self, output: int, tensor: OutTensor, start: int, values: Tensor) -> None:
        """Elements of an output tensor from `start` on, flat, in the output's dtype."""
        ...

    def write_bytes(self, output: int, tensor: OutTensor, start: int, data: memoryview) -> None:
        """Stored bytes of an output tensor from byte `start` on."""
        ...

    def sync(self) -> None:
        """Return when all that was written before the call is safe."""
        ...

    def close(self) -> None: ...


def partial(to: str) -> Path:
    """The folder that an output grows in: `out/ties` -> `out/ties.partial`."""
    path = Path(to)
    return path.with_name(path.name + ".partial")


def shard_path(outputs: Sequence[Output], output: int, shard: int) -> Path:
    """Where a shard of an unfinished output lies."""
    return partial(outputs[output].to) / outputs[output].shards[shard].file


def first_name(outputs: Sequence[Output], output: int, shard: int) -> Path:
    """Where a shard of an unfinished output lies, or the file of another output of which it is a further name."""
    path, same = shard_path(outputs, output, shard), outputs[output].shards[shard].same
    if same is not None:
        with contextlib.suppress(OSError):
            if os.path.samefile(path, shard_path(outputs, *same)):
                return shard_path(outputs, *same)
    return path


class Files:
    """The shards of every output, each with its whole size from the start. A shard that several outputs share is one
    file with a name in the folder of each, or, where the file system refuses that, several files that are written side
    by side: then `copied` names those after the first, by output and number."""

    def __init__(self, outputs: Sequence[Output]):
        self._outputs = outputs
        self._writers: dict[tuple[int, int], list[ShardFileWriter]] = {}
        self.copied: list[tuple[int, int]] = []

    def create(self) -> None:
        """Make and preallocate every file. Raises StoppedError where the disk has no room."""
        for place, shard in self._shards():  # each is known, and closed, whatever becomes of the next
            path = shard_path(self._outputs, *place)
            _make_home(partial(self._outputs[place[0]].to), shard.file)
            if shard.same is not None and _linked(shard_path(self._outputs, *shard.same), path):
                continue
            _part(path)
            self._add(place, shard, ShardFileWriter.create(path, shard.header, shard.nbytes))

    def reopen(self, coded: bool = False) -> None:
        """Open the files of a stopped run; not those that it has `coded`, which may be gone. Raises StoppedError where
        one is missing or has another size."""
        for place, shard in self._shards():
            if coded and place[1] >= self._outputs[place[0]].kept:
                continue
            path = shard_path(self._outputs, *place)
            if first_name(self._outputs, *place) == path:
                set_writable(path, True)  # a run may have been stopped between its first output and its last
                self._add(place, shard, ShardFileWriter.open(path, shard.nbytes))

    def write(self, output: int, tensor: OutTensor, start: int, values: Tensor) -> None:
        data = values.contiguous().view(torch.uint8).numpy().data
        self.write_bytes(output, tensor, start // 8 if tensor.dtype == BIT else start * values.element_size(), data)

    def write_bytes(self, output: int, tensor: OutTensor, start: int, data: memoryview) -> None:
        for file in self._writers[output, tensor.shard]:
            file.write(tensor.start + start, data)

    def sync(self) -> None:
        for files in self._writers.values():
            for file in files:
                file.sync()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, though one fails
            for files in self._writers.values():
                for file in files:
                    stack.callback(file.close)

    def notes(self) -> list[Problem]:
        """What there is to say of shards that were to be one file and are several."""
        if not self.copied:
            return []
        names = ", ".join(f"`{Path(self._outputs[o].to) / self._outputs[o].shards[s].file}`" for o, s in self.copied)
        nbytes = sum(self._outputs[o].shards[s].nbytes for o, s in self.copied)
        message = f"copies, since the file system gives no file two names there: {names} ({size(nbytes)})"
        return [Problem(message, None, "put all folders of a recipe on one disk that has hard links")]

    def linked(self) -> dict[str, int]:
        """By output folder, the bytes of shards that are further names of another output's."""
        found = {output.to: 0 for output in self._outputs}
        for place, shard in self._shards():
            if shard.same is not None and place not in self.copied:
                found[self._outputs[place[0]].to] += shard.nbytes
        return found

    def _shards(self) -> Iterator[tuple[tuple[int, int], OutShard]]:
        for o, output in enumerate(self._outputs):
            for s, shard in enumerate(output.shards):
                yield (o, s), shard

    def _add(self, place: tuple[int, int], shard: OutShard, file: ShardFileWriter) -> None:
        if shard.same is None:
            self._writers[place] = [file]
        else:
            self._writers[shard.same].append(file)
            self.copied.append(place)


def set_writable(path: Path, writable: bool) -> None:
    """Let the owner write into a file, or nobody, as far as it has such modes. Follows no link."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mode = stat.S_IMODE(os.fstat(file).st_mode)
            wanted = mode | stat.S_IWUSR if writable else mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
            if wanted != mode:
                os.fchmod(file, wanted)
        finally:
            os.close(file)


def _linked(first: Path, path: Path) -> bool:
    """Give the file `first` the name `path` too, in place of a file that is there; False where that cannot be."""
    try:
        _part(path, always=True)
        os.link(first, path)
    except OSError:
        return False
    return True


def _part(path: Path, always: bool = False) -> None:
    """Remove a file that an earlier attempt has left, where it has other names: they may be those of finished files,
    which nothing may be written into."""
    with contextlib.suppress(OSError):
        found = path.lstat()
        if stat.S_ISREG(found.st_mode) and (always or found.st_nlink > 1):
            path.unlink()


def _make_home(folder: Path, name: str) -> None:
    """Make the folder, below an output's, of a file of this name."""
    if "/" in name:
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            message = f"cannot make `{(folder / name).parent}`: {fault.strerror}"
            raise StoppedError(message, hint=hint_for(fault)) from fault


def make_safe(sink: Sink, journal: Journal) -> None:
    """Return when all units that the journal tells of lie on the disk, and it says so. Raises StoppedError where the
    disk refuses; then the journal has forgotten the units whose bytes may be lost."""
    mark = journal.mark()
    if mark is None:
        return
    try:
        sink.sync()
    except StoppedError:
        journal.distrust()
        raise
    journal.safe(mark)


class Memory:
    """Output tensors in memory, by output and name."""

    def __init__(self, outputs: Sequence[Output]):
        from mergekit_lite.checkpoint.dtype import TORCH_DTYPES

        self.tensors: list[dict[str, Tensor]] = [
            {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype]) for each in output.tensors for t in each.parts}
            for output in outputs
        ]

    def write(self, output: int, tensor: OutTensor, start: int, values: Tensor) -> None:
        self.tensors[output][tensor.name].view(-1)[start : start + values.numel()] = values

    def write_bytes(self, output: int, tensor: OutTensor, start: int, data: memoryview) -> None:
        whole = self.tensors[output][tensor.name].view(-1).view(torch.uint8)
        whole[start : start + len(data)] = torch.frombuffer(data, dtype=torch.uint8)

    def sync(self) -> None:
        """Memory is as safe as it gets."""

    def close(self) -> None:
        """Nothing to close: the tensors belong to the caller."""
