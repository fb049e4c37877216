"""A picture of a study's trials: scores over trials, scores against what holes held, the front of several scores."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lite.errors import printable
from mergekit_lite.evaluate.study import Trial
from mergekit_lite.recipe.holes import Hole
from mergekit_lite.recipe.model import Scoring
from mergekit_lite.redact import redact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 12  # holes with a panel of their own
COLUMNS = 3
LONGEST = 32  # letters of a label
LABELS = 8  # categories whose labels are written out
BINS = 5  # in which numbers are taken together, to see what they explain
DONE, BEST, GIVEN_UP, FAILED = "#4c78a8", "#e45756", "#9d9d9d", "#b279a2"
# Nothing of a reader's own settings, no mathematics in names, and the same file for the same trials.
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "trials",
    "font.size": 8.0,
}


def draw(
    trials: Sequence[Trial], best: Sequence[Trial], scores: Sequence[Scoring], holes: Sequence[Hole]
) -> str | None:
    """The picture as SVG; None where matplotlib is not installed. Every trial has a marker in the first panel; those
    without a score stand at its lower edge. The holes that explain most of the first score have panels, 12 at most."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "svg"}):
        done = [trial for trial in trials if trial.state == "done"]
        logs = {hole.path for hole in holes if hole.log}
        paths = list(dict.fromkeys(path for trial in trials for path in trial.values))
        paths.sort(key=lambda path: -explained(path, done, scores[0].name))
        fronts = [(scores[0].name, score.name) for score in scores[1:]]
        count = len(scores) + len(fronts) + min(len(paths), MOST)
        rows = math.ceil(count / COLUMNS)
        wide, high = 4.2 * min(count, COLUMNS), 3.1 * rows + 0.4
        figure = Figure(figsize=(wide, high))
        # By hand: what matplotlib finds by itself takes seconds for a dozen panels.
        figure.subplots_adjust(0.7 / wide, 0.7 / high, 1 - 0.2 / wide, 1 - 0.5 / high, wspace=0.25, hspace=0.35)
        panels = iter([figure.add_subplot(rows, min(count, COLUMNS), 1 + number) for number in range(count)])
        first = next(panels)
        _over_trials(first, trials, best, scores[0])
        if first.get_legend_handles_labels()[1]:
            first.legend(fontsize=7, framealpha=0.6)
        for score in scores[1:]:
            _over_trials(next(panels), trials, best, score)
        for pair in fronts:
            _front(next(panels), done, best, pair)
        for path in paths[:MOST]:
            _against(next(panels), done, best, path, scores[0].name, path in logs)
        _title(figure, trials, len(paths))
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of signs that a font lacks: the reader's fonts are used
            figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue().decode("utf-8")


def explained(path: str, done: Sequence[Trial], score: str) -> float:
    """The share of a score's variance that lies between the values of a hole, numbers taken together in bins of equal
    counts: 0 to 1; 0 where nothing can be said."""
    pairs = [(trial.values[path], trial.scores[score]) for trial in done if path in trial.values]
    if not pairs:
        return 0.0
    if all(_is_number(value) for value, _ in pairs):
        pairs.sort(key=lambda pair: pair[0])
        groups: dict[Any, list[float]] = {}
        for number, (_, found) in enumerate(pairs):
            groups.setdefault(number * BINS // len(pairs), []).append(found)
    else:
        groups = {}
        for value, found in pairs:
            groups.setdefault(json.dumps(value), []).append(found)
    mean = math.fsum(found for _, found in pairs) / len(pairs)
    whole = math.fsum((found - mean) ** 2 for _, found in pairs)
    between = math.fsum(len(g) * (math.fsum(g) / len(g) - mean) ** 2 for g in groups.values())
    return between / whole if 0 < whole < math.inf else 0.0


def _over_trials(panel: Axes, trials: Sequence[Trial], best: Sequence[Trial], score: Scoring) -> None:
    """One score over the trials, and the best so far."""
    done = [trial for trial in trials if trial.state == "done"]
    _points(panel, [(trial.number, trial.scores[score.name]) for trial in done], DONE, "done")
    if done:
        so_far, found = [], done[0].scores[score.name]
        for trial in done:
            found = (
                max(found, trial.scores[score.name]) if score.goal == "max" else min(found, trial.scores[score.name])
            )
            so_far.append(found)
        panel.step([trial.number for trial in done], so_far, where="post", color=BEST, linewidth=1, label="best so far")
    _points(panel, [(trial.number, trial.scores[score.name]) for trial in best], BEST, "best")
    for state, color, marker in (("given up", GIVEN_UP, "v"), ("failed", FAILED, "x")):
        numbers = [trial.number for trial in trials if trial.state == state]
        if numbers:
            edge = [0.03] * len(numbers)
            marks = panel.scatter(
                numbers, edge, s=16, c=color, marker=marker, transform=panel.get_xaxis_transform(), label=state
            )
            marks.set_gid(state.replace(" ", "-"))
    panel.locator_params(axis="x", integer=True)
    panel.set_xlabel("trial")
    panel.set_ylabel(_label(score.name))


def _front(panel: Axes, done: Sequence[Trial], best: Sequence[Trial], names: tuple[str, str]) -> None:
    """Two scores against each other; the best are those that no other betters in all scores."""

    def points(trials: Sequence[Trial]) -> list[tuple[float, float]]:
        return [(trial.scores[names[0]], trial.scores[names[1]]) for trial in trials]

    _points(panel, points(done), DONE, "done")
    _points(panel, points(best), BEST, "front")
    panel.plot(*zip(*sorted(points(best)), strict=True) if best else ([], []), color=BEST, linewidth=0.8)
    panel.set_xlabel(_label(names[0]))
    panel.set_ylabel(_label(names[1]))


def _against(panel: Axes, done: Sequence[Trial], best: Sequence[Trial], path: str, score: str, log: bool) -> None:
    """The score against what a hole held."""
    held = [trial for trial in done if path in trial.values]
    values = [trial.values[path] for trial in held]
    numbers = all(_is_number(value) for value in values)
    kinds = {text: place for place, text in enumerate(dict.fromkeys(json.dumps(value) for value in values))}

    def points(trials: Sequence[Trial]) -> list[tuple[float, float]]:
        found = [(trial.values[path], trial.scores[score]) for trial in trials if path in trial.values]
        return [(value if numbers else kinds[json.dumps(value)], y) for value, y in found]

    if numbers and log:
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        panel.xaxis.set_minor_formatter(lambda x, _: "")
    _points(panel, points(held), DONE, "done")
    _points(panel, points(best), BEST, "best")
    if not numbers:
        shown = dict(list(kinds.items())[:: math.ceil(len(kinds) / LABELS)])
        size = LONGEST if len(shown) < 3 else 14
        texts = [_label(text.strip('"'), size) for text in shown]
        panel.set_xticks(list(shown.values()), texts, rotation=0 if len(shown) < 4 else 20)
        panel.set_xlim(-0.5, len(kinds) - 0.5)
    panel.set_title(_label(path.removeprefix("steps."), 2 * LONGEST), fontsize=8)
    panel.set_ylabel(_label(score))


def _points(panel: Axes, points: Sequence[tuple[float, float]], color: str, label: str) -> None:
    if points:
        x, y = zip(*points, strict=True)
        marks = panel.scatter(x, y, s=22 if color == BEST else 14, c=color, alpha=0.8, linewidths=0, label=label)
        marks.set_gid(label)
        if color == BEST:
            marks.set_zorder(3)


def _title(figure: Figure, trials: Sequence[Trial], holes: int) -> None:
    counts = [(state, sum(trial.state == state for trial in trials)) for state in ("done", "given up", "failed")]
    text = f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in counts if count)
    if holes > MOST:
        text += f" · the {MOST} of {holes} holes that explain most of the score"
    figure.suptitle(text)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(text: str, longest: int = LONGEST) -> str:
    """A name of the recipe's, as a label: the end tells more than the beginning."""
    text = printable(redact(text))
    return text if len(text) <= longest else f"…{text[-longest + 1 :]}"
