"""Tiny mixtures of experts of every family, statistics of their routers, and merges of their experts made whole: by
direct formulas over fused weights in memory, where the program streams those on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from mergekit_lite import load_recipe, plan, run

EXPERTS, TOP = 8, 2
MIXTRAL = pytest.mark.parametrize("tiny", [("mixtral", False)], indirect=True, ids=["mixtral"])
_COMMON = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "num_experts_per_tok": TOP,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    **_COMMON,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
KINDS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=EXPERTS),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON, num_experts=EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=20
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, num_experts=EXPERTS, moe_intermediate_size=16, head_dim=6),
    "olmoe": lambda: OlmoeConfig(**_COMMON, num_experts=EXPERTS),
    "phimoe": lambda: PhimoeConfig(**_COMMON, num_local_experts=EXPERTS),
    "deepseek_v2": lambda: DeepseekV2Config(**_DEEPSEEK, topk_method="group_limited_greedy"),
    "deepseek_v3": lambda: DeepseekV3Config(**_DEEPSEEK),
}
COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Tiny:
    """A model in memory, its folder on disk, its statistics by layer (logits, counts) and the file of them."""

    model: Any
    folder: Path
    statistics: Path
    logits: Mapping[int, Tensor] = field(default_factory=dict)
    usage: Mapping[int, Tensor] = field(default_factory=dict)


def routers(model: Any) -> dict[int, Any]:
    """The feed-forward parts that have experts, by layer."""
    return {i: layer.mlp for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


def gate_of(part: Any) -> Any:
    """The router of a feed-forward part."""
    return part.router if hasattr(part, "router") else part.gate


def write_tiny(folder: Path, kind: str, *, fused: bool = False, dtype: torch.dtype = torch.float32) -> Tiny:
    """A random model of one kind, and statistics of random logits: usage with a tie and an expert never used."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(KINDS[kind]()).to(dtype).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape))
    model.save_pretrained(folder / "model", save_original_format=not fused)
    logits, usage, stored = {}, {}, {}
    generator = torch.Generator().manual_seed(3)
    for i in routers(model):
        drawn = torch.randn(40, EXPERTS, generator=generator, dtype=torch.float64)
        drawn += torch.linspace(1.5, 0, EXPERTS, dtype=torch.float64)[torch.randperm(EXPERTS, generator=generator)]
        drawn[:, 4] = -9.0 + 0.1 * drawn[:, 4]  # never among the two
        logits[i] = drawn
        usage[i] = torch.bincount(drawn.topk(TOP).indices.flatten(), minlength=EXPERTS)
        apart = kind in ("mixtral", "phimoe") and not fused
        module = "block_sparse_moe.gate" if apart else "mlp.router" if kind == "phimoe" else "mlp.gate"
        router = f"model.layers.{i}.{module}"
        stored[f"{router}.logits_gram"] = drawn.T @ drawn
        stored[f"{router}.usage"] = usage[i]
        stored[f"{router}.tokens"] = torch.tensor(len(drawn))
    save_file(stored, folder / "statistics.safetensors", {"format": "mergekit_lite statistics 1"})
    return Tiny(model, folder / "model", folder / "statistics.safetensors", logits, usage)


def alike(tiny: Tiny, layer: int, similarity: str) -> Tensor:
    """How similar every two experts are, of vectors taken whole."""
    part = routers(tiny.model)[layer]
    if similarity == "router-logits":
        vectors = tiny.logits[layer].T
    elif similarity == "router-weight":
        vectors = gate_of(part).weight.detach().double()
    else:
        experts = part.experts
        flat = [experts.gate_up_proj.detach().flatten(1), experts.down_proj.detach().flatten(1)]
        vectors = torch.cat(flat, dim=1).double()
    return torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)


def groups_of(tiny: Tiny, layer: int, into: int, similarity: str, routing: int = 1) -> dict[int, list[int]]:
    """The members of each group, by its dominant expert, which comes first."""
    usage = tiny.usage[layer].tolist()
    near = alike(tiny, layer, similarity)
    size = EXPERTS // routing
    found: dict[int, list[int]] = {}
    for start in range(0, EXPERTS, size):
        block = range(start, start + size)
        order = sorted(block, key=lambda e: (-usage[e], e))
        dominant = order[: into // routing]
        for d in dominant:
            found[d] = [d]
        for e in block:
            if e not in dominant:
                best = max(dominant, key=lambda d: (float(near[e, d]), -dominant.index(d)))
                found[best].append(e)
    return dict(sorted(found.items()))


def mean_of(tiny: Tiny, layer: int, members: list[int], *, align: bool, even: bool) -> tuple[Tensor, Tensor]:
    """The mean of some experts, gate and up over one another, and down: W_G = sum f pi(W) / sum f."""
    experts = routers(tiny.model)[layer].experts
    both, down = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()
    gate, up = both.chunk(2, dim=1)
    like = members[0]
    weights = torch.ones(len(members)) if even else tiny.usage[layer][members].double()
    weights = weights if weights.sum() > 0 else torch.ones(len(members))
    sums = [torch.zeros_like(gate[0]), torch.zeros_like(up[0]), torch.zeros_like(down[0])]
    for e, weight in zip(members, weights.tolist(), strict=True):
        p = np.arange(gate.shape[1])
        if align and e != like:
            c = gate[like] @ gate[e].T + up[like] @ up[e].T + down[like].T @ down[e]
            p = linear_sum_assignment(c.numpy(), maximize=True)[1]
        for total, part in zip(sums, (gate[e][p], up[e][p], down[e][:, p]), strict=True):
            total += weight * part
    made = [total / float(weights.sum()) for total in sums]
    return torch.cat(made[:2]), made[2]


def fill(part: Any, slot: int, both: Tensor, down: Tensor) -> None:
    """Put an expert's weights into a slot of a model in memory."""
    with torch.no_grad():
        part.experts.gate_up_proj[slot].copy_(both)
        part.experts.down_proj[slot].copy_(down)


def logits_of(model: Any) -> Tensor:
    ids = torch.arange(2 * 24).view(2, 24) * 7 % 48
    with torch.no_grad():
        return model.eval()(ids).logits


def write_recipe(path: Path, tiny: Tiny, settings: str, more: str = "") -> Path:
    models = f"{{a: {tiny.folder}, routers: {tiny.statistics}}}"
    step = f"m: {{use: merge_experts, of: a, with: {{{settings}}}}}"
    path.write_text(
        f"version: 1\n{more}models: {models}\nsteps:\n  {step}\nsave: {{to: {path.with_suffix('')}}}\n",
        encoding="utf-8",
    )
    return path


def merged(path: Path, **options: Any) -> Path:
    made = plan(load_recipe(path))
    run(made, **options)
    return Path(made.outputs[0].to)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def changed(tiny: Tiny, to: Path, change: Any) -> None:
    """A copy of the model whose tensors `change` has changed."""
    to.mkdir()
    (to / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
    held = tensors(tiny.folder)
    change(held)
    save_file(held, to / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The model of this kind, its experts apart or in one tensor."""
    kind, fused = request.param
    return write_tiny(tmp_path_factory.mktemp(kind), kind, fused=fused)
