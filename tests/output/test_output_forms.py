"""Merged pipelines and sentence-transformers models load in their libraries and compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import form_models
import pytest
import torch

import mergekit_lite


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def merged(make: Callable[[Path, int], Path], folder: Path, save: str) -> Path:
    a, b = make(folder / "a", 1), make(folder / "b", 2)
    (folder / "r.yaml").write_text(
        f"version: 1\nmodels: {{a: {a}, b: {b}}}\nsteps: {{m: {{use: interpolate, of: [a, b], with: {{t: 0.5}}}}}}\n"
        f"save: {{to: {folder / 'out'}, {save}}}\n"
    )
    mergekit_lite.run(mergekit_lite.plan(mergekit_lite.load_recipe(folder / "r.yaml"), threads=1), threads=1)
    return folder / "out"


def check_halves(made: Any, a: Any, b: Any, tolerance: float) -> None:
    states: list[Mapping[str, torch.Tensor]] = [model.state_dict() for model in (made, a, b)]
    assert states[0].keys() == states[1].keys()
    for name, values in states[0].items():
        wanted = (states[1][name].double() + states[2][name].double()) / 2
        assert (values.double() - wanted).abs().max() <= tolerance, name


@pytest.mark.parametrize(
    ("save", "dtype", "tolerance"),
    [("shard: 40KB", torch.float32, 1e-6), ("dtype: bfloat16", torch.bfloat16, 2**-8)],
)
def test_a_merged_pipeline_loads_and_draws(save: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    out = merged(form_models.pipeline, tmp_path, save)
    assert (out / "unet/diffusion_pytorch_model.safetensors.index.json").exists() == ("shard" in save)
    made = DiffusionPipeline.from_pretrained(out, torch_dtype=dtype)
    assert type(made) is StableDiffusionPipeline
    a, b = (DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("a", "b"))
    for component in ("unet", "vae", "text_encoder"):
        assert {values.dtype for values in getattr(made, component).state_dict().values()} == {dtype}
        check_halves(getattr(made, component), getattr(a, component), getattr(b, component), tolerance)
    made.set_progress_bar_config(disable=True)
    image = made("a b", num_inference_steps=2, height=16, width=16, output_type="np").images
    assert image.shape == (1, 16, 16, 3) and image.std() > 0


def test_a_merged_sentence_transformer_loads_and_encodes(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    out = merged(form_models.sentences, tmp_path, "shard: 5KB")
    made, a, b = (SentenceTransformer(str(place), device="cpu") for place in (out, tmp_path / "a", tmp_path / "b"))
    assert any("linear" in name for name in made.state_dict())
    check_halves(made, a, b, 1e-6)
    assert made.prompts["query"] == "a " and made.max_seq_length == 16
    vectors = made.encode(["a b", "b"])
    assert vectors.shape == (2, 8) and not (vectors[0] == vectors[1]).all()
