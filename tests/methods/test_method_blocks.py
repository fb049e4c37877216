"""A method gives the same bits however a tensor is cut into blocks, and statistics however it is cut into grains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lite.methods import Method, all_methods, get
from mergekit_lite.methods.spec import Block, keywords

WHOLE_MODELS = ("structure", "alignment", "vocabulary")  # carried out by the plan and the run
# Settings of the parts that reach every branch of their arithmetic; a part that is not here is run with its defaults.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weight": (0.3, -1.7, 1.0)}, {"weight": (0.3, 0.0, 2.0), "normalize": False}],
    "interpolate": [{"t": 0.37}],
    "slerp": [{"t": 0.37}, {"t": 0.37, "mode": "row"}],
    "add": [{"weight": (0.7, 1.0)}],
    "sparsify": [
        {"density": 0.3},
        {"density": 0.3, "select": "threshold"},
        {"density": 0.3, "keep": "random", "rescale": True},
        {"density": 0.4, "keep": "middle", "gamma": 0.1, "scope": "global"},
        {"density": 0.4, "scope": "row"},
        {"density": 0.4, "keep": "middle", "gamma": 0.2, "scope": "row"},
    ],
    "elect": [
        {"weight": (1.0, 0.4, 2.0), "aggregate": aggregate, "zero_sign": zero_sign}
        for aggregate in ("mean", "sum", "max")
        for zero_sign in ("majority", "positive", "drop")
    ]
    + [{"weight": (1.0, -0.4, 2.0), "compat": compat} for compat in (False, True)],
    "passthrough": [{"scale": 0.3}],
    "model_stock": [{}, {"clamp": False}, {"granularity": "row"}],
    "nuslerp": [{"weight": (0.3, 0.9)}, {"weight": (0.3, 0.9), "mode": "row"}],
    "multislerp": [{"weight": (0.3, 0.9)}],
    "karcher": [{"weight": (0.3, 0.9, 1.0)}],
    "geometric_median": [{"weight": (1.0, 0.9, 1.0)}],
    "nearswap": [{"t": 0.4}],
    "ram": [{"epsilon": 0.5}],
    "ramplus_tl": [{"epsilon": 0.5}, {"epsilon": 0.5, "scope": "global"}],
    "magprune": [{"density": 0.4}, {"density": 0.4, "rescale": False}],
    "sce": [{}, {"select_topk": 0.4}, {"select_topk": 0.4, "compat": True}],
    "tall_masks": [{}, {"output": "mask"}],
    "keep_shared": [{"k": 2}],
    "emr": [{"scope": "tensor"}],
    "pcb": [{}, {"ratio": 0.5, "scope": "tensor"}],
    "cabs": [{"n": 2, "m": 8}],
}
# Their statistics are sums of numbers, formed grain by grain.
SUMMED = {"slerp", "model_stock", "nuslerp", "multislerp", "karcher", "geometric_median", "sce", "emr"}
PARTS = [
    m
    for m in all_methods().values()
    if m.public and not m.composite and m.reach not in WHOLE_MODELS and not any(p.kind == "reference" for p in m.params)
]
CASES = [(m, params) for m in PARTS for params in SETTINGS.get(m.name, [{}])]
IDS = [f"{m.name}-{i}" for i, (m, _) in enumerate(CASES)]
ROWS, LENGTH = 23, 17


def complete(method: Method, params: dict[str, Any], count: int) -> dict[str, Any]:
    full = {p.name: params.get(p.name, p.default) for p in method.params}
    for param in method.per_input:
        if not isinstance(full[param.name], tuple):
            full[param.name] = (full[param.name],) * count
    return full


def inputs(method: Method, seed: int, dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """Flat tensors with ties and zeros among them, and how many of them are in `of`."""
    generator = torch.Generator().manual_seed(seed)
    count = method.inputs[1] or (2 if method.base_last else 3)
    xs = [torch.randn(ROWS * LENGTH, generator=generator, dtype=dtype) for _ in range(count + method.base_last)]
    for x in xs:
        x[::5] = x[::5].round()
        x[3::11] = -0.0
    return xs, count


def statistic(method: Method, params: dict[str, Any], xs: Sequence[Tensor], grain: int) -> Any:
    if method.reach_of(params) not in ("measured", "pooled"):
        return None
    assert method.measure is not None
    measure = method.measure(params, len(xs), [len(xs[0])])
    while True:
        part = measure.part(0)
        for start in range(0, len(xs[0]), grain):
            if part.add([x[start : start + grain] for x in xs], start):
                break
        if not measure.close([part]):
            return measure.result(0)


def kernel(method: Method, params: dict[str, Any], stat: Any) -> Callable[[Sequence[Tensor], int], Tensor]:
    def run(xs: Sequence[Tensor], start: int) -> Tensor:
        arguments = keywords(params)
        if stat is not None:
            arguments["stat"] = stat
        if method.positioned:
            arguments["block"] = Block(start, 77)
        if method.reports:
            arguments["report"] = lambda done, total: None
        if method.reach_of(params) == "row":
            xs = [x.reshape(-1, LENGTH) for x in xs]
        return method.fn(xs, **arguments).reshape(-1)

    return run


def bits(x: Tensor) -> list[int]:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int64).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method, params", CASES, ids=IDS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, ROWS * LENGTH), max_size=6), seed=st.integers(0, 1000))
def test_blocks_do_not_show(
    method: Method, params: dict[str, Any], dtype: torch.dtype, cuts: list[int], seed: int
) -> None:
    xs, count = inputs(method, seed, dtype)
    full = complete(method, params, count)
    run = kernel(method, full, statistic(method, full, xs, 64))
    before = [x.clone() for x in xs]
    whole = run(xs, 0)
    assert whole.dtype == dtype and len(whole) == len(xs[0])
    assert all(bits(x) == bits(y) for x, y in zip(xs, before, strict=True)), "an input was changed"
    assert all(whole.data_ptr() != x.data_ptr() for x in xs), "the result is an input's memory"
    # Rows are never cut, and a matrix method always gets whole tensors.
    unit = {"row": LENGTH, "matrix": ROWS * LENGTH}.get(method.reach_of(full), 1)
    ends = sorted({0, len(whole), *(cut // unit * unit for cut in cuts)})
    pieces = [run([x[a:b].clone() for x in xs], a) for a, b in itertools.pairwise(ends)]
    assert bits(torch.cat(pieces)) == bits(whole)


@pytest.mark.parametrize("method, params", CASES, ids=IDS)
def test_grains_do_not_show_in_counts_and_ranks(method: Method, params: dict[str, Any]) -> None:
    xs, count = inputs(method, 4, torch.float32)
    full = complete(method, params, count)
    one, other = (statistic(method, full, xs, grain) for grain in (19, 1000))
    if method.name in SUMMED and one is not None:
        torch.testing.assert_close(numbers(one), numbers(other), rtol=1e-14, atol=1e-14, equal_nan=True)
    else:
        assert one == other


def numbers(statistic: Any) -> Tensor:
    """All numbers of a statistic in order, None as NaN."""
    if isinstance(statistic, tuple):
        return torch.cat([numbers(part) for part in statistic])
    return torch.tensor([float("nan") if statistic is None else statistic], dtype=torch.float64)


def test_a_gram_matrix_is_summed_in_double_precision() -> None:
    xs, _ = inputs(get("slerp"), 9, torch.float32)
    xs[1] = xs[1] * 1e4 - 3
    gram = statistic(get("slerp"), {"t": 0.5, "mode": "tensor"}, xs, 50)
    exact = torch.stack(xs).double() @ torch.stack(xs).double().T
    torch.testing.assert_close(torch.tensor(gram, dtype=torch.float64), exact, rtol=1e-13, atol=0)
