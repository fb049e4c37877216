"""Three and more networks: planted permutations undone, the oracle, one order for all, nothing lost on the way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from align_nets import NETS, Net, Reads, decoder, mlp, product
from test_align_match_oracles import ORACLES, net_of, tensors
from torch import Tensor

from mergekit_lite.align.apply import composed, inverse
from mergekit_lite.align.many import ManySolution, Way, match_many

WAYS: tuple[Way, ...] = ("star", "merge_many", "cycle")


def solve(net: Net, models: list[dict[str, Tensor]], **settings: Any) -> ManySolution:
    kinds = settings.pop("kinds", net.kinds)
    reading = [model.__getitem__ for model in models]
    return match_many(net.spaces, reading, shapes=net.shapes, kinds=kinds, **settings)


def scrambled(
    net: Net, count: int, noise: float, seed: int = 0
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Networks near the first one, and the same with their units in random orders, but for the first."""
    a = net.tensors(seed)
    near = [a] + [{n: t + noise * torch.randn_like(t) for n, t in a.items()} for _ in range(count - 1)]
    return near, [a] + [net.apply(net.member(seed + i), model) for i, model in enumerate(near[1:], 1)]


@pytest.mark.parametrize("cost", ["dot", "cosine"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETS)
def test_planted(name: str, way: Way, cost: str) -> None:
    net = NETS[name]()
    near, models = scrambled(net, 3, 0.05)
    found = solve(net, models, way=way, cost=cost)
    assert found.settled
    for model, expected, p in zip(models, near, found.permutations, strict=True):
        back = net.apply(p, model)
        assert all(torch.equal(back[n], t) for n, t in expected.items())
    assert all((p == np.arange(len(p))).all() for p in found.permutations[0].values())


@pytest.mark.parametrize("kinds", [None, {"heads", "vo", "mlp"}])
@pytest.mark.parametrize("way", WAYS)
def test_agreement_is_true_and_does_not_fall(way: Way, kinds: set[str] | None) -> None:
    net = decoder(1)
    models = [net.tensors(seed, torch.float64) for seed in range(3)]
    found = solve(net, models, way=way, kinds=kinds or net.kinds)
    names = list(net.shapes) if kinds is None else [n for n in net.shapes if n[0].isdigit() and "norm" not in n]
    aligned = [net.apply(p, model) for p, model in zip(found.permutations, models, strict=True)]
    for given, sums in ((models, found.agreement[0]), (aligned, found.agreement[1])):
        assert sum(product(a, b, names) for a, b in combinations(given, 2)) == pytest.approx(sums, rel=1e-9)
    assert found.agreement[1] > found.agreement[0]


def test_the_joint_ways_agree_more_than_the_star() -> None:
    """Where the models differ, matching to the mean of the others never ends below the joint search's own start."""
    net = mlp([8, 12, 12, 4])
    sums = dict.fromkeys(WAYS, 0.0)
    for seed in range(3):
        models = [net.tensors(10 * seed + i) for i in range(3)]
        for way in WAYS:
            sums[way] += solve(net, models, way=way).agreement[1]
    assert sums["star"] < sums["merge_many"]
    assert sums["star"] < sums["cycle"]


@pytest.mark.parametrize("way", ["merge_many", "cycle"])
def test_oracle(way: Way) -> None:
    """The oracle's permutations, turned so that the first model stays as it is."""
    case = ORACLES["merge_many/three_models"]
    models = [tensors(model) for model in case["inputs"]["models"]]
    net = net_of(case, {name: tuple(tensor.shape) for name, tensor in models[0].items()})
    found = solve(net, models, way=way)
    perms = [{"P0": np.array(p["data"])} for p in case["expected"]["perms"]]
    back = inverse(net.spaces, perms[0])
    for got, expected in zip(found.permutations, perms, strict=True):
        np.testing.assert_array_equal(got["P0"], composed(net.spaces, expected, back)["P0"])
    aligned = [net.apply(p, model) for p, model in zip(found.permutations, models, strict=True)]
    distances = sum(float((a[n] - b[n]).square().sum()) for a, b in combinations(aligned, 2) for n in a)
    assert distances == pytest.approx(case["expected"]["sum_pairwise_sq_dist_trace"][-1], abs=case["atol"])


@pytest.mark.parametrize("way", WAYS)
def test_threads_change_nothing(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_lite.align.cycle.STEPS", 4)
    net = decoder(1)
    models = [net.tensors(seed) for seed in range(3)]
    for kinds in (net.kinds, net.kinds - {"residual"}):
        alone = solve(net, models, way=way, kinds=kinds)
        with ThreadPoolExecutor(3) as threads:
            other = solve(net, models, way=way, kinds=kinds, threads=threads)
        assert alone.agreement == other.agreement
        for one, two in zip(alone.permutations, other.permutations, strict=True):
            assert all((one[name] == p).all() for name, p in two.items())


def test_layers_are_read_once_and_what_does_not_fit_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = decoder()
    kinds = {"heads", "vo", "mlp"}
    models = [Reads(net.tensors(seed)) for seed in range(3)]
    once = match_many(net.spaces, models, shapes=net.shapes, kinds=kinds)
    used = {use.tensor for space in net.spaces if space.kind in kinds for use in space.uses}
    assert all(model.count == {name: int(name in used) for name in net.shapes} for model in models)
    whole = match_many(net.spaces, models, shapes=net.shapes, kinds=net.kinds)
    assert all(set(model.count.values()) == {1, 2} for model in models)
    monkeypatch.setattr("mergekit_lite.align.parts.KEPT", 0)
    again = match_many(net.spaces, models, shapes=net.shapes, kinds=net.kinds)
    assert all(min(model.count.values()) > 2 for model in models)
    assert again.agreement == whole.agreement != once.agreement


def test_one_and_two_models() -> None:
    net = mlp([3, 5, 2])
    a = net.tensors(1)
    for way in WAYS:
        assert solve(net, [a], way=way).agreement == (0.0, 0.0)
        b = net.apply(net.member(2), a)
        found = solve(net, [a, b], way=way)
        assert torch.equal(net.apply(found.permutations[1], b)["0.weight"], a["0.weight"])
