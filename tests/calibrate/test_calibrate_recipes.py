"""Files of `merge stats` in recipes: a vision model's from images, a mixture's from text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from calibrate_models import TEXT_FILE, write
from safetensors.torch import load_file

from mergekit_lite.calibrate.memory import positions
from mergekit_lite.cli.app import execute

Shown = tuple[int, str, str]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Shown:
        capsys.readouterr()
        code = execute([*words, "--threads", "1"])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_images_and_their_labels(merge: Callable[..., Shown]) -> None:
    """All kinds that a vision model has, from an .npz file; RegMean and Fisher merging of two by them."""
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    draw = np.random.default_rng(0)
    np.savez("images.npz", pixel_values=draw.normal(size=(40, 1, 8, 8)), labels=draw.integers(3, size=40))
    kinds = ("gram", "fisher", "gradient", "activations", "hidden", "confidence")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.ViTForImageClassification(config).save_pretrained(name)
        words = ("--data", "images.npz", "--collect", ",".join(kinds), "--out", f"s_{name}")
        code, _, err = merge("stats", name, *words)
        assert code == 0, err
        assert {path.stem for path in Path(f"s_{name}").iterdir()} == set(kinds)
    models = [load_file(f"{name}/model.safetensors") for name in "ab"]
    for kind, use, more in (
        ("gram", "regmean", "with: {alpha: 1, ridge: 0}"),
        ("fisher", "fisher", "with: {normalize: false}"),
    ):
        Path("r.yaml").write_text(
            f"version: 1\ncompute: float64\nmodels: {{a: ./a, b: ./b, sa: ./s_a/{kind}.safetensors, "
            f"sb: ./s_b/{kind}.safetensors}}\nsteps: {{m: {{use: {use}, of: {{a: {{{kind}: sa}}, b: {{{kind}: sb}}}}, "
            f"{more}}}}}\nsave: {{to: {use}, dtype: float64}}\n"
        )
        code, _, err = merge("run", "r.yaml")
        assert code == 0, err
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    assert name in models[0], sorted(models[0])
    first, second = (model[name].double().numpy() for model in models)
    one, two = (load_file(f"s_{n}/gram.safetensors")[name].double().numpy() for n in "ab")
    wanted = (first @ one + second @ two) @ np.linalg.inv(one + two)
    np.testing.assert_allclose(load_file("regmean/model.safetensors")[name], wanted, rtol=1e-4, atol=1e-5)
    one, two = (load_file(f"s_{n}/fisher.safetensors")[name].double().numpy() + 1e-6 for n in "ab")
    wanted = (first * one + second * two) / (one + two)
    np.testing.assert_allclose(load_file("fisher/model.safetensors")[name], wanted, rtol=1e-6, atol=1e-9)
    # Four patches of an image and one place for its class.
    model = transformers.ViTForImageClassification(config)
    assert positions(model, {"pixel_values": torch.zeros(7, 1, 8, 8)}) == 7 * 5
    assert load_file("s_a/hidden.safetensors")["hidden_states"].shape == (40, 1, 16)


def test_the_use_of_experts_from_a_text_says_which_remain(merge: Callable[..., Shown]) -> None:
    write(Path("mixtral"), "mixtral")
    Path("text.txt").write_text(TEXT_FILE)
    words = ("--text", "text.txt", "--block", "16", "--collect", "router", "--out", "s")
    assert merge("stats", "mixtral", *words)[0] == 0
    Path("r.yaml").write_text(
        "version: 1\nmodels: {a: ./mixtral, routers: ./s/router.safetensors}\n"
        "steps: {m: {use: merge_experts, of: a, with: {into: 5, statistics: routers, mode: prune, router: compact}}}\n"
        "save: {to: out}\n"
    )
    code, _, err = merge("run", "r.yaml")
    assert code == 0, err
    before, after, router = (
        load_file(path) for path in ("mixtral/model.safetensors", "out/model.safetensors", "s/router.safetensors")
    )
    for layer in range(2):
        lead = f"model.layers.{layer}.block_sparse_moe"
        usage = router[f"{lead}.gate.usage"].numpy()
        kept = sorted(np.argsort(-usage, kind="stable")[:5].tolist())
        assert usage[kept].sum() > usage.sum() * 5 / 16
        found = [after[f"{lead}.experts.{number}.w1.weight"] for number in range(5)]
        wanted = [before[f"{lead}.experts.{number}.w1.weight"] for number in kept]
        # Which place an expert has is the router's business.
        assert all(any(torch.equal(one, other) for other in found) for one in wanted)
        assert f"{lead}.experts.5.w1.weight" not in after


def test_a_device_map_gives_the_same_numbers(merge: Callable[..., Shown]) -> None:
    """By accelerate's hooks; here all of the model is in memory."""
    write(Path("llama"), "llama")
    Path("text.txt").write_text(TEXT_FILE)
    words = ("llama", "--text", "text.txt", "--block", "16", "--examples", "4", "--collect", "gram,fisher,gradient")
    assert merge("stats", *words, "--out", "plain")[0] == 0
    code, _, err = merge("stats", *words, "--device-map", "auto", "--device", "cpu", "--out", "spread")
    assert code == 0, err
    for kind in ("gram", "fisher", "gradient"):
        one, two = (load_file(f"{folder}/{kind}.safetensors") for folder in ("plain", "spread"))
        assert set(one) == set(two)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
