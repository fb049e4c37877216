"""LoRA adapters as peft writes them, without peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: Mapping[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
PREFIX = "base_model.model."


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG, **settings: Any
) -> Path:
    """The adapter of these tensors, `base_model.model.` before their names; `settings` change the configuration, those
    that are None are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {key: value for key, value in {**config, **settings}.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(made), encoding="utf-8")
    save_file({f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def factors(
    shapes: Mapping[str, tuple[int, ...]], rank: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random factors for the weights of these modules and shapes (out x in)."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for module, (rows, columns) in shapes.items():
        made[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
        made[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).to(dtype) / 8
    return made
