"""What `merge path` has found: tables for people, JSON, the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.cli import show

if TYPE_CHECKING:
    from mergekit_lite.evaluate.path import Baseline, Point
    from mergekit_lite.evaluate.stragglers import Layer, Stragglers
    from mergekit_lite.recipe.model import Scoring
    from mergekit_lite.run.trial import Made


@dataclass(frozen=True)
class Study:
    """All of it; `layers` and `stragglers` are None where nobody asked, `baseline` where there are no probabilities."""

    a: str
    b: str
    aligned: list[str] | None
    metric: str
    goal: str
    points: Sequence[Point]
    barrier: float
    layers: Sequence[Layer] | None
    stragglers: Stragglers | None
    baseline: Baseline | None
    made: Sequence[Made]

    @property
    def best(self) -> int:
        """The number of the point with the best score."""
        sign = 1.0 if self.goal == "min" else -1.0
        return min(range(len(self.points)), key=lambda i: sign * self.points[i].score)

    def as_json(self) -> dict[str, Any]:
        """Keys that nothing was measured for are left out."""
        points = [{key: value for key, value in asdict(point).items() if value is not None} for point in self.points]
        made: dict[str, Any] = {"a": self.a, "b": self.b, "aligned": self.aligned, "goal": self.goal}
        made |= {"metric": self.metric, "points": points, "barrier": self.barrier}
        if self.layers is not None and self.stragglers is not None:
            made["layers"] = [asdict(layer) for layer in self.layers]
            named = self.stragglers
            made["stragglers"] = {
                "by": named.by,
                "layers": [layer.name for layer in named.layers],
                "globs": [glob for layer in named.layers for glob in layer.globs],
                "with": {"density": named.density} if named.layers else None,
            }
        if self.baseline is not None:
            made["ensemble"] = {**asdict(self.baseline), "first": (self.a, self.b)[self.baseline.first]}
        made["merged"] = {
            "merges": len(self.made),
            "tensors": sum(one.tensors for one in self.made),
            "of": sum(one.all_tensors for one in self.made),
            "bytes_written": sum(one.bytes_written for one in self.made),
        }
        return made


def scoring(command: str, metric: str | None, goal: str, timeout: float | None) -> Scoring:
    """The score of a command line. Raises UsageError where the command names no model."""
    from mergekit_lite.errors import Mark
    from mergekit_lite.evaluate.score import Score
    from mergekit_lite.recipe.model import Scoring

    Score(command, metric, timeout)
    return Scoring(metric or "score", command, metric, goal, timeout, Mark("--score", 1, 1, command, len(command)))


def tables(study: Study) -> None:
    """For people: the layers first, where they were asked for, the barrier of the whole last."""
    if study.layers is not None and study.stragglers is not None:
        _layers(study.layers, study.stragglers)
        show.line()
    if study.baseline is not None:
        _baseline(study, study.baseline)
        show.line()
    _points(study)
    show.line(f"barrier {study.barrier:.6g}")


def _points(study: Study) -> None:
    columns = ["t", "score"] + (["accuracy", "FFT", "TTF"] if study.points[0].accuracy is not None else [])
    rows = []
    for number, point in enumerate(study.points):
        figures = [value for value in (point.accuracy, point.fft, point.ttf) if value is not None]
        shown = [f"{point.t:.4g}", f"{point.score:.6g}", *(f"{value:.4f}" for value in figures)]
        rows.append([*shown, "best" if number == study.best else ""])
    show.table([*columns, ""], rows, right=columns)


def _layers(layers: Sequence[Layer], found: Stragglers) -> None:
    sharp = any(layer.sharpness is not None for layer in layers)
    columns = ["barrier", "|B-A|/|A|"] + (["sharpness"] if sharp else [])
    named = {layer.name for layer in found.layers}
    rows = [
        [
            layer.name,
            f"{layer.barrier:.6g}",
            f"{layer.screen:.4g}",
            *([_number(layer.sharpness)] if sharp else []),
            "straggler" if layer.name in named else "",
        ]
        for layer in layers
    ]
    show.table(["layer", *columns, ""], rows, right=columns)
    if not found.layers:
        show.line(f"no stragglers: no layer has a {found.by} above 0")
        return
    show.line(f"stragglers, by {found.by}; `sparsify` thins out what has changed in them:")
    for line in found.text:
        show.line(f"  {line}")


def _baseline(study: Study, found: Baseline) -> None:
    first = (study.a, study.b)[found.first]
    rows = [
        [
            f"cascade, window {one.window:g}" if one.window else f"{first} alone",
            f"{one.accuracy:.4f}",
            f"{one.cost:.3f}",
        ]
        for one in found.cascades
    ]
    rows.append(["ensemble", f"{found.accuracy:.4f}", f"{2.0:.3f}"])
    best = next(point for point in study.points if point.t == found.share_at)
    share = f"{100 * found.share:.1f}% of the ensemble's" if found.share is not None else ""
    rows.append([f"merge, t {best.t:.4g}", _number(best.accuracy), f"{1.0:.3f}", share])
    rows = [row if len(row) == 4 else [*row, ""] for row in rows]
    show.table(["", "accuracy", "models a sample", ""], rows, right=["accuracy", "models a sample"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value >= 1e-3 or not value else f"{value:.3g}"


def drawn(study: Study, path: Path) -> None:
    """Draw it. Raises StoppedError where the disk refuses."""
    from mergekit_lite.evaluate.path_picture import draw

    bars: list[tuple[str, list[tuple[str, float | None]]]] = []
    if study.layers is not None:
        bars.append(("barrier of the layer", [(layer.name, layer.barrier) for layer in study.layers]))
        if any(layer.sharpness is not None for layer in study.layers):
            bars.append(("sharpness of the layer", [(layer.name, layer.sharpness) for layer in study.layers]))
    ts, scores = [point.t for point in study.points], [point.score for point in study.points]
    draw(path, ts, scores, study.goal, study.metric, bars)
