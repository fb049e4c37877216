"""Tucker's decomposition: the oracles, what the theory promises of any tensor, and FLoRA folded as its layers do."""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import BOTH, ORACLES, around_base, cases, close, tensor
from torch import Tensor

from mergekit_lite.methods import get
from mergekit_lite.methods.tucker import decomposed, flora, fold
from mergekit_lite.methods.whole import apply, evaluate

DECOMPOSED = [name for name in ORACLES if name.startswith("tucker/") and "delta" in ORACLES[name]["inputs"]]


def summed(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The product as one sum over all indices of the core."""
    inner, outer = string.ascii_lowercase[: core.ndim], string.ascii_uppercase[: core.ndim]
    pairs = ",".join(o + i for o, i in zip(outer, inner, strict=True))
    return torch.einsum(f"{inner},{pairs}->{outer}", core, *factors)


@BOTH
def test_reconstruct(compute: torch.dtype) -> None:
    case = "tucker/reconstruct"
    found = ORACLES[case]["inputs"]
    core, factors = tensor(found["core"]), [tensor(f) for f in found["factors"]]
    close(
        ORACLES[case]["params"]["scale"] * fold(core.to(compute), [f.to(compute) for f in factors]),
        case,
        "delta",
        compute,
    )


@pytest.mark.parametrize("case", DECOMPOSED)
def test_hosvd(case: str) -> None:
    stored = ORACLES[case]
    delta = tensor(stored["inputs"]["delta"])
    found = decomposed(delta, stored["params"]["ranks"])
    close(found.whole(), case, "reconstruction", torch.float64)
    wanted = stored["expected"]
    if "error_fro" in wanted:
        assert float((found.whole() - delta).norm()) == pytest.approx(wanted["error_fro"], abs=stored["atol"])
        assert sum(found.left) ** 0.5 == pytest.approx(wanted["error_bound"], abs=stored["atol"])


def test_every_oracle_is_used() -> None:
    assert {*DECOMPOSED, "tucker/reconstruct"} == {name for name in ORACLES if name.startswith("tucker/")}


@BOTH
@cases("tucker/", "tucker/reconstruct", "tucker/hosvd_truncate")
def test_the_method(case: str, compute: torch.dtype) -> None:
    """Those oracles whose ranks the settings can say."""
    stored = ORACLES[case]
    rank = max(stored["params"]["ranks"][:2])
    got = apply(get("tucker"), [tensor(stored["inputs"]["delta"])], {"rank": rank}, compute=compute)
    close(got, case, "reconstruction", compute)


SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=5)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_what_the_theory_promises(shape: list[int], data: st.DataObject) -> None:
    ranks = [data.draw(st.integers(1, n)) for n in shape]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).double()
    norm = float(x.norm())
    errors = []
    for sweeps in range(4):
        found = decomposed(x, ranks, sweeps=sweeps)
        for factor in found.factors:
            torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]).double())
        torch.testing.assert_close(found.whole(), summed(found.core, found.factors))
        errors.append(float((found.whole() - x).norm()))
    assert errors[0] ** 2 <= sum(found.left) + 1e-9 * norm**2
    assert all(after <= before + 1e-9 * norm for before, after in itertools.pairwise(errors))
    # What is left out along each axis is known from the unfolding's singular values.
    for axis, rank in enumerate(decomposed(x, ranks).core.shape):
        values = torch.linalg.svdvals(x.movedim(axis, 0).reshape(shape[axis], -1))
        assert found.left[axis] == pytest.approx(float((values[rank:] ** 2).sum()), abs=1e-9 * norm**2)
    torch.testing.assert_close(decomposed(x, [None] * len(shape)).whole(), x)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, energy=st.sampled_from([0.3, 0.8, 0.99, 1 - 1e-9, 1.0]), seed=st.integers(0, 99))
def test_energy_gives_the_least_ranks(shape: list[int], energy: float, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    found = decomposed(x, [None] * len(shape), energy)
    whole = float(x.norm()) ** 2
    assert float((found.whole() - x).norm()) ** 2 <= (1 - energy) * whole + 1e-9 * whole
    for axis, rank in enumerate(found.core.shape):
        values = torch.linalg.svdvals(x.movedim(axis, 0).reshape(shape[axis], -1)) ** 2
        allowed = (1 - energy) / len(shape) * whole
        assert float(values[rank:].sum()) <= allowed + 1e-9 * whole
        assert rank == 1 or float(values[rank - 1 :].sum()) > allowed - 1e-9 * whole


def test_around_a_base_and_with_a_kernel_of_its_own_rank() -> None:
    generator = torch.Generator().manual_seed(2)
    base, other = (torch.randn(6, 5, 3, 3, generator=generator) for _ in range(2))
    call = around_base(get("tucker"), 1, rank=2, kernel_rank=1, sweeps=2)
    (got,) = evaluate(call, [[other, base]], compute=torch.float64)
    change = got - base.double()
    ranks = [int(torch.linalg.matrix_rank(change.movedim(i, 0).reshape(n, -1))) for i, n in enumerate(base.shape)]
    assert ranks == [2, 2, 1, 1]
    wanted = decomposed(other.double() - base.double(), [2, 2, 1, 1], sweeps=2).whole()
    torch.testing.assert_close(change, wanted, rtol=0, atol=1e-9)


def test_planted_ranks_are_found() -> None:
    generator = torch.Generator().manual_seed(7)
    core = torch.randn(2, 3, 1, 2, generator=generator).double()
    factors = [torch.randn(n, r, generator=generator).double() for n, r in zip((9, 8, 3, 3), core.shape, strict=True)]
    x = summed(core, factors)
    found = decomposed(x, [None] * 4, 1 - 1e-9)
    assert found.core.shape == core.shape
    torch.testing.assert_close(found.whole(), x, rtol=0, atol=1e-8)


def test_flora_is_what_its_layers_add() -> None:
    """Their sum, index by index: dW[o, i, k, l] = s sum G[a, b, c, d] A0[i, a] A1[o, b] A2[k, c] A3[l, d]."""
    generator = torch.Generator().manual_seed(3)
    core = torch.randn(2, 3, 2, 1, generator=generator).double()
    factors = [torch.randn(n, r, generator=generator).double() for n, r in zip((4, 5, 3, 3), core.shape, strict=True)]
    weight = torch.randn(5, 4, 3, 3, generator=generator).double()
    wanted = weight + 0.5 * torch.einsum("abcd,ia,ob,kc,ld->oikl", core, *factors)
    torch.testing.assert_close(flora([weight, core, *factors], 0.5), wanted)
    core, factors = core[:, :, 0, 0], factors[:2]
    wanted = weight[..., 0, 0] + 2.0 * factors[1] @ core.T @ factors[0].T
    torch.testing.assert_close(flora([weight[..., 0, 0], core, *factors], 2.0), wanted)
