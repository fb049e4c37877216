"""Methods on whole matrices against plain NumPy: eigendecompositions, explicit loops, gradients, invariants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from method_cases import ORACLES, around_base, tensor
from numpy.typing import NDArray
from torch import Tensor

from mergekit_lite.methods import Slot, get
from mergekit_lite.methods.iso_cts import split_ranks
from mergekit_lite.methods.spectral import left_basis, on_matrices, polar, triplets
from mergekit_lite.methods.whole import apply, evaluate

Array = NDArray[np.float64]
F64 = torch.float64
SPECTRAL = ["ace", "cart", "core_space", "iso_c", "iso_cts", "knots", "star", "svc", "tsv_m", "wudi"]
SIZES = pytest.mark.parametrize("rows, columns", [(9, 14), (14, 9), (8, 8)])
KINDS = [(10, 8), (5,), (6, 8, 5)]
BIG = {"rank_share": 0.1, "svd": "randomised"}


def deltas(count: int, rows: int, columns: int, seed: int = 0, rank: int | None = None) -> list[Tensor]:
    """Random matrices in double precision, of rank `rank` or full rank."""
    generator = torch.Generator().manual_seed(seed)
    full = [torch.randn(rows, columns, generator=generator, dtype=F64) for _ in range(count)]
    return full if rank is None else [(x[:, :rank] @ x[:rank] if rank else x * 0) for x in full]


def decaying(count: int, rows: int, columns: int) -> list[Tensor]:
    """Matrices with singular values 1, 1/2, 1/4 ..."""
    found = []
    for x in deltas(count, rows, columns, seed=3):
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        found.append((u * 0.5 ** torch.arange(len(vh), dtype=F64)) @ vh)
    return found


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(deltas(1, size, size, seed)[0]).Q


def run(name: str, xs: list[Tensor], key: int = 0, **settings: Any) -> Tensor:
    return apply(get(name), xs, settings, key=key, compute=F64)


def close(got: Tensor, expected: Array | Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def inverse_root(gram: Array) -> Array:
    values, vectors = np.linalg.eigh(gram)
    result: Array = (vectors / np.sqrt(values)) @ vectors.T
    return result


def orth(x: Array) -> Array:
    """Orthogonal Procrustes by eigendecomposition, for a matrix of full rank."""
    return x @ inverse_root(x.T @ x) if x.shape[0] >= x.shape[1] else inverse_root(x @ x.T) @ x


def by_eigen(x: Array, count: int) -> tuple[Array, Array, Array]:
    """The largest singular triplets (u, s, v), from the eigenvectors of x^T x."""
    values, vectors = np.linalg.eigh(x.T @ x)
    s, v = np.sqrt(values[::-1][:count]), vectors[:, ::-1][:, :count]
    return x @ v / s, s, v


# The decompositions.


@SIZES
def test_triplets(rows: int, columns: int) -> None:
    x = deltas(1, rows, columns)[0]
    found = triplets(x, 100, "exact", 0)
    close(found.matrix(), x)
    for basis in (found.u, found.v):
        close(basis.T @ basis, torch.eye(len(found.s), dtype=F64))
    assert all(column[column.abs().argmax()] > 0 for column in found.u.T)
    mirrored = triplets(-x, 100, "exact", 0)
    close(mirrored.u, found.u)
    close(mirrored.v, -found.v)


@pytest.mark.parametrize("rows, columns", [(60, 40), (40, 60), (50, 50)])
def test_random_triplets_are_near_the_exact_ones(rows: int, columns: int) -> None:
    x = decaying(1, rows, columns)[0]
    state = torch.random.get_rng_state()
    found, exact = triplets(x, 6, "randomised", 7), triplets(x, 6, "exact", 0)
    close(found.s, exact.s)
    close(found.u, exact.u, 1e-6)
    close(found.v, exact.v, 1e-6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(triplets(x, 6, "randomised", 7).u, found.u)
    assert not torch.equal(triplets(x, 6, "randomised", 8).u, found.u)


def test_random_search_on_a_slow_spectrum_comes_close() -> None:
    x = deltas(1, 80, 60)[0]
    found, exact = triplets(x, 5, "randomised", 1), triplets(x, 5, "exact", 0)
    assert bool((found.s <= exact.s + 1e-12).all()) and bool((found.s > 0.95 * exact.s).all())


def test_directions_of_no_size_are_left_out() -> None:
    x = deltas(1, 12, 9, rank=4)[0]
    assert len(triplets(x, 9, "exact", 0).s) == 4 and len(triplets(0 * x, 9, "exact", 0).s) == 0
    close(polar(x), triplets(x, 4, "exact", 0).u @ triplets(x, 4, "exact", 0).v.T)


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_left_basis(svd: str) -> None:
    blocks = deltas(2, 40, 15, rank=3) + deltas(1, 40, 7, seed=9, rank=3)
    basis, sizes = left_basis(blocks, 9, svd, 3, 1e-5)
    u, s, _ = np.linalg.svd(np.concatenate([b.numpy() for b in blocks], axis=1))
    close(sizes, s[:9])
    close(basis @ basis.T, u[:, :9] @ u[:, :9].T)
    assert left_basis(blocks, 40, "exact", 0, 1e-5)[0].shape == (40, 9)


# What every one of them does.


@pytest.mark.parametrize("name", SPECTRAL)
def test_models_that_are_the_base_return_it(name: str) -> None:
    base = torch.tensor([[0.1, -0.0, 3e38], [1e-45, 0.0, -7.0]])
    (got,) = evaluate(around_base(get(name), 3), [[base] * 4])
    assert got.view(torch.int32).tolist() == base.view(torch.int32).tolist()


@pytest.mark.parametrize("name", SPECTRAL)
def test_convolutions_count_as_matrices(name: str) -> None:
    xs = deltas(3, 4, 18)
    got = run(name, [x.reshape(4, 2, 3, 3) for x in xs])
    assert torch.equal(got.reshape(4, 18), run(name, xs))


@pytest.mark.parametrize("shape", [(), (6,), (6, 1), (1, 6), (1, 1, 6)], ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_vectors_are_averaged(name: str, shape: tuple[int, ...]) -> None:
    xs = [x.reshape(-1)[: math.prod(shape)].reshape(shape) for x in deltas(3, 2, 3)]
    got = run(name, xs) if name == "cart" else run(name, xs, **{"lambda": 2.0})
    expected = xs[0] if name == "svc" else sum(xs, torch.zeros(shape, dtype=F64)) / 3
    close(got, expected if name == "cart" else 2 * expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", SPECTRAL)
def test_a_number_that_is_none_shows_everywhere(name: str, bad: float) -> None:
    xs = deltas(3, 3, 4)
    xs[1][0, 2] = bad
    assert bool(run(name, xs).isnan().all())
    assert bool(on_matrices([torch.tensor([bad, 1.0])], lambda xs: xs[0], lambda xs: xs[0]).isnan().all())


@pytest.mark.parametrize("name", SPECTRAL)
def test_inputs_stay_and_single_precision_is_near(name: str) -> None:
    xs = [x.float() for x in deltas(3, 10, 7)]
    before = [x.clone() for x in xs]
    got = apply(get(name), xs, {})
    assert all(torch.equal(x, y) for x, y in zip(xs, before, strict=True)) and got.dtype == torch.float32
    assert torch.equal(got, apply(get(name), xs, {}))
    exact = run(name, xs)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(
    "name, settings",
    [
        *((name, {}) for name in ("tsv_m", "iso_c", "iso_cts", "svc", "cart", "star", "core_space")),
        ("wudi", {"solver": "closed"}),
    ],
)
def test_turning_and_scaling_all_deltas_turns_and_scales_the_result(name: str, settings: dict[str, Any]) -> None:
    xs, left, right = deltas(3, 12, 9), rotation(12, 5), rotation(9, 6)
    got = run(name, [3 * left @ x @ right for x in xs], **settings)
    close(got, 3 * left @ run(name, xs, **settings) @ right, 1e-8)


@pytest.mark.parametrize("merge", ["ties", "dare_ties"])
def test_knots_turns_with_the_columns(merge: str) -> None:
    xs, left = deltas(3, 12, 9, rank=2), rotation(12, 5)
    assert not torch.allclose(run("knots", xs, merge=merge), run("knots", xs, merge="linear"))
    close(run("knots", [left @ x for x in xs], merge=merge), left @ run("knots", xs, merge=merge), 1e-8)


@pytest.mark.parametrize("name, settings", [(n, BIG) for n in ("tsv_m", "iso_c", "svc", "cart", "star")])
def test_randomised_is_near_exact(name: str, settings: dict[str, Any]) -> None:
    xs = decaying(3, 70, 60)
    got = run(name, xs, key=4, **settings)
    close(got, run(name, xs, **settings | {"svd": "exact"}), 1e-7)
    assert torch.equal(got, run(name, xs, key=4, **settings))


# One by one.


@pytest.mark.parametrize("compute", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
def test_oracles(name: str, compute: torch.dtype) -> None:
    case = ORACLES[f"{name}/two_tasks"]
    expected = tensor(case["expected"]["delta"])
    got = apply(get(name), [tensor(d) for d in case["inputs"]["deltas"]], {}, compute=compute)
    atol = case["atol"] if compute == F64 else 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)


@SIZES
@pytest.mark.parametrize("share", [None, 0.25])
def test_tsv_m(rows: int, columns: int, share: float | None) -> None:
    xs = deltas(3, rows, columns)
    count = max(1, math.floor(min(rows, columns) * (1 / 3 if share is None else share)))
    u, s, v = zip(*(by_eigen(x.numpy(), count) for x in xs), strict=True)
    expected = orth(np.concatenate(u, axis=1)) * np.concatenate(s) @ orth(np.concatenate(v, axis=1)).T
    close(run("tsv_m", xs, rank_share=share, **{"lambda": 1.5}), 1.5 * expected, 1e-7)


def test_tsv_m_of_copies_and_of_models_without_a_change() -> None:
    x, zero = deltas(1, 10, 12)[0], torch.zeros(10, 12, dtype=F64)
    close(run("tsv_m", [x] * 5), triplets(x, 2, "exact", 0).matrix())
    close(run("tsv_m", [zero, x]), triplets(x, 5, "exact", 0).matrix())
    assert bool(run("tsv_m", deltas(7, 3, 4)).any())


@SIZES
def test_iso_c(rows: int, columns: int) -> None:
    xs = deltas(3, rows, columns)
    total = sum(x.numpy() for x in xs)
    root = np.linalg.eigvalsh(total @ total.T)[-min(rows, columns) :]
    close(run("iso_c", xs), np.sqrt(root).mean() * orth(np.asarray(total)), 1e-8)


def test_iso_c_has_a_flat_spectrum_where_the_sum_has_one() -> None:
    xs = deltas(3, 12, 10, rank=2)
    sizes = torch.linalg.svdvals(run("iso_c", xs))
    expected = torch.linalg.svdvals(torch.stack(xs).sum(0)).mean()  # over all ten, as published
    close(sizes, torch.cat([expected.expand(6), torch.zeros(4, dtype=F64)]))
    x = xs[0]
    assert not bool(run("iso_c", [x, -x]).any())


def test_split_ranks_is_the_published_rule() -> None:
    for size in range(1, 40):
        for models in range(1, 9):
            for share in (0.0, 0.5, 0.8, 1.0):
                common, own = split_ranks(size, models, share)
                assert common >= 0 and common + own * models == size
                published = round((size - int(size * share)) / models)
                assert own == published or (published * models > size and own == size // models)


@SIZES
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_iso_cts(rows: int, columns: int, share: float) -> None:
    xs = [x.numpy() for x in deltas(2, rows, columns)]
    size = min(rows, columns)
    own = round((size - int(size * share)) / 2)
    u, s, v = by_eigen(xs[0] + xs[1], size - 2 * own)
    for x in xs:
        a, b, c = by_eigen(x - u[:, : size - 2 * own] @ u[:, : size - 2 * own].T @ x, own)
        u, s, v = np.concatenate([u, a], axis=1), np.concatenate([s, b]), np.concatenate([v, c], axis=1)
    got = run("iso_cts", [torch.from_numpy(x) for x in xs], common_share=share)
    close(got, s.mean() * orth(u) @ orth(v).T, 1e-7)
    close(torch.linalg.svdvals(got), torch.full((size,), float(s.mean()), dtype=F64), 1e-7)


def test_iso_cts_where_nothing_is_shared_or_all_is() -> None:
    x = deltas(1, 10, 12)[0]
    assert bool(run("iso_cts", [x, -x]).any())
    close(run("iso_cts", [x] * 2, common_share=1.0), run("iso_c", [x] * 2))
    low = deltas(1, 10, 12, rank=2)[0]
    close(run("iso_cts", [low] * 2), run("iso_c", [low] * 2))


def test_iso_c_of_low_rank_has_the_scale_of_full_rank() -> None:
    """A change that is small, but large enough for every direction to be well defined, does not scale the rest."""
    xs = deltas(2, 12, 10, rank=2)
    u, _, vh = torch.linalg.svd(torch.stack(xs).sum(0), full_matrices=False)
    nearly = [x + 1e-4 * y for x, y in zip(xs, deltas(2, 12, 10, seed=7), strict=True)]
    found, full = run("iso_c", xs), run("iso_c", nearly)
    close(u[:, :4].T @ found @ vh[:4].T, u[:, :4].T @ full @ vh[:4].T, 5e-3)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_svc(alpha: float) -> None:
    xs = deltas(3, 9, 11)
    merged = 0.7 * xs[0] + xs[1] + 0.4 * xs[2] + 0.1 * deltas(1, 9, 11, seed=8)[0]
    u, s, vh = np.linalg.svd(merged.numpy(), full_matrices=False)
    for r in range(9):
        response, total = u[:, r] @ merged.numpy(), 0.0
        for x in xs:
            own = u[:, r] @ x.numpy()
            total += max(alpha, float(response @ own / (own @ own)))
        s[r] *= 3 / total
    close(run("svc", [merged, *xs], alpha=alpha), u * s @ vh)
    calibrated = run("svc", [merged, *xs])
    assert bool((torch.linalg.svdvals(calibrated) <= torch.linalg.svdvals(merged) + 1e-12).all())


def test_svc_undoes_what_copies_add_up() -> None:
    x = deltas(1, 9, 6)[0]
    close(run("svc", [4 * x] + [x] * 4), x)
    close(run("svc", [x, x, torch.zeros_like(x)]), x)
    assert not bool(run("svc", [torch.zeros_like(x), x]).any())


def test_cart() -> None:
    xs = deltas(3, 9, 14)
    centre = sum(x.numpy() for x in xs) / 3
    expected = centre.copy()
    for x in xs:
        u, s, v = by_eigen((x.numpy() - centre).T, 2)
        expected += 0.6 * (v * s @ u.T)
    close(run("cart", xs, rank_share=0.25, **{"lambda": 0.6}), expected, 1e-7)
    close(run("cart", xs, rank_share=1.0), centre)
    close(run("cart", [xs[0]] * 3), xs[0])


def test_star() -> None:
    xs = deltas(2, 9, 14)
    expected = np.zeros((9, 14))
    for x in xs:
        s = np.linalg.svd(x.numpy(), compute_uv=False)
        kept = next(k for k in range(1, 10) if s[:k].sum() >= 0.6 * s.sum())
        u, _, v = by_eigen(x.numpy().T, kept)
        expected += (v * s[:kept] * s.sum() / s[:kept].sum()) @ u.T / 2
    close(run("star", xs, eta=0.6), expected, 1e-7)
    one = run("star", xs[:1])
    assert int(torch.linalg.matrix_rank(one)) < 9
    close(torch.linalg.svdvals(one).sum(), torch.linalg.svdvals(xs[0]).sum())
    close(run("star", xs, eta=1.0), (xs[0] + xs[1]) / 2)


@pytest.mark.parametrize("scales, uneven", [((1.0, 1.0, 1.0), False), ((0.01, 0.1, 3.0), True)])
def test_ace(scales: tuple[float, ...], uneven: bool) -> None:
    xs = [(x * scale).numpy() for x, scale in zip(deltas(3, 8, 6), scales, strict=True)]
    logs = [math.log(np.trace(x.T @ x)) for x in xs]
    assert (np.var(logs, ddof=1) / np.mean(logs) ** 2 > 0.3) == uneven
    covariances, ridges = [], []
    for x in xs:
        rows = [row - x.mean(axis=0) for row in x]
        sigma = sum(np.outer(row, row) for row in rows)
        size = np.trace(sigma) if uneven else 1.0
        covariances.append(sigma / size)
        ridges.append(0.05 / size)
    damped = [sigma + ridge * np.eye(6) for sigma, ridge in zip(covariances, ridges, strict=True)]
    prior = sum(covariances).mean(axis=0) / (np.mean([np.trace(x.T @ x) for x in xs]) if uneven else 1.0)
    expected = sum(x @ c for x, c in zip(xs, damped, strict=True)) @ np.linalg.inv(sum(damped) + prior)
    if uneven:
        rest = sum(x @ (c - sum(damped) / 3) for x, c in zip(xs, covariances, strict=True))
        u, s, v = by_eigen(expected + rest, 3)
        expected = expected + s.mean() * u @ v.T
    close(run("ace", [torch.from_numpy(x) for x in xs], ridge=0.05, rank_share=0.5), expected, 1e-6)


def test_ace_with_a_huge_ridge_is_the_mean() -> None:
    xs = deltas(3, 8, 6)
    close(run("ace", xs, ridge=1e9), torch.stack(xs).mean(0), 1e-6)


def test_knots() -> None:
    xs = deltas(3, 10, 8, rank=2)
    u, s, vh = np.linalg.svd(np.concatenate([x.numpy() for x in xs], axis=1))
    blocks = [s[:6, None] * vh[:6, 8 * t : 8 * t + 8] for t in range(3)]
    kept = math.floor(0.3 * 48)
    for block in blocks:
        block[np.abs(block) < np.sort(np.abs(block), axis=None)[-kept]] = 0
    merged = np.zeros((6, 8))
    for place in np.ndindex(6, 8):
        values = [block[place] for block in blocks]
        agreed = [v for v in values if v * np.sign(sum(values)) > 0]
        merged[place] = sum(agreed) / max(1, len(agreed))
    close(run("knots", xs, density=0.3, **{"lambda": 0.6}), 0.6 * u[:, :6] @ merged, 1e-8)
    close(run("knots", xs, merge="linear"), torch.stack(xs).sum(0))
    close(run("knots", xs, merge="dare_linear", density=1.0), torch.stack(xs).sum(0))


@pytest.mark.parametrize("merge", ["ties", "dare_ties"])
def test_knots_trims_the_blocks_of_all_tensors_together(merge: str) -> None:
    small, large = deltas(3, 10, 8, rank=2), [3 * x for x in deltas(3, 6, 40, 1, rank=1)]
    biases = deltas(3, 1, 5, 2)
    blocks, bases = [], []
    for xs, rank in ((small, 6), (large, 3)):
        u, s, vh = np.linalg.svd(np.concatenate([x.numpy() for x in xs], axis=1), full_matrices=False)
        columns = xs[0].shape[1]
        blocks.append([s[:rank, None] * vh[:rank, columns * t : columns * (t + 1)] for t in range(3)])
        bases.append(u[:, :rank])
    density = 1.0
    if merge == "ties":
        density = 0.3
        for t in range(3):
            sizes = np.sort(np.concatenate([np.abs(pair[t]).ravel() for pair in blocks]))
            bound = sizes[-math.floor(density * (6 * 8 + 3 * 40))]
            for pair in blocks:
                pair[t] = np.where(np.abs(pair[t]) >= bound, pair[t], 0)
    call = get("knots")(*map(Slot, range(3)), merge=merge, density=density, scope="global", **{"lambda": 0.6})
    tensors = [small, biases, large]
    got = evaluate(
        call, [[x.reshape(shape) for x in xs] for xs, shape in zip(tensors, KINDS, strict=True)], compute=F64
    )
    for result, pair, u in zip((got[0], got[2]), blocks, bases, strict=True):
        values = np.stack(pair)
        agreed = values * np.sign(values.sum(axis=0)) > 0
        merged = (values * agreed).sum(axis=0) / np.maximum(1, agreed.sum(axis=0))
        close(result.reshape(len(u), -1), 0.6 * u @ merged, 1e-8)
    close(got[1], 0.6 * torch.stack(biases).mean(0).reshape(5))
    if merge == "ties":  # by itself the small tensor would keep other entries
        assert sum((block != 0).sum() for block in blocks[0]) < math.floor(density * 48) * 3


def test_knots_with_a_global_scope_goes_on_where_nothing_has_changed() -> None:
    call = get("knots")(*map(Slot, range(2)), scope="global")
    zeros = [torch.zeros(4, 3)] * 2
    broken = [torch.full((4, 3), torch.nan), torch.ones(4, 3)]
    empty = [torch.zeros(3, 0)] * 2
    nothing, lost, void = evaluate(call, [zeros, broken, empty])
    assert torch.equal(nothing, zeros[0]) and bool(lost.isnan().all()) and void.shape == (3, 0)


def test_knots_draws_a_mask_for_every_model() -> None:
    xs = deltas(1, 30, 40) * 2
    got = run("knots", xs, merge="dare_linear", density=0.5, key=2)
    assert torch.equal(got, run("knots", xs, merge="dare_linear", density=0.5, key=2))
    basis = left_basis(xs, 30, "exact", 0, 1e-5)[0]
    factors = (basis.T @ got) / (basis.T @ xs[0])
    counts = [int((factors - value).abs().lt(1e-6).sum()) for value in (0, 2, 4)]
    assert sum(counts) == 1200 and 500 < counts[1] < 700


@pytest.mark.parametrize("merge", ["tsv_m", "iso_c", "linear"])
def test_core_space_loses_nothing(merge: str) -> None:
    xs = deltas(3, 20, 16, rank=2)
    whole = torch.stack(xs).sum(0) if merge == "linear" else run(merge, xs)
    if merge == "iso_c":
        whole *= 16 / 6  # the mean is over the six singular values of the core
    close(run("core_space", xs, merge=merge), whole, 1e-7)
    close(run("core_space", xs, merge=merge, rank=2, svd="randomised"), whole, 1e-7)
    assert int(torch.linalg.matrix_rank(run("core_space", xs, merge="ties"))) <= 6


def test_a_known_rank_sees_through_rounding() -> None:
    xs = deltas(2, 40, 30, rank=2)
    blurred = [x + 1e-3 * noise for x, noise in zip(xs, deltas(2, 40, 30, seed=4), strict=True)]
    for name in ("knots", "core_space"):
        assert int(torch.linalg.matrix_rank(run(name, blurred, merge="linear"))) == 30
        got = run(name, blurred, merge="linear", rank=2)
        assert int(torch.linalg.matrix_rank(got)) == 4 and float((got - torch.stack(xs).sum(0)).abs().max()) < 0.1
        check = get(name).check
        assert check is not None
        rest = {"scope": "tensor", "merge": "ties"}
        assert "needs `rank`" in (check({"svd": "randomised", "rank": None} | rest, 2) or "")
        assert check({"svd": "exact", "rank": None} | rest, 2) is None
        assert check({"svd": "randomised", "rank": 4} | rest, 2) is None


def published_loss(delta: Tensor, xs: list[Tensor]) -> Tensor:
    return torch.stack([((delta - x) @ x.T).square().sum() / x.square().sum() for x in xs]).sum()


def adam(xs: list[Tensor], steps: int, rate: float) -> Tensor:
    delta = torch.stack(xs).sum(0).requires_grad_()
    optimizer = torch.optim.Adam([delta], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        published_loss(delta, xs).backward()
        optimizer.step()
    return delta.detach()


@SIZES
def test_wudi_takes_adams_steps_down_the_published_loss(rows: int, columns: int) -> None:
    xs = deltas(3, rows, columns)
    close(run("wudi", xs, steps=40, rate=1e-2), adam(xs, 40, 1e-2))
    close(run("wudi", [*xs, 0 * xs[0]], steps=0, **{"lambda": 0.5}), torch.stack(xs).sum(0) / 2)


@SIZES
def test_wudi_in_closed_form_is_the_minimum(rows: int, columns: int) -> None:
    xs = deltas(3, rows, columns)
    closed = run("wudi", xs, solver="closed", ridge=1e-10).requires_grad_()
    published_loss(closed, xs).backward()
    assert closed.grad is not None and float(closed.grad.abs().max()) < 1e-7
    least = float(published_loss(closed.detach(), xs))
    start, near = torch.stack(xs).sum(0), run("wudi", xs, steps=3000, rate=1e-2)
    assert least - 1e-9 < float(published_loss(near, xs)) < least + 1e-3 * float(published_loss(start, xs))


def test_wudi_in_closed_form_on_few_rows_stays_in_their_span() -> None:
    xs = deltas(2, 3, 12)
    got = run("wudi", xs, solver="closed")
    q = torch.linalg.qr(torch.cat(xs).T).Q
    close(got @ q @ q.T, got)
    close(run("wudi", xs[:1], solver="closed"), xs[0], 1e-4)


@pytest.mark.parametrize("shape", [(60, 7), (7, 60), (20, 10)])
@pytest.mark.parametrize("count", [3, 60])
def test_left_basis_of_high_and_of_wide_blocks(shape: tuple[int, int], count: int) -> None:
    """Narrow blocks go another way than wide ones, with the same outcome."""
    generator = torch.Generator().manual_seed(4)
    blocks = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    u, s = left_basis(blocks, count, "exact", 0, 1e-7)
    expected_u, expected_s, _ = np.linalg.svd(torch.cat(blocks, dim=1).numpy(), full_matrices=False)
    kept = min(count, len(expected_s))
    np.testing.assert_allclose(s, expected_s[:kept], rtol=1e-9)
    np.testing.assert_allclose(abs(u.T.numpy() @ expected_u[:, :kept]), np.eye(kept), atol=1e-7)
    np.testing.assert_allclose(u.T @ u, np.eye(kept), atol=1e-12)
