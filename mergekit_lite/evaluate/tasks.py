"""Thresholds of a mask store, one for each task, by the score of the task (TALL-masks, arXiv 2405.07813)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lite.errors import InterruptedRun, Problem, RecipeError, StoppedError
from mergekit_lite.evaluate.judge import Judge
from mergekit_lite.evaluate.score import TASK, ScoreFailed
from mergekit_lite.evaluate.study import Trial
from mergekit_lite.evaluate.template import Template
from mergekit_lite.recipe.holes import Hole, points, setting
from mergekit_lite.recipe.model import AsMasks


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What is to be found: the values to try for every task, and whether one hole stands for all tasks."""

    path: str
    values: Mapping[str, tuple[Any, ...]]
    common: bool

    def setting(self, chosen: Mapping[str, Any]) -> list[str]:
        """The settings that fill the holes with the thresholds of these tasks."""
        if self.common:
            return [setting(self.path, dict(chosen))]
        return [setting(f"{self.path}.{task}", value) for task, value in chosen.items()]


def thresholds_of(template: Template) -> Thresholds | None:
    """The thresholds that a recipe leaves open by task; None where its score is not one of tasks. Raises RecipeError
    where such a score has nothing to go by."""
    mark = next((score.mark for score in template.scores if TASK in score.command), None)
    if mark is None:
        return None
    masks = template.first.saves[0].masks
    path = template.holes[0].path.partition(".threshold")[0] + ".threshold"
    if masks is None or any(hole.path.partition(".threshold")[0] + ".threshold" != path for hole in template.holes):
        hint = f"only `threshold` may be left open then; a score of the whole has no `{TASK}`"
        raise RecipeError(Problem(f"`{TASK}` in a score is a task of a mask store", mark, hint))
    if len(template.scores) > 1 or template.scores[0].screen is not None:
        raise RecipeError(Problem("thresholds go by one score, without a `screen`", mark, "keep one of them"))
    values = {hole.path: _points(hole) for hole in template.holes}
    common = template.holes[0].path == path
    if common:
        return Thresholds(path, dict.fromkeys(masks.tasks, values[path]), True)
    return Thresholds(path, {_task(hole, masks): values[hole.path] for hole in template.holes}, False)


def choose(template: Template, wanted: Thresholds, judge: Judge, jobs: int) -> Iterator[Trial]:
    """Score every task with each of its values, while the others have their first, and give the trials as they are
    done; the last is the store with the best of each, whose score is their mean. The first of several alike is taken.
    Raises StoppedError where a task has no score at all,
    InterruptedRun on Ctrl-C, and what merges raise."""
    scoring = template.scores[0]
    first = {task: values[0] for task, values in wanted.values.items()}
    work = [(task, value) for task, values in wanted.values.items() for value in values]

    def one(number: int) -> Trial:
        task, value = work[number]
        recipe = template.fill(wanted.setting({**first, task: value}))
        name = f"{wanted.path}.{task}"
        asked = replace(scoring, command=scoring.command.replace(TASK, task))
        with judge.candidate(recipe, f"{number:04d}", task) as candidate:
            try:
                found = candidate.score(asked)
            except ScoreFailed as fault:
                return Trial(number, "failed", {name: value}, {}, candidate.seconds, fault.problems[0].message)
        return Trial(number, "done", {name: value}, {scoring.name: found}, candidate.seconds, task)

    best: dict[str, Trial] = {}
    sign = 1.0 if scoring.goal == "max" else -1.0
    with ThreadPoolExecutor(jobs, "trial") as threads:
        try:
            for (task, _), trial in zip(work, threads.map(one, range(len(work))), strict=True):
                before = best.get(task)
                if trial.state == "done" and (
                    before is None or sign * trial.scores[scoring.name] > sign * before.scores[scoring.name]
                ):
                    best[task] = trial
                yield trial
        except BaseException as fault:
            judge.stop()
            threads.shutdown(cancel_futures=True)
            if isinstance(fault, KeyboardInterrupt):
                hint = "the same command goes on: what is scored is remembered"
                raise InterruptedRun("stopped by Ctrl-C", hint=hint) from fault
            raise
    for task in wanted.values:
        if task not in best:
            raise StoppedError(f"no threshold of `{task}` could be scored", hint="try the command by hand")
    chosen = {task: next(iter(trial.values.values())) for task, trial in best.items()}
    mean = sum(trial.scores[scoring.name] for trial in best.values()) / len(best)
    values = {wanted.path: chosen} if wanted.common else {f"{wanted.path}.{task}": v for task, v in chosen.items()}
    yield Trial(len(work), "done", values, {scoring.name: mean}, {}, "mean of the tasks")


def _points(hole: Hole) -> tuple[Any, ...]:
    found = points(hole)
    if found is None:
        hint = "for example `threshold: {choice: [0.2, 0.3, 0.4, 0.5, 0.6]}`"
        raise RecipeError(Problem("thresholds are tried one by one: give them a `step`, or a choice", hole.mark, hint))
    return found


def _task(hole: Hole, masks: AsMasks) -> str:
    return next(task for task in masks.tasks if hole.path.endswith(f".{task}") or hole.path.endswith(f'."{task}"'))
