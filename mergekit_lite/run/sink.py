"""Where finished blocks go: shard files under `out.partial/`, or tensors in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mergekit_lite.checkpoint.meta import BIT
from mergekit_lite.checkpoint.writer import ShardFileWriter
from mergekit_lite.errors import StoppedError
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.limits import hint_for
from mergekit_lite.plan.model import Output, OutTensor
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


class Files:
    """The shards of every output, each with its whole size from the start."""

    def __init__(self, outputs: Sequence[Output]):
        self._outputs = outputs
        self._writers: list[list[ShardFileWriter]] = []

    def create(self) -> None:
        """Make and preallocate every file. Raises StoppedError where the disk has no room."""
        for output in self._outputs:
            folder = partial(output.to)
            self._writers.append([])
            for shard in output.shards:  # each is known, and closed, whatever becomes of the next
                _make_home(folder, shard.file)
                self._writers[-1].append(ShardFileWriter.create(folder / shard.file, shard.header, shard.nbytes))

    def reopen(self, coded: bool = False) -> None:
        """Open the files of a stopped run; not those that it has `coded`, which may be gone, and come last. Raises
        StoppedError where one is missing or has another size."""
        for output in self._outputs:
            folder = partial(output.to)
            self._writers.append([])
            for shard in output.shards[: output.kept] if coded else output.shards:
                self._writers[-1].append(ShardFileWriter.open(folder / shard.file, shard.nbytes))

    def write(self, output: int, tensor: OutTensor, start: int, values: Tensor) -> None:
        data = values.contiguous().view(torch.uint8).numpy().data
        self.write_bytes(output, tensor, start // 8 if tensor.dtype == BIT else start * values.element_size(), data)

    def write_bytes(self, output: int, tensor: OutTensor, start: int, data: memoryview) -> None:
        self._writers[output][tensor.shard].write(tensor.start + start, data)

    def sync(self) -> None:
        for shards in self._writers:
            for shard in shards:
                shard.sync()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, though one fails
            for shards in self._writers:
                for shard in shards:
                    stack.callback(shard.close)


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
