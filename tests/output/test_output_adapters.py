"""Adapters that peft trains on tiny models, folded in by peft itself and by a recipe."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from mergekit_lite import load_recipe, plan, run

LLAMA = LlamaConfig(
    vocab_size=72, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False, attention_bias=True,
)  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What is trained, by name: the settings of peft's LoraConfig.
LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "lora_alpha": 10, "target_modules": ALL},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ALL,
        "rank_pattern": {"o_proj": 3, "layers.1.mlp.up_proj": 7, r"^model\.layers\.0\.mlp\.gate_proj": 2},
        "alpha_pattern": {
            "o_proj": 1,
            r"layers\.1\..*_proj": 50,
            r"^model\.layers\.0\.mlp\.gate_proj": 3,
            "(up_proj|down_proj)": 9,
        },
    },
    "saved_modules": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]},
    "embedding": {"r": 5, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ALL},
    "dora_of_an_embedding": {"r": 3, "use_dora": True, "target_modules": ["embed_tokens"]},
    "all_biases": {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
    "lora_bias": {"r": 4, "target_modules": ["q_proj", "k_proj"], "lora_bias": True, "use_rslora": True},
    "orthogonal": {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
}
GPT2S: dict[str, dict[str, Any]] = {
    "gpt2": {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "gpt2_without_the_flag": {"r": 4, "target_modules": ["c_proj", "c_attn"]},
    "gpt2_square": {"r": 4, "target_modules": r".*attn\.c_proj", "fan_in_fan_out": True},
    "gpt2_dora": {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_fc", "c_proj"]},
}


class Convolutions(nn.Module):
    """Layers that LoRA adapts besides linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 10, 3)
        self.point = nn.Conv2d(10, 4, 1)
        self.line = nn.Conv1d(5, 7, 3)
        self.linear = nn.Linear(9, 9)
        self.config = {"model_type": "custom"}


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "convolutions": {"r": 3, "target_modules": ["wide", "point", "line", "linear"]},
    "convolutions_dora": {"r": 3, "use_dora": True, "target_modules": ["wide", "point", "line"]},
}


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama(**settings: Any) -> Any:
    config = copy.deepcopy(LLAMA)
    for key, value in settings.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config)


def gpt2() -> Any:
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter at random, so that no factor is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def write_base(model: Any, folder: Path) -> Path:
    randomise(model, 1)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def train(model: Any, settings: dict[str, Any], folder: Path, seed: int = 2) -> dict[str, Tensor]:
    """Put a random adapter into `folder`; gives the state dict of what peft makes of the base and that folder."""
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    randomise(tuned, seed)
    for name, parameter in tuned.named_parameters():
        if "magnitude" in name:
            parameter.data.abs_()
    tuned.save_pretrained(folder)
    # Read back, since patterns are tried in the order of the file.
    return dict(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().state_dict())


def write_recipe(folder: Path, models: str, steps: str = "", save: str = "step: m, ") -> Path:
    text = f"version: 1\nmodels: {{{models}}}\n{steps}save: {{{save}to: {folder}/out}}\n"
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def merged(recipe: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    run(plan(load_recipe(recipe), out=out), **options)
    return load_file(out / "model.safetensors")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tied: tuple[str, ...] = ()) -> None:
    assert set(ours) == set(theirs) - set(tied)
    for name, value in ours.items():
        wanted = theirs[name].to(value)
        # A sum rounds relative to its terms, which are of the order of the tensor's largest entry.
        largest = float((value - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
        assert largest <= 1e-6, f"{name}: {largest}"


def differential(make: Callable[[], Any], settings: dict[str, Any], tmp_path: Path, tied: tuple[str, ...] = ()) -> None:
    model = make()
    base = write_base(model, tmp_path / "base")
    theirs = train(model, settings, tmp_path / "lora")
    recipe = write_recipe(tmp_path, f"m: {{path: {base}, adapter: {tmp_path}/lora}}")
    ours = merged(recipe, tmp_path / "out")
    same(ours, theirs, tied)
    start = load_file(base / "model.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in ours.items())


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_with_an_adapter_is_what_peft_makes_of_it(name: str, tmp_path: Path) -> None:
    differential(llama, LLAMAS[name], tmp_path)


@pytest.mark.parametrize("name", GPT2S)
def test_weights_stored_as_in_times_out(name: str, tmp_path: Path) -> None:
    model = gpt2()
    assert any(isinstance(module, Conv1D) for module in model.modules())
    differential(lambda: model, GPT2S[name], tmp_path, tied=("lm_head.weight",))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, tmp_path: Path) -> None:
    differential(Convolutions, CONVOLUTIONS[name], tmp_path)
