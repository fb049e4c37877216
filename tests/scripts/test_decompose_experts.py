"""The training behind MC-SMoE's compression: what its parts are before, in and after it, on a network of two steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "reproduce"))
import decompose_experts as script

GROUPS = [[0, 2], [1], [3]]


@pytest.fixture
def part() -> script.LowRankRows:
    weight = torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(0))
    weight[2] = weight[0]
    return script.LowRankRows(weight, GROUPS, 2, halves=2)


def test_it_starts_as_the_weights_and_experts_of_a_group_stay_one(part: script.LowRankRows) -> None:
    weight = torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(0))
    made = part(weight)
    torch.testing.assert_close(made[[0, 1, 3]], weight[[0, 1, 3]], rtol=0, atol=1e-6)
    assert torch.equal(made[2], made[0])
    # Each half is a matrix of its own, with a nearest one of rank 2.
    half = weight[1, 6:].double().numpy()
    vectors = np.linalg.eigh(half.T @ half)[1][:, -2:]
    np.testing.assert_allclose((part.u @ part.v)[3].detach().numpy(), half @ vectors @ vectors.T, atol=1e-5)


def test_rows_are_cut_by_weight_times_gradient(part: script.LowRankRows) -> None:
    target = torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(1))
    (part(target) * target).sum().backward()
    # The gradient of S is the sum over the experts of a group.
    gradient = torch.stack([target[members].sum(0) for members in GROUPS]).reshape(6, 6, 5)
    scores = (part.s.detach() * gradient).abs().mean(2)
    part.watch()
    torch.testing.assert_close(part.importance, scores * (1 - script.AVERAGE))
    part.cut(0.5)
    wanted = [sorted(np.argsort(-row)[:3].tolist()) for row in scores.numpy()]
    assert [row.nonzero().flatten().tolist() for row in part.kept[..., 0]] == wanted
    # A row that is cut does not come back, whatever its importance.
    part.importance.copy_(1.0 - part.kept[..., 0])
    part.cut(0.34)
    assert [
        set(row.nonzero().flatten().tolist()) <= set(w) for row, w in zip(part.kept[..., 0], wanted, strict=True)
    ] == [True] * 6
    assert part.kept.sum() == 6 * 2
    stored = part.parts()
    assert stored["s"].shape == (12, 5) and stored["rows"].shape == (12, 2)


def test_the_whole_way(tmp_path: Path) -> None:
    found = script.measure(tmp_path, 0, steps=2, recovery=3, rank=4, share=0.1)
    assert found["loaded"] == pytest.approx(found["recovered"], abs=1e-6)
    assert found["stable_rank"][1] < found["stable_rank"][0]
    # The parts that are stored make the weights that transformers loads.
    parts = load_file(tmp_path / "recovered/parts.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    groups = script.tiny.groups(tmp_path / "M-SMoE_4")
    name = "layers.1.down_proj"
    made = parts[f"{name}.u"] @ parts[f"{name}.v"]
    for (matrix, row), values in zip(parts[f"{name}.rows"].tolist(), parts[f"{name}.s"], strict=True):
        made[matrix, row] += values
    experts = model.model.layers[1].mlp.experts.down_proj
    for matrix, members in zip(made, groups[1], strict=True):
        for expert in members:
            torch.testing.assert_close(experts[expert], matrix, rtol=0, atol=1e-6)
    # 6 rows of 64 in each of 24 matrices of 64 x 64, of rank 4, and two numbers for each row.
    assert sum(t.numel() for t in parts.values()) == 24 * (4 * 128 + 6 * 64 + 6 * 2)
    # Routers are as they were.
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "M-SMoE_4")
    assert torch.equal(model.model.layers[0].mlp.gate.weight, before.model.layers[0].mlp.gate.weight)
