"""Models for a loopback Hub, and recipes over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

HIDDEN, UP, WORDS, LAYERS = 64, 192, 700, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": UP,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": WORDS,
    "tie_word_embeddings": False,
}  # fmt: skip
HEAD = "version: 1\nmodels: {base: org/base, math: org/math, code: org/code}\n"
BOTH = "{math: {weight: 1.0}, code: {weight: 0.8}}"
RECIPES = {
    "linear": f"steps: {{m: {{use: linear, of: {BOTH}}}}}",
    "slerp": "steps: {m: {use: slerp, of: [math, code], with: {t: 0.4}}}",
    "ties": f"steps: {{m: {{use: ties, base: base, of: {BOTH}, with: {{scope: tensor}}}}}}",
    "pools": f"steps: {{m: {{use: ties, base: base, of: {BOTH}}}}}",
    "permute": (
        "steps: {p: {use: permute, of: math, like: base}, m: {use: linear, of: {p: {weight: 1}, base: {weight: 1}}}}"
    ),
}


def recipe(use: str, to: str = "out/x") -> str:
    return f"{HEAD}{RECIPES[use]}\nsave: {{step: m, to: {to}, dtype: bfloat16}}\n"


def shapes() -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for layer in range(LAYERS):
        head = f"model.layers.{layer}"
        made |= {f"{head}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        made |= {f"{head}.mlp.{part}_proj.weight": (UP, HIDDEN) for part in ("gate", "up")}
        made |= {f"{head}.mlp.down_proj.weight": (HIDDEN, UP)}
        made |= {f"{head}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return made | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}


def model(seed: int) -> dict[str, bytes]:
    """The files of a model with two shards and a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=generator).to(torch.bfloat16) for n, s in shapes().items()}
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[: len(names) // 2]}
    parts["model-00002-of-00002.safetensors"] = names[len(names) // 2 :]
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    return {
        **{file: save({name: tensors[name] for name in part}, {"format": "pt"}) for file, part in parts.items()},
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": json.dumps({"seed": seed, "words": "w" * 20_000}).encode(),
    }


def weights(files: Mapping[str, bytes]) -> int:
    """Bytes of the shards."""
    return sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))


def large_shard(path: Path, nbytes: int) -> Path:
    """A shard of about `nbytes` zeros, which take no room on the disk."""
    rows = nbytes // 2048
    meta = {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}
    header = json.dumps({"lm_head.weight": meta}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 2048)
    return path
