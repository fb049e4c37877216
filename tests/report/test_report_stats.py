"""Statistics against numpy on whole tensors and against exact rational arithmetic."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from report_files import noise, write, write_raw
from safetensors.torch import load_file

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.report.stats import Stats, measure, nonfinite, over, stats_of, total


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor in float64, parts of complex ones side by side."""
    flat = tensor.reshape(-1)
    if flat.is_complex():
        return flat.numpy().view(np.float32).astype(np.float64)
    return flat.numpy().astype(np.float64) if flat.dtype in INTEGERS else flat.to(torch.float64).numpy()


INTEGERS = {d for d in TORCH_DTYPES.values() if not d.is_floating_point and not d.is_complex and d != torch.bool}


@pytest.mark.parametrize("code", TORCH_DTYPES)
@pytest.mark.parametrize("block", [7, 64, 10**6])
def test_as_numpy_on_the_whole_tensor(tmp_path: Path, code: str, block: int) -> None:
    checkpoint = write(tmp_path / "m", {"x": noise(TORCH_DTYPES[code], 600, 3).reshape(20, 30)})
    x = numbers(load_file(tmp_path / "m/model.safetensors")["x"])
    heard: list[int] = []
    with Reader(checkpoint.shards) as reader:
        found = measure(reader, checkpoint.tensors["x"], heard.append, block)
        bad = nonfinite(reader, checkpoint.tensors["x"], lambda nbytes: None, block)
    assert found is not None
    finite = x[np.isfinite(x)]
    assert found.count == x.size
    assert found.nan == np.isnan(x).sum()
    assert found.positive_infinity == (x == np.inf).sum()
    assert found.negative_infinity == (x == -np.inf).sum()
    assert bad == found.nonfinite == x.size - finite.size
    assert found.zeros == (x == 0).sum()
    assert (found.min, found.max) == (finite.min(), finite.max())
    scale = np.abs(finite).max()
    assert found.mean == pytest.approx(finite.mean(), rel=1e-9, abs=1e-12 * scale)
    assert found.std == pytest.approx(finite.std(), rel=1e-9)
    assert sum(heard) == checkpoint.tensors["x"].nbytes
    assert (len(heard) > 1) == (block < 600)


def test_a_small_spread_far_from_zero() -> None:
    """Where the difference of the mean square and the squared mean has no digit left."""
    torch.manual_seed(1)
    values = 1e8 + torch.randn(1000, dtype=torch.float64) * 1e-3
    exact = statistics.pvariance([Fraction(v) for v in values.tolist()])
    blocks = sum((stats_of(part.clone()) for part in values.split(64)), Stats())
    assert blocks.std == pytest.approx(math.sqrt(exact), rel=1e-6)


@given(st.lists(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(-math.inf)), min_size=1, max_size=6))
def test_parts_add_up_to_the_whole(parts: list[list[float]]) -> None:
    whole = stats_of(torch.tensor([x for part in parts for x in part], dtype=torch.float64))
    added = sum((stats_of(torch.tensor(part, dtype=torch.float64)) for part in parts), Stats())
    assert added.count == whole.count and added.nan == whole.nan
    assert (added.min, added.max, added.zeros) == (whole.min, whole.max, whole.zeros)
    assert added.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-6)
    assert added.squares == pytest.approx(whole.squares, rel=1e-6, abs=1e-6)


def test_the_input_is_left_alone() -> None:
    values = torch.arange(5, dtype=torch.float64)
    stats_of(values)
    assert values.tolist() == [0, 1, 2, 3, 4]


def test_nothing_finite_is_null_in_json() -> None:
    made = stats_of(torch.tensor([math.nan, math.inf])).as_json()
    assert made == {
        "count": 2, "nan": 1, "positive_infinity": 1, "negative_infinity": 0, "zeros": 0,
        "min": None, "max": None, "mean": None, "std": None,
    }  # fmt: skip


def test_total_counts_weights_only_and_threads_change_nothing(tmp_path: Path) -> None:
    tensors = {f"t{i}": noise(torch.bfloat16, 1000, i) for i in range(5)}
    checkpoint = write(tmp_path / "m", {**tensors, "positions": torch.arange(1000)}, shards=2)
    one = list(over(checkpoint, measure, 1))
    assert one == list(over(checkpoint, measure, 4))
    assert [meta.name for meta, _ in one] == list(checkpoint.tensors)
    x = np.concatenate([numbers(t) for t in tensors.values()])
    x = x[np.isfinite(x)]
    found = total(iter(one))
    assert found.count == 5000 and found.finite == x.size
    assert found.std == pytest.approx(x.std(), rel=1e-9)


def test_a_dtype_without_numbers_is_not_measured(tmp_path: Path) -> None:
    checkpoint = write_raw(tmp_path / "m", "x", "F4", (4, 6), bytes(range(12)))
    assert [stats for _, stats in over(checkpoint, measure, 1)] == [None]
    assert [count for _, count in over(checkpoint, nonfinite, 1)] == [0]


def test_an_empty_tensor(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "m", {"x": torch.empty(0, 3), "y": torch.tensor(2.5)})
    found = {meta.name: stats for meta, stats in over(checkpoint, measure, 1)}
    assert found["x"] == Stats()
    assert found["y"] == Stats(1, min=2.5, max=2.5, mean=2.5)
