"""LoHa, LoKr and (IA)^3 adapters of tiny models, folded in by a recipe, by peft, and left in place by peft."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_output_adapters import (  # the models and helpers of LoRA's tests
    ALL,
    Convolutions,
    gpt2,
    llama,
    merged,
    randomise,
    same,
    write_base,
    write_recipe,
)
from torch import Tensor, nn

from mergekit_lite import RecipeError, load_recipe, plan

KEPT = {"modules_to_save": ["norm", "lm_head"]}
LLAMAS: dict[str, Any] = {
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=ALL),
    "loha_patterns": peft.LoHaConfig(
        r=4, alpha=6, target_modules=ALL, rank_pattern={"o_proj": 2, r"layers\.1\.mlp\..*_proj": 5},
        alpha_pattern={"up_proj": 3, "model.layers.0.self_attn.q_proj": 11}, **KEPT,
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=ALL),
    "lokr_of_whole_halves": peft.LoKrConfig(r=30, alpha=7, target_modules=ALL, rank_pattern={"q_proj": 40}),
    "lokr_of_factored_halves": peft.LoKrConfig(r=1, alpha=2, target_modules=ALL, decompose_both=True, **KEPT),
    "lokr_factor": peft.LoKrConfig(r=2, alpha=3, target_modules=["up_proj", "o_proj"], decompose_factor=4),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3_square": peft.IA3Config(target_modules=["q_proj", "o_proj"], feedforward_modules=["o_proj"], **KEPT),
}  # fmt: skip
GPT2S = {
    "gpt2_ia3": peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    "gpt2_ia3_square": peft.IA3Config(
        target_modules=["attn.c_proj"], feedforward_modules=["attn.c_proj"], fan_in_fan_out=True
    ),
}


class Convolution(nn.Module):
    """One whose numbers of channels have factors large enough to be factored again."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(9, 12, 3)
        self.config = {"model_type": "custom"}


LAYERS = ["wide", "point", "line", "linear"]
CONVOLUTIONS: dict[str, Any] = {
    "loha": peft.LoHaConfig(r=3, alpha=4, target_modules=LAYERS),
    "loha_tucker": peft.LoHaConfig(r=3, alpha=4, target_modules=LAYERS, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=1, alpha=4, target_modules=LAYERS),
    "lokr_whole": peft.LoKrConfig(r=9, alpha=4, target_modules=LAYERS),
    "lokr_tucker": peft.LoKrConfig(
        r=1, alpha=4, target_modules=LAYERS, use_effective_conv2d=True, decompose_both=True, decompose_factor=2
    ),
    "lokr_both": peft.LoKrConfig(r=1, alpha=4, target_modules=["wide"], use_effective_conv2d=True, decompose_both=True),
}


def train(model: Any, config: Any, folder: Path) -> tuple[Any, Any]:
    """Put a random adapter into `folder`; the model with it in place, and what peft makes of the two."""
    tuned = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    randomise(tuned, 2)
    tuned.save_pretrained(folder)
    beside = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    return beside, peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().eval()


@pytest.mark.parametrize("name", LLAMAS | GPT2S)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    make: Callable[[], Any] = llama if name in LLAMAS else gpt2
    model = make()
    base = write_base(model, tmp_path / "base")
    beside, folded = train(model, (LLAMAS | GPT2S)[name], tmp_path / "adapter")
    recipe = write_recipe(tmp_path, f"m: {{path: {base}, adapter: {tmp_path}/adapter}}")
    ours = merged(recipe, tmp_path / "out")
    same(ours, dict(folded.state_dict()), () if name in LLAMAS else ("lm_head.weight",))
    start = load_file(base / "model.safetensors")
    assert any(not torch.equal(start[key], value) for key, value in ours.items())
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits: list[Tensor] = [m(input_ids=tokens).logits for m in (loaded, beside, folded, model.eval())]
    size = max(1.0, float(logits[0].abs().max()))
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-5 * size
    assert float((logits[0] - logits[2]).abs().max()) <= 1e-5 * size
    assert float((logits[0] - logits[3]).abs().max()) > 1e-2 * size


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_those_of_peft(name: str, tmp_path: Path) -> None:
    model = Convolution() if name == "lokr_both" else Convolutions()
    base = write_base(model, tmp_path / "base")
    _, folded = train(model, CONVOLUTIONS[name], tmp_path / "adapter")
    recipe = write_recipe(tmp_path, f"m: {{path: {base}, adapter: {tmp_path}/adapter}}")
    same(merged(recipe, tmp_path / "out", threads=2, block=7), dict(folded.state_dict()))


def test_every_form_of_the_tensors_is_met(tmp_path: Path) -> None:
    """What the cases above are for: each combination of tensors that one module may have occurs in them."""
    from mergekit_lite.checkpoint.adapter import open_adapter
    from mergekit_lite.checkpoint.lycoris import PARTS

    seen = set()
    for number, (make, config) in enumerate(
        [
            *((llama, c) for c in LLAMAS.values()),
            *((Convolution if n == "lokr_both" else Convolutions, c) for n, c in CONVOLUTIONS.items()),
        ]
    ):
        folder = tmp_path / str(number)
        train(make(), config, folder)
        seen |= {(p.kind, tuple(p.parts)) for p in open_adapter(str(folder), None).products.values()}
    wanted = {(kind, parts) for kind, orders in PARTS.items() for parts in orders}
    # The left half is the smaller one, so peft never factors it alone.
    assert seen == wanted - {("LOKR", ("lokr_w1_a", "lokr_w1_b", "lokr_w2"))}


class Chain(nn.Module):
    """Convolutions of every kind of (IA)^3's, one behind the other: square, in groups, one channel at a time, 3-D."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 8, 3, padding=1)
        self.square = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.groups = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.deep = nn.Conv2d(12, 12, 3, groups=12)
        self.cube = nn.Conv3d(12, 5, (1, 2, 2))
        self.config = {"model_type": "custom"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.groups(self.square(self.wide(x).tanh()).tanh()).tanh()).tanh()
        made: Tensor = self.cube(x.unsqueeze(2))
        return made


@pytest.mark.parametrize("inputs", [[], ["wide", "square", "groups", "deep", "cube"], ["square", "deep"], r".*u.*"])
def test_ia3_of_convolutions(inputs: Any, tmp_path: Path) -> None:
    model = Chain()
    base = write_base(model, tmp_path / "base")
    layers = ["wide", "square", "groups", "deep", "cube"]
    config = peft.IA3Config(target_modules=layers, feedforward_modules=inputs)
    beside, folded = train(model, config, tmp_path / "adapter")
    recipe = write_recipe(tmp_path, f"m: {{path: {base}, adapter: {tmp_path}/adapter}}")
    ours = merged(recipe, tmp_path / "out", threads=2, block=7)
    same(ours, dict(folded.state_dict()))
    loaded = Chain()
    loaded.load_state_dict(ours)
    x = torch.randn(2, 6, 7, 7, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        made, wanted, start = loaded(x), beside(x), model(x)
    size = max(1.0, float(wanted.abs().max()))
    assert float((made - wanted).abs().max()) <= 1e-5 * size < float((made - start).abs().max())


def test_ia3_of_a_square_convolution_needs_to_know_what_it_scales(tmp_path: Path) -> None:
    """The shapes say the same for inputs and outputs; another file's vector does not fit at all."""
    model = Chain()
    base = write_base(model, tmp_path / "base")
    train(model, peft.IA3Config(target_modules=["square"], feedforward_modules=[]), tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    config = json.loads(path.read_text())
    recipe = write_recipe(tmp_path, f"m: {{path: {base}, adapter: {tmp_path}/adapter}}")
    for named in (None, 3, "(a+)+b(c|d)*e(f)"):
        path.write_text(json.dumps({**config, "feedforward_modules": named}))
        with pytest.raises(RecipeError, match=r"do not fit a weight.*square"):
            plan(load_recipe(recipe), out=tmp_path / "out")
    train(model, peft.IA3Config(target_modules=["wide"], feedforward_modules=[]), tmp_path / "wrong")
    tensors = load_file(tmp_path / "wrong/adapter_model.safetensors")
    save_file(
        {key: value[:, :7].clone() for key, value in tensors.items()}, tmp_path / "wrong/adapter_model.safetensors"
    )
    with pytest.raises(RecipeError, match="do not fit a weight"):
        plan(load_recipe(write_recipe(tmp_path, f"m: {{path: {base}, adapter: {tmp_path}/wrong}}")))
