"""What lies between two networks, what their units do, and how smooth their order is: plain measurements in PyTorch
(`make reproduce`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from alignment_models import Judge, Weights, scores
from torch import Tensor, nn

from mergekit_lite.align.reset import reset_bn
from mergekit_lite.family.axes import spaces_of
from mergekit_lite.family.data import load_family
from mergekit_lite.family.spaces import Space

POINTS = 25
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Way:
    """Losses and accuracies at evenly spaced points of the straight line between two networks, by split, the ends
    included, and the distance of the ends."""

    losses: Mapping[str, Sequence[float]]
    accuracies: Mapping[str, Sequence[float]]
    distance: float

    def barrier(self, split: str) -> float:
        """The most by which the loss lies above the straight line between the losses of the ends; never below 0."""
        losses = self.losses[split]
        last = len(losses) - 1
        return max(x - ((last - i) * losses[0] + i * losses[-1]) / last for i, x in enumerate(losses))

    def middle(self, split: str) -> float:
        """The accuracy half way."""
        return self.accuracies[split][len(self.accuracies[split]) // 2]

    def ends(self, split: str) -> float:
        """The mean accuracy of the two networks."""
        return (self.accuracies[split][0] + self.accuracies[split][-1]) / 2


def way(
    judge: Judge, a: Weights, b: Weights, points: int = POINTS, finish: Callable[[Weights], Weights] | None = None
) -> Way:
    """What lies between `a` and `b`. `finish` makes the network that is measured out of one between them."""
    losses: dict[str, list[float]] = {split: [] for split in SPLITS}
    accuracies: dict[str, list[float]] = {split: [] for split in SPLITS}
    for point in range(points):
        between = mixed(a, b, point / (points - 1))
        if finish is not None and 0 < point < points - 1:
            between = finish(between)
        for split in SPLITS:
            loss, accuracy = judge.measure(between, split)
            losses[split].append(loss)
            accuracies[split].append(accuracy)
    return Way(losses, accuracies, distance(a, b))


def mixed(a: Weights, b: Weights, share: float) -> Weights:
    """(1 - share) a + share b; of counters those of `a`."""
    return {name: torch.lerp(x, b[name], share) if x.is_floating_point() else x for name, x in a.items()}


def distance(a: Weights, b: Weights) -> float:
    """||a - b|| over all weights; running statistics are none."""
    names = [name for name, x in a.items() if x.is_floating_point() and "running_" not in name]
    return float(sum((a[n].double() - b[n].double()).square().sum() for n in names) ** 0.5)


def with_statistics(judge: Judge, weights: Weights) -> Weights:
    """`weights` with the running statistics of BatchNorm measured anew on the training images."""
    module = judge.net.module()
    module.load_state_dict(weights)
    reset_bn(module, judge.data.inputs["train"].split(400))
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def spaces(judge: Judge, weights: Weights) -> tuple[Space, ...]:
    """The spaces of the network."""
    family = judge.net.family
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return spaces_of(judge.net.config(judge.module), shapes, None if family is None else load_family(family))


def activations(judge: Judge, weights: Weights, examples: int) -> Weights:
    """By space: what the layers that read it get as input on the first training examples, (rows, elements). Every token
    and every pixel is a row, and so is every layer that reads the space."""
    module = judge.module
    readers = {
        judge.names[use.tensor].removesuffix(".weight"): space.name
        for space in spaces(judge, weights)
        for use in space.uses
        if space.parent is None and use.axis == 1
    }
    found: dict[str, list[Tensor]] = {}

    def noting(space: str) -> Callable[[nn.Module, Any], None]:
        def note(part: nn.Module, given: Any) -> None:
            rows = given[0].movedim(1, -1) if isinstance(part, nn.Conv2d) else given[0]
            found.setdefault(space, []).append(rows.flatten(0, -2))

        return note

    parts = ((module.get_submodule(path), space) for path, space in readers.items())
    hooks = [
        part.register_forward_pre_hook(noting(space))
        for part, space in parts
        if isinstance(part, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        own = {judge.names[name]: tensor for name, tensor in weights.items()}
        scores(module, own, judge.data.inputs["train"][:examples])
    for hook in hooks:
        hook.remove()
    return {space: torch.cat(rows) for space, rows in found.items()}


def hidden_layers(weights: Weights) -> list[tuple[str, str]]:
    """The names of the hidden layers of a fully connected network, each with the one that follows."""
    layers = [name.removesuffix(".bias") for name in weights if name.endswith(".bias") and name != "head.bias"]
    layers = [*sorted(layers, key=lambda name: int(name.rsplit(".", 1)[1])), "head"]
    return list(itertools.pairwise(layers))


def path_length(weights: Weights) -> float:
    """Over the hidden layers of a fully connected network: the sum of the L1 distances of neighbouring units, all
    weights of a unit taken together. It is the total variation too, the sum of the absolute differences of neighbours
    along every axis of hidden units, over all tensors."""
    total = 0.0
    for layer, following in hidden_layers(weights):
        ways_in, ways_out = weights[f"{layer}.weight"], weights[f"{following}.weight"]
        units = torch.cat([ways_in, weights[f"{layer}.bias"][:, None], ways_out.T], dim=1).double()
        total += float(units.diff(dim=0).abs().sum())
    return total
