"""Smooth order: against every order tried, and on a network whose function must not change."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from align_nets import Net, Reads, mlp
from digits_nets import digits, logits, one_thread, train
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mergekit_lite.align.apply import fault
from mergekit_lite.align.distances import Metric, UnitDistances
from mergekit_lite.align.path import path_length, shortest_path
from mergekit_lite.align.reorder import reorder
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space, Use

CASES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
WIDTHS = (64, 128, 128, 128, 10)
ORACLE = next(case for case in CASES if case["id"] == "smooth_order/brute_force_6")


def manhattan(points: np.ndarray) -> np.ndarray:
    return np.abs(points[:, None] - points[None]).sum(axis=2)


def walked(points: np.ndarray, order: np.ndarray) -> float:
    return sum(float(np.abs(points[a] - points[b]).sum()) for a, b in itertools.pairwise(order))


def test_the_oracle() -> None:
    stored, expected = ORACLE["inputs"]["neurons"], ORACLE["expected"]
    weight = torch.tensor(stored["data"], dtype=torch.float64).reshape(stored["shape"])
    space = Space("h", "mlp", len(weight), (Use("w", 0),))
    found, figures = reorder([space], {"w": weight}.__getitem__, shapes={"w": tuple(weight.shape)})
    assert found["h"].tolist() == expected["order"]
    assert figures["h"].length_after == pytest.approx(expected["path_length"], abs=1e-12)
    assert figures["h"].length_before == pytest.approx(expected["identity_length"], abs=1e-12)


@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=st.integers(-3, 3)))
@settings(max_examples=60, deadline=None)
def test_small_spaces_are_solved_exactly_and_twins_stay_in_order(points: np.ndarray) -> None:
    found = shortest_path(manhattan(points))
    orders = list(itertools.permutations(range(len(points))))
    assert sorted(found) == list(range(len(points)))
    if len(points) <= 2:
        assert found.tolist() == list(range(len(points)))
    assert walked(points, found) == pytest.approx(min(walked(points, np.array(order)) for order in orders))
    for a, b in itertools.combinations(range(len(points)), 2):
        if (points[a] == points[b]).all():
            assert found.tolist().index(a) < found.tolist().index(b)


@given(st.integers(10, 40), st.integers(0, 1000))
@example(40, 1)
@settings(max_examples=30, deadline=None)
def test_larger_ones_end_where_no_reversal_and_no_single_point_gains(count: int, seed: int) -> None:
    points = np.random.default_rng(seed).standard_normal((count, 4))
    distances = manhattan(points)
    found = shortest_path(distances, seed=seed)
    length = path_length(distances, found)
    assert sorted(found) == list(range(count))
    assert found.tolist() <= found[::-1].tolist()
    assert length <= path_length(distances, np.arange(count))
    assert found.tolist() == shortest_path(distances, seed=seed).tolist()
    for i, j in itertools.combinations(range(count), 2):
        turned = np.concatenate((found[:i], found[i : j + 1][::-1], found[j + 1 :]))
        assert path_length(distances, turned) > length - 1e-8
    for i in range(count):
        rest = np.delete(found, i)
        for j in range(count):
            assert path_length(distances, np.insert(rest, j, found[i])) > length - 1e-8


def test_points_on_a_line_are_sorted() -> None:
    points = np.random.default_rng(0).permutation(300).astype(np.float32)[:, None]
    order = shortest_path(manhattan(points))
    assert points[order, 0].tolist() in (list(range(300)), list(range(299, -1, -1)))


@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("threads", [None, 2])
def test_distances_are_those_of_numpy(metric: Metric, threads: int | None) -> None:
    parts = [torch.randn(130, size, dtype=torch.float64) for size in (1, 7, 9000)]
    with ThreadPoolExecutor(2) as pool:
        total = UnitDistances(130, metric, pool if threads else None)
        for part in parts:
            total.add(part)
    points = torch.cat(parts, dim=1).numpy()
    order = 1 if metric == "l1" else 2
    expected = np.stack([np.linalg.norm(points - point, ord=order, axis=1) for point in points])
    np.testing.assert_allclose(total.matrix(), expected, rtol=1e-12)


def test_a_trained_network_becomes_smoother_and_keeps_its_function() -> None:
    net, pixels = mlp(WIDTHS), digits()[0]
    with one_thread():
        tensors = train(WIDTHS, seed=0)
    reads = Reads(tensors)
    found, figures = reorder(net.spaces, reads, shapes=net.shapes)
    after = net.apply(found, tensors)
    torch.testing.assert_close(logits(after, pixels), logits(tensors, pixels), rtol=0, atol=1e-4)
    assert max(reads.count.values()) <= 4

    def lengths(of: dict[str, torch.Tensor]) -> dict[str, float]:
        """Along each space, everything of its units side by side."""
        units = {
            space.name: np.concatenate(
                [np.moveaxis(of[u.tensor].numpy(), u.axis, 0).reshape(128, -1) for u in space.uses], 1
            )
            for space in net.spaces
        }
        return {name: float(np.abs(np.diff(x, axis=0)).sum()) for name, x in units.items()}

    before, then = lengths(tensors), lengths(after)
    for space in net.spaces:
        assert fault(space, found[space.name]) is None
        figure = figures[space.name]
        assert figure.length_before == pytest.approx(before[space.name], rel=1e-5)
        assert figure.length_after == pytest.approx(then[space.name], rel=1e-5)
        assert figure.variation_before == pytest.approx(before[space.name] / 3, rel=1e-5)
        assert figure.variation_after == pytest.approx(then[space.name] / 3, rel=1e-5)
    assert sum(then.values()) < 0.8 * sum(before.values())


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_groups_stay_together_and_children_follow_their_parents(metric: Metric) -> None:
    """Four groups of three heads with keys by groups; coordinates within each group."""
    shapes = {"q": (12 * 2, 5), "k": (4 * 2, 5), "o": (5, 12 * 2)}
    heads = Space("heads", "heads", 12, (Use("q", 0, 2), Use("o", 1, 2), Use("k", 0, 2, grouped=True)), group=3)
    inner = [
        Space(
            f"qk{i}",
            "qk",
            2,
            (Use("k", 0, 1, 2 * i), *(Use("q", 0, 1, 6 * i + 2 * j) for j in range(3))),
            parent="heads",
            slot=i,
        )
        for i in range(4)
    ]
    net = Net([heads, *inner], shapes)
    tensors = net.tensors(3, torch.float64)
    found, figures = reorder(net.spaces, tensors.__getitem__, shapes=shapes, kinds=["heads", "qk"], metric=metric)
    assert [fault(space, found[space.name]) for space in net.spaces] == [None] * 5
    assert figures["heads"].length_after <= figures["heads"].length_before
    # The first child's order does not touch `o`, so distances are looked at in the network as it was.
    p = found["heads"].reshape(4, 3)
    units = np.concatenate([tensors["q"].reshape(12, -1), tensors["o"].T.reshape(12, -1)], axis=1)

    def length(points: np.ndarray) -> float:
        return float(np.linalg.norm(np.diff(points, axis=0), ord=1 if metric == "l1" else 2, axis=1).sum())

    inside = [length(units[list(row)]) for row in p]
    for row, found_length in zip(p, inside, strict=True):
        assert found_length == pytest.approx(min(length(units[list(way)]) for way in itertools.permutations(row)))
    keys = tensors["k"].reshape(4, -1)
    wholes = np.concatenate([units[p].reshape(4, -1), keys[p[:, 0] // 3]], axis=1)
    between = min(length(wholes[list(way)]) for way in itertools.permutations(range(4)))
    assert length(wholes) == pytest.approx(between)
    assert figures["heads"].length_after == pytest.approx(between + sum(inside))
    # What each child orders is what its parent has put into its slot.
    after = net.apply(found, tensors)
    for i in range(4):
        rows = [
            np.concatenate([after["k"][2 * i + x], *(after["q"][6 * i + 2 * j + x] for j in range(3))]) for x in (0, 1)
        ]
        assert figures[f"qk{i}"].length_after == pytest.approx(length(np.stack(rows)))


def test_experts_are_ordered_by_all_that_is_theirs_and_their_units_after_them() -> None:
    shapes = {"gate": (5, 3), **{f"e{i}.{part}": (4, 3) for i in range(5) for part in ("up", "gate")}}
    experts = Space(
        "experts",
        "experts",
        5,
        (Use("gate", 0),),
        renames=(tuple(f"e{i}.up" for i in range(5)), tuple(f"e{i}.gate" for i in range(5))),
    )
    units = [
        Space(f"mlp{i}", "mlp", 4, (Use(f"e{i}.up", 0), Use(f"e{i}.gate", 0)), parent="experts", slot=i)
        for i in range(5)
    ]
    net = Net([experts, *units], shapes)
    tensors = net.tensors(0, torch.float64)
    found, figures = reorder(net.spaces, tensors.__getitem__, shapes=shapes, kinds=["experts", "mlp"])
    points = np.stack(
        [np.concatenate([tensors[n].numpy().ravel() for n in (f"e{i}.up", f"e{i}.gate")]) for i in range(5)]
    )
    points = np.concatenate([tensors["gate"].numpy(), points], axis=1)
    best = min(walked(points, np.array(order)) for order in itertools.permutations(range(5)))
    assert figures["experts"].length_after == pytest.approx(best)
    after = net.apply(found, tensors)
    for i in range(5):
        rows = np.concatenate([after[f"e{i}.up"].numpy(), after[f"e{i}.gate"].numpy()], axis=1)
        best = min(walked(rows, np.array(order)) for order in itertools.permutations(range(4)))
        assert walked(rows, np.arange(4)) == pytest.approx(best)
        assert figures[f"mlp{i}"].length_after == pytest.approx(best)


def test_other_kinds_are_left_alone_and_what_is_not_finite_is_refused() -> None:
    net = mlp((3, 6, 6, 2))
    tensors = net.tensors(0)
    assert reorder(net.spaces, tensors.__getitem__, shapes=net.shapes, kinds=["heads"]) == ({}, {})
    tensors["1.weight"][0, 0] = torch.nan
    with pytest.raises(InputError, match=r"space `h0` hold NaN"):
        reorder(net.spaces, tensors.__getitem__, shapes=net.shapes)
