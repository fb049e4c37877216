"""A study: trials of one recipe with holes, drawn by Optuna, kept in its SQLite file, shared by whoever opens it.

A trial that its process left behind (it was killed, or stopped by Ctrl-C) is put back by the next process on that
machine, with the values that it had.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.errors import InterruptedRun, RecipeError, StoppedError, UsageError
from mergekit_lite.evaluate.judge import Judging
from mergekit_lite.evaluate.score import ScoreFailed
from mergekit_lite.evaluate.space import distributions, grid, settings, value
from mergekit_lite.recipe.holes import Hole
from mergekit_lite.recipe.model import Recipe, Scoring
from mergekit_lite.run.journal import boot

if TYPE_CHECKING:
    import optuna

LEFT = "left:"
SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")
HOPELESS = 3  # so many trials that failed, and none that did not: the next will not either
WARM_UP = 5  # so many trials are seen to the end before one is given up early


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
        self._grid = list(grid(holes)) if sampler == "grid" else None
        with _alone(path):
            self._study = _open(path, scores)
            known = self._study.user_attrs.get("of")
            if known is None:
                self._study.set_user_attr("of", identity)
            elif known != identity:
                message = f"`{path}` is the study of another recipe, or of this one before it was changed"
                hint = "choose another folder with `--out`, or remove this one to start anew"
                raise UsageError(message, hint=hint)
            self._put_back()
            for point in self._grid or ():
                self._study.enqueue_trial(point, skip_if_exists=True)
        began = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = _sampler(sampler, seed + began, len(scores))

    def trials(self) -> list[Trial]:
        """All trials that have ended, in their order."""
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
                while not stop.is_set():
                    with lock:
                        if self._begun() >= trials:
                            return
                        trial = self._study.ask(self._distributions)
                        trial.set_user_attr("by", _me())
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
                trial.set_user_attr("why", why[:1000])
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

    def _begun(self) -> int:
        """Trials that have ended, are at work or wait for nobody; those that failed with their process do not count."""
        left = self._left()
        trials = self._study.get_trials(deepcopy=False)
        return sum(trial.state.name != "WAITING" and trial.number not in left for trial in trials)

    def _left(self) -> set[int]:
        """The numbers of trials that a process left behind."""
        return {int(key.removeprefix(LEFT)) for key in self._study.user_attrs if key.startswith(LEFT)}

    def _put_back(self) -> None:
        """Have trials done again that a process which is no more has left on this machine."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            by = trial.user_attrs.get("by")
            if by is not None and _is_gone(by):
                with contextlib.suppress(ValueError):  # another process was first
                    self._study.tell(trial.number, state=TrialState.FAIL)
                    self._study.set_user_attr(f"{LEFT}{trial.number}", True)
                    self._study.enqueue_trial(trial.params)

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


def _open(path: Path | None, scores: Sequence[Scoring]) -> optuna.Study:
    import optuna

    try:
        return optuna.create_study(
            storage=None if path is None else f"sqlite:///{path}",
            study_name="merge",
            load_if_exists=True,
            directions=["maximize" if score.goal == "max" else "minimize" for score in scores],
            pruner=optuna.pruners.PercentilePruner(50.0, n_startup_trials=WARM_UP),
        )
    except Exception as fault:  # SQLAlchemy's, Optuna's, Alembic's
        message = f"`{path}` cannot be opened as a study: {fault}"
        raise StoppedError(message.splitlines()[0], hint="is it the file of another program?") from fault


@contextlib.contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """While this is held no other process opens the study: tables are made by one of them."""
    if path is None:
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _sampler(name: str | None, seed: int, scores: int) -> optuna.samplers.BaseSampler:
    """The sampler of this name; None: TPE, with several scores NSGA-II. `seed` differs with the trials that there are,
    so that a study that goes on does not draw the same again. All of a grid waits in the study already."""
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


def _me() -> dict[str, Any]:
    """This process, told from every other on this machine."""
    return {"host": socket.gethostname(), "boot": boot(), "pid": os.getpid(), "began": _began(os.getpid())}


def _is_gone(by: Mapping[str, Any]) -> bool:
    """Whether a process is no more, as far as can be seen from here."""
    if by["host"] != socket.gethostname():
        return False
    return bool(by["boot"] != boot() or by["began"] != _began(by["pid"]))


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's own count; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
