"""From a recipe without holes to its scores: planned, merged into a place of its own where nobody has scored the same
merge before, scored, and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_lite.errors import InterruptedRun
from mergekit_lite.evaluate.book import Book, Memo
from mergekit_lite.evaluate.score import Score, ScoreFailed
from mergekit_lite.evaluate.worker import make_folder, make_place, remove_place
from mergekit_lite.plan.identity import Identities, result_digest
from mergekit_lite.plan.model import Plan
from mergekit_lite.recipe.model import Recipe, Scoring
from mergekit_lite.recipe.score import written
from mergekit_lite.run.copy import ByteSource
from mergekit_lite.run.inputs import inputs_of
from mergekit_lite.run.progress import Options
from mergekit_lite.run.trial import Made, TrialFolder, TrialTensors

if TYPE_CHECKING:
    from torch import Tensor

LOGS, SCORES, WORK = "logs", "scores.jsonl", "work"
Planner = Callable[[Recipe, Path], Plan]
OfStore = Callable[[str, Path], Plan]  # of the model `STORE#TASK`, for a folder
Check = Callable[[], None]
Measure = Callable[[Scoring, Path, Path, Check, str], float]


def by_number(scoring: Scoring, model: Path, log: Path, check: Check, merged: str) -> float:
    """The number that a score's command gives for the folder `model`. `merged` is the digest of what lies there."""
    return Score(scoring.command, scoring.metric, scoring.timeout).of(model, log, check)


class Judging(Protocol):
    """What scores merges."""

    made: list[Made]

    def candidate(self, recipe: Recipe, label: str) -> contextlib.AbstractContextManager[Candidate]:
        """The merge that `recipe` writes, called `label` in logs. Raises what a plan raises."""
        ...

    def stop(self) -> None:
        """Have merges and scores that are at work raise InterruptedRun."""
        ...

    def close(self) -> None:
        """Remove what is left of trials."""
        ...


class Candidate:
    """One merge to be scored, merged when the first score asks for it."""

    def __init__(self, merged: str, make: Callable[[], Any], one: Callable[[Scoring, Any], float], book: Memo):
        self.merged = merged  # its digest
        self._make = make
        self._one = one
        self._book = book
        self._made: Any = None
        self.seconds: dict[str, float] = {}

    def score(self, scoring: Scoring) -> float:
        """Raises StoppedError where the score cannot be had."""
        key = hashlib.sha256(repr(written(scoring)).encode()).hexdigest()[:16]
        known = self._book.get(self.merged, key)
        if known is not None:
            return known
        if self._made is None:
            self._made = self._timed("merge", self._make)
        value: float = self._timed("score", lambda: self._one(scoring, self._made))
        self._book.put(self.merged, key, value)
        return value

    def _timed(self, what: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = work()
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began
        return found


class Judge:
    """Scores by commands. `work` is a folder for trials, one for each of `jobs` at a time; merges wait for each other,
    as one takes all threads, and scores do not. `logs` keeps what commands say. `measure` runs them."""

    def __init__(
        self,
        plan: Planner,
        of_store: OfStore,
        options: Options,
        work: Path,
        logs: Path,
        book: Memo,
        jobs: int,
        measure: Measure = by_number,
    ):
        self._plan = plan
        self._of_store = of_store
        self._stopped = threading.Event()
        self._options = replace(options, check=self._check)
        self._logs = logs
        self._book = book
        self._measure = measure
        self._merging = threading.Lock()
        self._free = [TrialFolder(work / f"job-{number}" / "model") for number in range(jobs)]
        self._tasks: dict[Path, TrialFolder] = {}
        self._work = work
        self.made: list[Made] = []

    @contextlib.contextmanager
    def candidate(self, recipe: Recipe, label: str, task: str | None = None) -> Iterator[Candidate]:
        """The merge that `recipe` writes, called `label` in logs; of a mask store the model of its `task`. Raises what
        a plan raises."""
        folder = self._free.pop()
        try:
            plan = self._plan(recipe, folder.path)
            identities = Identities(plan)
            merged = result_digest(plan, identities.tensors())

            def make() -> Path:
                with self._merging:
                    folder.path.parent.mkdir(parents=True, exist_ok=True)
                    self.made.append(folder.write(plan, self._options, identities))
                    return folder.path if task is None else self._task(folder, task)

            def one(scoring: Scoring, path: Path) -> float:
                log = self._logs / f"{label}-{_file_name(scoring.name)}"
                return self._measure(scoring, path, log, self._check, merged)

            yield Candidate(merged, make, one, self._book)
        finally:
            self._free.append(folder)

    def _task(self, store: TrialFolder, task: str) -> Path:
        """The model of a task of the store, put together beside it."""
        place = store.path.with_name("task")
        found = self._tasks.setdefault(place, TrialFolder(place))
        found.write(self._of_store(f"{store.path}#{task}", place), self._options)
        return place

    def stop(self) -> None:
        """Have merges and scores that are at work raise InterruptedRun."""
        self._stopped.set()

    def _check(self) -> None:
        if self._stopped.is_set():
            raise InterruptedRun("stopped by Ctrl-C")

    def close(self) -> None:
        """Remove the trials."""
        remove_place(self._work)


@contextlib.contextmanager
def command_judge(plan: Planner, of_store: OfStore, options: Options, folder: Path, jobs: int) -> Iterator[Judge]:
    """A judge whose logs and scores are kept in a study's folder, and whose trials are removed at the end."""
    make_folder(folder / LOGS)
    work = make_place(folder / WORK)
    judge = Judge(plan, of_store, options, work, folder / LOGS, Book(folder / SCORES), jobs)
    try:
        yield judge
    finally:
        judge.close()


class MemoryJudge:
    """Scores by functions of state dicts, by the names of the scores: nothing is written. `models` are state dicts by
    name, None: plans read from the disk."""

    def __init__(
        self,
        plan: Planner,
        options: Options,
        models: Mapping[str, Mapping[str, Tensor]] | None,
        functions: Mapping[str, Callable[[dict[str, Tensor]], float]],
    ):
        self._plan = plan
        self._options = options
        self._models = models
        self._functions = functions
        self._trials = TrialTensors()
        self._book = Memo()
        self.made: list[Made] = []

    @contextlib.contextmanager
    def candidate(self, recipe: Recipe, label: str) -> Iterator[Candidate]:
        """The merge that `recipe` writes. Raises what a plan raises."""
        plan = self._plan(recipe, Path("memory"))
        merged = result_digest(plan, Identities(plan).tensors())

        def make() -> dict[str, Tensor]:
            with contextlib.ExitStack() as stack:
                if self._models is None:
                    source: ByteSource = stack.enter_context(inputs_of(plan, self._options.threads))
                else:
                    from mergekit_lite.checkpoint.memory import MemoryReader

                    source = MemoryReader(self._models)
                tensors, made = self._trials.make(plan, source, self._options)
            self.made.append(made)
            return tensors

        def one(scoring: Scoring, tensors: dict[str, Tensor]) -> float:
            value = float(self._functions[scoring.name](dict(tensors)))
            if not math.isfinite(value):
                raise ScoreFailed(f"`{scoring.name}` is {value}", hint="a score is a finite number")
            return value

        yield Candidate(merged, make, one, self._book)

    def stop(self) -> None:
        """Nothing here is at work in another thread."""

    def close(self) -> None:
        """Nothing to remove."""


def _file_name(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in name)[:60]
