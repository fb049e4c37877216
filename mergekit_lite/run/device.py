"""Where kernels run. The only file that names cuda."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import BIT, TensorMeta
from mergekit_lite.checkpoint.unpack import Unpacker
from mergekit_lite.errors import StoppedError, UsageError
from mergekit_lite.run.bits import Masks
from mergekit_lite.run.copy import ByteSource
from mergekit_lite.run.transplant import Shared

RING = 3  # staging buffers of a thread: one is filled while others are on their way


def find_device(name: str) -> torch.device:
    """The device of this name: `cpu`, `cuda`, `cuda:1`, or with `auto` the first GPU if there is one.

    Raises UsageError for another name and where there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if name != "auto" and (kind != "cuda" or not (index or "0").isdecimal()):
        raise UsageError(f"there is no device `{name}`", hint="`cpu`, `cuda`, `cuda:1` or `auto`")
    number = int(index or 0)
    if number >= count:
        what = f"torch sees {count} of them" if count else "torch sees none, or was built without CUDA"
        raise UsageError(f"there is no GPU `{name}`: {what}", hint="leave out `--device`, or install torch with CUDA")
    return torch.device("cuda", number)


@dataclass(frozen=True, slots=True)
class Graphics:
    """The GPUs that torch can use, each in words; the version of CUDA that torch was built for, None where for none,
    and the newest one that the driver knows, None where it does not say."""

    names: tuple[str, ...]
    built_for: str | None
    driver_for: str | None


def graphics() -> Graphics:
    """What torch sees of GPUs. Nothing is left on them but what asking for their memory takes."""
    built_for = torch.version.cuda or getattr(torch.version, "hip", None)
    if built_for is None:
        return Graphics((), None, None)
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    names: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an old driver, and so does the caller
        known = ask() if ask is not None else 0
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            free, total = torch.cuda.mem_get_info(number)
            names.append(f"{torch.cuda.get_device_name(number)}, {free / 1e9:.1f} GB free of {total / 1e9:.1f} GB")
    return Graphics(tuple(names), built_for, f"{known // 1000}.{known % 1000 // 10}" if known else None)


def lane(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What a thread works in: on a GPU a stream of its own, so that its copies overlap with the others' kernels. There,
    too little memory is a StoppedError."""
    return nullcontext if device.type == "cpu" else lambda: _Stream(device)


class _Stream:
    def __init__(self, device: torch.device):
        self._context = torch.cuda.stream(torch.cuda.Stream(device))

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._context.__exit__(kind, error, trace)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            hint = "use fewer `--threads` or a smaller `--block`, or leave out `--device`; `--resume` goes on"
            raise StoppedError("the GPU has too little memory for this merge", hint=hint) from error


@dataclass
class DeviceLoader:
    """Stored numbers on a GPU in the dtype of the arithmetic, by way of page-locked memory, so that the copy goes on
    while the next block is read. For one thread."""

    source: ByteSource
    compute: torch.dtype
    device: torch.device
    shared: Shared = field(default_factory=Shared)
    _ring: list[tuple[Tensor, torch.cuda.Event]] = field(default_factory=list)
    _turn: int = 0
    _unpacker: Unpacker | None = None
    _masks: Masks | None = None

    def load(self, meta: TensorMeta, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in memory of their own."""
        if meta.dtype == BIT:
            self._masks = self._masks or Masks(self.source)
            return self._masks.load(meta, start, stop).to(self.device).to(self.compute)
        if meta.packed is not None:
            self._unpacker = self._unpacker or Unpacker(self.source)
            return self._unpacker.load(meta, start, stop).to(self.device, self.compute)
        dtype = TORCH_DTYPES[meta.dtype]
        nbytes = (stop - start) * dtype.itemsize
        raw, copied = self._buffer(nbytes)
        copied.synchronize()
        staged = raw[:nbytes]
        self.source.read_bytes(meta, start * dtype.itemsize, stop * dtype.itemsize, staged.numpy().data)
        moved = staged.view(dtype).to(self.device, non_blocking=True)
        copied.record()
        return moved.to(self.compute)

    def _buffer(self, nbytes: int) -> tuple[Tensor, torch.cuda.Event]:
        if len(self._ring) < RING:
            self._ring.append((torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
        self._turn = (self._turn + 1) % len(self._ring)
        raw, copied = self._ring[self._turn]
        if len(raw) < nbytes:
            copied.synchronize()
            raw = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self._ring[self._turn] = (raw, copied)
        return raw, copied
