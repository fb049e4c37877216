"""`merge path`: how a score changes on the way from one model to another."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mergekit_lite.cli import bar, options, show

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
    offline: options.Offline = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Score the merges (1-t) A + t B for t from 0 to 1 and give the barrier: the most that the path is worse than the
    straight line between the scores of its ends (Git Re-Basin, arXiv 2209.04836).

    Every merge is written to a temporary folder, scored and removed.
    """
    import shutil
    import tempfile

    from mergekit_lite.align.diagnose import barrier
    from mergekit_lite.evaluate.score import Score

    scorer = Score(score, metric, timeout)
    kinds = [word.strip() for word in align.split(",") if word.strip()] if align is not None else None
    ts = [i / (points - 1) for i in range(points)]
    found: list[float] = []
    with tempfile.TemporaryDirectory(prefix="merge-path-") as temporary, bar.counting("score", points) as advance:
        work = Path(temporary)
        first, second = _located(a), _located(b)
        if kinds is not None:
            settings = {"spaces": kinds, **({"family": family} if family else {})}
            step: dict[str, object] = {"use": "permute", "of": "b", "like": "a", "with": settings}
            _merge(work / "aligned.yaml", first, second, step, work / "aligned", offline, threads)
            second = str(work / "aligned")
        for t in ts:
            out = work / "point"
            step = {"use": "interpolate", "of": ["a", "b"], "with": {"t": t}}
            _merge(work / "point.yaml", first, second, step, out, offline, threads)
            found.append(scorer.of(out))
            shutil.rmtree(out)
            advance(1)
    sign = 1.0 if goal is Goal.min else -1.0
    height = barrier([sign * value for value in found], ts)
    best = min(range(points), key=lambda i: sign * found[i])
    if json:
        values = [{"t": t, "score": value} for t, value in zip(ts, found, strict=True)]
        show.json({"a": a, "b": b, "aligned": kinds, "goal": goal.value, "points": values, "barrier": height})
        return
    rows = [
        [f"{t:.4g}", f"{value:.6g}", "best" if i == best else ""]
        for i, (t, value) in enumerate(zip(ts, found, strict=True))
    ]
    show.table(["t", "score", ""], rows, right=["t", "score"])
    show.line(f"barrier {height:.6g}")


def _located(text: str) -> str:
    """A location as a recipe may hold it whatever folder the recipe lies in."""
    local = Path(text).expanduser()
    return str(local.resolve()) if local.exists() else text


def _merge(
    recipe: Path, a: str, b: str, step: Mapping[str, object], out: Path, offline: bool, threads: int | None
) -> None:
    import json

    from mergekit_lite import merge

    text = {"version": 1, "models": {"a": a, "b": b}, "steps": {"m": step}, "save": {"to": str(out)}}
    recipe.write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
    merge.run(merge.plan(merge.load_recipe(recipe), offline=offline, threads=threads), threads=threads)
