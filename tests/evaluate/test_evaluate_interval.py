"""Boxes around models, and bounds that hold for every network within."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lite import RecipeError, UsageError, load_recipe, plan, run
from mergekit_lite.evaluate.interval import ACTIVATIONS, certified, linear_bounds, network_bounds
from mergekit_lite.methods import get
from mergekit_lite.methods.whole import apply
from tests.methods.method_cases import ORACLES, close, tensor

LAYERS = ["first", "second", "head"]


def network(seed: int, spread: float, around: int = 7) -> dict[str, Tensor]:
    """A network of 5, 6, 4 and 3 units near the one of seed `around`."""
    sizes = [5, 6, 4, 3]
    made = {}
    for name, inner, outer in zip(LAYERS, sizes, sizes[1:], strict=False):
        for part, shape in (("weight", (outer, inner)), ("bias", (outer,))):
            start = torch.Generator().manual_seed(around + inner)
            own = torch.Generator().manual_seed(seed + 31 * outer)
            made[f"{name}.{part}"] = torch.randn(shape, generator=start) + spread * torch.randn(shape, generator=own)
    return made


def box_of(models: list[dict[str, Tensor]], give: str) -> dict[str, Tensor]:
    return {
        n: apply(get("box"), [m[n] for m in models], {"box": "hull", "give": give}, compute=torch.float64)
        for n in models[0]
    }


def outputs(weights: dict[str, Tensor], x: Tensor, activation: str) -> Tensor:
    for number, layer in enumerate(LAYERS):
        x = ACTIVATIONS[activation](x) if number else x
        x = x @ weights[f"{layer}.weight"].double().T + weights[f"{layer}.bias"].double()
    return x


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.sampled_from([0.0, 1e-6, 0.1, 2.0]),
    st.sampled_from(sorted(ACTIVATIONS)),
)
def test_every_convex_soup_lies_within_the_bounds(
    seeds: list[int], weights: list[float], spread: float, activation: str
) -> None:
    models = [network(seed, spread) for seed in seeds]
    lo, hi = box_of(models, "lo"), box_of(models, "hi")
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(len(seeds)))
    low, high = network_bounds(lo, hi, LAYERS, x, activation)
    shares = torch.tensor(weights[: len(models)], dtype=torch.float64) + 1e-9
    shares /= shares.sum()
    soup = {n: sum(s * m[n].double() for s, m in zip(shares, models, strict=True)) for n in lo}
    for one in (*models, soup, box_of(models, "centre")):
        found = outputs(one, x.double(), activation)  # type: ignore[arg-type]
        error = 1e-12 * (1 + found.abs())  # of this evaluation
        assert bool((low <= found + error).all() and (found - error <= high).all())


def test_bounds_of_one_layer_are_reached() -> None:
    """The worst case over the corners of the box, in exact arithmetic: no box that is smaller would hold it."""
    w_lo, w_hi = torch.tensor([[-1.0, 0.25], [0.5, -2.0]]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    x_lo, x_hi = torch.tensor([[-1.0, 3.0]]), torch.tensor([[2.0, 3.5]])
    low, high = linear_bounds((w_lo, w_hi), (torch.tensor([1.0, 0.0]), torch.tensor([1.5, 0.0])), (x_lo, x_hi))
    ends = [(w_lo[i, j], w_hi[i, j], x_lo[0, j], x_hi[0, j]) for i in range(2) for j in range(2)]
    corners = [[Fraction(float(w)) * Fraction(float(x)) for w in e[:2] for x in e[2:]] for e in ends]
    worst = [min(corners[0]) + min(corners[1]) + 1, min(corners[2]) + min(corners[3])]
    best = [max(corners[0]) + max(corners[1]) + Fraction(3, 2), max(corners[2]) + max(corners[3])]
    for found, exact, sign in ((low, worst, -1), (high, best, 1)):
        for got, wanted in zip(found[0].tolist(), exact, strict=True):
            assert 0 <= sign * (Fraction(got) - wanted) < 1e-13


def test_what_is_certified_holds_and_a_wide_box_certifies_nothing() -> None:
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(3))
    models = [network(seed, 1e-3) for seed in range(3)]
    labels = outputs(models[0], x.double(), "relu").argmax(1)
    bounds = network_bounds(box_of(models, "lo"), box_of(models, "hi"), LAYERS, x)
    sure = certified(bounds, labels)
    assert int(sure.sum()) > 25
    for model in models:
        assert bool((outputs(model, x.double(), "relu").argmax(1) == labels)[sure].all())
    assert not certified(bounds, (labels + 1) % 3)[sure].any()
    wide = [network(seed, 3.0) for seed in range(3)]
    assert not certified(network_bounds(box_of(wide, "lo"), box_of(wide, "hi"), LAYERS, x), labels).any()


@pytest.mark.parametrize("give", ["lo", "hi", "centre", "empty"])
def test_intersections_against_the_oracle(give: str) -> None:
    case = "interval/intersection"
    given = ORACLES[case]["inputs"]
    boxes = [tensor(end) for ends in zip(given["lo"], given["hi"], strict=True) for end in ends]
    got = apply(get("box"), boxes, {"box": "intersection", "give": give}, compute=torch.float64)
    if give == "empty":
        assert got.tolist() == [float(not there) for there in ORACLES[case]["expected"]["nonempty"]["data"]]
    else:
        close(got, case, "center" if give == "centre" else give, torch.float64)


def test_linear_bounds_against_the_oracle() -> None:
    case = "interval/linear_bounds"
    given = {name: tensor(value) for name, value in ORACLES[case]["inputs"].items()}
    x = given["x"][None]
    low, high = linear_bounds((given["w_lo"], given["w_hi"]), None, (x, x))
    close(low[0], case, "y_lo", torch.float64)
    close(high[0], case, "y_hi", torch.float64)


def test_a_box_is_saved_and_what_boxes_do_not_share_is_counted(tmp_path: Path) -> None:
    models = {name: network(seed, 1.0) for seed, name in enumerate("abcd")}
    for name, weights in models.items():
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    give = {end: f"{{use: box, of: [a, b], with: {{give: {end}}}}}" for end in ("lo", "hi")}
    other = {f"{end}2": f"{{use: box, of: [c, d], with: {{give: {end}}}}}" for end in ("lo", "hi")}
    both = "{use: box, of: [lo, hi, lo2, hi2], with: {box: intersection, give: empty}}"
    text = {
        "version": "1",
        "models": "{" + ", ".join(f"{n}: {tmp_path}/{n}" for n in models) + "}",
        "steps": "{" + ", ".join(f"{n}: {s}" for n, s in {**give, **other, "empty": both}.items()) + "}",
        "save": f"[{{step: lo, to: {tmp_path}/lo}}, {{step: empty, to: {tmp_path}/empty}}]",
    }
    (tmp_path / "r.yaml").write_text("".join(f"{k}: {v}\n" for k, v in text.items()), encoding="utf-8")
    run(plan(load_recipe(tmp_path / "r.yaml")))
    low, empty = (load_file(tmp_path / name / "model.safetensors") for name in ("lo", "empty"))
    for name in low:
        a, b, c, d = (models[key][name] for key in "abcd")
        assert torch.equal(low[name], a.minimum(b))
        apart = (a.minimum(b) > c.maximum(d)) | (c.minimum(d) > a.maximum(b))
        assert torch.equal(empty[name], apart.float())
    assert sum(int(t.sum()) for t in empty.values()) > 0


@pytest.mark.parametrize(
    "settings, count, message",
    [
        ("box: intersection", 3, "lower and the upper end of each box in turn, here are 3 inputs"),
        ("give: empty", 2, "the hull of models is never empty"),
        ("give: middle", 2, "`give` is one of centre | lo | hi | empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: str, count: int, message: str, tmp_path: Path) -> None:
    of = ", ".join("abc"[:count])
    models = ", ".join(f"{n}: {n}" for n in "abc"[:count])
    text = f"version: 1\nmodels: {{{models}}}\nsteps: {{s: {{use: box, of: [{of}], with: {{{settings}}}}}}}\n"
    (tmp_path / "r.yaml").write_text(text + "save: {to: o}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    problem = caught.value.problems[0]
    assert message in problem.message and problem.mark is not None and problem.mark.line == 3


def test_a_wrong_box_is_refused() -> None:
    lo, hi = network(0, 0.0), network(0, 0.0)
    x = torch.zeros(1, 5)
    with pytest.raises(UsageError, match="no activation `gelu`"):
        network_bounds(lo, hi, LAYERS, x, "gelu")
    with pytest.raises(UsageError, match=r"the box has no `third\.weight`"):
        network_bounds(lo, hi, ["first", "third"], x)
    hi["second.bias"] = hi["second.bias"] - 1
    with pytest.raises(UsageError, match=r"lower end of `second\.bias` is above"):
        network_bounds(lo, hi, LAYERS, x)
