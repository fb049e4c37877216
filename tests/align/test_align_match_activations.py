"""Matching by activations: units that do the same are found whatever their weights are. What a match takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from align_nets import Net, decoder, encoder, experts, mlp, shuffled
from scipy.stats import pearsonr
from torch import Tensor

from mergekit_lite.align.activations import correlations, match_activations, match_correlations
from mergekit_lite.align.apply import Order, group_order
from mergekit_lite.align.memory import matching_bytes
from mergekit_lite.family.spaces import Space

SAMPLES = 40
FEATURES = {"heads": 3}  # numbers of one head; every other unit has one


def activations(net: Net, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        space.name: torch.randn(SAMPLES, space.size * FEATURES.get(space.kind, 1), generator=generator) * 3 + 1
        for space in net.spaces
    }


def reordered(net: Net, p: dict[str, Order], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the activations are when the network's units are put in the order p."""
    named, found = {space.name: space for space in net.spaces}, {}
    for space in net.spaces:
        source = space.name
        if space.parent is not None:
            slot = group_order(named[space.parent], p[space.parent])[space.slot]
            source = next(s.name for s in net.spaces if (s.parent, s.kind, s.slot) == (space.parent, space.kind, slot))
        units = given[source].reshape(SAMPLES, space.size, -1)[:, p[space.name]]
        found[space.name] = units.reshape(SAMPLES, -1)
    return found


@pytest.mark.parametrize(
    "net", [mlp([3, 6, 7, 2]), decoder(), encoder(), experts()], ids=lambda net: net.spaces[-1].kind
)
def test_planted(net: Net) -> None:
    random = np.random.default_rng(5)
    like = activations(net, 1)
    planted = {space.name: shuffled(space, random) for space in net.spaces}
    of = reordered(net, planted, {name: 2 * x + 0.3 * torch.randn_like(x) for name, x in like.items()})
    found = match_activations(net.spaces, like.__getitem__, of.__getitem__, kinds=net.kinds)
    back = reordered(net, found.permutations, of)
    for name, x in like.items():
        assert torch.corrcoef(torch.stack([back[name].reshape(-1), x.reshape(-1)]))[0, 1] > 0.9
    assert found.objective[-1] > found.start
    assert found.distance_after is None


def test_correlations_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    b[:, 5] = 3.0  # never changes
    found = correlations(a, b, 4)
    for i in range(4):
        for j in range(4):
            pairs = [(2 * i, 2 * j), (2 * i + 1, 2 * j + 1)]
            expected = sum(pearsonr(a[:, x], b[:, y])[0] for x, y in pairs if y != 5)
            assert found[i, j] == pytest.approx(expected, abs=1e-12)


def test_a_fixed_parent_and_its_children() -> None:
    net = encoder()
    names = [space.name for space in net.spaces if space.kind == "vo"]
    worth = np.random.default_rng(0).random((4, 4))
    given: list[tuple[str, str]] = []

    def correlation(a: Space, b: Space) -> np.ndarray:
        given.append((a.name, b.name))
        return worth

    found = match_correlations(net.spaces, correlation, kinds={"vo"})
    assert given == [(name, name) for name in names]
    assert set(found.permutations) == set(names)
    assert found.start == pytest.approx(3 * np.trace(worth))


def test_stated_memory_grows_with_what_is_held() -> None:
    ff, d = 11008, 4096
    net = mlp([d, ff, d])
    space = net.spaces[0]
    stated = matching_bytes(space, net.shapes)
    assert 8 * ff**2 + 3 * 4 * ff * d < stated < 8 * ff**2 + 8 * 4 * ff * d
    wide = decoder(1, kv=8, group=4, head=128, width=d, hidden=8)
    heads = next(space for space in wide.spaces if space.kind == "heads")
    inner = [space for space in wide.spaces if space.parent == heads.name]
    tensors = {use.tensor for use in heads.uses}
    held = 8 * sum(int(np.prod(wide.shapes[name])) for name in tensors)
    with_inner = matching_bytes(heads, wide.shapes, children=inner)
    assert max(held, matching_bytes(heads, wide.shapes)) < with_inner < 3 * held
