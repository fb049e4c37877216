"""`merge path --layers`: each layer of two models by its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.cli import bar, show

if TYPE_CHECKING:
    from mergekit_lite.calibrate.layer_sharpness import Examples
    from mergekit_lite.evaluate.judge import Planner
    from mergekit_lite.evaluate.path import Line
    from mergekit_lite.evaluate.stragglers import Layer
    from mergekit_lite.report.screen import Moved
    from mergekit_lite.run.progress import Options


def screened(a: str, b: str, offline: bool, threads: int, examples: Examples) -> dict[str, Moved]:
    """The layers that both models have; also finds, before a score is run, whether `examples` can be used."""
    from mergekit_lite.report.look import open_location
    from mergekit_lite.report.screen import screen

    first, second = (open_location(location, offline) for location in (a, b))
    if examples:
        examples.check(first, a)
    with bar.reading("compare", sum(meta.nbytes for meta in first.tensors.values())) as advance:
        return screen(first, second, threads=threads, advance=advance)


def sharpness_of(
    line: Line,
    layers: dict[str, Moved],
    examples: Examples,
    rho: float | None,
    plan: Planner,
    working: Options,
    folder: Path,
) -> dict[str, float]:
    """The sharpness of each layer of the merge half way."""
    import tempfile

    from mergekit_lite.calibrate.layer_sharpness import layer_sharpness
    from mergekit_lite.calibrate.sharpness import RHO
    from mergekit_lite.evaluate.worker import make_folder
    from mergekit_lite.report.look import open_location
    from mergekit_lite.run.trial import TrialFolder

    show.note(f"sharpness of {show.count(len(layers), 'layer')}")
    make_folder(folder)
    with tempfile.TemporaryDirectory(prefix="half-way-", dir=folder) as place:
        trial = TrialFolder(Path(place) / "model")
        trial.write(plan(line.recipe(0.5), trial.path), working)
        return layer_sharpness(
            open_location(str(trial.path), offline=True),
            {name: moved.tensors for name, moved in layers.items()},
            examples,
            rho=RHO if rho is None else rho,
            threads=working.threads,
        )


def layer_of(
    line: Line,
    number: int,
    name: str,
    one: Moved,
    everyone: dict[str, Moved],
    sharp: dict[str, float],
    ts: Sequence[float],
    advance: Callable[[int], object],
) -> Layer:
    """A layer's own path, and what else is known of it. Raises StoppedError where a score cannot be had."""
    from mergekit_lite.evaluate.stragglers import Layer
    from mergekit_lite.family.home import globs_of

    names = [tensor for moved in everyone.values() for tensor in moved.tensors]
    globs = globs_of(name, one.tensors, names)
    found = line.layer(name, globs, number, ts, advance)
    return Layer(name, tuple(globs), one.matrices, found.scores, found.barrier, one.ratio, sharp.get(name))
