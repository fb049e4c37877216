"""Where tensors are read from, whatever that is: files on this disk, files on the Hub, or both."""

from __future__ import annotations

from mergekit_lite.checkpoint.closing import Closing
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.lazy import torch


class Source(Closing):
    """Gives any range of a tensor's bytes to any number of threads. A context manager."""

    @property
    def fetched(self) -> int:
        """Bytes that came over a network so far."""
        return 0

    @property
    def touched(self) -> tuple[str, ...]:
        """Files whose size and mtime stayed and whose ctime did not, between the first look at them and the latest:
        only their rights, links or names changed, or their bytes did and the mtime was set back."""
        return ()

    def abort(self) -> None:
        """Have every thread that waits for a network stop waiting. A disk lets nobody wait for long."""

    def check(self) -> None:
        """Raises InputError where a file is not what it was when its header was read, or cannot be had."""
        raise NotImplementedError

    def read_bytes(self, meta: TensorMeta, start_byte: int, stop_byte: int, buffer: memoryview) -> None:
        """Fills `buffer`, writable and of `stop_byte - start_byte` bytes, with that range of the tensor's bytes.

        Raises InputError where the file changed or cannot be read.
        """
        raise NotImplementedError

    def read(self, meta: TensorMeta, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D in its stored dtype, which must be one of TORCH_DTYPES.

        `out`, where given, is a contiguous CPU tensor of that dtype and of `stop - start` elements; it is filled and
        returned. Raises InputError where the file changed or cannot be read.
        """
        # Copies need no torch, and its import takes longer than many of them.
        from mergekit_lite.checkpoint.dtype import TORCH_DTYPES

        dtype = TORCH_DTYPES[meta.dtype]
        if not 0 <= start <= stop <= meta.numel:
            raise ValueError(f"elements [{start}, {stop}) of a tensor of {meta.numel}")
        if out is None:
            out = torch.empty(stop - start, dtype=dtype)
        elif out.dtype != dtype or out.numel() != stop - start or not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError(f"`out` is no contiguous CPU tensor of {stop - start} elements of {dtype}")
        if meta.packed is not None:
            from mergekit_lite.checkpoint.unpack import Unpacker

            return out.view(-1).copy_(Unpacker(self).load(meta, start, stop))
        if stop > start:
            size = dtype.itemsize
            buffer = out.view(-1).view(torch.uint8).numpy().data  # as bytes, since numpy lacks BF16 and FP8
            self.read_bytes(meta, start * size, stop * size, buffer)
        return out
