"""Methods that work with angles and distances, against plain loops over whole vectors in NumPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import BOTH, ORACLES, around_base, cases, close, tensor
from numpy.typing import NDArray
from torch import Tensor

from mergekit_lite.methods import Slot, get
from mergekit_lite.methods.gram import Gram
from mergekit_lite.methods.model_stock import share
from mergekit_lite.methods.whole import apply, evaluate

Vector = NDArray[np.float64]


def draw(seed: int, count: int, shape: tuple[int, ...] = (6, 5), spread: float = 1.0) -> list[Tensor]:
    """`count` tensors around a common one."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [centre + spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def run(name: str, xs: Sequence[Tensor], base: Tensor | None = None, **params: Any) -> Tensor:
    """A method on `xs` in float64, with the base where it takes it."""
    method = get(name)
    for param in method.per_input:
        params.setdefault(param.name, (param.default,) * len(xs))
    if method.surrounds and base is not None:
        return evaluate(around_base(method, len(xs), **params), [[*xs, base]], compute=torch.float64)[0]
    given = [*xs, *([] if base is None else [base])]
    return evaluate(method(*map(Slot, range(len(given))), **params), [given], compute=torch.float64, grain=7)[0]


def same(got: Tensor, expected: NDArray[np.float64], rtol: float = 1e-9) -> None:
    torch.testing.assert_close(got, torch.from_numpy(np.asarray(expected)), rtol=rtol, atol=1e-12)


@BOTH
@cases("model_stock/")
def test_model_stock(case: str, compute: torch.dtype) -> None:
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    call = around_base(get("model_stock"), len(given["models"]), **params)
    models = [tensor(x) for x in (*given["models"], given["base"])]
    close(evaluate(call, [models], compute=compute)[0], case, "out", compute)


def test_model_stock_beyond_the_base() -> None:
    base = torch.zeros(2)
    xs = [torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.5])]
    cosine = (-1 + 0.25) / 1.25
    expected = 2 * cosine / (1 + cosine) * np.array([0.0, 0.5])
    same(run("model_stock", xs, base, clamp=False), expected)
    assert share(-0.5, 3, clamp=False) == 0  # where the formula divides by 0


def test_model_stock_by_row_is_model_stock_of_each_row() -> None:
    *xs, base = draw(1, 4, (7, 3, 4))
    whole = run("model_stock", xs, base, granularity="row")
    for i in range(7):
        torch.testing.assert_close(whole[i], run("model_stock", [x[i] for x in xs], base[i]), rtol=1e-12, atol=1e-14)


def arc(a: Vector, b: Vector, t: float) -> Vector:
    angle = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("spread", [1.0, 1e-3], ids=["far", "near"])
@pytest.mark.parametrize("based", [False, True], ids=["weights", "changes"])
@pytest.mark.parametrize("mode", ["tensor", "row", "column"])
def test_nuslerp(mode: str, based: bool, spread: float) -> None:
    *xs, base = draw(2, 3, spread=spread)
    start = base if based else torch.zeros_like(base)
    a, b = ((x - start).numpy() for x in xs)
    expected = np.empty_like(a)
    if mode == "tensor":
        expected = arc(a.ravel(), b.ravel(), 0.75).reshape(a.shape)
    elif mode == "row":
        for i in range(a.shape[0]):
            expected[i] = arc(a[i], b[i], 0.75)
    else:
        for j in range(a.shape[1]):
            expected[:, j] = arc(a[:, j], b[:, j], 0.75)
    same(run("nuslerp", xs, base if based else None, weight=(0.5, 1.5), mode=mode), expected + start.numpy())


@pytest.mark.parametrize("mode", ["row", "column"])
@pytest.mark.parametrize("shape", [(9,), (3, 2, 4), (4, 0), ()], ids=str)
def test_nuslerp_of_other_shapes(shape: tuple[int, ...], mode: str) -> None:
    xs = draw(3, 2, shape)
    result = run("nuslerp", xs, mode=mode)
    if len(shape) == 1:
        torch.testing.assert_close(result, run("nuslerp", xs), rtol=1e-12, atol=1e-14)
    elif len(shape) == 3:
        first = (lambda x: x[1, 1]) if mode == "row" else (lambda x: x[:, 1, 1])
        torch.testing.assert_close(first(result), run("nuslerp", [first(x) for x in xs]), rtol=1e-12, atol=1e-14)
    else:
        torch.testing.assert_close(result, (xs[0] + xs[1]) / 2)


def test_where_there_is_no_arc_it_is_the_line() -> None:
    a, zero, infinite = torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor([math.inf, 1.0])
    for mode in ("tensor", "row"):
        assert run("nuslerp", [a, zero], weight=(1.0, 3.0), mode=mode).tolist() == [0.25, 0.5]
        assert run("nuslerp", [a, -a], weight=(1.0, 3.0), mode=mode).tolist() == [-0.5, -1.0]
        assert run("nuslerp", [a, infinite], mode=mode).tolist() == [math.inf, 1.5]
    for name in ("multislerp", "karcher"):
        assert run(name, [a, -a]).tolist() == [0.0, 0.0]
        assert run(name, [a, zero, -3 * a, zero]).tolist() == [-0.5, -1.0]
        assert run(name, [a, infinite]).tolist() == [math.inf, 1.5]
        assert run(name, [zero, zero]).tolist() == [0.0, 0.0]


def on_sphere(xs: Sequence[Vector], weight: Sequence[float], steps: int, follow: bool = True) -> Vector:
    """The mean on the sphere by its definition, with the vectors themselves."""
    norms = [float(np.linalg.norm(x)) for x in xs]
    points = [x / norm for x, norm in zip(xs, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weight, points, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps if follow else 0):
        tangent = np.zeros_like(mean)
        for w, u in zip(weight, points, strict=True):
            away = u - (mean @ u) * mean
            tangent = tangent + w * math.acos(mean @ u) * away / np.linalg.norm(away)
        angle = float(np.linalg.norm(tangent))
        mean = math.cos(angle) * mean + math.sin(angle) * tangent / angle
    return sum(w * n for w, n in zip(weight, norms, strict=True)) * mean


@pytest.mark.parametrize("spread", [3.0, 0.5])
@pytest.mark.parametrize("based", [False, True], ids=["weights", "changes"])
@pytest.mark.parametrize("options", [{}, {"log_map": False}, {"normalize_weights": False}], ids=str)
def test_multislerp(options: dict[str, bool], based: bool, spread: float) -> None:
    *xs, base = draw(4, 5, spread=spread)
    weight = np.array([0.3, 0.9, 0.5, 1.1])
    shares = weight if options.get("normalize_weights") is False else weight / weight.sum()
    start = base.numpy() if based else np.zeros(base.shape)
    expected = on_sphere([(x.numpy() - start).ravel() for x in xs], shares, 1, options.get("log_map", True))
    got = run("multislerp", xs, base if based else None, weight=tuple(weight), **options)
    same(got, expected.reshape(base.shape) + start)


@pytest.mark.parametrize("steps", [1, 3])
def test_karcher_steps(steps: int) -> None:
    xs = draw(5, 4, spread=2.0)
    expected = on_sphere([x.numpy().ravel() for x in xs], [0.25] * 4, steps)
    same(run("karcher", xs, max_iter=steps, tol=0.0), expected.reshape(6, 5))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 6), spread=st.sampled_from([1e-3, 0.3, 1.0]))
def test_the_karcher_mean_leaves_no_pull(seed: int, count: int, spread: float) -> None:
    xs = draw(seed, count, spread=spread)
    mean = run("karcher", xs, max_iter=200, tol=1e-13).numpy().ravel()
    radius = float(np.linalg.norm(mean))
    assert radius == pytest.approx(np.mean([float(x.norm()) for x in xs]))
    pull = np.zeros_like(mean)
    for x in xs:
        u = x.numpy().ravel() / float(x.norm())
        away = u - (mean @ u) * mean / radius**2
        sine = float(np.linalg.norm(away))
        if sine:
            pull += math.atan2(sine, mean @ u / radius) * away / sine
    assert np.linalg.norm(pull) < 1e-9


def total_distance(point: Vector, xs: Sequence[Tensor], weight: Sequence[float]) -> float:
    return sum(w * float(np.linalg.norm(point - x.numpy())) for w, x in zip(weight, xs, strict=True))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), spread=st.sampled_from([1e-4, 1.0]))
def test_nothing_near_the_geometric_median_is_better(seed: int, count: int, spread: float) -> None:
    xs = draw(seed, count, (3, 4), spread)
    generator = np.random.default_rng(seed)
    weight = tuple(generator.uniform(0.5, 2.0, count))
    median = run("geometric_median", xs, weight=weight, max_iter=2000, tol=1e-12).numpy()
    best = total_distance(median, xs, weight)
    for size in (1e-1, 1e-3):
        around = median + size * spread * generator.normal(size=(20, 3, 4))
        assert all(total_distance(point, xs, weight) >= best * (1 - 1e-7) for point in around)


def test_the_geometric_median_stays_at_an_input_that_holds_it() -> None:
    square = [torch.tensor([float(x), float(y)]) for x, y in itertools.product((-1, 1), repeat=2)]
    centre, far = torch.zeros(2), torch.tensor([0.0, 1e6])
    assert run("geometric_median", [*square, centre]).tolist() == [0.0, 0.0]
    assert run("geometric_median", [*[centre] * 3, far], max_iter=1000).norm() < 1e-3


def test_the_geometric_median_of_a_whole_model() -> None:
    models = draw(6, 3, (10,))
    halves = [[x[:4] for x in models], [x[4:] for x in models]]
    call = get("geometric_median")(*map(Slot, range(3)), scope="global")
    got = torch.cat(evaluate(call, halves, compute=torch.float64))
    torch.testing.assert_close(got, run("geometric_median", models), rtol=1e-12, atol=1e-14)


def test_nearswap_is_its_formula() -> None:
    x, base = draw(7, 2)
    x[0, 0] = base[0, 0]
    shares = np.minimum(0.4 / np.maximum(np.abs(x.numpy() - base.numpy()), 1e-300), 1)
    same(run("nearswap", [x], base, t=0.4), (1 - shares) * base.numpy() + shares * x.numpy())
    assert torch.equal(run("nearswap", [x], base, t=0.0), base)


@pytest.mark.parametrize("shape", [(8, 9), (1, 1), (40,), (2, 3, 11), (5, 1)], ids=str)
def test_arcee_fusion(shape: tuple[int, ...]) -> None:
    base, tuned = draw(8, 2, shape, 0.3)
    a, b = (x.numpy().reshape(-1, shape[-1]) for x in (base, tuned))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (b, a))
    importance = np.abs(b - a) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    first, median, third = np.quantile(importance, [0.25, 0.5, 0.75], method="lower")
    chosen = importance >= median + 1.5 * (third - first)
    got = run("arcee_fusion", [base, tuned])
    assert torch.equal(got, torch.from_numpy(np.where(chosen, b, a)).reshape(shape))
    same(run("importance", [base, tuned]), importance.reshape(shape))


def test_inner_products_of_small_differences_are_exact() -> None:
    generator = torch.Generator().manual_seed(9)
    base = torch.randn(1000, generator=generator)
    xs = [base + 1e-4 * torch.randn(1000, generator=generator) for _ in range(2)]
    measure = Gram(3, origin=2)
    part = measure.part(0)
    for start in range(0, 1000, 96):
        part.add([x[start : start + 96] for x in (*xs, base)], start)
    assert not measure.close([part])
    deltas = torch.stack([x.double() - base.double() for x in xs])
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[:2, :2] = deltas @ deltas.T
    torch.testing.assert_close(torch.tensor(measure.result(0), dtype=torch.float64), expected, rtol=1e-13, atol=0)


def test_relative_movement_follows_from_inner_products() -> None:
    case = ORACLES["straggler/relative_movement"]
    for name, expected in case["expected"].items():
        base, tuned = tensor(case["inputs"]["zeroshot"][name]), tensor(case["inputs"]["finetuned"][name])
        measure = Gram(2)
        part = measure.part(0)
        part.add([tuned - base, base], 0)
        measure.close([part])
        gram = measure.result(0)
        assert math.sqrt(gram[0][0] / gram[1][1]) == pytest.approx(expected, abs=case["atol"])


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher", "geometric_median"])
def test_weights_without_meaning_are_refused(name: str) -> None:
    method = get(name)
    assert method.check is not None
    params = {p.name: p.default for p in method.params}
    weight = (0.0, 0.0) if name in ("karcher", "geometric_median") else (1.0, -1.0)
    assert "weights" in (method.check({**params, "weight": weight}, 2) or "")
    assert method.check({**params, "weight": (1.0, 0.5)}, 2) is None


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher", "geometric_median"])
def test_the_only_input_with_a_weight_is_copied(name: str) -> None:
    xs = [torch.tensor([float("nan"), 1.0]), torch.tensor([-0.0, 3e38])]
    result = apply(get(name), xs, {"weight": (0.0, 0.7)})
    assert result.view(torch.int32).tolist() == xs[1].view(torch.int32).tolist()
