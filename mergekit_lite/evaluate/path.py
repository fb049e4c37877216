"""The straight line between two models: scores on it, layer by layer too, and what they say of samples."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.align.diagnose import barrier
from mergekit_lite.evaluate.ensemble import WINDOWS, Cascade, accuracy, cascade, ensemble
from mergekit_lite.evaluate.judge import LOGS, WORK, Judge, Planner
from mergekit_lite.evaluate.readings import Readings
from mergekit_lite.evaluate.samples import Samples, Where, flips
from mergekit_lite.evaluate.worker import make_folder
from mergekit_lite.plan.model import Plan
from mergekit_lite.recipe.model import Recipe, Scoring
from mergekit_lite.recipe.read import parse
from mergekit_lite.run.progress import Options
from mergekit_lite.run.trial import Made

Settings = float | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Point:
    """The merge (1-t) A + t B: its score and, where samples are known, the share of them that are right, of those that
    it alone gets right (`fft`: both ends are wrong) and that it alone gets wrong (`ttf`)."""

    t: float
    score: float
    accuracy: float | None = None
    fft: float | None = None
    ttf: float | None = None


@dataclass(frozen=True, slots=True)
class LayerPath:
    """B with one layer on its way from A to B: scores by the ts of the path, and how much worse than the straight line
    between the first and the last they get, at most."""

    name: str
    scores: tuple[float, ...]
    barrier: float


@dataclass(frozen=True, slots=True)
class Baseline:
    """Both ends as an ensemble, at the cost of two models, and as cascades that begin with the end that is right more
    often, number `first`; `share` is the accuracy of the best merge on the path over that of the ensemble, at
    `share_at`."""

    accuracy: float
    first: int
    cascades: tuple[Cascade, ...]
    share: float | None
    share_at: float


class Line:
    """Scores of merges of `a` and `b`, locations as in a recipe, by the one command in `scoring`.

    One folder is written again and again, and of a merge only those tensors are computed that differ from the last.
    """

    def __init__(self, a: str, b: str, scoring: Scoring, judge: Judge, readings: Readings):
        self._a, self._b, self._scoring, self._judge, self._readings = a, b, scoring, judge, readings
        self._samples: list[Samples] = []

    @property
    def made(self) -> Sequence[Made]:
        """What the merges cost, one by one; those whose score was known cost nothing and are left out."""
        return self._judge.made

    def points(self, ts: Sequence[float], told: Callable[[int], object]) -> list[Point]:
        """The path at `ts`, from 0 to 1. Raises StoppedError where a score cannot be had."""
        values = []
        self._samples = []
        for t in ts:
            value, samples = self._score(t, f"t{t:.6g}")
            values.append(value)
            self._samples += [samples] if samples is not None else []
            told(1)
        if not self._samples:
            return [Point(t, value) for t, value in zip(ts, values, strict=True)]
        first, last = self._samples[0].right, self._samples[-1].right
        return [
            Point(t, value, one.accuracy, *flips(first, last, one.right))
            for t, value, one in zip(ts, values, self._samples, strict=True)
        ]

    def layer(
        self, name: str, globs: Sequence[str], number: int, ts: Sequence[float], told: Callable[[int], object]
    ) -> LayerPath:
        """B with the tensors of `globs` on their way from A to B. `number` is the layer's in logs. Raises as
        `points`."""
        scores = []
        for t in ts:
            where = {**dict.fromkeys(globs, t), "else": 1.0} if t != 1 else 1.0
            scores.append(self._score(where, f"layer{number:03d}-t{t:.6g}")[0])
            told(1)
        return LayerPath(name, tuple(scores), height(scores, ts, self._scoring.goal))

    def baseline(self, ts: Sequence[float]) -> Baseline | None:
        """What the ends of the path that `points` has scored give together; None without their probabilities."""
        if not self._samples:
            return None
        ends = [self._samples[0], self._samples[-1]]
        labels = ends[0].labels
        shares = [one.probabilities for one in ends if one.probabilities is not None]
        if labels is None or len(shares) < 2:
            return None
        order = sorted(range(2), key=lambda i: -ends[i].accuracy)
        whole = accuracy(ensemble(shares), labels)
        found = tuple(cascade([shares[i] for i in order], labels, window) for window in (0.0, *WINDOWS))
        between = range(1, len(ts) - 1) or range(len(ts))
        best = max(between, key=lambda i: self._samples[i].accuracy)
        share = self._samples[best].accuracy / whole if whole else None
        return Baseline(whole, order[0], found, share, ts[best])

    def recipe(self, t: Settings) -> Recipe:
        """The recipe of one merge."""
        steps = {"m": {"use": "interpolate", "of": ["a", "b"], "with": {"t": t}}}
        text = {"version": 1, "models": {"a": self._a, "b": self._b}, "steps": steps, "save": {"to": "path"}}
        made, problems = parse(json.dumps(text), "merge path")  # JSON is YAML
        assert made is not None, problems
        return made

    def _score(self, t: Settings, label: str) -> tuple[float, Samples | None]:
        with self._judge.candidate(self.recipe(t), label) as candidate:
            value = candidate.score(self._scoring)
            return value, self._readings.samples(candidate.merged)


@contextlib.contextmanager
def opened_line(
    a: str, b: str, scoring: Scoring, where: Where, plan: Planner, options: Options, folder: Path, kept: bool
) -> Iterator[Line]:
    """A line whose scores, and with `kept` what commands say, lie in `folder`; the merges are removed at the end."""
    work = folder / WORK / secrets.token_hex(4)  # others may be at work in the folder
    make_folder(folder / LOGS)
    readings = Readings(folder, scoring, where, kept)
    judge = Judge(plan, _no_store, options, work, folder / LOGS, readings, 1, readings.measure)
    try:
        yield Line(a, b, scoring, judge, readings)
    finally:
        judge.close()


def height(scores: Sequence[float], ts: Sequence[float], goal: str) -> float:
    """The barrier of scores of which small ones are good, or large ones with the goal `max`."""
    sign = 1.0 if goal == "min" else -1.0
    return barrier([sign * value for value in scores], ts)


def _no_store(store: str, folder: Path) -> Plan:
    raise AssertionError("a path has no mask store")
