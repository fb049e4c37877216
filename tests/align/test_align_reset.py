"""What follows an average: running statistics against NumPy's, and spread and loss of merged networks on real data."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from align_nets import Net, mlp
from digits_nets import TEST, TRAIN, digits, one_thread, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergekit_lite import collect
from mergekit_lite.align.diagnose import barrier
from mergekit_lite.align.match import match
from mergekit_lite.align.reset import repair, reset_bn
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space, Use

ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def batches(size: int = 250) -> list[Tensor]:
    return list(digits()[0][TRAIN].split(size))


def images(pixels: Tensor) -> Tensor:
    return pixels.reshape(-1, 1, 8, 8)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(24 * 16, 10),
    )


def conv_spaces() -> list[Space]:
    def normalised(conv: int) -> list[Use]:
        norm = [Use(f"{conv + 1}.{part}", 0) for part in ("weight", "bias")]
        still = [Use(f"{conv + 1}.running_{part}", 0, weighed=False) for part in ("mean", "var")]
        return [Use(f"{conv}.weight", 0), *norm, *still]

    first = Space("first", "mlp", 24, (*normalised(0), Use("3.weight", 1)))
    return [first, Space("second", "mlp", 24, (*normalised(3), Use("8.weight", 1, block=16)))]


def trained_conv(seed: int) -> nn.Sequential:
    pixels, labels = digits()
    torch.manual_seed(seed)
    net = conv_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(5):
        for batch in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            cross_entropy(net(images(pixels[batch])), labels[batch]).backward()
            optimizer.step()
    return net.eval()


def loaded(make: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    net = copy.deepcopy(make)
    net.load_state_dict(state)
    return net.eval()


def average(a: nn.Sequential, b: nn.Sequential, alpha: float) -> nn.Sequential:
    states = a.state_dict(), b.state_dict()
    return loaded(
        a,
        {
            n: (1 - alpha) * x + alpha * y if x.is_floating_point() else x
            for (n, x), y in zip(states[0].items(), states[1].values(), strict=True)
        },
    )


@torch.no_grad()
def loss(net: nn.Module, shape: tuple[int, ...] = (64,)) -> float:
    pixels, labels = digits()
    return float(cross_entropy(net(pixels[TEST].reshape(-1, *shape)), labels[TEST]))


def spread(net: nn.Sequential, upto: int, inputs: Tensor) -> np.ndarray:
    """Each channel's standard deviation after the first layers."""
    with torch.no_grad():
        found = net[:upto](inputs).double().numpy()
    return np.moveaxis(found, 1, 0).reshape(found.shape[1], -1).std(axis=1)


def test_running_statistics_are_the_mean_over_batches() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3, momentum=0.3)
    net = nn.Sequential(nn.Linear(4, 3), norm, nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    net[3].train()
    norm.running_mean.fill_(99)
    given = [torch.randn(6, 4) for _ in range(3)]
    assert reset_bn(net, (batch for batch in given)) == 1
    seen = [net[0](batch).detach().double().numpy() for batch in given]
    np.testing.assert_allclose(norm.running_mean, np.mean([x.mean(axis=0) for x in seen], axis=0), rtol=1e-5)
    np.testing.assert_allclose(norm.running_var, np.mean([x.var(axis=0, ddof=1) for x in seen], axis=0), rtol=1e-5)
    assert norm.momentum == 0.3
    assert [part.training for part in net] == [False, False, False, True]


def test_other_networks_need_no_data_and_faults_leave_modes_alone() -> None:
    assert reset_bn(nn.Linear(2, 2), []) == 0
    assert reset_bn(nn.BatchNorm1d(2, track_running_stats=False), []) == 0
    net = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(InputError, match="without data"):
        reset_bn(net, [])
    with pytest.raises(ValueError):
        reset_bn(net, [torch.zeros(3, 2), torch.zeros(3, 2, 2, 2)])
    assert net[0].training and net[0].momentum == 0.1


def test_a_merged_convolutional_network_works_once_its_statistics_are_new() -> None:
    """Two networks trained apart and matched. Averaged statistics are too wide for averaged weights."""
    a, b = trained_conv(0), trained_conv(1)
    net = Net(conv_spaces(), {name: tuple(x.shape) for name, x in a.state_dict().items()})
    found = match(net.spaces, a.state_dict().__getitem__, b.state_dict().__getitem__, shapes=net.shapes, kinds=["mlp"])
    moved = loaded(b, net.apply(found.permutations, b.state_dict()))
    given = [images(batch) for batch in batches()]
    assert loss(moved, (1, 8, 8)) == pytest.approx(loss(b, (1, 8, 8)), rel=1e-4)
    before, after = [], []
    collapsed = restored = np.zeros(0)
    for alpha in ALPHAS:
        merged = average(a, moved, alpha)
        before.append(loss(merged, (1, 8, 8)))
        target = (1 - alpha) * spread(a, 5, torch.cat(given)) + alpha * spread(moved, 5, torch.cat(given))
        if alpha == 0.5:
            collapsed = spread(merged, 5, torch.cat(given)) / target
        reset_bn(merged, given)
        after.append(loss(merged, (1, 8, 8)))
        if alpha == 0.5:
            restored = spread(merged, 5, torch.cat(given)) / target
    assert np.median(collapsed) < 0.8 and 0.9 < np.median(restored) < 1.1
    assert barrier(after, ALPHAS) < 0.5 * barrier(before, ALPHAS)


def as_module(weights: dict[str, Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(weights) // 2):
        out, into = weights[f"{i}.weight"].shape
        layers += [nn.Linear(into, out), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    net.load_state_dict({f"{2 * int(n.split('.')[0])}.{n.split('.')[1]}": x for n, x in weights.items()})
    return net.eval()


def test_repair_gives_every_layer_the_parents_statistics_and_lowers_the_barrier() -> None:
    widths = (64, 48, 48, 48, 48, 10)
    weights = [train(widths, seed) for seed in (0, 1)]
    net = mlp(widths)
    found = match(net.spaces, weights[0].__getitem__, weights[1].__getitem__, shapes=net.shapes, kinds=["mlp"])
    a, b = as_module(weights[0]), as_module(net.apply(found.permutations, weights[1]))
    pixels = torch.cat(batches())
    before, after = [], []
    for alpha in ALPHAS:
        merged = average(a, b, alpha)
        before.append(loss(merged))
        measured = {
            str(i): spread(merged, i + 1, pixels)
            / ((1 - alpha) * spread(a, i + 1, pixels) + alpha * spread(b, i + 1, pixels))
            for i in (0, 2, 4, 6, 8)
        }
        shares = repair(merged, [a, b], [1 - alpha, alpha], batches(300))
        after.append(loss(merged))
        assert list(shares) == list(measured)
        assert shares["0"] == pytest.approx(measured["0"].mean(), rel=1e-4)  # nothing before it was repaired
        assert alpha != 0.5 or measured["6"].mean() < 0.75
        for upto in (1, 3, 5, 7, 9):
            ends = [net[:upto](pixels).detach().double().numpy() for net in (a, b)]
            got = merged[:upto](pixels).detach().double().numpy()
            for figure in (np.mean, np.std):
                wanted = (1 - alpha) * figure(ends[0], axis=0) + alpha * figure(ends[1], axis=0)
                np.testing.assert_allclose(figure(got, axis=0), wanted, rtol=1e-3, atol=1e-4)
    assert after[0] == pytest.approx(before[0], rel=1e-4) and after[-1] == pytest.approx(before[-1], rel=1e-4)
    assert barrier(after, ALPHAS) < 0.6 * barrier(before, ALPHAS)


def test_convolutions_and_dead_channels() -> None:
    torch.manual_seed(0)
    parents = [nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)) for _ in range(2)]
    merged = average(*parents, 0.5)
    with torch.no_grad():
        merged[0].weight[1] = 0
    given = [torch.randn(20, 2, 4, 4) for _ in range(3)]
    assert list(repair(merged, parents, [0.5, 0.5], given)) == ["0", "3"]
    inputs = torch.cat(given)
    got = spread(merged, 1, inputs)
    wanted = 0.5 * (spread(parents[0], 1, inputs) + spread(parents[1], 1, inputs))
    np.testing.assert_allclose(got[[0, 2]], wanted[[0, 2]], rtol=1e-4)
    assert got[1] == 0 and torch.isfinite(merged[0].bias).all()
    assert list(repair(merged, parents, [0.5, 0.5], [(batch,) for batch in given], layers=["0"])) == ["0"]


def test_what_cannot_be_repaired_is_refused_by_name() -> None:
    net = conv_net().eval()
    inputs = [torch.randn(4, 1, 8, 8)]
    assert repair(net, [net], [1.0], inputs) == {"8": pytest.approx(1)}  # only the head has a bias
    with pytest.raises(InputError, match="`0` has no bias"):
        repair(net, [net], [1.0], inputs, layers=["0"])
    with pytest.raises(InputError, match="`1` is no linear"):
        repair(net, [net], [1.0], inputs, layers=["1"])
    with pytest.raises(InputError, match="2 alphas"):
        repair(net, [net], [0.5, 0.5], inputs)
    with pytest.raises(InputError, match="without data"):
        repair(net, [net], [1.0], [])


def test_statistics_stand_in_for_parents() -> None:
    """Gathered beforehand, batch by batch, from one parent after the other: the same repair as with the parents."""
    torch.manual_seed(1)
    parents = [nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)) for _ in range(2)]
    given = [torch.randn(size, 2, 4, 4) for size in (20, 7)]
    known = [collect(parent, given, "activations").tensors["activations"] for parent in parents]
    whole, mixed, files = (average(*parents, 0.3) for _ in range(3))
    shares = repair(whole, parents, [0.7, 0.3], given)
    assert repair(files, known, [0.7, 0.3], given) == pytest.approx(shares)
    assert repair(mixed, [parents[0], known[1]], [0.7, 0.3], given) == pytest.approx(shares)
    assert min(shares.values()) < 0.95
    for made in (files, mixed):
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(made.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="no mean and variance of `3`"):
        repair(files, [{n: t for n, t in known[0].items() if n != "3.variance"}], [1.0], given)
    with pytest.raises(InputError, match=r"`0\.mean` is 4, the layer has 3 channels"):
        repair(files, [known[0] | {"0.mean": torch.zeros(4)}], [1.0], given)
