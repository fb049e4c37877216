"""Layer-wise adaptive sharpness against a brute-force writing of it, by torch functions on copies of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mergekit_lite.calibrate.sharpness import sharpness
from mergekit_lite.errors import InputError, UsageError

LAYERS = {"first": ("0.weight", "0.bias"), "second": ("2.weight", "2.bias"), "bias": ("2.bias",)}


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 4, dtype=dtype), torch.randint(3, (n,))) for n in (8, 8, 3)]


def loss(module: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


def by_hand(module: torch.nn.Module, group: tuple[str, ...], rho: float, steps: int) -> float:
    """The formula, entry by entry bounds and all, on a dict of weights."""
    theta = {name: p.detach().clone() for name, p in module.named_parameters()}

    def at(delta: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        moved = {name: theta[name] + delta[name] if name in delta else theta[name] for name in theta}
        return torch.nn.functional.cross_entropy(functional_call(module, moved, (batch[0],)), batch[1])

    eta = 2.5 * rho / steps
    rises = []
    for batch in data():
        delta = {name: torch.zeros_like(theta[name]) for name in group}
        seen = [at(delta, batch).item()]
        for _ in range(steps):
            gradient = torch.func.grad(lambda d, batch=batch: at(d, batch))(delta)
            for name in group:
                size = theta[name].abs()
                step = delta[name] + eta * size * gradient[name].sign()
                delta[name] = torch.max(torch.min(step, rho * size), -rho * size)
            seen.append(at(delta, batch).item())
        rises.append(max(seen) - seen[0])
    return sum(rises) / len(rises)


@pytest.mark.parametrize(("rho", "steps"), [(0.01, 20), (0.1, 20), (2.0, 7), (0.5, 1)])
def test_it_is_what_the_formula_gives_written_out(rho: float, steps: int) -> None:
    module = network()
    found = sharpness(module, data(), loss, LAYERS, rho=rho, steps=steps)
    wanted = {name: by_hand(module, group, rho, steps) for name, group in LAYERS.items()}
    assert found == pytest.approx(wanted, rel=1e-9)
    assert all(value > 0 for value in found.values()) and found["bias"] <= found["second"] + 1e-12


def test_of_a_linear_loss_it_is_the_sum_of_all_moves() -> None:
    """max of <c, theta + delta> over the box is rho sum |c theta|, which the ascent reaches."""
    module = torch.nn.Linear(5, 1, bias=False).double()
    c = torch.tensor([[1.0, -2.0, 0.0, 3.0, 0.5]], dtype=torch.float64)
    found = sharpness(module, [c, 2 * c], lambda m, b: (m.weight * b).sum(), {"all": ["weight"]}, rho=0.05)
    assert found["all"] == pytest.approx(1.5 * 0.05 * float((c * module.weight.detach()).abs().sum()), rel=1e-12)


def test_the_network_is_left_as_it_was() -> None:
    module = network(torch.float32).train()
    module[0].weight.requires_grad_(False)
    module[2].bias.grad = torch.ones(3)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def broken(m: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if not torch.equal(m[0].weight, before["0.weight"]):
            raise ArithmeticError
        return loss(m, batch)

    sharpness(module, data(torch.float32), loss, LAYERS)
    with pytest.raises(ArithmeticError):
        sharpness(module, data(torch.float32), broken, LAYERS)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert module.training and not module[0].weight.requires_grad and module[2].weight.requires_grad
    assert module[2].bias.grad is not None and module[2].weight.grad is None


def test_a_layer_that_the_loss_does_not_depend_on_is_flat_and_a_cliff_infinite() -> None:
    module = network()
    found = sharpness(module, data(), lambda m, b: m[2].bias.sum(), LAYERS)
    assert found["first"] == 0 < found["bias"]

    def cliff(m: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        total = m[2].bias.abs().sum()
        return total / (total <= before)  # infinite as soon as the bias grows

    before = module[2].bias.detach().abs().sum()
    assert sharpness(module, data(), cliff, {"bias": ["2.bias"]})["bias"] == math.inf


def test_wrong_use_is_told() -> None:
    module = network()
    with pytest.raises(UsageError, match=r"no parameter `0\.wieght`"):
        sharpness(module, data(), loss, {"a": ["0.wieght"]})
    with pytest.raises(UsageError, match="measure nothing"):
        sharpness(module, data(), loss, LAYERS, rho=0.0)
    with pytest.raises(UsageError, match="measure nothing"):
        sharpness(module, data(), loss, LAYERS, steps=0)
    with pytest.raises(UsageError, match="one number"):
        sharpness(module, data(), lambda m, b: m(b[0]), LAYERS)
    with pytest.raises(InputError, match="without data"):
        sharpness(module, [], loss, LAYERS)
    with pytest.raises(InputError, match="loss of a batch is nan"):
        sharpness(module, data(), lambda m, b: loss(m, b) * math.nan, LAYERS)
