"""`merge path`: how a score changes on the way from one model to another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_lite.cli import bar, options, show
from mergekit_lite.errors import MergeError, UsageError

if TYPE_CHECKING:
    from mergekit_lite.evaluate.judge import Planner

POINTS = 11
MOST = 1001


class Goal(str, Enum):
    """Which scores are good."""

    min = "min"
    max = "max"


def path(
    a: Annotated[str, typer.Argument(metavar="A", help="The checkpoint where the path begins.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The one where it ends.", show_default=False)],
    score: Annotated[
        str,
        typer.Option(
            "--score", metavar="COMMAND", help="Prints a number for the checkpoint in {model}.", show_default=False
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="PATH", help="Where the number is in printed JSON: a.b.", show_default=False),
    ] = None,
    goal: Annotated[
        Goal, typer.Option("--goal", help="Whether small scores (a loss) or large ones are good.")
    ] = Goal.min,
    points: Annotated[
        int, typer.Option("--points", metavar="N", min=2, max=MOST, help="Points on the path, both ends included.")
    ] = POINTS,
    predictions: Annotated[
        str | None,
        typer.Option(
            "--predictions",
            metavar="PATH",
            help="Where the JSON, or a file in {out}, says of each sample whether it is right, or its class.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="PATH", help="Where the true classes are.", show_default=False),
    ] = None,
    probabilities: Annotated[
        str | None,
        typer.Option(
            "--probabilities", metavar="PATH", help="Where each sample's probabilities are.", show_default=False
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Each layer's own path too, and straggler layers.")] = False,
    count: Annotated[
        int | None,
        typer.Option("--stragglers", metavar="N", min=1, help="So many of them; 2 if left out.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="Measure the layers' sharpness by a text.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="Or by model inputs and labels, .safetensors or .npz.", show_default=False
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option("--examples", metavar="N", min=1, help="Draw this many; all if left out.", show_default=False),
    ] = None,
    rho: Annotated[
        float | None,
        typer.Option(
            "--rho",
            metavar="R",
            help="How far weights move for it, relative to their size; 0.01 if left out.",
            show_default=False,
        ),
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            "--align", metavar="SPACES", help="Match B's units with A's first, such as mlp,heads.", show_default=False
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option("--family", metavar="FILE", help="A family file for --align.", show_default=False),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="S", min=0, help="Seconds for one score at most.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Keep scores and logs here, and go on there.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the path: a .svg, .png or .pdf.", show_default=False),
    ] = None,
    offline: options.Offline = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Score the merges (1-t) A + t B for t from 0 to 1 and give the barrier: the most that the path is worse than the
    straight line between the scores of its ends (Git Re-Basin, arXiv 2209.04836).

    With --layers, the barrier of B with one layer on its way from A, layer by layer. With what the command says of each
    sample, those that the merge alone gets right (FFT) or wrong (TTF), and what both models give as an ensemble. Merges
    are written one over the other, and a known score is not measured again.
    """
    from mergekit_lite import choose, merge
    from mergekit_lite.calibrate.layer_sharpness import Examples
    from mergekit_lite.cli import path_layers, path_show
    from mergekit_lite.evaluate.path import height, opened_line
    from mergekit_lite.evaluate.samples import Where
    from mergekit_lite.evaluate.stragglers import COUNT, stragglers
    from mergekit_lite.run.progress import Options

    where, given = Where(predictions, labels, probabilities), Examples(text, data, examples)
    scoring = path_show.scoring(score, metric, goal.value, timeout)
    where.check(score)
    _check({"--stragglers": count, "--text": text, "--data": data}, "--layers", layers)
    _check({"--rho": rho, "--examples": examples}, "--text` or `--data", bool(given))
    if plot is not None:
        from mergekit_lite.evaluate.path_picture import check_picture

        check_picture(plot)
    ts = [i / (points - 1) for i in range(points)]
    working = Options(threads or merge.default_threads())
    with _folder(out) as folder:
        plan = choose.planner(offline=offline, threads=threads)
        first, second = _located(a), _located(b)
        if align is not None:
            with _unmarked():
                second = _aligned(first, second, _words(align), family, folder, plan, offline, threads)
        with opened_line(first, second, scoring, where, plan, working, folder, out is not None) as line:
            with _unmarked():
                plan(line.recipe(0.5), folder / "path")  # so that its faults come before the first score
            moved = path_layers.screened(first, second, offline, working.threads, given) if layers else {}
            sharp = path_layers.sharpness_of(line, moved, given, rho, plan, working, folder) if given else {}
            with bar.counting("score", points * (1 + len(moved))) as advance:
                found = line.points(ts, advance)
                rows = [
                    path_layers.layer_of(line, number, name, one, moved, sharp, ts, advance)
                    for number, (name, one) in enumerate(moved.items())
                ]
            study = path_show.Study(
                a=a,
                b=b,
                aligned=_words(align) if align is not None else None,
                metric=scoring.name,
                goal=goal.value,
                points=found,
                barrier=height([point.score for point in found], ts, goal.value),
                layers=rows if layers else None,
                stragglers=stragglers(rows, count or COUNT) if layers else None,
                baseline=line.baseline(ts),
                made=line.made,
            )
    if plot is not None:
        path_show.drawn(study, plot)
    if json:
        show.json(study.as_json() | ({"plot": str(plot)} if plot is not None else {}))
        return
    path_show.tables(study)
    if plot is not None:
        show.note(f"wrote {plot}")


def _check(given: dict[str, object], to: str, there: bool) -> None:
    """Raises UsageError where an option is given without what it belongs to."""
    lone = next((name for name, value in given.items() if value is not None), None)
    if lone is not None and not there:
        raise UsageError(f"`{lone}` belongs to `{to}`", hint=f"give `{to}` too, or leave it out")


@contextlib.contextmanager
def _unmarked() -> Iterator[None]:
    """Errors without their places: nobody wrote the recipe that they are in."""
    try:
        yield
    except MergeError as fault:
        raise type(fault)([replace(problem, mark=None) for problem in fault.problems]) from fault


def _words(align: str) -> list[str]:
    return [word.strip() for word in align.split(",") if word.strip()]


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where scores and merges lie: `out`, or a folder that is gone afterwards."""
    if out is not None:
        yield out
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="merge-path-") as temporary:
        yield Path(temporary)


def _located(text: str) -> str:
    """A location as a recipe may hold it whatever folder the recipe lies in."""
    local = Path(text).expanduser()
    return str(local.resolve()) if local.exists() else text


def _aligned(
    a: str,
    b: str,
    spaces: Sequence[str],
    family: str | None,
    folder: Path,
    plan: Planner,
    offline: bool,
    threads: int | None,
) -> str:
    """B with its units in the order of A's, written once into `folder`."""
    import json

    from mergekit_lite import merge
    from mergekit_lite.evaluate.worker import make_folder
    from mergekit_lite.plan.identity import Identities, result_digest

    settings = {"spaces": spaces, **({"family": family} if family else {})}
    step = {"use": "permute", "of": "b", "like": "a", "with": settings}
    text = {"version": 1, "models": {"a": a, "b": b}, "steps": {"m": step}, "save": {"to": str(folder / "aligned")}}
    make_folder(folder)
    recipe = folder / "aligned.yaml"
    recipe.write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
    loaded = merge.load_recipe(recipe)
    planned = plan(loaded, folder / "aligned")
    out = folder / f"aligned-{result_digest(planned, Identities(planned).tensors())}"
    if not out.exists():
        merge.run(merge.plan(loaded, out=out, offline=offline, threads=threads), threads=threads)
    return str(out)
