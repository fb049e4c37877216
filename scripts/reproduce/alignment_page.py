"""Match the units of networks that were trained apart, and measure what lies between them: minutes on two cores.

    python scripts/reproduce/alignment_page.py --write docs/alignment.md

The barrier is the most by which the loss on the straight line between two networks lies above the straight line
between their losses, over 25 points.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from alignment_measure import Way, activations, path_length, spaces, way, with_statistics
from alignment_merges import Merger
from alignment_models import Judge, Net, Weights, scores, trained
from alignment_results import CNN, LLAMA, MLPS, SMOOTH, VIT, Line, Many, Results, Smooth
from alignment_text import bars_text, document, tables
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy
from work import processes

from mergekit_lite.align.apply import moves, permuted
from mergekit_lite.align.ste import ste
from mergekit_lite.merge import default_threads

SEEDS = (0, 1, 2)
CACHE = Path("demo/alignment")
EXAMPLES = {"llama": 16}  # training examples behind activations; 256 of the others
TESTED = {"llama": 32}  # examples of each split that a loss is the mean of; all of the others
COUNTS = (2, 3, 5, 8)
MANY = MLPS[1]
STE_BATCH, STE_STEPS = 400, 60  # twenty epochs
WAYS = ("naive", "star", "merge_many", "cycle")

NAIVE = Line("as they are")
MATCHED = Line("matched", {})
RESIDUAL = ("mlp", "heads", "residual")
LINES: dict[Net, tuple[Line, ...]] = {
    **dict.fromkeys(MLPS, (NAIVE, MATCHED)),
    CNN: (
        NAIVE,
        Line("as they are", reset=True),
        MATCHED,
        Line("matched", {}, reset=True),
        Line("activations", {}, reset=True, activations=True),
    ),
    **{
        net: (
            NAIVE,
            Line("mlp, heads", {"spaces": ["mlp", "heads"]}),
            Line("mlp, heads, residual", {"spaces": [*RESIDUAL]}),
            Line(f"mlp, heads, residual, {inner}", {"spaces": [*RESIDUAL, *inner.split(", ")]}),
            Line("the same, cosine", {"spaces": [*RESIDUAL, *inner.split(", ")], "cost": "cosine"}),
            Line("mlp, heads, residual by activations", {"spaces": [*RESIDUAL]}, activations=True),
        )
        for net, inner in ((VIT, "qk, vo"), (LLAMA, "vo"))
    },
}
PAIRS = {net: SEEDS[:1] if net == LLAMA else SEEDS for net in LINES}


@functools.lru_cache(maxsize=2)
def judge(net: Net, seed: int) -> Judge:
    torch.set_num_threads(1)
    return Judge(net, seed, TESTED.get(net.kind, 2000))


@functools.lru_cache(maxsize=16)
def model(net: Net, seed: int, number: int) -> Weights:
    """Network `number` of one seed, read from the cache or trained."""
    torch.set_num_threads(1)
    return trained(net, 10 * seed + number, seed, CACHE)


def train(net: Net, seed: int, number: int) -> None:
    """Leave the network in the cache."""
    model(net, seed, number)


def merger(net: Net, seed: int) -> Merger:
    return Merger(net, net.config(judge(net, seed).module))


def line(net: Net, seed: int, one: Line) -> Way:
    """What lies between two networks, the second permuted as `one` says."""
    a, b = (model(net, seed, number) for number in (0, 1))
    measured = judge(net, seed)
    if one.settings is not None:
        seen = None
        if one.activations:
            examples = EXAMPLES.get(net.kind, 256)
            seen = (activations(measured, a, examples), activations(measured, b, examples))
        b = merger(net, seed).permuted(a, b, seen, **one.settings)
    return way(measured, a, b, finish=functools.partial(with_statistics, measured) if one.reset else None)


def many(net: Net, seed: int, count: int, how: str) -> Many:
    """The mean of `count` networks: loss and accuracy on the test split."""
    models = [model(net, seed, number) for number in range(count)]
    found = merger(net, seed)
    merged = found.mean(models) if how == "naive" else found.many(models, way=how)
    return Many(*judge(net, seed).measure(merged, "test"))


def single(net: Net, seed: int) -> Many:
    """The mean of the networks' own losses and accuracies on the test split."""
    found = [judge(net, seed).measure(model(net, seed, number), "test") for number in range(max(COUNTS))]
    return Many(*(sum(values) / len(found) for values in zip(*found, strict=True)))


def learnt(net: Net, seed: int, number: int) -> Weights:
    """A network in the order that is learnt by the loss of its mean with the first. The order is chosen by the loss on
    all training images."""
    measured = judge(net, seed)
    first, other = model(net, seed, 0), model(net, seed, number)
    inputs, labels = measured.data.inputs["train"], measured.data.labels["train"]
    batches = itertools.cycle(range(0, len(inputs), STE_BATCH))

    def loss(weights: Mapping[str, Tensor], seen: slice) -> Tensor:
        return cross_entropy(scores(measured.module, weights, inputs[seen]), labels[seen])

    def batch_loss(weights: Mapping[str, Tensor]) -> Tensor:
        start = next(batches)
        return loss(weights, slice(start, start + STE_BATCH))

    units = spaces(measured, other)
    shapes = {name: tuple(tensor.shape) for name, tensor in other.items()}
    found = ste(
        first,
        other,
        units,
        batch_loss,
        lr=0.1,
        steps=STE_STEPS,
        validation=lambda state: loss(state, slice(None)),
        seed=seed,
    )
    moved = moves(units, found.permutations, shapes)
    return {name: permuted(moved[name], other[moved[name].source]) if name in moved else w for name, w in other.items()}


def between_others(net: Net, seed: int, how: str) -> Way:
    """What lies between the second and the third of three networks that are matched as `how` says."""
    models = [model(net, seed, number) for number in range(3)]
    if how == "naive":
        return way(judge(net, seed), models[1], models[2])
    if how == "ste":
        return way(judge(net, seed), learnt(net, seed, 1), learnt(net, seed, 2))
    found = merger(net, seed)
    b, c = (found.many(models, weights, way=how) for weights in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
    return way(judge(net, seed), b, c)


def smooth(net: Net, seed: int) -> Smooth:
    """The path through the units of a network before and after, and the largest change of a score."""
    before = model(net, seed, 0)
    after = merger(net, seed).reordered(before)
    measured = judge(net, seed)
    with torch.no_grad():
        found = [scores(measured.module, weights, measured.data.inputs["test"]) for weights in (before, after)]
    return Smooth(path_length(before), path_length(after), float((found[0] - found[1]).abs().max()))


def measure(workers: int, console: Console) -> Results:
    with processes(workers, console) as (pool, wait):
        # The longest first, so that no process waits for the other at the end.
        needed = [
            (net, seed, number) for net in (LLAMA, VIT, *MLPS[::-1], CNN) for seed in PAIRS[net] for number in (0, 1)
        ]
        needed += [(MANY, seed, number) for seed in SEEDS for number in range(2, max(COUNTS))]
        needed += [(SMOOTH, seed, 0) for seed in SEEDS]
        wait("training", [pool.submit(train, *one) for one in needed])
        lines = {
            (net, one): [pool.submit(line, net, seed, one) for seed in PAIRS[net]]
            for net, ones in reversed(LINES.items())
            for one in ones
        }
        means = {
            (count, how): [pool.submit(many, MANY, seed, count, how) for seed in SEEDS]
            for count in COUNTS
            for how in WAYS
        }
        others = {how: [pool.submit(between_others, MANY, seed, how) for seed in SEEDS] for how in (*WAYS, "ste")}
        singles = [pool.submit(single, MANY, seed) for seed in SEEDS]
        orders = [pool.submit(smooth, SMOOTH, seed) for seed in SEEDS]
        groups: list[list[Future[Any]]] = [*lines.values(), *means.values(), *others.values(), singles, orders]
        wait("matching", [future for futures in groups for future in futures])
        return Results(
            SEEDS,
            {
                key: [future.result() for future in lines[key]]
                for net, ones in LINES.items()
                for key in ((net, one) for one in ones)
            },
            {key: [future.result() for future in futures] for key, futures in means.items()},
            [future.result() for future in singles],
            {how: [future.result() for future in futures] for how, futures in others.items()},
            [future.result() for future in orders],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=min(default_threads(), 8), help="processes")
    parser.add_argument("--write", type=Path, help="write the results as a document")
    args = parser.parse_args()

    results = measure(args.workers, Console(stderr=True))
    console = Console()
    for table in tables(results):
        console.print(table)
    console.print(bars_text(results))
    if args.write:
        args.write.write_text(document(results), encoding="utf-8")


if __name__ == "__main__":
    main()
