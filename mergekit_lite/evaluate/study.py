"""A study: trials of one recipe with holes, drawn by Optuna, kept in its SQLite file, shared by whoever opens it.

A trial that its process left behind (it was killed, or stopped by Ctrl-C) is put back by the next process on that
machine, with the values that it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.errors import InterruptedRun, RecipeError, StoppedError, UsageError
from mergekit_lite.evaluate.judge import Judging
from mergekit_lite.evaluate.score import ScoreFailed
from mergekit_lite.evaluate.space import distributions, grid, settings, value
from mergekit_lite.evaluate.storage import alone, open_study
from mergekit_lite.evaluate.storage import told as faults_told
from mergekit_lite.evaluate.worker import is_gone, me
from mergekit_lite.recipe.holes import Hole
from mergekit_lite.recipe.model import Recipe, Scoring
from mergekit_lite.redact import redact

if TYPE_CHECKING:
    import optuna

LEFT = "left:"
SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")
HOPELESS = 3  # so many trials that failed, and none that did not: the next will not either
AGAIN = "again"  # of a trial that is done again, the number of the one that was left


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial as it ended: `state` is `done`, `given up` (its cheap score was below the middle) or `failed`, for
    which `why` is the reason. `values` are those of the holes by path, `scores` by name."""

    number: int
    state: str
    values: Mapping[str, Any]
    scores: Mapping[str, float]
    seconds: Mapping[str, float] = field(default_factory=dict)
    why: str | None = None


class Study:
    """The study in the file `path`, or in memory."""

    def __init__(
        self,
        path: Path | None,
        holes: Sequence[Hole],
        scores: Sequence[Scoring],
        identity: str,
        sampler: str | None = None,
        seed: int = 0,
    ):
        """Open the study, or begin it. `identity` is the digest of what is searched. Raises UsageError where the file
        holds the study of something else, where the sampler does not fit, and where Optuna is not installed."""
        self.holes, self.scores = holes, scores
        self._distributions = distributions(holes)
        check_sampler(sampler, holes, len(scores))
        self._path, self._sampler, self._seed = path, sampler, seed
        self._grid = list(grid(holes)) if sampler == "grid" else None
        with faults_told(path), alone(path) as held:
            self._study = open_study(path, scores)
            known = self._study.user_attrs.get("of")
            if known is None and not self._study.get_trials(deepcopy=False):
                self._study.set_user_attr("of", identity)
            elif known != identity:
                message = f"`{path}` is the study of another recipe, or of this one before it was changed"
                hint = "choose another folder with `--out`, or remove this one to start anew"
                raise UsageError(message, hint=hint)
            self._put_back(held)

    def trials(self) -> list[Trial]:
        """All trials that have ended, in their order."""
        with faults_told(self._path):
            left = self._left()
            found = [self._ended(t) for t in self._study.get_trials(deepcopy=False) if t.number not in left]
        return [trial for trial in found if trial is not None]

    def best(self) -> list[Trial]:
        """The best trial, the first of several alike; with several scores all those that no other betters in each."""
        done = [trial for trial in self.trials() if trial.state == "done"]
        signs = [1.0 if score.goal == "max" else -1.0 for score in self.scores]

        def of(trial: Trial) -> list[float]:
            return [sign * trial.scores[score.name] for sign, score in zip(signs, self.scores, strict=True)]

        if len(self.scores) == 1:
            return [max(done, key=lambda trial: (of(trial)[0], -trial.number))] if done else []
        front = []
        for trial in done:
            mine = of(trial)
            if not any(of(t) != mine and all(x >= y for x, y in zip(of(t), mine, strict=True)) for t in done):
                front.append(trial)
        return front

    def run(
        self,
        judge: Judging,
        fill: Callable[[Sequence[str]], Recipe],
        trials: int,
        jobs: int,
        told: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        """Go on until the study has so many trials, `jobs` of them at a time. `fill` makes the recipe of settings. A
        trial whose recipe or score is at fault has failed; raises StoppedError where none ever succeeds, InputError
        where a model cannot be read, InterruptedRun on Ctrl-C."""
        if self._grid is not None:
            trials = min(trials, len(self._grid))
        stop = threading.Event()
        lock = threading.Lock()  # Optuna's samplers are not made for threads
        faults: list[BaseException] = []

        def worker() -> None:
            try:
                with faults_told(self._path):
                    while not stop.is_set():
                        with lock, alone(self._path):
                            trial = self._next(trials)
                        if trial is None:
                            return
                        ended = self._one(trial, judge, fill, lock)
                        told(ended)
                        with lock:
                            self._give_up(ended)
            except BaseException as fault:
                faults.append(fault)
                stop.set()

        with ThreadPoolExecutor(jobs, "trial") as threads:
            working = [threads.submit(worker) for _ in range(jobs)]
            try:
                while not all(one.done() for one in working):
                    time.sleep(0.05)
            except KeyboardInterrupt as fault:
                stop.set()
                judge.stop()
                raise InterruptedRun("stopped by Ctrl-C", hint="the same command goes on with the study") from fault
        if faults:
            raise faults[0]

    def _next(self, trials: int) -> optuna.Trial | None:
        """Begin a trial; None where there are so many. While this goes on the study is this process's alone.

        What is drawn depends on the seed, on how many trials were begun before and on those that have ended, and on
        nothing that a process keeps: a study that was stopped draws what it would have drawn.
        """
        from optuna.trial import TrialState

        left = self._left()
        known = [t for t in self._study.get_trials(deepcopy=False) if t.number not in left]
        begun = [t for t in known if t.state != TrialState.WAITING]
        if len(begun) >= trials:
            return None
        if self._grid is not None and len(begun) == len(known):
            taken = [trial.params for trial in begun]
            self._study.enqueue_trial(next(point for point in self._grid if point not in taken))
        self._study.sampler = _sampler(self._sampler, _seed(self._seed, len(begun)), len(self.scores))
        trial = self._study.ask(self._distributions)
        trial.set_user_attr("by", me())
        return trial

    def _one(
        self, trial: optuna.Trial, judge: Judging, fill: Callable[[Sequence[str]], Recipe], lock: threading.Lock
    ) -> Trial:
        """Carry out one trial and tell the study of it."""
        from optuna.trial import TrialState

        state, why, found = TrialState.FAIL, None, []
        seconds: Mapping[str, float] = {}
        try:
            recipe = fill(settings(self.holes, trial.params))
            with judge.candidate(recipe, f"{trial.number:04d}") as candidate:
                seconds = candidate.seconds
                screen = self.scores[0].screen
                given_up = False
                if screen is not None:
                    cheap = candidate.score(screen)
                    with lock:
                        trial.report(cheap if screen.goal == self.scores[0].goal else -cheap, 0)
                        given_up = trial.should_prune()
                if given_up:
                    state = TrialState.PRUNED
                else:
                    found = [candidate.score(scoring) for scoring in self.scores]
                    state = TrialState.COMPLETE
        except (RecipeError, ScoreFailed) as fault:
            why = fault.problems[0].message
        with lock:
            trial.set_user_attr("seconds", dict(seconds))
            if why is not None:
                trial.set_user_attr("why", redact(why)[:1000])
            self._study.tell(trial, found or None, state)
        ended = self._ended(self._study.get_trials(deepcopy=False)[trial.number])
        assert ended is not None
        return ended

    def _give_up(self, ended: Trial) -> None:
        """Raises StoppedError where trial after trial fails."""
        if ended.state != "failed":
            return
        known = self.trials()
        if len(known) >= HOPELESS and all(trial.state == "failed" for trial in known):
            raise StoppedError(
                f"all {len(known)} trials have failed, the last: {ended.why}", hint="try the command by hand"
            )

    def _left(self) -> set[int]:
        """The numbers of trials that a process left behind."""
        return {int(key.removeprefix(LEFT)) for key in self._study.user_attrs if key.startswith(LEFT)}

    def _put_back(self, held: bool) -> None:
        """Have trials done again that a process which is no more has left on this machine. Where the study is `held` by
        this process alone, a trial that nobody has put a name to is one of these. A process that is killed within this
        leaves nothing that the next would not put right."""
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)
        again = {trial.user_attrs.get(AGAIN) for trial in trials}
        for trial in trials:
            by = trial.user_attrs.get("by")
            if trial.state == TrialState.RUNNING and (held if by is None else is_gone(by)):
                # What was not drawn to its end is drawn anew, and comes out alike.
                if trial.number not in again and trial.params.keys() == self._distributions.keys():
                    self._study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.number})
                self._study.set_user_attr(f"{LEFT}{trial.number}", True)
                with contextlib.suppress(ValueError):  # another process was first
                    self._study.tell(trial.number, state=TrialState.FAIL)

    def _ended(self, trial: Any) -> Trial | None:
        words = {"COMPLETE": "done", "PRUNED": "given up", "FAIL": "failed"}
        state = words.get(trial.state.name)
        if state is None:
            return None
        values = {hole.path: value(hole, trial.params[hole.path]) for hole in self.holes if hole.path in trial.params}
        names = [score.name for score in self.scores]
        scores = dict(zip(names, trial.values, strict=True)) if state == "done" else {}
        seconds = trial.user_attrs.get("seconds", {})
        return Trial(trial.number, state, values, scores, seconds, trial.user_attrs.get("why"))


def check_sampler(name: str | None, holes: Sequence[Hole], scores: int) -> None:
    """Raises UsageError where Optuna is not installed, and where this sampler cannot fill these holes."""
    try:
        import optuna
    except ImportError:
        hint = "`pip install 'mergekit_lite[search]'`"
        raise UsageError("a search needs Optuna, which is not installed", hint=hint) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lone = next((hole for hole in holes if hole.kind == "choice"), None)
    if name == "cmaes" and (scores > 1 or lone is not None):
        what = f"`{lone.path}` is a choice" if lone is not None else "there are several scores"
        raise UsageError(f"CMA-ES searches numbers by one score, and {what}", hint="use `--sampler tpe`")
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise UsageError("`--sampler cmaes` needs the package cmaes", hint="`pip install 'mergekit_lite[search]'`")
    endless = next((hole for hole in holes if hole.kind == "search" and hole.step is None), None)
    if name == "grid" and endless is not None:
        message = f"`{endless.path}` has endless many values, so that no grid can be laid over them"
        raise UsageError(message, hint="give it a `step`, or use another `--sampler`")


def _sampler(name: str | None, seed: int, scores: int) -> optuna.samplers.BaseSampler:
    """The sampler of this name; None: TPE, with several scores NSGA-II. All that they know they read from the study. A
    point of a grid waits in the study already."""
    from optuna import samplers

    name = name or ("tpe" if scores == 1 else "nsga2")
    if name == "cmaes":
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    made: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
        "tpe": samplers.TPESampler,
        "nsga2": samplers.NSGAIISampler,
        "random": samplers.RandomSampler,
        "grid": samplers.RandomSampler,
    }
    return made[name](seed=seed)


def _seed(seed: int, number: int) -> int:
    """The seed of one draw: neither those of one study nor those of two lie side by side."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big")
