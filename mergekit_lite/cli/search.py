"""`merge search`: the holes of a recipe filled by a score."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_lite.cli import bar, options, show
from mergekit_lite.cli.path import Goal
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    from mergekit_lite.evaluate.search import Found
    from mergekit_lite.evaluate.study import Trial
    from mergekit_lite.evaluate.template import Template
    from mergekit_lite.recipe.model import Scoring

SHOWN = 10  # trials in the table


class Sampler(str, Enum):
    """How values are drawn."""

    tpe = "tpe"
    cmaes = "cmaes"
    nsga2 = "nsga2"
    random = "random"
    grid = "grid"


def search(
    recipe: options.Recipe,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials",
            metavar="N",
            min=1,
            help="Trials of the study, those of earlier runs included; 50 if left out.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", metavar="N", min=1, help="Scores that are measured at a time; 1 if left out.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The study's folder; RECIPE.search if left out.", show_default=False),
    ] = None,
    sampler: Annotated[
        Sampler | None,
        typer.Option("--sampler", help="How values are drawn; tpe, or nsga2 by several scores.", show_default=False),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            metavar="COMMAND",
            help="In place of the recipe's score: prints a number for the checkpoint in {model}.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="PATH", help="Where the number is in printed JSON: a.b.", show_default=False),
    ] = None,
    goal: Annotated[
        Goal | None,
        typer.Option("--goal", help="Whether small scores (a loss) or large ones are good.", show_default=False),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="S", min=0, help="Seconds for one score at most.", show_default=False),
    ] = None,
    text: options.Text = None,
    data: options.Data = None,
    block: options.TokenBlock = None,
    lines: options.Lines = False,
    examples: options.Examples = None,
    set: options.Set = None,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Fill the holes of a recipe by a score, and write the best one as a plain recipe.

    Holes: {search: [0, 1]}, {choice: [a, b]} for any value, of: {greedy: [a, b, c]} for a greedy soup. The score
    stands in the recipe: a program that prints a number, or JSON, for the merge in {model}. The study is kept in a
    folder: the same command goes on with it, on several machines at once if they share the folder.

    Weights of: {learned: [a, b, c]} are learned from --text or --data by the gradient of a loss: learned soups, and
    AdaMerging with task_arithmetic. So are the permutations of a permute step, from: {learned: ste}, of small networks.
    The model is loaded with transformers: pip install 'mergekit_lite[calibrate]'.
    """
    from mergekit_lite import choose
    from mergekit_lite.evaluate import search as driver
    from mergekit_lite.evaluate.template import Template

    template = Template(recipe, set or (), _given(score, metric, goal, timeout))
    folder = out or Path(f"{Path(recipe).stem}.search")
    read: dict[str, object] = {
        "--text": text,
        "--data": data,
        "--block": block,
        "--lines": lines or None,
        "--examples": examples,
    }
    if template.learned is not None or template.order is not None:
        from mergekit_lite.cli.learn import learn

        what = "weights" if template.order is None else "permutations"
        _refuse({"--trials": trials, "--jobs": jobs, "--sampler": sampler}, f"{what} are learned, without trials")
        learn(template, folder, text, data, block, lines, examples, device, threads, offline, allow_pickle, json)
        return
    _refuse(read, "a score takes no data; weights that are learned do, `of: {learned: [a, b]}`")
    trials, jobs = trials or 50, jobs or 1
    count = driver.how_many(template, trials)
    with bar.counting("trials", count) as advance:

        def told(trial: Trial) -> None:
            advance(1)
            if trial.state == "failed":
                show.note(f"trial {trial.number} failed: {trial.why}", "yellow")

        found = choose.search(
            template,
            out=folder,
            trials=trials,
            jobs=jobs,
            sampler=sampler.value if sampler is not None else None,
            threads=threads,
            device=device,
            offline=offline,
            allow_pickle=allow_pickle,
            told=told,
        )
    if json:
        show.json({"folder": str(folder), **driver.as_json(found)})
        return
    _table(template, found)
    if len(found.best) == 1:
        show.line(f"wrote {folder / driver.BEST} · `merge run {folder / driver.BEST}` makes it")
    else:
        show.line(f"wrote {folder / driver.FRONT} · {show.count(len(found.best), 'recipe')}, none better in all scores")
    if (folder / driver.PICTURE).exists():
        show.line(f"wrote {folder / driver.PICTURE}: all trials as a picture")


def _refuse(given: Mapping[str, object], why: str) -> None:
    """Raises UsageError for the first option that is given where it means nothing."""
    option = next((name for name, value in given.items() if value is not None), None)
    if option is not None:
        raise UsageError(f"`{option}` does not go with this recipe", hint=why)


def _given(score: str | None, metric: str | None, goal: Goal | None, timeout: float | None) -> tuple[Scoring, ...]:
    """The score of the command line."""
    from mergekit_lite.errors import Mark
    from mergekit_lite.recipe.model import Scoring

    if score is None:
        given = {"--metric": metric, "--goal": goal, "--timeout": timeout}
        lone = next((name for name, value in given.items() if value is not None), None)
        if lone is not None:
            raise UsageError(f"`{lone}` belongs to `--score`", hint="the recipe's score states its own")
        return ()
    if goal is None:
        raise UsageError("`--score` needs `--goal`", hint="`--goal max` where large scores are good, else `--goal min`")
    return (Scoring(metric or "score", score, metric, goal.value, timeout, Mark("--score", 1, 1, score, len(score))),)


def _table(template: Template, found: Found) -> None:
    """The best trials, and how the others ended."""
    from mergekit_lite.evaluate.tasks import thresholds_of

    names = [score.name for score in template.scores]
    paths = list(dict.fromkeys(path for trial in found.trials for path in trial.values))
    sign = -1.0 if template.scores[0].goal == "max" else 1.0
    best = {trial.number for trial in found.best}
    done = [trial for trial in found.trials if trial.state == "done"]
    by_one = template.greedy is not None or thresholds_of(template) is not None
    if not by_one:
        done.sort(key=lambda t: (t.number not in best, sign * t.scores[names[0]], t.number))
    shown = done if by_one else done[: max(SHOWN, len(best))]
    rows = [
        [
            str(trial.number),
            *(f"{trial.scores[name]:.6g}" for name in names),
            *(_shown(trial.values.get(path)) for path in paths),
            " · ".join(filter(None, ["best" if trial.number in best else None, trial.why])),
        ]
        for trial in shown
    ]
    show.table(["trial", *names, *paths, ""], rows, right=["trial", *names])
    counts = [(state, sum(trial.state == state for trial in found.trials)) for state in ("done", "given up", "failed")]
    told = ", ".join(f"{count} {state}" for state, count in counts if count)
    show.line(f"{show.count(len(found.trials), 'trial')}: {told}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
