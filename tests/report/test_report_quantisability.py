"""Fake quantisation and moments: the oracles, plain Python with exact fractions, and what must not matter."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_files import write
from torch import Tensor

from mergekit_lite.errors import InputError
from mergekit_lite.report.quantisability import WAYS, Shape, Way, fake_quantise, quantisability, together

ORACLES: dict[str, dict[str, Any]] = {
    case["id"]: case
    for case in json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
    if case["method"] == "quant"
}


def tensor(stored: dict[str, Any]) -> Tensor:
    return torch.tensor(stored["data"], dtype=torch.float64).reshape(stored["shape"])


def test_every_oracle_is_used() -> None:
    assert set(ORACLES) == {
        f"quant/{name}" for name in ("symmetric_tensor", "symmetric_row", "asymmetric_tensor", "shape_stats")
    }


@pytest.mark.parametrize("case", [name for name in ORACLES if name != "quant/shape_stats"])
def test_rounding_oracles(case: str, tmp_path: Path) -> None:
    stored, params = ORACLES[case], ORACLES[case]["params"]
    w, by_row = tensor(stored["inputs"]["w"]), params["granularity"] == "row"
    low, high = (w.amin(1, keepdim=True), w.amax(1, keepdim=True)) if by_row else (w.min(), w.max())
    got = fake_quantise(w, low, high, params["bits"], params["symmetric"])
    torch.testing.assert_close(got, tensor(stored["expected"]["w"]), rtol=0, atol=stored["atol"])
    (weight,) = quantisability(write(tmp_path / "m", {"w": w}))
    assert weight.shape is not None
    way = (params["bits"], "channel" if by_row else "tensor", "symmetric" if params["symmetric"] else "asymmetric")
    mse = stored["expected"]["mse"]
    assert weight.shape.lost[way] / 8 == pytest.approx(mse, abs=stored["atol"])
    assert weight.shape.error(way) == pytest.approx(mse / w.var(correction=0).item(), rel=1e-12)


def test_moments_oracle(tmp_path: Path) -> None:
    stored = ORACLES["quant/shape_stats"]
    (weight,) = quantisability(write(tmp_path / "m", {"w": tensor(stored["inputs"]["w"])}))
    shape, wanted = weight.shape, stored["expected"]
    assert shape is not None
    got = {"std": math.sqrt(shape.squares / shape.count), "skewness": shape.skewness, "kurtosis": shape.kurtosis}
    assert got == pytest.approx({name: wanted[name] for name in got}, abs=stored["atol"])


def by_fractions(rows: list[list[float]], way: Way) -> float:
    """mse / var, in exact arithmetic; Python rounds halves of fractions to even."""
    bits, granularity, kind = way
    exact = [[Fraction(x) for x in row] for row in rows]
    flat = [x for row in exact for x in row]
    lost = Fraction(0)
    for row in exact:
        near = row if granularity == "channel" else flat
        low, high = min(near), max(near)
        for x in row:
            if kind == "symmetric":
                most = 2 ** (bits - 1) - 1
                scale = max(abs(low), abs(high)) / most
                code = max(-most, min(most, round(x / scale))) if scale else 0
                back = code * scale
            else:
                scale = (high - low) / (2**bits - 1)
                zero = round(-low / scale) if scale else 0
                code = max(0, min(2**bits - 1, round(x / scale) + zero)) if scale else 0
                back = (code - zero) * scale if scale else x
            lost += (back - x) ** 2
    mean = sum(flat) / len(flat)
    return float(lost / sum((x - mean) ** 2 for x in flat))


# Halves, so that numbers lie in the middle between two codes; a row of zeros, one of one number, and one above 0.
ROWS = [
    [-3.5, -0.5, 0.5, 1.5, 2.5, 7.0],
    [0.0] * 6,
    [2.0] * 6,
    [5.0, 6.0, 7.0, 8.0, 9.0, 9.5],
    [-1.0, 0.25, 0.5, 0.75, 1.0, -0.125],
]


@pytest.mark.parametrize("block", [1, 4, 13, 1 << 15])
def test_every_way_in_exact_arithmetic(tmp_path: Path, block: int) -> None:
    (weight,) = quantisability(write(tmp_path / "m", {"w": torch.tensor(ROWS)}), block=block)
    assert weight.shape is not None
    got = {way: weight.shape.error(way) for way in WAYS}
    assert got == pytest.approx({way: by_fractions(ROWS, way) for way in WAYS}, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes_against_numpy(tmp_path: Path, dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(3)
    tensors = {
        "wide.weight": torch.randn(3, 40_000, generator=drawn).to(dtype),  # a row is longer than a block
        "kernel.weight": torch.rand(50, 7, 3, 3, generator=drawn).to(dtype) - 0.2,
        "norm.weight": torch.ones(5).to(dtype),
        "positions": torch.arange(6).reshape(2, 3),
        "one.weight": torch.full((4, 4), 2.5).to(dtype),
    }
    found = {weight.meta.name: weight.shape for weight in quantisability(write(tmp_path / "m", tensors), threads=2)}
    assert set(found) == {"wide.weight", "kernel.weight", "one.weight"}
    for name in ("wide.weight", "kernel.weight"):
        w = tensors[name].double().numpy().reshape(len(tensors[name]), -1)
        z = (w - w.mean()) / w.std()
        shape = found[name]
        assert shape is not None
        assert (shape.skewness, shape.kurtosis) == pytest.approx(((z**3).mean(), (z**4).mean()), rel=1e-9)
        scale = np.abs(w).max(axis=1, keepdims=True) / 7
        rounded = np.clip(np.rint(w / scale), -7, 7) * scale
        wanted = ((rounded - w) ** 2).mean() / w.var()
        assert shape.error((4, "channel", "symmetric")) == pytest.approx(wanted, rel=1e-9)
        # More bits lose less, and so does a scale of one's own.
        for granularity in ("tensor", "channel"):
            errors = [shape.error((bits, granularity, "asymmetric")) or 0 for bits in (2, 4, 8)]
            assert errors == sorted(errors, reverse=True)
    one = found["one.weight"]
    assert one is not None and (one.skewness, one.kurtosis) == (None, None)
    assert all(one.error(way) is None for way in WAYS)


def test_threads_and_shards(tmp_path: Path) -> None:
    tensors = {f"{i}.weight": torch.randn(30 + i, 33, generator=torch.Generator().manual_seed(i)) for i in range(7)}
    one, many = write(tmp_path / "one", tensors), write(tmp_path / "many", tensors, shards=3)
    first = {w.meta.name: w.shape for w in quantisability(one)}
    second = {w.meta.name: w.shape for w in quantisability(many, threads=4)}
    assert first == second
    shapes = [shape for shape in first.values() if shape is not None]
    assert together(shapes) == together(shapes[::-1])


def test_a_weight_worse_than_its_worst_parent_is_flagged(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    even, far = torch.rand(40, 40, generator=drawn) - 0.5, torch.randn(40, 40, generator=drawn)
    far[0, 0] = 50.0  # an outlier, which spoils the scale of a tensor, and of the first row
    plain = {f"{name}.weight": even.clone() for name in ("a", "b", "new", "nan")}
    merged = {**plain, "a.weight": far, "other.weight": even.clone(), "nan.weight": even / 0}
    worse_parent = {**plain, "a.weight": even + 0.05, "other.weight": torch.ones(3, 3)}
    del worse_parent["new.weight"]
    opened = [write(tmp_path / name, state) for name, state in (("m", merged), ("p", plain), ("q", worse_parent))]
    found = {w.meta.name: w for w in quantisability(opened[0], opened[1:], threads=2)}
    assert found["a.weight"].worse == tuple(way for way in WAYS if way[0] == 4)
    assert not found["b.weight"].worse and len(found["b.weight"].parents) == 2
    assert list(found["new.weight"].parents) == [str(tmp_path / "p")]
    # Without a parent of this shape, or with NaN, there is no verdict.
    assert not found["other.weight"].parents and not found["other.weight"].worse
    assert found["nan.weight"].shape is None and not found["nan.weight"].worse
    # One parent that is as bad clears it.
    (again,) = [w for w in quantisability(opened[0], [opened[1], opened[0]]) if w.meta.name == "a.weight"]
    assert not again.worse


def test_what_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "m", {"a.weight": torch.ones(3, 3)})
    other = write(tmp_path / "o", {"a.weight": torch.ones(3, 4), "b.weight": torch.ones(3, 3)})
    with pytest.raises(InputError, match="has no weight of"):
        quantisability(model, [model, other])
    codes = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}
    coded = write(tmp_path / "coded", {"a.weight": torch.ones(3, 3)}, codes)
    for models in ([coded], [model, coded]):
        with pytest.raises(InputError, match="codes of AWQ"):
            quantisability(models[0], models[1:])


def test_no_weight_at_all(tmp_path: Path) -> None:
    assert quantisability(write(tmp_path / "m", {"a": torch.ones(3)})) == []
    assert together([]) == Shape(0, 0.0, dict.fromkeys(WAYS, 0.0))
