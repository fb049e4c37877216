"""What `make reproduce` measures of matched networks, and what is to be reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from alignment_measure import Way
from alignment_models import Net

MLPS = tuple(Net("mlp", width, 3, epochs=40, batch=64, rate=1e-3) for width in (64, 256, 512))
SMOOTH = Net("mlp", 128, 3, epochs=40, batch=64, rate=1e-3)
CNN = Net("cnn", 32, 3, epochs=15, batch=64, rate=3e-3)
VIT = Net("vit", 64, 2, epochs=40, batch=64, rate=2e-3, decay=0.01)
LLAMA = Net("llama", 128, 2, epochs=1, batch=16, rate=3e-3, train=6400, decay=0.01)

# What the specification states, by width: barriers of the test loss, and by how much the distance falls in percent.
EXPECTED = {64: (1.53, 0.104, 26), 256: (0.95, 0.029, 19), 512: (0.77, 0.014, 16)}
EXPECTED_MANY = {  # by number of networks: accuracy of the plain mean, star and merge_many
    2: (0.752, 0.962, 0.968),
    3: (0.282, 0.957, 0.958),
    5: (0.133, 0.946, 0.949),
    8: (0.105, 0.934, 0.938),
}
EXPECTED_OTHERS = {"star": 0.066, "merge_many": 0.032, "ste": 0.047}
EXPECTED_PATH = 0.77


@dataclass(frozen=True)
class Line:
    """How the second of two networks is permuted before the way between them is measured: the settings of `permute`,
    None for not at all. `reset`: BatchNorm's statistics are measured anew on the way."""

    label: str
    settings: Mapping[str, Any] | None = None
    reset: bool = False
    activations: bool = False

    def __hash__(self) -> int:
        return hash((self.label, self.reset))


class Many(NamedTuple):
    """A merged network on the test split."""

    loss: float
    accuracy: float


class Smooth(NamedTuple):
    before: float
    after: float
    change: float


@dataclass(frozen=True)
class Results:
    """Lists are by seed. `many` by number of networks and way; `others` the way between the second and the third of
    three networks, by way."""

    seeds: Sequence[int]
    lines: Mapping[tuple[Net, Line], Sequence[Way]]
    many: Mapping[tuple[int, str], Sequence[Many]]
    singles: Sequence[Many]
    others: Mapping[str, Sequence[Way]]
    smooth: Sequence[Smooth]

    def of(self, net: Net) -> dict[Line, Sequence[Way]]:
        return {one: ways for (found, one), ways in self.lines.items() if found == net}


def bars(results: Results) -> list[list[str]]:
    """What is to be reached, by how much, what was measured, and `met` or `missed`."""
    wide = MLPS[-1]
    matched = {net: [*results.of(net).values()][1] for net in MLPS}
    barriers = [_barrier(matched[net]) for net in MLPS]
    apart = 100 * fmean(way.ends("test") - way.middle("test") for way in matched[wide])
    most = max(count for count, _ in results.many)
    accuracy = {how: fmean(one.accuracy for one in results.many[most, how]) for how in ("naive", "merge_many")}
    gaps = {
        count: fmean(one.loss for one in results.many[count, "merge_many"])
        - fmean(one.loss for one in results.many[count, "star"])
        for count in dict.fromkeys(count for count, _ in results.many)
        if count >= 5
    }
    ratio = max(one.after / one.before for one in results.smooth)
    change = max(one.change for one in results.smooth)
    falls = [_falls(results, net) for net in MLPS]
    distances = [distance_falls(results, net) for net in MLPS]
    others = {how: _barrier(results.others[how]) for how in results.others if how in EXPECTED_OTHERS}

    def row(what: str, bar: str, measured: str, met: bool) -> list[str]:
        return [what, bar, measured, "met" if met else "missed"]

    return [
        row(f"width {wide.width}: the barrier falls by", "at least 90%", f"{falls[-1]:.1f}%", falls[-1] >= 90),
        row(f"width {wide.width}: barrier when matched", "below 0.05", f"{barriers[-1]:.3f}", barriers[-1] < 0.05),
        row(f"width {wide.width}: half way behind the ends", "at most 1.5 points", f"{apart:.2f} points", apart <= 1.5),
        row(
            "the barrier falls with the width",
            "at each step",
            _listed(barriers),
            barriers == sorted(barriers, reverse=True),
        ),
        row("the barrier falls by, at every width", "above 90%", f"{min(falls):.1f}% at least", min(falls) > 90),
        row("while the distance falls by", "below 30%", f"{max(distances):.0f}% at most", max(distances) < 30),
        row(
            f"{most} networks, merge_many: accuracy",
            "above 0.92",
            f"{accuracy['merge_many']:.3f}",
            accuracy["merge_many"] > 0.92,
        ),
        row(f"{most} networks as they are: accuracy", "below 0.2", f"{accuracy['naive']:.3f}", accuracy["naive"] < 0.2),
        row(
            f"loss of merge_many less that of star, {' and '.join(map(str, gaps))} networks",
            "at most 0",
            _listed(list(gaps.values())),
            all(gap <= 0 for gap in gaps.values()),
        ),
        *(
            row(f"between the others of three, {how}: barrier", "below 0.1", f"{barrier:.3f}", barrier < 0.1)
            for how, barrier in others.items()
        ),
        row("smooth order: length", "at most 0.85 of before", f"{ratio:.3f} at most", ratio <= 0.85),
        row("smooth order: change of a score", "at most 1e-4", f"{change:.1e} at most", change <= 1e-4),
    ]


def _barrier(ways: Sequence[Way]) -> float:
    return fmean(way.barrier("test") for way in ways)


def _falls(results: Results, net: Net) -> float:
    """By how many percent the mean barrier of the test loss falls."""
    naive, matched = results.of(net).values()
    return 100 * (1 - _barrier(matched) / _barrier(naive))


def distance_falls(results: Results, net: Net) -> float:
    """By how many percent the mean distance of the networks falls."""
    naive, matched = results.of(net).values()
    return 100 * (1 - fmean(way.distance for way in matched) / fmean(way.distance for way in naive))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
