"""What `make reproduce` shows of matched networks: tables on the terminal, and the text of docs/alignment.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from alignment_measure import POINTS
from alignment_models import CONTEXT, HEADS, TEXT_BYTES, Net
from alignment_results import (
    CNN,
    EXPECTED,
    EXPECTED_MANY,
    EXPECTED_OTHERS,
    EXPECTED_PATH,
    LLAMA,
    MLPS,
    SMOOTH,
    VIT,
    Results,
    bars,
    distance_falls,
)
from rich.box import SIMPLE
from rich.table import Table
from work import page

TEXT = """\
# Matching networks that were trained apart

Written by `make reproduce`. Every merge is a recipe, run by `merge_in_memory` with `use: permute`, `merge_many` or
`reorder`. The barrier is the most by which the loss on the straight line between two networks lies above the straight
line between their losses, over {points} points, ends included. Figures are means over the seeds {seeds}; what stands in
brackets are the seeds one by one. *Expected* are the figures of the specification that the methods follow, measured
with another implementation on networks of its own. The test split has {test} images, so differences of accuracy below
one point are noise.

{bars}

## Two networks, by width

{pairs}

Fully connected networks 64-w-w-w-10 with ReLU, as `permute` with its default settings matches them. *Half way* is the
accuracy of the mean of the two. The distance is ||A - B|| over all weights.

It shows that a large part of the barrier comes from the order of units, and the larger a part the wider the networks
are. It does not show that the networks come close: their distance falls little.

## More than two networks

{many}

Width {many_width}; accuracy of the mean on the test split, and its loss. The networks themselves are right in
{single_accuracy} of the cases, with a loss of {single_loss}. *As they are*: the plain mean (`linear`). The other
columns are the values of `way` of `merge_many`.

{others}

Three networks are matched, to the first (`star`) or with each other. The barrier is that between the second and the
third, which have never been compared with each other under `star`. `ste`: the second and the third are each put in the
order that is learnt by the loss of the mean with the first (`mergekit_lite.align.ste`), in 60 steps
on 400 training images each at a rate of 0.1, chosen by the loss on all training images.

## A network with BatchNorm

{cnn}

Three convolutions of 3x3 with {cnn_width} channels. *Reset*: the running statistics of each network on the way are
measured anew on the training images, since the mean of two networks has others than the mean of theirs. *By
activations*: `cost: activation`, on 256 training images.

## Transformers

{vit}

Vision Transformers of {vit_layers} blocks, width {vit_width}, {heads} heads, on the digits in patches of 2x2.

{llama}

Llamas of {llama_layers} blocks, width {llama_width}, {heads} query heads and {kv} key and value heads; one pair. *Half
way* and *ends* are the share of bytes predicted right. These networks have been trained apart from the first step.
They say nothing about fine-tunes of one base, whose units are in one order already.

The accuracy of the ends stays the same in every row, as it must. What is left of the barrier is large in all of them,
and no mean of two is of use as it is. A smaller distance is not a smaller barrier, as the rows of the ViT show. Whether
longer training or wider networks of these kinds would match better was not measured. Only orders are looked for, no
rotations or signs of the residual stream, and no invertible maps inside the heads.

## Smooth order

{smooth}

64-{smooth_width}-{smooth_width}-{smooth_width}-10, `use: reorder`. The length is the sum of the L1 distances of
neighbouring units, which is the total variation of the weights along the axes of hidden units as well.

## Setting

- Digits: scikit-learn's {images} images of 8x8 with pixels in [0, 1], {train} for training and the rest for the test,
  drawn anew for each seed. Both networks of a pair see the same images, in orders of their own.
- Training: Adam, its rate on one cycle of PyTorch's `OneCycleLR`. {trainings}
- Text: the first {text} bytes of the source files of Python's standard library, those of its top folder in
  alphabetical order. Training examples are windows of {context} bytes out of the first nine tenths, the test's out of
  the last. The figures therefore depend on the release of Python.
- The specification states the epochs and the rate of the fully connected networks, and not the size of batches or
  splits. They come from a trial with one pair, batches of 32, 64 and 128 and the test split in sight: with 64 the
  figures came nearest to those expected. The bars on two networks held with each of the three.
"""


class Sheet(NamedTuple):
    """A table. Columns after the first stand to the right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Results) -> list[Table]:
    """For the terminal."""
    found = []
    for sheet in _sheets(results).values():
        table = Table(title=sheet.title, box=SIMPLE)
        for number, heading in enumerate(sheet.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in sheet.rows:
            table.add_row(*row)
        found.append(table)
    return found


def document(results: Results) -> str:
    """The text of docs/alignment.md: the same for the same results."""
    text = TEXT.format(
        **{name: _markdown(sheet) for name, sheet in _sheets(results).items()},
        points=POINTS,
        seeds=", ".join(map(str, results.seeds)),
        images=1797,
        train=MLPS[0].train,
        test=1797 - MLPS[0].train,
        many_width=MLPS[1].width,
        smooth_width=SMOOTH.width,
        cnn_width=CNN.width,
        vit_layers=VIT.layers,
        vit_width=VIT.width,
        llama_layers=LLAMA.layers,
        llama_width=LLAMA.width,
        heads=HEADS,
        kv=HEADS // 2,
        single_accuracy=f"{fmean(one.accuracy for one in results.singles):.3f}",
        single_loss=f"{fmean(one.loss for one in results.singles):.3f}",
        text=f"{TEXT_BYTES:,}",
        context=CONTEXT,
        trainings=" ".join(
            f"{name}: {net.epochs} epoch{'s' * (net.epochs > 1)}, batches of {net.batch}, rate {net.rate:g}."
            for name, net in (("MLP", MLPS[0]), ("CNN", CNN), ("ViT", VIT), ("Llama", LLAMA))
        ),
    )
    return page(text)


def bars_text(results: Results) -> str:
    """Which bars were not reached."""
    missed = [f"{row[0]}: {row[2]}, not {row[1]}" for row in bars(results) if row[3] == "missed"]
    return f"Bars missed: {'; '.join(missed)}." if missed else "All bars are reached."


def _sheets(results: Results) -> dict[str, Sheet]:
    width = MLPS[1].width
    return {
        "bars": Sheet("bars", ("what", "bar", "measured", ""), bars(results)),
        "pairs": _pairs(results),
        "many": _many(results),
        "others": Sheet(
            f"barrier between the others of three networks of width {width}",
            ("way", "barrier of the test loss", "of the train loss", "expected (test)"),
            [
                [
                    _named(how),
                    _spread([way.barrier("test") for way in ways]),
                    _spread([way.barrier("train") for way in ways]),
                    _figure(EXPECTED_OTHERS.get(how)),
                ]
                for how, ways in results.others.items()
            ],
        ),
        "cnn": _lines(results, CNN, "a CNN with BatchNorm"),
        "vit": _lines(results, VIT, "ViT"),
        "llama": _lines(results, LLAMA, "Llama"),
        "smooth": Sheet(
            "smooth order",
            ("seed", "length before", "after", "ratio", "expected", "largest change of a score"),
            [
                [
                    str(seed),
                    f"{s.before:.0f}",
                    f"{s.after:.0f}",
                    f"{s.after / s.before:.3f}",
                    f"{EXPECTED_PATH}",
                    f"{s.change:.1e}",
                ]
                for seed, s in zip(results.seeds, results.smooth, strict=True)
            ],
        ),
    }


def _pairs(results: Results) -> Sheet:
    rows = []
    for net in MLPS:
        naive, matched = results.of(net).values()
        expected = EXPECTED[net.width]
        for label, ways, test in (("as they are", naive, expected[0]), ("matched", matched, expected[1])):
            falls = label == "matched"
            rows.append(
                [
                    f"{net.width} {label}",
                    _spread([way.barrier("test") for way in ways]),
                    f"{test}",
                    f"{fmean(way.barrier('train') for way in ways):.3f}",
                    f"{fmean(way.middle('test') for way in ways):.3f}",
                    f"{fmean(way.ends('test') for way in ways):.3f}",
                    f"{fmean(way.distance for way in ways):.1f}",
                    f"-{distance_falls(results, net):.0f}% (-{expected[2]}%)" if falls else "",
                ]
            )
    headings = ("width", "barrier, test", "expected", "train", "half way", "ends", "distance", "change (expected)")
    return Sheet("two fully connected networks", headings, rows)


def _many(results: Results) -> Sheet:
    counts = list(dict.fromkeys(count for count, _ in results.many))
    ways = list(dict.fromkeys(how for _, how in results.many))
    rows = []
    for count in counts:
        found = {how: results.many[count, how] for how in ways}
        rows.append(
            [
                f"{count}, accuracy",
                *(_spread([one.accuracy for one in found[how]]) for how in ways),
                " / ".join(f"{value:.3f}" for value in EXPECTED_MANY[count]),
            ]
        )
        rows.append([f"{count}, loss", *(_spread([one.loss for one in found[how]]) for how in ways), ""])
    expected = "expected: as they are / star / merge_many"
    return Sheet("the mean of several networks", ("networks", *map(_named, ways), expected), rows)


def _lines(results: Results, net: Net, title: str) -> Sheet:
    rows = [
        [
            one.label + (", reset" if one.reset else ""),
            _spread([way.barrier("test") for way in ways]),
            f"{fmean(way.barrier('train') for way in ways):.3f}",
            f"{fmean(way.middle('test') for way in ways):.3f}",
            f"{fmean(way.ends('test') for way in ways):.3f}",
            f"{fmean(way.distance for way in ways):.1f}",
        ]
        for one, ways in results.of(net).items()
    ]
    return Sheet(title, ("permuted", "barrier, test", "train", "half way", "ends", "distance"), rows)


def _named(how: str) -> str:
    return "as they are" if how == "naive" else how


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _spread(values: Sequence[float]) -> str:
    mean = f"{fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({' '.join(f'{value:.3f}' for value in values)})"


def _markdown(sheet: Sheet) -> str:
    lines = [sheet.headings, [":-", *["-:"] * (len(sheet.headings) - 1)], *sheet.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
