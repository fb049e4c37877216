"""Task vectors against each other: NumPy on whole tensors, plain loops over entries, and what must not matter."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from report_files import LLAMA, llama, noise, write
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.errors import InputError
from mergekit_lite.report.task_vectors import Overlap, overlap_of, task_vectors, together


def tuned(base: dict[str, Tensor], seed: int, share: float = 0.6) -> dict[str, Tensor]:
    """A model that differs from the base in about this share of its entries."""
    drawn = torch.Generator().manual_seed(seed)
    return {
        name: value + torch.randn(value.shape, generator=drawn) * (torch.rand(value.shape, generator=drawn) < share)
        for name, value in base.items()
    }


def expected(base: np.ndarray, models: list[np.ndarray]) -> dict[str, float | int | None]:
    """By a loop over entries."""
    deltas = [model.reshape(-1) - base.reshape(-1) for model in models]
    pairs = list(itertools.combinations(deltas, 2))
    supports = itertools.combinations([set(np.flatnonzero(delta)) for delta in deltas], 2)
    signs = [[int(d > 0) - int(d < 0) for d in entry] for entry in zip(*deltas, strict=True)]
    used = [[s for s in entry if s] for entry in signs]
    shared = [entry for entry in used if len(entry) > 1]
    return {
        "cosine": np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]),
        "overlap": np.mean([len(a & b) / len(a | b) for a, b in supports]),
        "conflict": sum(len(set(entry)) > 1 for entry in shared) / len(shared),
        "changed": sum(bool(entry) for entry in used),
    }


def figures(found: Overlap) -> dict[str, float | int | None]:
    return {name: getattr(found, name) for name in ("cosine", "overlap", "conflict", "changed")}


@pytest.mark.parametrize("count", [2, 4])
def test_tensors_layers_and_all(tmp_path: Path, count: int) -> None:
    base = llama()
    models = [tuned(base, seed) for seed in range(1, 1 + count)]
    opened = [write(tmp_path / str(i), model, LLAMA) for i, model in enumerate(models)]
    found = task_vectors(write(tmp_path / "base", base, LLAMA), opened)
    assert set(found.tensors) == set(base) and not found.left

    def joined(state: dict[str, Tensor], names: list[str]) -> np.ndarray:
        return np.concatenate([state[name].double().numpy().reshape(-1) for name in names])

    for name, one in found.tensors.items():
        wanted = expected(joined(base, [name]), [joined(model, [name]) for model in models])
        assert figures(one) == pytest.approx(wanted, rel=1e-12)
    homes = {f"model.layers.{i}": [n for n in base if f"layers.{i}." in n] for i in range(3)}
    homes |= {"model.embed_tokens": ["model.embed_tokens.weight"], "model.norm": ["model.norm.weight"]}
    assert set(found.layers) == set(homes)
    for home, names in homes.items():
        wanted = expected(joined(base, names), [joined(model, names) for model in models])
        assert figures(found.layers[home]) == pytest.approx(wanted, rel=1e-12) and found.members[home] == len(names)
    wanted = expected(joined(base, list(base)), [joined(model, list(base)) for model in models])
    assert figures(found.whole) == pytest.approx(wanted, rel=1e-12)


def test_shards_threads_and_blocks(tmp_path: Path) -> None:
    base = {f"layers.{i}.weight": torch.randn(50, 37, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    models = [tuned(base, seed) for seed in (7, 8, 9)]
    one = [write(tmp_path / f"one{i}", model) for i, model in enumerate([base, *models])]
    many = [write(tmp_path / f"many{i}", model, shards=2 + i) for i, model in enumerate([base, *models])]
    first = task_vectors(one[0], one[1:])
    second = task_vectors(many[0], many[1:], threads=4)
    assert (first.whole, first.layers) == (second.whole, second.layers)
    assert dict(first.tensors) == {name: second.tensors[name] for name in first.tensors}
    # Small blocks sum in another order: counts are the same, sums nearly.
    small = task_vectors(one[0], one[1:], block=11)
    assert (small.whole.support, small.whole.conflicts) == (first.whole.support, first.whole.conflicts)
    np.testing.assert_allclose(small.whole.gram, first.whole.gram, rtol=1e-12)


@pytest.mark.parametrize("code", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_numbers_that_are_not_finite_count_nowhere(code: str) -> None:
    base, *models = (noise(TORCH_DTYPES[code], 400, seed) for seed in range(4))
    found = overlap_of(base, models)
    wide = [t.to(torch.float64).numpy() for t in (base, *models)]
    with np.errstate(invalid="ignore"):
        sound = np.logical_and.reduce([np.isfinite(model - wide[0]) for model in wide[1:]])
    assert found.undefined == (~sound).sum() > 0
    start, *ends = (x[sound] for x in wide)
    assert figures(found) == pytest.approx(expected(start, ends), rel=1e-12)


def test_models_that_change_nothing_have_no_direction(tmp_path: Path) -> None:
    base = {"a": torch.ones(4), "b": torch.ones(4)}
    moved = {"a": torch.ones(4), "b": torch.tensor([2.0, 1.0, 0.0, 1.0])}
    opposite = {"a": torch.ones(4), "b": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    start, *models = (write(tmp_path / str(i), state) for i, state in enumerate([base, base, moved, opposite]))
    found = task_vectors(start, models)
    assert figures(found.tensors["a"]) == {"cosine": None, "overlap": None, "conflict": None, "changed": 0}
    # Of three pairs one has a direction; the first model shares no entry with the others.
    b = found.tensors["b"]
    assert b.cosine == pytest.approx(-2 / math.sqrt(2 * 6)) and b.conflict == 1.0 and b.changed == 3
    assert [b.pair_overlap(i, j) for i, j in b.pairs] == [0.0, 0.0, 2 / 3]
    assert b.as_json()["norms"] == pytest.approx([0.0, math.sqrt(2), math.sqrt(6)])


def test_sums_of_parts_do_not_depend_on_their_order() -> None:
    drawn = torch.Generator().manual_seed(0)
    parts = [
        overlap_of(torch.zeros(9), [torch.randn(9, generator=drawn) * 10.0**k for _ in "ab"]) for k in range(-8, 8)
    ]
    assert together(parts) == together(parts[::-1])


def test_tensors_that_take_no_part_say_why(tmp_path: Path) -> None:
    base = {**llama(), "lm_head.weight": torch.ones(6, 4), "counter": torch.tensor([3]), "none": torch.ones(0, 2)}
    other = {**{k: v + 1 for k, v in base.items()}, "extra": torch.ones(2), "model.norm.weight": torch.ones(5)}
    del other["model.layers.1.mlp.up_proj.weight"]
    opened = [write(tmp_path / name, state, LLAMA) for name, state in (("b", base), ("x", base), ("y", other))]
    found = task_vectors(opened[0], opened[1:])
    assert found.left == {
        "lm_head.weight": "is tied to model.embed_tokens.weight",
        "counter": "holds no numbers to merge",
        "none": "is empty",
        "extra": f"is missing in {tmp_path / 'b'}",
        "model.norm.weight": "has several shapes: 4, 5",
        "model.layers.1.mlp.up_proj.weight": f"is missing in {tmp_path / 'y'}",
    }
    assert set(found.tensors) == set(base) - set(found.left)


def test_what_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"a": torch.ones(3)})
    other = write(tmp_path / "other", {"b": torch.ones(3)})
    with pytest.raises(InputError, match="no tensor of the base"):
        task_vectors(base, [other, other])
    codes = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    coded = write(tmp_path / "coded", {"a": torch.ones(3)}, codes)
    with pytest.raises(InputError, match=r"coded` is quantised: its numbers are codes of GPTQ"):
        task_vectors(base, [base, coded])
