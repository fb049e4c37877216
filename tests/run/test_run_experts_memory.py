"""Merging experts takes the memory of two of them a thread, not of a layer: a process of its own is watched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.plan.budget import memory_bytes
from tests.faults.memory import digests, merge, named_figure

WIDTH, UNITS, EXPERTS = 512, 1024, 32
LAYER = 3 * WIDTH * UNITS * EXPERTS * 4  # bytes of a layer's experts in float32


@pytest.fixture(scope="module", params=["apart", "fused"])
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of experts in bfloat16, near copies of one another, so that they are soon matched."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(2)
    lead, both, down = "model.layers.0.mlp.", torch.randn(2 * UNITS, WIDTH), torch.randn(WIDTH, UNITS)
    tensors = {f"{lead}gate.weight": torch.randn(EXPERTS, WIDTH).bfloat16()}
    if request.param == "fused":
        tensors[f"{lead}experts.gate_up_proj"] = (both + 0.1 * torch.randn(EXPERTS, *both.shape)).bfloat16()
        tensors[f"{lead}experts.down_proj"] = (down + 0.1 * torch.randn(EXPERTS, *down.shape)).bfloat16()
    else:
        for e in range(EXPERTS):
            gate, up = (both + 0.1 * torch.randn(both.shape)).bfloat16().chunk(2)
            tensors[f"{lead}experts.{e}.gate_proj.weight"] = gate.contiguous()
            tensors[f"{lead}experts.{e}.up_proj.weight"] = up.contiguous()
            tensors[f"{lead}experts.{e}.down_proj.weight"] = (down + 0.1 * torch.randn(down.shape)).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say how much memory there is")
def test_a_merge_of_experts_keeps_the_figure_that_its_plan_names(experts: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"version: 1\nmodels: {{a: {experts}}}\nsteps:\n  m: {{use: merge_experts, of: a, with: "
        f"{{into: 8, similarity: weight, router: compact}}}}\nsave: {{to: {tmp_path / 'out'}}}\n",
        encoding="utf-8",
    )
    refused = merge("run", str(path), "--memory", "90MB", "--threads", "1")
    assert refused.code == 3 and "`m` needs two experts of `model.layers.0.mlp.gate` at once" in refused.err
    figure = named_figure(refused)
    assert figure is not None
    kept = merge("run", str(path), "--memory", figure, "--threads", "1")
    assert kept.code == 0, kept.err
    standing = plan(load_recipe(path), threads=1, memory="4GB", check_output=False)
    assert kept.peak <= memory_bytes(figure)
    assert standing.peak_bytes < LAYER * 2 / 3  # with what the solver takes
    free = run(plan(load_recipe(path), out=tmp_path / "free"), threads=2)
    assert digests(kept) == [digest for files in free.shards.values() for digest in files.values()]
