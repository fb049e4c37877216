"""Permutations learnt by a loss: against every permutation tried, and against weight matching on real data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from align_nets import mlp
from digits_nets import TEST, VALIDATION, accuracy, digits, logits, loss, one_thread, train
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from mergekit_lite.align.apply import fault
from mergekit_lite.align.many import match_many
from mergekit_lite.align.match import match
from mergekit_lite.align.ste import ste, ste_many
from mergekit_lite.errors import InputError

State = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def on_batches(seed: int = 0) -> Callable[[State], Tensor]:
    """Cross-entropy on another 256 training images at each call."""
    pixels, labels = digits()
    generator = torch.Generator().manual_seed(seed)

    def of(state: State) -> Tensor:
        chosen = torch.randint(1000, (256,), generator=generator)
        return cross_entropy(logits(state, pixels[chosen]), labels[chosen])

    return of


@torch.no_grad()
def held_out(state: State) -> Tensor:
    return loss(state, VALIDATION)


def mean(*states: State) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def test_it_mostly_finds_the_best_of_all_where_weight_matching_never_does() -> None:
    """Random networks of three hidden units, and a loss that asks for the mean under an order that is not the
    closest."""
    net, hits = mlp((2, 3, 1)), 0
    for seed in range(9):
        a, b = net.tensors(seed, torch.float64), net.tensors(seed + 50, torch.float64)
        inputs = torch.randn(200, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        first = match(net.spaces, a.__getitem__, b.__getitem__, shapes=net.shapes, kinds=["mlp"]).permutations
        wanted = logits(mean(a, net.apply({"h0": np.roll(first["h0"], 1)}, b)), inputs)

        def distance(state: State, inputs: Tensor = inputs, wanted: Tensor = wanted) -> Tensor:
            return mse_loss(logits(state, inputs), wanted)

        orders = [{"h0": np.array(order)} for order in itertools.permutations(range(3))]
        losses = [float(distance(mean(a, net.apply(order, b)))) for order in orders]
        found = ste(a, b, net.spaces, distance, steps=100)
        assert found.score == pytest.approx(float(distance(mean(a, net.apply(found.permutations, b)))), abs=1e-12)
        assert found.scores[0] == pytest.approx(float(distance(mean(a, net.apply(first, b)))))
        assert found.score == found.scores[found.step] == min(found.scores) and len(found.scores) == 101
        assert found.score < 0.5 * found.scores[0] and found.scores[0] > 1e-3
        hits += found.score == pytest.approx(min(losses), abs=1e-9)
    assert hits >= 5


def test_a_scrambled_copy_is_found_at_once() -> None:
    widths = (64, 32, 32, 10)
    net, a = mlp(widths), train(widths, 0, epochs=3)
    found = ste(a, net.apply(net.member(1), a), net.spaces, on_batches(), steps=2, validation=held_out)
    assert found.step == 0 and found.score == pytest.approx(float(held_out(a)), rel=1e-6)


def test_held_out_loss_falls_below_that_of_weight_matching() -> None:
    widths = (64, 96, 96, 10)
    net, a, b = mlp(widths), train(widths, 0), train(widths, 1)
    found = ste(a, b, net.spaces, on_batches(), lr=0.3, steps=30, validation=held_out)
    assert [fault(space, found.permutations[space.name]) for space in net.spaces] == [None, None]
    matched = match(net.spaces, a.__getitem__, b.__getitem__, shapes=net.shapes, kinds=["mlp"]).permutations
    assert found.scores[0] == pytest.approx(float(held_out(mean(a, net.apply(matched, b)))), rel=1e-5)
    assert found.score == pytest.approx(float(held_out(mean(a, net.apply(found.permutations, b)))), rel=1e-5)
    assert found.score < 0.98 * found.scores[0]
    again = ste(a, b, net.spaces, on_batches(), lr=0.3, steps=30, validation=held_out)
    assert again.scores == found.scores


@pytest.mark.parametrize("mixed", [False, True])
def test_three_at_once_come_closer_than_by_weights_alone(mixed: bool) -> None:
    widths = (64, 128, 128, 10)
    net, models = mlp(widths), [train(widths, seed, epochs=20) for seed in range(3)]
    found = ste_many(models, net.spaces, on_batches(), steps=60, validation=held_out, mixed=mixed)
    merged = mean(*(net.apply(p, model) for p, model in zip(found.permutations, models, strict=True)))
    by_weights = match_many(net.spaces, [m.__getitem__ for m in models], shapes=net.shapes, kinds=["mlp"]).permutations
    start = mean(*(net.apply(p, model) for p, model in zip(by_weights, models, strict=True)))
    assert found.permutations[0] == {}
    assert found.scores[0] == pytest.approx(float(held_out(start)), rel=1e-5)
    assert found.score == pytest.approx(float(held_out(merged)), rel=1e-5)
    assert found.score < 0.95 * found.scores[0]
    assert loss(merged, TEST) < loss(start, TEST)
    assert accuracy(merged, TEST) > 0.93
    assert accuracy(mean(*models), TEST) < 0.85


def test_whole_numbers_stay_and_other_networks_are_refused() -> None:
    net = mlp((2, 3, 1))
    a, b = net.tensors(0), net.tensors(1)
    seen = []

    def of(state: State) -> Tensor:
        seen.append(state["count"])
        return logits({name: state[name] for name in a}, torch.ones(1, 2)).sum()

    count = torch.tensor(7)
    ste({**a, "count": count}, {**b, "count": count + 1}, net.spaces, of, steps=1)
    ste_many([{**a, "count": count}] * 2, net.spaces, of, steps=1, mixed=True)
    assert seen and all(value.item() == 7 for value in seen)
    with pytest.raises(InputError, match="model 2 has other tensors"):
        ste(a, {**b, "more": count}, net.spaces, of)


def test_losses_that_are_never_numbers_leave_weight_matching() -> None:
    net = mlp((2, 3, 1))
    a, b = net.tensors(0), net.tensors(1)
    found = ste(a, b, net.spaces, lambda state: state["0.weight"].sum() * torch.nan, steps=0)
    matched = match(net.spaces, a.__getitem__, b.__getitem__, shapes=net.shapes, kinds=["mlp"]).permutations
    assert (found.permutations["h0"] == matched["h0"]).all() and found.step == 0
