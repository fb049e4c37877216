"""Methods that read statistics beside the models, through a whole recipe in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import ORACLES, tensor
from torch import Tensor

from mergekit_lite import RecipeError, load_recipe, merge_in_memory
from mergekit_lite.methods import get

BOTH = pytest.mark.parametrize("compute", ["float64", "float32"])


def merged(
    folder: Path, use: str, inputs: str, states: dict[str, dict[str, Tensor]], compute: str = "float64", **settings: Any
) -> dict[str, Tensor]:
    models = ", ".join(f"{name}: ./{name}" for name in states)
    text = f"version: 1\ncompute: {compute}\nmodels: {{{models}}}\nsteps:\n  m:\n    use: {use}\n    of: {inputs}\n"
    if settings:
        text += f"    with: {{{', '.join(f'{key}: {value}' for key, value in settings.items())}}}\n"
    path = folder / "recipe.yaml"
    path.write_text(text + "save: {to: out}\n")
    return merge_in_memory(load_recipe(path), states)


def close(got: Tensor, case: str, compute: str, name: str = "out") -> None:
    expected = tensor(ORACLES[case]["expected"][name])
    if compute == "float64":
        torch.testing.assert_close(got, expected, rtol=0.0, atol=ORACLES[case]["atol"])
    else:
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@BOTH
@pytest.mark.parametrize("case", [c for c in ORACLES if c.startswith("fisher/") and "normalized" not in c])
def test_fisher(case: str, compute: str, tmp_path: Path) -> None:
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    models, fishers = (list(given[key]) for key in ("models", "fishers"))
    states: dict[str, dict[str, Tensor]] = {}
    for i, (model, information) in enumerate(zip(models, fishers, strict=True)):
        states |= {f"x{i}": {"w": tensor(model)}, f"f{i}": {"w": tensor(information)}}
    shares = params["lambda"]
    inputs = ", ".join(f"x{i}: {{fisher: f{i}, weight: {share}}}" for i, share in enumerate(shares))
    out = merged(tmp_path, "fisher", f"{{{inputs}}}", states, compute, eps=params["eps"], normalize="false")
    close(out["w"], case, compute)


@BOTH
def test_wise_ft_weighted_by_fisher_information(compute: str, tmp_path: Path) -> None:
    case = "wise_ft/fisher_weighted"
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    states = {name: {key: tensor(value) for key, value in state.items()} for name, state in given.items()}
    alpha = params["alpha"]
    inputs = f"{{zeroshot: {{fisher: fisher0, weight: {1 - alpha}}}, finetuned: {{fisher: fisher1, weight: {alpha}}}}}"
    settings = {"eps": params["fisher_floor"], "smoothing": "floor", "normalize": "false"}
    out = merged(tmp_path, "fisher", inputs, states, compute, **settings)
    close(out["w"], case, compute, "w")


@BOTH
def test_fisher_with_given_norms(compute: str) -> None:
    given, params = (ORACLES["fisher/normalized"][key] for key in ("inputs", "params"))
    xs = [tensor(x).to(getattr(torch, compute)) for x in (*given["models"], *given["fishers"])]
    norms = tuple(float(norm) for norm in given["model_fisher_norms"])
    out = get("fisher").fn(xs, weight=params["lambda"], eps=params["eps"], smoothing="add", normalize=True, stat=norms)
    close(out, "fisher/normalized", compute)


def test_fisher_norms_run_over_the_whole_model(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    models = [{n: torch.randn(5, generator=draw, dtype=torch.float64) for n in ("u", "v")} for _ in range(2)]
    fishers = [{n: torch.rand(5, generator=draw, dtype=torch.float64) * s for n in ("u", "v")} for s in (1, 100)]
    states = {f"x{i}": model for i, model in enumerate(models)} | {f"f{i}": f for i, f in enumerate(fishers)}
    out = merged(tmp_path, "fisher", "{x0: {fisher: f0}, x1: {fisher: f1}}", states)
    shares = [1 / (torch.cat(list(f.values())).norm() + 1e-6) for f in fishers]
    for name in ("u", "v"):
        terms = [s * (f[name] + 1e-6) for s, f in zip(shares, fishers, strict=True)]
        expected = sum(t * m[name] for t, m in zip(terms, models, strict=True)) / sum(terms)
        torch.testing.assert_close(out[name], expected, rtol=1e-12, atol=0)


@BOTH
@pytest.mark.parametrize("case", [c for c in ORACLES if c.startswith("regmean/")])
def test_regmean(case: str, compute: str, tmp_path: Path) -> None:
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    states: dict[str, dict[str, Tensor]] = {}
    for i, (weights, gram) in enumerate(zip(given["weights"], given["grams"], strict=True)):
        states |= {f"x{i}": {"w": tensor(weights)}, f"g{i}": {"w": tensor(gram)}}
    inputs = "{x0: {gram: g0}, x1: {gram: g1}}"
    out = merged(tmp_path, "regmean", inputs, states, compute, alpha=params["alpha"], ridge=params["ridge"])
    close(out["w"], case, compute)


def test_tensors_without_statistics_take_the_mean(tmp_path: Path) -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    states = {"a": {"w": a, "b": a[0]}, "b": {"w": b, "b": b[0]}, "g": {"w": torch.eye(3)}}
    out = merged(tmp_path, "regmean", "[a, b]", states, gram="g")
    torch.testing.assert_close(out["w"], (a + b) / 2)
    torch.testing.assert_close(out["b"], (a[0] + b[0]) / 2)


@pytest.mark.parametrize(
    "inputs, states, said",
    [
        ("[a, b]", {"g": {"w": torch.eye(2)}}, "a Gram matrix has another shape than (3, 3) In: `w`"),
        (
            "{a: {gram: g}, b: {gram: h}}",
            {"g": {"w": torch.eye(3)}, "h": {}},
            "`h` lacks tensors that other statistics",
        ),
        ("{a: {gram: g}, b: {gram: gg}}", {"g": {"w": torch.eye(3)}}, "there is no model or step `gg`"),
        ("{a: {gram: m}, b: {gram: g}}", {"g": {"w": torch.eye(3)}}, "in a circle: m -> m"),
    ],
)
def test_statistics_that_do_not_fit(
    inputs: str, states: dict[str, dict[str, Tensor]], said: str, tmp_path: Path
) -> None:
    models = {"a": {"w": torch.ones(4, 3)}, "b": {"w": torch.ones(4, 3)}, **states}
    settings = {"gram": "g"} if inputs == "[a, b]" else {}
    with pytest.raises(RecipeError) as caught:
        merged(tmp_path, "regmean", inputs, models, **settings)
    assert said in str(caught.value)
