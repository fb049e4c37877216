"""Tiny dense models of every family that mixtures are built from, and those mixtures made another way: the dense model
in memory whose feed-forward parts are replaced by ones that choose among those of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from mergekit_lite import load_recipe, plan, run

LAYERS, WIDTH, VOCABULARY = 3, 24, 48
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": LAYERS,
}
KINDS: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=10),
    "deepseek_v2": lambda: DeepseekV2Config(**_LATENT),
    "deepseek_v3": lambda: DeepseekV3Config(**_LATENT),
}


def write_dense(folder: Path, kind: str, seed: int, **changes: Any) -> Any:
    """A random model on disk; gives it as it is in memory. No tensor of it is all ones or zeros."""
    torch.manual_seed(seed)
    config = KINDS[kind]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def write_states(path: Path, seed: int, layers: int = LAYERS, width: int = WIDTH) -> NDArray[np.float32]:
    """A file of hidden states as `merge stats` writes it; gives their means (layers, width)."""
    states = torch.randn(5, layers, width, generator=torch.Generator().manual_seed(seed))
    mean = states.double().mean(dim=0).float()
    save_file({"hidden_states": states, "mean": mean}, path, {"format": "mergekit_lite statistics 1"})
    return mean.numpy()


def mixture(path: Path, models: Mapping[str, Path], step: str, **options: Any) -> Path:
    """What the step gives, run by the program."""
    named = ", ".join(f"{name}: {at}" for name, at in models.items())
    text = f"version: 1\nmodels: {{{named}}}\nsteps:\n  m: {{use: moe, {step}}}\nsave: {{to: {path.with_suffix('')}}}\n"
    path.write_text(text, encoding="utf-8")
    settings = {key: options.pop(key) for key in ("threads", "block") if key in options}
    made = plan(load_recipe(path), **settings)
    run(made)
    return Path(made.outputs[0].to)


def loaded(folder: Path) -> Any:
    """The written model by stock transformers, which must find every tensor that it looks for and no other."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(told.values()), told
    return model.eval()


def logits_of(model: Any) -> Tensor:
    ids = torch.arange(2 * 24).view(2, 24) * 7 % VOCABULARY
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


class Routed(nn.Module):
    """A feed-forward part that chooses among `experts`, dense ones with factors, by the rows of `gate`. `law` tells
    what becomes of scores; a shared expert comes on top, times the sigmoid of its gate where it has one."""

    def __init__(
        self,
        experts: Sequence[tuple[nn.Module, float]],
        gate: Tensor,
        chosen: int,
        law: str,
        shared: tuple[nn.Module, float] | None = None,
        shared_gate: Tensor | None = None,
    ):
        super().__init__()
        self.experts = nn.ModuleList(expert for expert, _ in experts)
        self.factors = [factor for _, factor in experts]
        self.shared = None if shared is None else shared[0]
        self.shared_factor = 1.0 if shared is None else shared[1]
        self.gate, self.shared_gate, self.chosen, self.law = gate, shared_gate, chosen, law

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.gate.T
        scores = scores.sigmoid() if self.law == "sigmoid" else scores.softmax(dim=-1)
        best = scores.argsort(dim=-1, descending=True)[..., : self.chosen]
        weights = torch.zeros_like(scores).scatter(-1, best, scores.gather(-1, best))
        if self.law != "unnormalised":
            weights = weights / weights.sum(dim=-1, keepdim=True)
        parts = [f * expert(x) for f, expert in zip(self.factors, self.experts, strict=True)]
        out = (torch.stack(parts, dim=-1) * weights[..., None, :]).sum(dim=-1)
        if self.shared is not None:
            over = 1.0 if self.shared_gate is None else (x @ self.shared_gate.T).sigmoid()
            out = out + over * self.shared_factor * self.shared(x)
        return out


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
