"""What tests of several folders share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

NAMES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (16, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}

# No test writes into the user's cache, its processes included.
os.environ["MERGEKIT_LITE_CACHE"] = "0"


@pytest.fixture
def tiny_checkpoint() -> Callable[..., Path]:
    """A function that writes a checkpoint of one file, `names` giving its tensors' shapes, and returns its folder:
    `tiny_checkpoint(folder, names=NAMES, dtype=torch.float32, seed=0, config=CONFIG)`."""

    def make(
        folder: Path,
        names: Mapping[str, tuple[int, ...]] = NAMES,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        config: Mapping[str, Any] | None = CONFIG,
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make
