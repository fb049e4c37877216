"""Weight matching: planted permutations found again, optima against every member of small groups, what is read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from itertools import permutations as arrangements
from itertools import product as combinations
from typing import Any

import numpy as np
import pytest
import torch
from align_nets import NETS, Net, Reads, conv_net, decoder, encoder, experts, mlp, product, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.align.apply import Order
from mergekit_lite.align.match import Solution, match
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space


def solve(net: Net, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **settings: Any) -> Solution:
    kinds = settings.pop("kinds", net.kinds)
    return match(net.spaces, a.__getitem__, b.__getitem__, shapes=net.shapes, kinds=kinds, **settings)


@pytest.mark.parametrize("name", NETS)
@given(seed=st.integers(0, 1 << 20), noise=st.sampled_from([0.0, 0.0, 0.05]), cost=st.sampled_from(["dot", "cosine"]))
@settings(deadline=None, max_examples=12)
def test_planted(name: str, seed: int, noise: float, cost: str) -> None:
    net = NETS[name]()
    a = net.tensors(seed)
    near = {name: tensor + noise * torch.randn_like(tensor) for name, tensor in a.items()}
    b = net.apply(net.member(seed + 1), near)
    found = solve(net, a, b, cost=cost, seed=seed)
    back = net.apply(found.permutations, b)
    for name, tensor in near.items():
        assert torch.equal(back[name], tensor), name
    assert found.settled
    assert found.distance_after is not None and found.distance_before is not None
    assert found.distance_after <= found.distance_before


def members(net: Net, kinds: set[str]) -> list[dict[str, Order]]:
    """Every member of the group of these kinds."""

    def every(space: Space) -> list[Order]:
        inner = list(arrangements(range(space.group)))
        return [
            np.concatenate([j * space.group + np.array(order) for j, order in zip(groups, orders, strict=True)])
            for groups in arrangements(range(space.groups))
            for orders in combinations(inner, repeat=space.groups)
        ]

    chosen = [space for space in net.spaces if space.kind in kinds]
    found = combinations(*(every(space) for space in chosen))
    return [{space.name: p for space, p in zip(chosen, member, strict=True)} for member in found]


SMALL = {
    "plain": (mlp([3, 5, 2]), {"mlp"}),
    "convolution": (conv_net(), {"residual"}),
    "grouped heads": (decoder(1, kv=3, head=2), {"heads"}),
    "grouped heads and values": (decoder(1, head=2, group=3), {"heads", "vo"}),
    "heads, queries and values": (encoder(2, 3), {"heads", "qk", "vo"}),
    "heads and queries": (encoder(3, 3), {"heads", "qk"}),
    "values alone": (encoder(2, 4), {"vo"}),
    "values alone, fused": (encoder(2, 4, fused=True), {"vo"}),
    "experts": (experts(3, 3), {"experts", "mlp"}),
    "experts alone": (experts(4, 3), {"experts"}),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", range(3))
def test_no_member_of_the_group_is_better(name: str, seed: int) -> None:
    net, kinds = SMALL[name]
    if name == "convolution":
        net = Net([space for space in net.spaces if space.name == "stage"], net.shapes)
    a, b = net.tensors(seed, torch.float64), net.tensors(seed + 100, torch.float64)
    found = solve(net, a, b, kinds=kinds)
    chosen = [space for space in net.spaces if space.kind in kinds]
    names = {use.tensor for space in chosen for use in space.uses if use.weighed}
    names |= {name for space in chosen for rename in space.renames for name in rename}
    best = max(product(a, net.apply(member, b), sorted(names)) for member in members(net, kinds))
    assert found.objective[-1] == pytest.approx(best, rel=1e-12)
    assert product(a, net.apply(found.permutations, b), sorted(names)) == pytest.approx(best, rel=1e-12)
    assert found.start == pytest.approx(product(a, b, sorted(names)), rel=1e-12)
    distance = sum(float((a[name] - net.apply(found.permutations, b)[name]).square().sum()) for name in names) ** 0.5
    assert found.distance_after == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize("cost", ["dot", "cosine"])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_objective_never_falls_and_is_true(name: str, anchored: bool, cost: str) -> None:
    net = NETS[name]()
    for seed in range(3):
        a, b = net.tensors(seed, torch.float64), net.tensors(seed + 100, torch.float64)
        if cost == "cosine":
            a, b = ({name: 3 * tensor / tensor.norm() for name, tensor in each.items()} for each in (a, b))
        found = solve(net, a, b, anchored=anchored, cost=cost, seed=seed)
        steps = [found.start, *found.objective]
        assert all(after >= before - 1e-9 for before, after in pairwise(steps))
        weighed = [n for n in net.shapes if "running" not in n and n not in UNUSED.get(name, ())]
        aligned = net.apply(found.permutations, b)
        true = product(a, aligned, weighed) / (9 if cost == "cosine" else 1)
        assert found.objective[-1] == pytest.approx(true, rel=1e-9)
        again = solve(net, a, aligned, anchored=False, cost=cost, seed=seed)
        assert found.settled and again.objective[-1] == pytest.approx(true, rel=1e-9)


UNUSED = {"mlp": ("3.bias",)}


@pytest.mark.parametrize("name", NETS)
def test_threads_change_nothing(name: str) -> None:
    net = NETS[name]()
    a, b = net.tensors(1), net.tensors(2)
    alone = solve(net, a, b)
    with ThreadPoolExecutor(3) as threads:
        assert_same(alone, solve(net, a, b, threads=threads))


def test_blocks_of_rows_change_nothing() -> None:
    net = mlp([64, 2100, 3])
    a = net.tensors(1)
    b = net.apply(net.member(2), {name: tensor + 0.5 * torch.randn_like(tensor) for name, tensor in a.items()})
    with ThreadPoolExecutor(3) as threads:
        assert_same(solve(net, a, b), solve(net, a, b, threads=threads))


def assert_same(one: Solution, other: Solution) -> None:
    assert one.objective == other.objective
    assert all((one.permutations[name] == p).all() for name, p in other.permutations.items())


@pytest.mark.parametrize("name", ["decoder", "encoder", "fused encoder", "experts"])
def test_every_tensor_is_read_once_without_residual(name: str) -> None:
    net = NETS[name]()
    a, b = Reads(net.tensors(1)), Reads(net.tensors(2))
    kinds = net.kinds - {"residual"}
    found = match(net.spaces, a, b, shapes=net.shapes, kinds=kinds)
    used = {use.tensor for space in net.spaces if space.kind in kinds for use in space.uses}
    used |= {name for space in net.spaces for names in space.renames for name in names}
    assert found.settled and found.sweeps == 1
    assert a.count == b.count == {name: int(name in used) for name in net.shapes}


def test_spaces_of_other_kinds_stay() -> None:
    net = decoder()
    found = solve(net, net.tensors(1), net.tensors(2), kinds={"mlp", "vo"})
    assert set(found.permutations) == {s.name for s in net.spaces if s.kind in ("mlp", "vo")}


def test_many_large_experts_are_matched_by_a_short_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading again instead of keeping, and no inner match for most pairs."""
    monkeypatch.setattr("mergekit_lite.align.experts.EVERY", 0)
    monkeypatch.setattr("mergekit_lite.align.experts.KEPT", 0)
    net = experts(8)
    a = net.tensors(3)
    b = net.apply(net.member(4), a)
    back = net.apply(solve(net, a, b).permutations, b)
    assert all(torch.equal(back[name], tensor) for name, tensor in a.items())
    other = net.tensors(5)
    found = solve(net, a, other, kinds={"experts", "mlp"})
    plain = solve(net, a, other, kinds={"experts"})
    assert found.objective[-1] > plain.objective[-1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30])
def test_not_finite(wrong: float) -> None:
    net = mlp([3, 4, 2])
    a, b = net.tensors(1), net.tensors(2)
    b["0.weight"][1, 1] = wrong
    with pytest.raises(InputError, match=r"`0\.weight` of the permuted model"):
        solve(net, a, b)


def test_zeros_and_equal_networks_stay() -> None:
    net = decoder()
    zeros = {name: torch.zeros(shape) for name, shape in net.shapes.items()}
    a = net.tensors(1)
    for one, other in ((zeros, zeros), (a, zeros), (a, a)):
        for cost in ("dot", "cosine"):
            found = solve(net, one, other, cost=cost)
            assert not any(found.moved.values())
            assert found.settled


def test_check_stops_it_and_report_counts() -> None:
    net = decoder()
    seen: list[tuple[str, int, int]] = []
    solve(net, net.tensors(1), net.tensors(1), report=lambda *now: seen.append(now))
    assert {name for name, _, _ in seen} == {s.name for s in net.spaces if s.parent is None}
    assert all(0 < done <= total for _, done, total in seen)

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        solve(net, net.tensors(1), net.tensors(2), check=stop)
    with ThreadPoolExecutor(2) as threads, pytest.raises(Stop):
        solve(net, net.tensors(1), net.tensors(2), check=stop, threads=threads, kinds={"mlp"})


def test_both_axes_in_one_space() -> None:
    """A square tensor with both axes in one space: the true objective grows, and a planted order is found."""
    net = Net([Space("h", "residual", 9, encoder(1, 1).spaces[0].uses[-2:])], {"transform": (9, 9)})
    for seed in range(5):
        a, b = net.tensors(seed), net.tensors(seed + 50)
        found = solve(net, a, b)
        assert found.objective[-1] == pytest.approx(product(a, net.apply(found.permutations, b)), rel=1e-5)
        assert found.objective[-1] >= found.start
    random = np.random.default_rng(0)
    assert shuffled(net.spaces[0], random).shape == (9,)
