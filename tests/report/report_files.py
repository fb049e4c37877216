"""Checkpoints for these tests, written with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.checkpoint.writer import encode_header

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 4,
    "vocab_size": 6,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def write(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> Checkpoint:
    """A checkpoint of `shards` files (with an index where more than one), the tensors dealt out in turn."""
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        homes = {name: files[place % shards] for place, name in enumerate(tensors)}
        for file in files:
            save_file({name: tensors[name] for name in tensors if homes[name] == file}, folder / file)
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(str(folder), None)


def write_raw(folder: Path, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Checkpoint:
    """A checkpoint of one tensor given as bytes, for the dtypes that torch lacks."""
    folder.mkdir(parents=True)
    header, _ = encode_header([(name, dtype, shape, len(data))], {})
    (folder / "model.safetensors").write_bytes(header + data)
    return open_checkpoint(str(folder), None)


def llama(seed: int = 0, layers: int = 3) -> dict[str, Tensor]:
    """Tensors named and laid out as LLAMA says, tied."""
    torch.manual_seed(seed)
    names = ["mlp.up_proj.weight", "self_attn.q_proj.weight"]
    body = {f"model.layers.{i}.{name}": torch.randn(5, 4) for i in range(layers) for name in names}
    return {"model.embed_tokens.weight": torch.randn(6, 4), **body, "model.norm.weight": torch.ones(4)}


def noise(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Numbers of a dtype: every bit pattern where it is narrow, so that NaN, infinities and -0 are among them."""
    torch.manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(count) < 0.5
    if dtype in (torch.float32, torch.float64, torch.complex64):
        made = torch.randn(count, dtype=torch.float64 if dtype == torch.float64 else dtype).to(dtype)
        made[::11] = float("nan")
        made[1::13] = float("inf")
        made[2::17] = float("-inf")
        made[3::5] = 0
        return made
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)
