"""State dicts in memory, seen as checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.checkpoint.meta import DTYPE_CODES, Checkpoint, TensorMeta
from mergekit_lite.checkpoint.quantized import with_numbers
from mergekit_lite.errors import InputError


def memory_checkpoint(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of one state dict, called `name`. Raises InputError for a dtype that no checkpoint stores, and
    as `with_numbers` does."""
    metas: dict[str, TensorMeta] = {}
    for key, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPE_CODES:
            raise InputError(f"`{key}` of `{name}` has the dtype {dtype}", hint="convert it to a floating dtype first")
        nbytes = tensor.numel() * tensor.element_size()
        metas[key] = TensorMeta(key, tuple(tensor.shape), DTYPE_CODES[dtype], name, 0, nbytes)
    config, metas = with_numbers(config, metas)
    return Checkpoint(name, None, None, config, metas, ())


class MemoryReader:
    """Reads the state dicts of `memory_checkpoint`s, by model name."""

    def __init__(self, models: Mapping[str, Mapping[str, Tensor]]):
        self._models = models

    def read_bytes(self, meta: TensorMeta, start: int, stop: int, buffer: memoryview) -> None:
        """Stored bytes [start, stop) of a tensor into `buffer`."""
        flat = self._models[meta.file][meta.name].detach().reshape(-1)
        size = flat.element_size()
        first = start // size
        values = flat[first : -(-stop // size)].cpu().contiguous().view(torch.uint8)
        buffer[:] = values[start - first * size : stop - first * size].numpy().data
