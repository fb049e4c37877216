"""The folder of statistics: a safetensors file for each kind, which is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from mergekit_lite.checkpoint.header import PREFIX_BYTES
from mergekit_lite.checkpoint.meta import DTYPE_BITS, DTYPE_CODES
from mergekit_lite.checkpoint.writer import ShardFileWriter, encode_header
from mergekit_lite.errors import StoppedError, UsageError
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.limits import hint_for

FORMAT = "mergekit_lite statistics 1"


def check_free(out: Path) -> None:
    """Raises UsageError where something is there already."""
    if os.path.lexists(out):
        raise UsageError(f"`{out}` exists", hint="name a new folder: nothing is ever overwritten")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that gets its name at the end; after an error nothing is left of it."""
    check_free(out)
    try:
        if not out.parent.is_dir():  # a sandbox refuses to make itself
            out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    except OSError as fault:
        raise StoppedError(f"cannot write `{out}`: {fault.strerror}", hint=hint_for(fault)) from fault
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        check_free(out)
        os.rename(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class StatisticsFile:
    """A safetensors file whose tensors, `(dtype, shape)` by name, come one after the other, in any order, and whose
    metadata are known at the end only; `longest` are metadata that take no less room. A context manager."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], longest: Mapping[str, str]):
        self._entries = [(name, code, shape, _nbytes(code, shape)) for name, (code, shape) in tensors.items()]
        header, begins = encode_header(self._entries, longest)
        self._length = len(header)
        self._begins = {entry[0]: begin for entry, begin in zip(self._entries, begins, strict=True)}
        total = len(header) + sum(entry[3] for entry in self._entries)
        self._writer = ShardFileWriter.create(path, header, total)

    def __enter__(self) -> StatisticsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor in its place."""
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._writer.write(self._begins[name], data.numpy().data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, filled up with spaces to the room that was kept for it, and flush."""
        header, _ = encode_header(self._entries, metadata)
        text = header[PREFIX_BYTES:].rstrip(b" ").ljust(self._length - PREFIX_BYTES, b" ")
        assert len(text) == self._length - PREFIX_BYTES
        self._writer.write(0, len(text).to_bytes(PREFIX_BYTES, "little") + text)
        self._writer.sync()


def write_statistics(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A file of tensors that are all there."""
    kinds = {name: (dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    with StatisticsFile(path, kinds, metadata) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
        file.finish(metadata)


def dtype_code(dtype: torch.dtype) -> str:
    return DTYPE_CODES[str(dtype).removeprefix("torch.")]


def _nbytes(code: str, shape: tuple[int, ...]) -> int:
    number = DTYPE_BITS[code] // 8
    for length in shape:
        number *= length
    return number
