"""mergekit-moe's recipes build the mixtures that they describe: gates, experts and logits, found another way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as kinds
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mergekit_lite.cli.app import execute
from tests.run.dense_models import LAYERS, loaded, logits_of, tensors, write_dense

WORDS = ["<unk>", "<s>", "</s>", "one", "two", "three", "four", "five"]
IDS = {word: number for number, word in enumerate(WORDS)}
FOR, OTHER, AGAINST = ("one two two", "three"), ("four",), ("five one", "two")
EXPERTS = f"""
experts:
  - source_model: KIND/a
    positive_prompts: {list(FOR)}
    negative_prompts: {list(AGAINST)}
  - {{source_model: KIND/b, positive_prompts: {list(OTHER)}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `a` and `b` below `llama`, `qwen2` and `qwen3`, with a tokenizer of words."""
    at = tmp_path_factory.mktemp("experts")
    made = Tokenizer(kinds.WordLevel(IDS, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    for kind in ("llama", "qwen2", "qwen3"):
        for seed, name in enumerate(("base", "a", "b")):
            write_dense(at / kind / name, kind, seed)
            fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
            fast.save_pretrained(at / kind / name)
    return at


def built(place: Path, kind: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that `merge run` makes of the recipe, gathering hidden states first where it asks for them."""
    monkeypatch.chdir(place)
    recipe, out = tmp_path / "their.yml", tmp_path / "out"
    recipe.write_text(f"base_model: {kind}/base\n{text.replace('KIND', kind)}", encoding="utf-8")
    if "hidden" in text:
        assert execute(["run", str(recipe), "--out", str(out)]) == 4 and not out.exists()
        assert execute(["stats", str(recipe), "--out", str(tmp_path / "their.states")]) == 0
    assert execute(["run", str(recipe), "--out", str(out)]) == 0
    return out


def tokens(text: str) -> list[int]:
    return [IDS["<s>"], *(IDS[word] for word in text.split())]


def unit(row: Tensor) -> Tensor:
    return row / row.norm()


def embedded(folder: Path, texts: Sequence[str]) -> Tensor:
    """The direction of the sum of all tokens' embeddings."""
    table = tensors(folder)["model.embed_tokens.weight"].double()
    return unit(torch.stack([table[number] for text in texts for number in tokens(text)]).sum(dim=0))


def states(folder: Path, texts: Sequence[str], last: bool) -> Tensor:
    """(layers, width): what goes into each layer, the mean over the texts."""
    model: Any = loaded(folder)
    found = []
    for text in texts:
        with torch.no_grad():
            layers = model(torch.tensor([tokens(text)]), output_hidden_states=True).hidden_states[:LAYERS]
        found.append(torch.stack([layer[0, -1] if last else layer[0].mean(dim=0) for layer in layers]))
    return torch.stack(found).double().mean(dim=0)


@pytest.mark.parametrize("gates", ["cheap_embed", "hidden", "hidden_avg"])
def test_gates_are_directions_of_prompts(
    gates: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = built(place, "llama", f"gate_mode: {gates}\n{EXPERTS}", monkeypatch, tmp_path)
    loaded(out)
    base, found = place / "llama" / "base", tensors(out)
    if gates == "cheap_embed":
        rows = [unit(embedded(base, FOR) - embedded(base, AGAINST)), embedded(base, OTHER)]
        expected = torch.stack(rows).expand(LAYERS, 2, -1)
    else:
        of = [states(base, texts, gates == "hidden") for texts in (FOR, AGAINST, OTHER)]
        expected = torch.stack([of[0] - of[1], of[2]], dim=1)
        expected = expected / expected.norm(dim=-1, keepdim=True)
    for layer in range(LAYERS):
        gate = found[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        torch.testing.assert_close(gate.double(), expected[layer], rtol=1e-4, atol=1e-5)


def test_prompts_that_change_need_another_pass(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(place, "llama", EXPERTS + "gate_mode: hidden\n", monkeypatch, tmp_path)
    recipe = tmp_path / "their.yml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("four", "four four"), encoding="utf-8")
    assert execute(["run", str(recipe), "--out", str(tmp_path / "again")]) == 4


@pytest.mark.parametrize(
    ("kind", "model_type", "more"),
    [
        ("llama", "mixtral", ""),
        ("qwen3", "qwen3_moe", "architecture: qwen\n"),
        ("qwen2", "qwen2_moe", "shared_experts: [{source_model: qwen2/a, residual_scale: 0.0}]\n"),
        (
            "llama",
            "qwen2_moe",
            "architecture: Qwen MoE\nshared_experts: [{source_model: llama/a, residual_scale: 0}]\n",
        ),
    ],
)
@pytest.mark.parametrize("gates", ["random", "uniform_random"])
def test_equal_experts_are_the_dense_model(
    kind: str, model_type: str, more: str, gates: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = "experts: [{source_model: KIND/base}, {source_model: KIND/base}, {source_model: KIND/base}]\n"
    out = built(place, kind, f"gate_mode: {gates}\n{experts}{more}", monkeypatch, tmp_path)
    model = loaded(out)
    assert model.config.model_type == model_type and model.config.num_experts_per_tok == 2
    torch.testing.assert_close(logits_of(model), logits_of(loaded(place / kind / "base")), rtol=1e-4, atol=1e-4)
    drawn = torch.cat([x.flatten() for name, x in tensors(out).items() if name.endswith("gate.weight")])
    deviation = 1.0 if gates == "random" else (1 / 24 / 3) ** 0.5
    assert 0.85 * deviation < float(drawn.std()) < 1.15 * deviation
    assert gates == "random" or float(drawn.abs().max()) <= (1 / 24) ** 0.5


def test_noise_and_factors_go_to_experts_and_to_the_shared_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "gate_mode: random\nexperts_per_token: 1\narchitecture: deepseek\n"
        "experts: [{source_model: KIND/a, noise_scale: 0.1}, {source_model: KIND/a, noise_scale: 0.1}]\n"
        "shared_experts: [{source_model: KIND/b, noise_scale: 0.2, residual_scale: 0.5}]\n"
    )
    found = tensors(built(place, "llama", text, monkeypatch, tmp_path))
    a, b = (tensors(place / "llama" / name) for name in "ab")
    parts: dict[str, list[Tensor]] = {"0": [], "1": [], "shared": []}
    for layer in range(LAYERS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            lead, own = f"model.layers.{layer}.mlp.", f"{name}.weight"
            for expert in "01":
                parts[expert].append((found[f"{lead}experts.{expert}.{own}"] - a[lead + own]).flatten())
            scale = 0.5 if name == "down_proj" else 1.0
            parts["shared"].append((found[f"{lead}shared_experts.{own}"] / scale - b[lead + own]).flatten())
    noise = {name: torch.cat(drawn) for name, drawn in parts.items()}
    for name, deviation in (("0", 0.1), ("1", 0.1), ("shared", 0.2)):
        assert abs(float(noise[name].std()) - deviation) < 0.05 * deviation, name
    correlation = torch.corrcoef(torch.stack([noise["0"], noise["1"]]))[0, 1]
    assert abs(float(correlation)) < 0.1
