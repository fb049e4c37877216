"""A search from its template to the best recipe: which driver fills the holes, and what is left in the study's
folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lite.errors import Mark, Problem, RecipeError, StoppedError, UsageError
from mergekit_lite.evaluate.greedy import greedy_soup
from mergekit_lite.evaluate.judge import Judge, Judging
from mergekit_lite.evaluate.picture import draw
from mergekit_lite.evaluate.score import PLACE, Score
from mergekit_lite.evaluate.study import Study, Trial, check_sampler
from mergekit_lite.evaluate.tasks import choose, thresholds_of
from mergekit_lite.evaluate.template import Template
from mergekit_lite.evaluate.worker import make_folder
from mergekit_lite.limits import hint_for
from mergekit_lite.recipe.holes import Hole, setting
from mergekit_lite.recipe.model import Recipe, Scoring
from mergekit_lite.recipe.score import GOALS
from mergekit_lite.recipe.write import to_yaml

STUDY, BEST, TRIALS, FRONT, PICTURE = "study.db", "best.yaml", "trials.json", "front", "trials.svg"


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: all its trials and the best, several of them only where there are several scores, with their
    recipes, in which nothing is left to be found."""

    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]
    recipes: tuple[Recipe, ...]
    texts: tuple[str, ...]


def check(template: Template, sampler: str | None, by_command: bool) -> None:
    """Raises RecipeError where nothing says how good a merge is, where something is to be learned, which no score does,
    or a greedy soup is to be found by several scores, and UsageError where a command names no model or the sampler does
    not fit."""
    if template.learned is not None:
        hint = "`merge search RECIPE --text FILE` or `--data FILE`; in Python `mergekit_lite.learn`"
        raise RecipeError(Problem("weights are learned from data, not by a score", template.learned.mark, hint))
    if template.order is not None:
        hint = "`merge search RECIPE --text FILE` or `--data FILE`; in Python `mergekit_lite.align.ste`"
        raise RecipeError(Problem("permutations are learned from data, not by a score", template.order.mark, hint))
    if not template.scores:
        hint = '`score: {command: "python score.py {model}", goal: max}` in the recipe, or `--score`'
        raise RecipeError(Problem(f"`{template.file}` does not say how good a merge is", None, hint))
    if template.greedy is not None and (len(template.scores) > 1 or template.scores[0].screen is not None):
        message = "a greedy soup goes by one score, without a `screen`"
        raise RecipeError(Problem(message, template.scores[-1].mark, "keep one of them"))
    saves = template.first.saves
    if len(saves) != 1:
        raise RecipeError(Problem("a search scores one output", saves[1].mark, "keep one `save`"))
    for scoring in template.scores if by_command else ():
        Score(scoring.command)
    if thresholds_of(template) is not None:
        if sampler is not None:
            raise UsageError("thresholds are tried one by one", hint="leave out `--sampler`")
    elif template.greedy is None:
        check_sampler(sampler, template.holes, len(template.scores))
    elif sampler is not None:
        raise UsageError("a greedy soup is not sampled", hint="leave out `--sampler`")


def how_many(template: Template, trials: int) -> int:
    """How many merges will be scored, of `trials` where there may be any number."""
    wanted = thresholds_of(template)
    if wanted is not None:
        return 1 + sum(len(values) for values in wanted.values.values())
    return 2 * len(template.greedy.values) - 1 if template.greedy is not None else trials


def stated(functions: Collection[str] | None, goal: str | Mapping[str, str]) -> list[Scoring]:
    """The scores that functions of these names give. Raises UsageError for a goal that is none."""
    found = []
    for name in functions or ():
        wanted = goal if isinstance(goal, str) else goal.get(name, "max")
        if wanted not in GOALS:
            raise UsageError(
                f"`{wanted}` is no goal", hint="`max` where large scores are good, `min` where small ones are"
            )
        found.append(Scoring(name, f"a function of {PLACE}", None, wanted, None, Mark("score", 1, 1, name, len(name))))
    return found


def search(
    template: Template,
    judge: Judging,
    folder: Path | None,
    trials: int,
    jobs: int,
    sampler: str | None,
    told: Callable[[Trial], None],
) -> Found:
    """Fill the holes of `template` by what `judge` says. `folder` keeps the study, None: memory. Raises what
    `Study.run` raises."""
    if folder is not None:
        make_folder(folder)
    ended: list[Trial] = []
    best: list[Trial] = []
    wanted = thresholds_of(template)
    if template.greedy is not None:
        ended = _told(_greedy(template, template.greedy, judge), told)
        best = [next(trial for trial in reversed(ended) if trial.why == "kept")]
    elif wanted is not None and isinstance(judge, Judge):
        ended = _told(choose(template, wanted, judge, jobs), told)
        best = ended[-1:]
    else:
        seed = template.first.seed
        path = folder / STUDY if folder is not None else None
        study = Study(path, template.holes, template.scores, template.identity(), sampler, seed)
        study.run(judge, template.fill, trials, jobs, told)
        ended, best = study.trials(), study.best()
    recipes = tuple(template.fill([setting(path, value) for path, value in trial.values.items()]) for trial in best)
    texts = tuple(_text(template, trial, recipe) for trial, recipe in zip(best, recipes, strict=True))
    found = Found(tuple(ended), tuple(best), recipes, texts)
    if folder is not None:
        _keep(folder, found, draw(found.trials, found.best, template.scores, template.holes))
    if not best:
        last = ended[-1].why if ended else "no trial has ended"
        raise StoppedError(f"no trial has a score; the last: {last}", hint="try the command by hand")
    return found


def _told(trials: Iterator[Trial], told: Callable[[Trial], None]) -> list[Trial]:
    found = []
    for trial in trials:
        found.append(trial)
        told(trial)
    return found


def _greedy(template: Template, hole: Hole, judge: Judging) -> Iterator[Trial]:
    """The merges that a greedy soup tries; `why` tells what became of each."""
    scoring = template.scores[0]
    seconds: dict[tuple[int, ...], dict[str, float]] = {}

    def score(members: Sequence[int]) -> float:
        recipe = template.fill([setting(hole.path, [hole.values[i] for i in members])])
        with judge.candidate(recipe, "-".join(str(i) for i in members)) as candidate:
            found = candidate.score(scoring)
            seconds.setdefault(tuple(members), candidate.seconds)
        return found

    tries = greedy_soup(len(hole.values), score, larger=scoring.goal == "max", accept=hole.accept)
    for number, tried in enumerate(tries):
        values = {hole.path: [hole.values[i] for i in tried.members]}
        why = "kept" if tried.kept else "alone" if tried.single else "left out"
        yield Trial(number, "done", values, {scoring.name: tried.score}, seconds.get(tried.members, {}), why)


def _text(template: Template, trial: Trial, recipe: Recipe) -> str:
    """The recipe of a trial as it is kept: what it was found by stands above it."""
    scores = ", ".join(f"{name} {value:.6g}" for name, value in trial.scores.items())
    lines = [f"# Found by `merge search {template.file}`: trial {trial.number}, {scores}."]
    lines += [f"#   {path}: {json.dumps(value)}" for path, value in trial.values.items()]
    return "\n".join([*(_one_line(line) for line in lines), to_yaml(replace(recipe, scores=()))])


def _one_line(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _keep(folder: Path, found: Found, picture: str | None) -> None:
    """Write the best recipes, all trials and their picture beside the study. Raises StoppedError where the disk
    refuses."""
    try:
        replace_file(folder / TRIALS, json.dumps([asdict(trial) for trial in found.trials], indent=1) + "\n")
        for old in (folder / FRONT).glob("trial-*.yaml"):
            old.unlink()
        if len(found.texts) == 1:
            replace_file(folder / BEST, found.texts[0])
        elif found.texts:
            (folder / BEST).unlink(missing_ok=True)
            (folder / FRONT).mkdir(exist_ok=True)
            for trial, text in zip(found.best, found.texts, strict=True):
                replace_file(folder / FRONT / f"trial-{trial.number:04d}.yaml", text)
        if picture is not None:
            replace_file(folder / PICTURE, picture)
        else:
            (folder / PICTURE).unlink(missing_ok=True)  # it would show fewer trials than there are
    except OSError as fault:
        raise StoppedError(f"cannot write into `{folder}`: {fault.strerror}", hint=hint_for(fault)) from fault


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that nobody ever sees a part of it."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    new.replace(path)


def as_json(found: Found) -> dict[str, Any]:
    """The outcome as plain data."""
    best = [{**asdict(trial), "recipe": text} for trial, text in zip(found.best, found.texts, strict=True)]
    return {"trials": [asdict(trial) for trial in found.trials], "best": best}
