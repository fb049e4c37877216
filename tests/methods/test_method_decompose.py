"""Low rank and rows: the oracle, and what NumPy finds in another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from method_cases import ORACLES, close, tensor

from mergekit_lite.methods import Slot, get
from mergekit_lite.methods.decompose import FIGURES, Parts, decompose_and_tell, parts_of, split
from mergekit_lite.methods.spec import Block
from mergekit_lite.methods.whole import apply, evaluate

ORACLE = "mc_smoe/lowrank_plus_rows"


def randoms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_oracle_is_used() -> None:
    assert [name for name in ORACLES if name.startswith("mc_smoe/")] == [ORACLE]


def test_oracle() -> None:
    stored = ORACLES[ORACLE]
    matrix, params, wanted = tensor(stored["inputs"]["w"]), stored["params"], stored["expected"]
    rank, rows = params["rank"], params["keep_rows"]
    low, none = split(matrix, Parts(*matrix.shape, rank, 0), "exact", 0)
    close(low, ORACLE, "lowrank", torch.float64)
    made, kept = split(matrix, Parts(*matrix.shape, rank, rows), "exact", 0)
    close(made, ORACLE, "approx", torch.float64)
    assert kept.tolist() == wanted["kept_rows"] and not len(none)
    assert float((matrix - made).norm() / matrix.norm()) == pytest.approx(wanted["rel_error"], abs=stored["atol"])


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (12, 5, 3, 3)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.26])
def test_as_an_eigenproblem_and_plain_loops(shape: tuple[int, ...], share: float) -> None:
    x = randoms(*shape)
    got = apply(get("decompose"), [x], {"rank": 4, "share": share}, compute=torch.float64)
    w = x.numpy().reshape(shape[0], -1)
    vectors = np.linalg.eigh(w.T @ w)[1][:, -4:]
    wanted = w @ vectors @ vectors.T
    means = [sum(abs(w[i] - wanted[i])) / w.shape[1] for i in range(len(w))]
    count = 0 if share == 0 else max(1, math.floor(share * len(w)))
    for i in sorted(range(len(w)), key=lambda i: (-means[i], i))[:count]:
        wanted[i] = w[i]
    np.testing.assert_allclose(got.numpy().reshape(w.shape), wanted, rtol=0, atol=1e-12)
    # Rows that are kept are kept to the bit.
    assert sum(bool((a == b).all()) for a, b in zip(got.numpy().reshape(w.shape), w, strict=True)) == count


def test_equal_rows_are_kept_from_the_first_on() -> None:
    x = torch.zeros(8, 6, dtype=torch.float64)
    x[0, 0] = 100.0  # what low rank takes
    x[2:6] = torch.eye(6, dtype=torch.float64)[1:5]
    made, kept = split(x, Parts(8, 6, 1, 2), "exact", 0)
    assert kept.tolist() == [2, 3]
    assert made.nonzero().tolist() == [[0, 0], [2, 1], [3, 2]]


def test_what_would_not_be_smaller_stays_to_the_bit() -> None:
    settings = {"rank": 4, "share": 0.1}
    for shape in [(), (9,), (1, 50), (50, 1), (8, 8), (0, 4)]:
        x = randoms(*shape)
        assert parts_of(shape, **settings) is None
        assert torch.equal(apply(get("decompose"), [x], settings, compute=torch.float64), x)
    assert parts_of((9, 9), 4, 0.1) is None and parts_of((10, 10), 4, 0.1) == Parts(10, 10, 4, 1)
    assert Parts(10, 10, 4, 1).numbers == 4 * 10 + 4 * 10 + 10
    assert Parts(10, 10, 4, 1).nbytes(2) == 2 * 90 + 4


def test_a_share_of_one_is_the_input() -> None:
    x = randoms(20, 20).float()
    x[3, 3] = torch.nan
    (got,) = evaluate(get("decompose")(Slot(0), rank=1, share=1), [[x]])
    assert torch.equal(got.view(torch.int32), x.view(torch.int32))


def test_a_matrix_with_nan_is_nan_throughout() -> None:
    x = randoms(20, 20)
    x[3, 3] = torch.inf
    assert bool(apply(get("decompose"), [x], {"rank": 2}, compute=torch.float64).isnan().all())
    told = decompose_and_tell([x], rank=2, share=0.1, svd="exact", block=Block(0, 1))
    assert told.shape == (404,) and bool(told.isnan().all())


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_figures(svd: str) -> None:
    # Singular values that fall off, so that a random search finds the largest.
    x = (randoms(60, 50) @ torch.diag(0.8 ** torch.arange(50).double())).reshape(60, 10, 5)
    told = decompose_and_tell([x], rank=3, share=0.05, svd=svd, block=Block(0, 7))
    made, figures = told[:-FIGURES].numpy().reshape(60, 50), told[-FIGURES:].tolist()
    w = x.numpy().reshape(60, 50)

    def stable(m: np.ndarray) -> float:
        return float(np.trace(m.T @ m) / np.linalg.eigvalsh(m.T @ m)[-1])

    assert figures == pytest.approx([np.linalg.norm(w), np.linalg.norm(w - made), stable(w), stable(made)], rel=1e-6)
    zeros = decompose_and_tell([torch.zeros(20, 20)], rank=2, share=0.1, svd=svd, block=Block(0, 7))
    assert not bool(zeros.any())
