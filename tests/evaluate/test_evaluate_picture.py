"""The picture of a study: every trial is in it, whatever the holes held and however the trials ended."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import pytest

from mergekit_lite.errors import Mark
from mergekit_lite.evaluate.picture import MOST, draw, explained
from mergekit_lite.evaluate.study import Trial
from mergekit_lite.recipe.holes import Hole
from mergekit_lite.recipe.model import Scoring

SVG = "{http://www.w3.org/2000/svg}"
MARK = Mark("r.yaml", 1, 1, "", 1)


def scoring(name: str, goal: str = "max") -> Scoring:
    return Scoring(name, "s {model}", None, goal, None, MARK)


def trials(states: list[str], values: Mapping[str, Any], scores: list[str]) -> list[Trial]:
    """Trials that ended so; `values` gives the choices of each hole."""
    draws = random.Random(4)
    return [
        Trial(
            number,
            state,
            {path: draws.choice(choices) for path, choices in values.items()},
            {name: draws.gauss(0, 1) for name in scores} if state == "done" else {},
        )
        for number, state in enumerate(states)
    ]


def marks(group: ElementTree.Element, gid: str) -> int:
    """How many markers the groups of this id have below an element."""
    return sum(len(list(found.iter(f"{SVG}use"))) for found in group.iter(f"{SVG}g") if found.get("id") == gid)


def panels(text: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(text)
    return [found for found in root.iter(f"{SVG}g") if (found.get("id") or "").startswith("axes_")]


MIXED = ["done"] * 9 + ["failed"] * 2 + ["done", "given up", "done"]
NUMBER, CHOICE, LISTS = [0.1, 0.25, 0.7], ["ties", "dare_ties"], [["a", "b"], ["a"], {"b": {"weight": 2}}, None, True]


@pytest.mark.parametrize(
    ("states", "values", "scores"),
    [
        (MIXED, {"steps.m.with.t": NUMBER}, ["acc"]),
        (MIXED, {"steps.m.with.t": NUMBER, "steps.m.use": CHOICE}, ["acc", "loss"]),
        (MIXED, {"steps.m.of": LISTS}, ["acc", "loss", "size"]),
        (MIXED, {"steps.m.use": CHOICE}, ["acc"]),
        (["failed"] * 3, {"steps.m.with.t": NUMBER}, ["acc"]),
        (["given up"] * 2, {"steps.m.with.t": NUMBER}, ["acc"]),
        (["done"], {"steps.m.with.t": NUMBER}, ["acc", "loss"]),
        ([], {}, ["acc"]),
        (["done"] * 30, {f"steps.m.of.m{n}.weight": NUMBER for n in range(20)}, ["acc"]),
        (["done"] * 4, {'steps.$x^2$.<b>&amp;"\x1b[31m\x00': NUMBER}, ["a $\\frac{1}$ <&>"]),
    ],
)
def test_every_trial_has_a_marker(states: list[str], values: dict[str, Any], scores: list[str]) -> None:
    found = trials(states, values, scores)
    best = [trial for trial in found if trial.state == "done"][:1]
    text = draw(found, best, [scoring(name) for name in scores], [Hole(path, "choice", MARK) for path in values])
    assert text is not None
    drawn = panels(text)
    holes = len(values) if found else 0
    assert len(drawn) == len(scores) + len(scores) - 1 + min(holes, MOST)
    for panel in drawn[: len(scores)]:
        for state in ("done", "given up", "failed"):
            assert marks(panel, state.replace(" ", "-")) == states.count(state)
        assert marks(panel, "best") == len(best)
    for panel in drawn[len(scores) :]:
        assert marks(panel, "done") == states.count("done")


def test_values_on_a_log_scale_and_thresholds_of_tasks_are_drawn() -> None:
    hole = Hole("steps.m.with.t", "search", MARK, 1e-4, 1, None, True)
    found = [Trial(n, "done", {"steps.m.with.t": 10.0**-n}, {"acc": float(n)}) for n in range(5)]
    first = draw(found, found[:1], [scoring("acc")], [hole])
    assert first is not None and draw(found, found[:1], [scoring("acc")], [hole]) == first
    tasks = [Trial(n, "done", {f"save.threshold.{t}": 0.2}, {"acc": float(n)}) for n, t in enumerate("ab")]
    tasks.append(Trial(2, "done", {"save.threshold.a": 0.2, "save.threshold.b": 0.4}, {"acc": 1.0}))
    text = draw(tasks, tasks[-1:], [scoring("acc")], [])
    assert text is not None and [marks(panel, "done") for panel in panels(text)] == [3, 2, 2]


def test_holes_that_explain_the_score_come_first() -> None:
    draws = random.Random(0)
    found = []
    for number in range(60):
        values = {"noise": draws.random(), "slope": draws.random(), "kind": draws.choice("xy")}
        score = values["slope"] + 5 * (values["kind"] == "x") + 0.01 * draws.random()
        found.append(Trial(number, "done", values, {"acc": score}))
    shares = {path: explained(path, found, "acc") for path in ("noise", "slope", "kind")}
    assert shares["kind"] > shares["slope"] > 0 and shares["kind"] > 0.9 > shares["noise"]
    assert explained("noise", [], "acc") == 0.0
    assert explained("noise", [Trial(0, "done", {"noise": 1}, {"acc": 2.0})], "acc") == 0.0
