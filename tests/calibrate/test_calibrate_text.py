"""`merge stats` and `regmean` on language models trained here, one for each language, scored on new sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lite.cli.app import execute

SIZES = {"vocab_size": 48, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
DECODER = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "mixtral": lambda: transformers.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
}


def sentences(language: int, count: int, seed: int) -> Tensor:
    """Each language has 22 words of its own and counts through them in steps of its own, with 10 % of slips."""
    draw = torch.Generator().manual_seed(seed)
    slips = (torch.rand(count, 16, generator=draw) < 0.1) * torch.randint(0, 22, (count, 16), generator=draw)
    start = torch.randint(0, 22, (count, 1), generator=draw)
    return (start + torch.cumsum((1, 7)[language] + slips, dim=1)) % 22 + 3 + 22 * language


def train(model: Any, data: Tensor, steps: int, rate: float) -> Any:
    optimizer = torch.optim.Adam(model.train().parameters(), lr=rate)
    draw = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        ids = data[torch.randint(len(data), (32,), generator=draw)]
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def loss(folder: str) -> float:
    """The mean over both languages, on sentences that no training and no statistics have seen."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return sum(float(model(ids, labels=ids).loss) for ids in (sentences(i, 200, 90 + i) for i in (0, 1))) / 2


@pytest.mark.parametrize("kind", CONFIGS)
def test_regmean_beats_the_mean_of_two_languages(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = [sentences(i, 512, i) for i in (0, 1)]
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    train(base, torch.cat(data), 25, 3e-3).save_pretrained("base")
    for name, ids in zip("ab", data, strict=True):
        train(transformers.AutoModelForCausalLM.from_pretrained("base"), ids, 60, 2e-3).save_pretrained(name)
        save_file({"input_ids": ids[:128].clone()}, f"{name}.safetensors")
        assert execute(["stats", name, "--data", f"{name}.safetensors", "--out", f"s_{name}", "--threads", "1"]) == 0
    models = "a: ./a, b: ./b, ga: ./s_a/gram.safetensors, gb: ./s_b/gram.safetensors"
    for use, inputs in (("linear", "[a, b]"), ("regmean", "{a: {gram: ga}, b: {gram: gb}}")):
        used = models if use == "regmean" else "a: ./a, b: ./b"
        recipe = f"version: 1\nmodels: {{{used}}}\nsteps: {{m: {{use: {use}, of: {inputs}}}}}\nsave: {{to: {use}}}\n"
        Path("r.yaml").write_text(recipe)
        assert execute(["run", "r.yaml"]) == 0
    found = {folder: loss(folder) for folder in ("a", "b", "linear", "regmean")}
    assert found["regmean"] < found["linear"] - 0.01 < min(found["a"], found["b"]), found
