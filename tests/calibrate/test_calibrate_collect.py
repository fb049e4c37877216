"""Statistics of networks in memory, each against the same thing worked out another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from mergekit_lite import InputError, MergeError, UsageError, collect


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).double()


def pixels(count: int = 7, width: int = 6) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def squares_by_label(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The squares of d log p(y|x) / d theta, (examples, classes, ...), by vmap over forward-mode-free Jacobians."""
    weights = {name: value.detach() for name, value in network.named_parameters()}

    def scores(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return log_softmax(functional_call(network, parameters, (row[None],))[0], dim=0)

    slopes = vmap(jacrev(scores), (None, 0))(weights, x)
    return {name: value**2 for name, value in slopes.items()}


def test_gram_matrices_are_those_of_the_inputs():
    network = mlp()
    batches = [pixels(7), pixels(3)]
    found = collect(network, batches)
    x = torch.cat(batches).numpy()
    w, b = (value.detach().numpy() for value in network[0].parameters())
    hidden = np.tanh(x @ w.T + b)
    assert set(found.tensors) == {"gram"} and set(found.tensors["gram"]) == {"0.weight", "2.weight"}
    for name, inputs in (("0.weight", x), ("2.weight", hidden)):
        gram = found.tensors["gram"][name]
        assert gram.dtype == torch.float32
        np.testing.assert_allclose(gram.numpy(), inputs.T @ inputs / 10, rtol=1e-6, atol=1e-6)
    assert found.rows == {"0.weight": 10, "2.weight": 10} and found.examples == 10


def test_gram_matrices_of_sequences_and_of_shared_inputs():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).mT
            x.mul_(2)  # a tensor that has been written to since is another input
            return scores @ self.q(x)

    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    rows = x.flatten(0, 1).double()
    found = collect(Attention(), [x.clone()]).tensors["gram"]
    torch.testing.assert_close(found["k.weight"].double(), rows.T @ rows / 10, rtol=1e-5, atol=1e-5)
    # q has seen x and 2 x: (1 + 4) / 2 of the mean.
    torch.testing.assert_close(found["q.weight"].double(), rows.T @ rows / 4, rtol=1e-5, atol=1e-5)


def test_expected_fisher_information_is_exact_and_formed_example_by_example():
    network, x = mlp(), pixels()
    shares = network(x).softmax(dim=1).detach()
    found = collect(network, [x], "fisher").tensors["fisher"]
    assert list(found) == ["0.weight", "0.bias", "2.weight"]
    for name, squares in squares_by_label(network, x).items():
        weights = shares.reshape(*shares.shape, *[1] * (squares.dim() - 2))
        torch.testing.assert_close(found[name], (weights * squares).sum(dim=1).mean(dim=0), rtol=1e-10, atol=1e-14)
    singly = collect(network, list(x.split(1)), "fisher").tensors["fisher"]
    for name, value in found.items():
        torch.testing.assert_close(singly[name], value, rtol=1e-12, atol=0)


def test_sampled_fisher_information_has_the_mean_of_the_expected():
    """Over many draws for one example, within five standard errors of every entry."""
    network, x = mlp(), pixels(1)
    count = 3000
    sampled = collect(network, [x.expand(count, 6)], "fisher", labels="sampled", seed=1).tensors["fisher"]
    shares = network(x).softmax(dim=1).detach()[0]
    for name, squares in squares_by_label(network, x).items():
        weights = shares.reshape(-1, *[1] * (squares.dim() - 2))
        mean = (weights * squares[0]).sum(dim=0)
        error = ((weights * squares[0] ** 2).sum(dim=0) - mean**2).clamp(min=0).div(count).sqrt()
        assert bool(((sampled[name] - mean).abs() <= 5 * error + 1e-12).all()), name
    again = collect(network, [x.expand(50, 6)], "fisher", labels="sampled", seed=1).tensors["fisher"]
    other = collect(network, [x.expand(50, 6)], "fisher", labels="sampled", seed=2).tensors["fisher"]
    same = collect(network, list(x.expand(50, 6).split(9)), "fisher", labels="sampled", seed=1).tensors["fisher"]
    assert all(torch.equal(again[name], same[name]) for name in again)
    assert any(not torch.equal(again[name], other[name]) for name in again)


def test_fisher_information_of_a_sequence_is_the_sum_of_its_positions():
    """Independent draws at each position: the mixed terms vanish in the mean."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4)).double()
    ids = torch.tensor([[0, 1, 1, 4]])
    known = torch.tensor([[0, 2, -100, 3]])  # shifted: positions 0, 1 and 2 predict 2, nothing, 3
    count = 4000
    batch = {"input": ids.expand(count, 4), "labels": known.expand(count, 4)}
    found = collect(network, [batch], "fisher", shift=True, seed=5).tensors["fisher"]["1.weight"]
    expected = torch.zeros(4, 3, dtype=torch.float64)
    spread = torch.zeros(4, 3, dtype=torch.float64)
    for position in (0, 2):
        hidden = network[0](ids)[0, position].detach()
        shares = network[1](hidden).softmax(dim=0).detach()
        for label in range(4):
            slope = torch.outer(one_hot(torch.tensor(label), 4) - shares, hidden)
            expected += shares[label] * slope**2
            spread += shares[label] * slope**4
    # Var((a + b)^2) is at most 8 (E a^4 + E b^4).
    assert bool(((found - expected).abs() <= 5 * (8 * spread / count).sqrt()).all())
    relative = float((found - expected).norm() / expected.norm())
    assert relative < 0.1, relative


class Block(nn.Module):
    """A router over experts as modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 5, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.top_k = 2

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(dim=-1)
        values, chosen = shares.topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                out[rows] += values[rows, place, None] * expert(x[rows])
        return out


def test_a_router_and_its_experts_against_numpy():
    torch.manual_seed(1)
    network = nn.ModuleDict({"moe": Block().double()})["moe"]
    x = pixels(40)
    with torch.no_grad():
        network.gate.weight[4] = -10 * x.sum(dim=0)  # nearly never chosen
    found = collect(network, [x[:25], x[25:]], "router,gram")
    scores = x.numpy() @ network.gate.weight.detach().numpy().T
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    chosen = np.argsort(-shares, axis=1)[:, :2]
    router = found.tensors["router"]
    assert {name: (tuple(t.shape), t.dtype) for name, t in router.items()} == {
        "gate.logits_gram": ((5, 5), torch.float64),
        "gate.usage": ((5,), torch.int64),
        "gate.tokens": ((), torch.int64),
    }
    np.testing.assert_allclose(router["gate.logits_gram"], scores.T @ scores, rtol=1e-12)
    assert router["gate.usage"].tolist() == np.bincount(chosen.ravel(), minlength=5).tolist()
    assert int(router["gate.tokens"]) == 40
    for number in range(5):
        mine = x.numpy()[(chosen == number).any(axis=1)]
        wanted = mine.T @ mine / max(len(mine), 1)
        np.testing.assert_allclose(found.tensors["gram"][f"experts.{number}.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_an_unused_layer_has_zeros_and_is_named():
    network = mlp()
    network.spare = nn.Linear(2, 3)  # type: ignore[assignment]
    network.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(network)[:3]), x)  # type: ignore[method-assign]
    found = collect(network, [pixels()], "gram,fisher,activations")
    assert found.unused == {
        "gram": ["spare.weight"],
        "fisher": ["spare.weight", "spare.bias"],
        "activations": ["spare"],
    }
    assert found.rows["spare.weight"] == 0
    assert not found.tensors["gram"]["spare.weight"].any() and not found.tensors["fisher"]["spare.bias"].any()
    assert "spare.mean" not in found.tensors["activations"]


def test_activations_have_the_mean_and_the_variance_of_all_batches_together():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    x = torch.randn(9, 2, 4, 4, dtype=torch.float64) + 100
    found = collect(network, [x[:2], x[2:3], x[3:]], "activations").tensors["activations"]
    first = network[0](x)
    torch.testing.assert_close(found["0.mean"], first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(found["0.variance"], first.var(dim=(0, 2, 3), correction=0))
    torch.testing.assert_close(found["3.mean"], network(x).mean(dim=0))
    torch.testing.assert_close(found["3.variance"], network(x).var(dim=0, correction=0))


@pytest.mark.parametrize("scale", [0.3, 1.0, 6.0])
def test_the_temperature_is_that_of_the_least_loss(scale: float):
    draw = torch.Generator().manual_seed(8)
    logits = scale * torch.randn(400, 6, generator=draw, dtype=torch.float64)
    labels = torch.where(torch.rand(400, generator=draw) < 0.6, logits.argmax(dim=1), 0)
    found = collect(nn.Identity(), [{"input": logits, "labels": labels}], "confidence").tensors["confidence"]
    best = minimize_scalar(lambda log: float(cross_entropy(logits * np.exp(log), labels)), bounds=(-3, 3)).x
    assert float(found["temperature"]) == pytest.approx(float(np.exp(-best)), rel=2e-3)
    assert float(found["loss"]) == pytest.approx(float(cross_entropy(logits, labels)))
    assert float(found["accuracy"]) == pytest.approx(float((logits.argmax(dim=1) == labels).double().mean()))
    assert float(found["confidence"]) == pytest.approx(float(logits.softmax(dim=1).max(dim=1).values.mean()))


def test_the_network_is_left_as_it_was():
    network = mlp().train()
    network[0].weight.requires_grad_(False)
    network[2].weight.grad = torch.ones(4, 5, dtype=torch.float64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    collect(network, [pixels()], ["gram", "fisher", "activations", "confidence"])
    assert all(part.training for part in network.modules())
    assert not network[0].weight.requires_grad and network[0].bias.requires_grad
    assert torch.equal(network[2].weight.grad, torch.ones(4, 5, dtype=torch.float64)) and network[0].bias.grad is None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    assert not any(p._post_accumulate_grad_hooks for p in network.parameters())


@pytest.mark.parametrize(
    "network, batches, what, error, said",
    [
        (mlp(), [pixels()], "gramm", UsageError, "no statistics `gramm`"),
        (mlp(), [pixels()], "", UsageError, "no statistics are asked for"),
        (mlp(), [], "gram", InputError, "without data"),
        (mlp(), [pixels(0)], "gram", InputError, "without data"),
        (mlp(), [{"input": pixels(3), "labels": torch.zeros(2)}], "gram", InputError, "tensors of 2 and 3 examples"),
        (mlp(), [pixels()], "router", InputError, "`Sequential` has no routers"),
        (mlp(), [pixels()], "hidden", (InputError, TypeError), ""),
        (nn.Linear(6, 1).double(), [pixels()], "fisher", InputError, "logits 1×1, which is no distribution"),
        (nn.Unflatten(1, (3, 2, 1)), [pixels()], "confidence", InputError, "no distribution"),
    ],
)
def test_what_cannot_be_gathered(network: nn.Module, batches: Any, what: str, error: Any, said: str):
    with pytest.raises(error) as caught:
        collect(network, batches, what)
    assert said in str(caught.value)


def test_a_network_without_scores_gives_no_fisher_information():
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return (super().forward(x),)

    with pytest.raises(MergeError, match="`Pair` gives no logits"):
        collect(Pair(6, 3).double(), [pixels()], "fisher")
    assert set(collect(Pair(6, 3).double(), [pixels()], "gram").tensors["gram"]) == {"weight"}
