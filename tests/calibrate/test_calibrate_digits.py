"""Statistics of the digits' fine-tunes: those of the script, formed by `collect`, and what merges gain by them."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_lite import collect, load_recipe, merge_in_memory

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import digits
import statistics_digits
import train_digits

States = dict[str, digits.Weights]
SEEDS = (0, 1, 2)


class Net(nn.Module):
    """The digits' network with the names of its checkpoints."""

    def __init__(self, weights: digits.Weights):
        super().__init__()
        self.encoder = nn.Module()
        sizes = [64, *[train_digits.WIDTH] * train_digits.LAYERS]
        self.encoder.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(train_digits.WIDTH, 10)
        self.load_state_dict(weights)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layers:
            x = layer(x).relu()
        return self.head(x)


def trained(seed: int) -> States:
    """The demo's fine-tunes of one seed, as its script trains them."""
    images, labels = digits.split("train")
    few = {task: digits.show(task, images[: train_digits.FEW]) for task in digits.TASKS}
    known = labels[: train_digits.FEW]
    start = train_digits.train(
        train_digits.fresh(100 * seed), torch.cat([*few.values()]), known.repeat(4), epochs=15, rate=1e-3, seed=seed
    )
    found = {}
    for number, task in enumerate(digits.TASKS):
        others = [x for name, x in few.items() if name != task]
        x, y = torch.cat([digits.show(task, images), *others]), torch.cat([labels, known.repeat(3)])
        found[task] = train_digits.train(start, x, y, epochs=8, rate=3e-4, seed=10 + number)
    return found


def merged(folder: Path, use: str, states: States, statistics: States, settings: str) -> digits.Weights:
    key = {"regmean": "gram", "fisher": "fisher"}.get(use)
    inputs = ", ".join(f"{name}: {{{key}: of_{name}}}" if key else f"{name}: {{}}" for name in states)
    models = [*states, *(f"of_{name}" for name in states if key)]
    (folder / "r.yaml").write_text(
        f"version: 1\nmodels: {{{', '.join(f'{name}: ./{name}' for name in models)}}}\n"
        f"steps: {{m: {{use: {use}, of: {{{inputs}}}{settings}}}}}\nsave: {{to: out}}\n"
    )
    given = states | ({f"of_{name}": value for name, value in statistics.items()} if key else {})
    return merge_in_memory(load_recipe(folder / "r.yaml"), given)


def test_what_merges_gain_by_statistics_on_held_out_images(tmp_path: Path):
    """Gathered from training images, scored on test images: RegMean beats the plain mean for each of three seeds,
    Fisher merging on average over them."""
    images, _ = digits.split("train")
    test, labels = digits.split("test")

    def score(weights: digits.Weights) -> float:
        tasks = digits.TASKS
        return sum(digits.accuracy(weights, digits.show(task, test), labels) for task in tasks) / len(tasks)

    gains: dict[str, list[float]] = {"regmean": [], "fisher": []}
    for seed in SEEDS:
        states = trained(seed)
        found = {task: collect(Net(states[task]), [digits.show(task, images[:64])], "gram,fisher") for task in states}
        plain = score(merged(tmp_path, "linear", states, {}, ""))
        for use, kind, settings in (("regmean", "gram", ""), ("fisher", "fisher", ", with: {normalize: false}")):
            statistics = {task: one.tensors[kind] for task, one in found.items()}
            gains[use].append(score(merged(tmp_path, use, states, statistics, settings)) - plain)
    print(gains)  # shown where the test fails
    assert min(gains["regmean"]) > 0.02, gains
    assert sum(gains["fisher"]) > 0, gains
    # The script forms both in another way: hooks play no part in it.
    task = "turned"
    x = digits.show(task, images[:64])
    for kind, wanted in (
        ("gram", statistics_digits.grams(states[task], x)),
        ("fisher", statistics_digits.fisher(states[task], x)),
    ):
        assert set(found[task].tensors[kind]) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(found[task].tensors[kind][name], value, rtol=1e-4, atol=1e-7)
