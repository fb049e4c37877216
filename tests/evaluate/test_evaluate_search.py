"""Searches by functions of state dicts: what is found, what it cost, and that a study goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergekit_lite
from mergekit_lite.errors import RecipeError, StoppedError, UsageError
from mergekit_lite.evaluate.study import Trial

Models = dict[str, dict[str, Tensor]]


@pytest.fixture
def models() -> Models:
    generator = torch.Generator().manual_seed(3)
    shapes = {f"layers.{i}.w": (4, 4) for i in range(3)}
    return {m: {n: torch.randn(s, generator=generator) for n, s in shapes.items()} for m in ("a", "b", "c", "base")}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    """A recipe of the models with this step."""

    def write(step: str) -> Path:
        path = tmp_path / "r.yaml"
        models = "{a: ./a, b: ./b, c: ./c, base: ./base}"
        path.write_text(f"version: 1\nmodels: {models}\nsteps: {{m: {step}}}\n", encoding="utf-8")
        return path

    return write


def near(models: Models, t: float) -> Callable[[dict[str, Tensor]], float]:
    """How far a merge is from (1-t) a + t b."""

    def score(tensors: dict[str, Tensor]) -> float:
        return sum(
            float(((1 - t) * models["a"][name] + t * models["b"][name] - tensor).square().sum())
            for name, tensor in tensors.items()
        )

    return score


INTERPOLATE = "{use: interpolate, of: [a, b], with: {t: {search: [0, 1]}}}"


def test_the_value_that_scores_best_is_found(models: Models, recipe: Callable[[str], Path]) -> None:
    found = mergekit_lite.search(recipe(INTERPOLATE), score=near(models, 0.3), goal="min", models=models, trials=40)
    (best,) = found.best
    assert best.values["steps.m.with.t"] == pytest.approx(0.3, abs=0.03)
    assert len(found.trials) == 40
    assert best.scores["score"] == min(trial.scores["score"] for trial in found.trials)
    # The recipe that comes out gives the score that it was found by.
    made = mergekit_lite.merge_in_memory(found.recipes[0], models)
    assert near(models, 0.3)(made) == best.scores["score"]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random", "grid", "nsga2"])
def test_every_sampler_draws_within_the_holes(models: Models, recipe: Callable[[str], Path], sampler: str) -> None:
    path = recipe("{use: interpolate, of: [a, b], with: {t: {search: [0.25, 1], step: 0.25}}}")
    found = mergekit_lite.search(
        path, score=near(models, 0.5), goal="min", models=models, trials=12, sampler=sampler, out=None
    )
    drawn = {trial.values["steps.m.with.t"] for trial in found.trials}
    assert drawn <= {0.25, 0.5, 0.75, 1.0}
    if sampler == "grid":
        assert len(found.trials) == len(drawn) == 4
        assert found.best[0].values == {"steps.m.with.t": 0.5}


def test_choices_of_any_kind_are_drawn_as_they_are_written(models: Models, recipe: Callable[[str], Path]) -> None:
    choice = "{choice: [[a, b], {b: {weight: 2}, c: {weight: 1}}]}"
    found = mergekit_lite.search(
        recipe(f"{{use: linear, of: {choice}, with: {{normalize: {{choice: [true, false]}}}}}}"),
        score=lambda tensors: float(tensors["layers.0.w"].sum()),
        models=models,
        sampler="grid",
    )

    def by_hand(names: dict[str, float], normalize: bool) -> float:
        total = sum(names.values()) if normalize else 1.0
        return float(sum(w / total * models[name]["layers.0.w"] for name, w in names.items()).sum())  # type: ignore[union-attr]

    wanted = [by_hand(n, k) for n in ({"a": 1.0, "b": 1.0}, {"b": 2.0, "c": 1.0}) for k in (True, False)]
    assert sorted(t.scores["score"] for t in found.trials) == pytest.approx(sorted(wanted), rel=1e-5)


def test_with_several_scores_the_best_are_those_that_none_betters(
    models: Models, recipe: Callable[[str], Path]
) -> None:
    scores = {"to_a": near(models, 0.0), "to_b": near(models, 1.0)}
    path = recipe("{use: linear, of: {a: {weight: {search: [0, 1]}}, b: {weight: {search: [0, 1]}}}, "
                  "with: {normalize: false}}")  # fmt: skip
    found = mergekit_lite.search(path, score=scores, goal="min", models=models, trials=30)
    front = {trial.number for trial in found.best}
    for trial in found.trials:
        better = [
            t for t in found.trials
            if t.scores != trial.scores and all(t.scores[n] <= trial.scores[n] for n in scores)
        ]  # fmt: skip
        assert (trial.number in front) == (not better)
    assert len(found.recipes) == len(front)


def test_a_trial_below_the_middle_of_the_cheap_score_is_given_up(
    models: Models, recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    from dataclasses import replace

    from mergekit_lite import choose
    from mergekit_lite.evaluate.judge import MemoryJudge
    from mergekit_lite.evaluate.search import search, stated
    from mergekit_lite.evaluate.template import Template
    from mergekit_lite.run.progress import Options

    asked = {"cheap": 0, "full": 0}

    def counted(name: str, score: Callable[[dict[str, Tensor]], float]) -> Callable[[dict[str, Tensor]], float]:
        def one(tensors: dict[str, Tensor]) -> float:
            asked[name] += 1
            return score(tensors)

        return one

    full, cheap = stated(["full", "cheap"], "min")
    template = Template(recipe(INTERPOLATE), (), [replace(full, screen=cheap)])
    functions = {name: counted(name, near(models, 0.5)) for name in asked}
    judge = MemoryJudge(choose.planner(models=models), Options(1), models, functions)
    found = search(template, judge, None, 30, 1, "random", lambda trial: None)
    states = [trial.state for trial in found.trials]
    assert asked == {"cheap": 30, "full": states.count("done")}
    assert 0 < states.count("given up") < 30
    # What was given up was worse than the middle of what was seen before.
    before: list[float] = []
    for trial in found.trials:
        value = near(models, 0.5)(
            {n: torch.lerp(models["a"][n], models["b"][n], trial.values["steps.m.with.t"]) for n in models["a"]}
        )
        if len(before) >= 6:
            assert (trial.state == "given up") == (value > sorted(before)[(len(before) - 1) // 2] + 1e-5) or (
                abs(value - sorted(before)[len(before) // 2]) < max(before) / 2
            )
        before.append(value)


def test_a_study_goes_on_and_refuses_another_recipe(
    models: Models, recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    told: list[Trial] = []

    def go(trials: int, step: str = INTERPOLATE) -> mergekit_lite.search:  # type: ignore[valid-type]
        return mergekit_lite.search(
            recipe(step),
            score=near(models, 0.3),
            goal="min",
            models=models,
            trials=trials,
            out=tmp_path,
            told=told.append,
        )

    first = go(5)
    second = go(8)
    assert [t.number for t in told] == list(range(8))
    assert [t.values for t in second.trials[:5]] == [t.values for t in first.trials]  # type: ignore[attr-defined]
    assert len({t.values["steps.m.with.t"] for t in second.trials}) == 8  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "trials.json").read_text())[7]["number"] == 7
    with pytest.raises(UsageError, match="another recipe"):
        go(9, INTERPOLATE.replace("[0, 1]", "[0, 2]"))
    with pytest.raises(UsageError, match="another recipe"):
        go(9, INTERPOLATE.replace("[a, b]", "[a, c]"))


def test_a_recipe_at_fault_for_some_values_fails_these_trials_alone(
    models: Models, recipe: Callable[[str], Path]
) -> None:
    step = "{use: linear, of: {a: {weight: {choice: [1, -1]}}, b: {weight: 1}}}"  # the weights may add up to nothing
    found = mergekit_lite.search(recipe(step), score=near(models, 0.5), goal="min", models=models, sampler="grid")
    assert {(t.values["steps.m.of.a.weight"], t.state) for t in found.trials} == {(1, "done"), (-1, "failed")}
    assert any(t.why and "0" in t.why for t in found.trials)


def test_where_nothing_succeeds_the_search_stops(models: Models, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    from mergekit_lite.evaluate.score import ScoreFailed

    def broken(tensors: dict[str, Tensor]) -> float:
        raise ScoreFailed("no such data")

    told: list[Trial] = []
    with pytest.raises(StoppedError, match="all 3 trials have failed, the last: no such data"):
        mergekit_lite.search(recipe(INTERPOLATE), score=broken, models=models, trials=50, told=told.append)
    assert len(told) == 3


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{use: linear, of: [a, b]}", "nothing to search"),
        ("{use: interpolate, of: [a, b], with: {t: {search: [0, 1], log: true}}}", "log scale"),
        ("{use: ties, base: base, of: [a, b], with: {density: {search: [0, 2]}}}", "`density` must lie in"),
        ("{use: {choice: [linear, liner]}, of: [a, b]}", "liner"),
        ("{use: linear, of: {greedy: [a, b]}, with: {normalize: {choice: [true, false]}}}", "by itself"),
        ("{use: linear, of: {greedy: [a, nobody]}}", "nobody"),
        ("{use: linear, of: {greedy: [a]}}", "at least two"),
        ("{use: linear, of: {greedy: [a, b], accept: le}}", "ge or gt"),
    ],
)
def test_what_cannot_be_searched_is_told_before_the_first_trial(
    models: Models, recipe: Callable[[str], Path], step: str, words: str
) -> None:
    def never(tensors: dict[str, Tensor]) -> float:
        raise AssertionError("scored")

    with pytest.raises(RecipeError) as caught:
        mergekit_lite.search(recipe(step), score=never, models=models)
    text = "\n".join(problem.render() for problem in caught.value.problems)
    assert words in text
    assert "--set" not in text.replace("`--set", "")  # faults stand in the recipe, not in what filled it


def test_a_greedy_soup_takes_in_what_helps(models: Models, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    goal = {n: (models["a"][n] + models["c"][n]) / 2 for n in models["a"]}

    def score(tensors: dict[str, Tensor]) -> float:
        return -sum(float((goal[n] - t).square().sum()) for n, t in tensors.items())

    path = recipe("{use: linear, of: {greedy: [a, b, c]}}")
    found = mergekit_lite.search(path, score=score, models=models, out=tmp_path / "study")
    (best,) = found.best
    assert sorted(best.values["steps.m.of"]) == ["a", "c"]
    assert best.scores["score"] == pytest.approx(0, abs=1e-9)
    text = (tmp_path / "study" / "best.yaml").read_text()
    made = mergekit_lite.merge_in_memory(mergekit_lite.load_recipe(tmp_path / "study" / "best.yaml"), models)
    assert all(torch.allclose(made[n], goal[n]) for n in goal), text


def test_functions_score_checkpoints_of_the_disk_too(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate("ab"):
        tiny_checkpoint(tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    text = f"version: 1\nmodels: {{a: ./a, b: ./b}}\nsteps: {{m: {INTERPOLATE}}}\n"
    Path("r.yaml").write_text(text, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    found = mergekit_lite.search(
        "r.yaml", score=lambda t: float(t["model.norm.weight"].sum()), trials=4, sampler="random"
    )
    assert len(found.trials) == 4 and len({t.scores["score"] for t in found.trials}) == 4
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


def test_a_function_that_writes_into_its_tensors_does_not_reach_the_next_trial(
    models: Models, recipe: Callable[[str], Path]
) -> None:
    right = near(models, 0.25)

    def score(tensors: dict[str, Tensor]) -> float:
        found = right(tensors)
        tensors["layers.1.w"].view(-1)[3:5].mul_(7)
        tensors.pop("layers.2.w")
        return found

    layers = "{layers.0.w: {choice: [0.25, 0.5]}, layers.1.w: {choice: [0.25, 0.75]}, '*': 0.25}"
    path = recipe(f"{{use: interpolate, of: [a, b], with: {{t: {layers}}}}}")
    found = mergekit_lite.search(path, score=score, goal="min", models=models, sampler="grid")
    for trial in found.trials:
        t = {name: next((v for p, v in trial.values.items() if name in p), 0.25) for name in models["a"]}
        merged = {name: torch.lerp(models["a"][name], models["b"][name], t[name]) for name in t}
        assert trial.scores["score"] == pytest.approx(right(merged), abs=1e-5)
    assert len({trial.scores["score"] for trial in found.trials}) == 4


def test_a_score_that_is_no_finite_number_fails_its_trial(models: Models, recipe: Callable[[str], Path]) -> None:
    def score(tensors: dict[str, Tensor]) -> float:
        return float("nan") if float(tensors["layers.0.w"][0, 0]) == float(models["a"]["layers.0.w"][0, 0]) else 1.0

    path = recipe("{use: interpolate, of: [a, b], with: {t: {choice: [0.0, 0.5]}}}")
    found = mergekit_lite.search(path, score=score, models=models, sampler="grid")
    assert {(t.values["steps.m.with.t"], t.state) for t in found.trials} == {(0.0, "failed"), (0.5, "done")}


@pytest.mark.parametrize("sampler", [None, "random", "grid"])
def test_a_study_in_pieces_draws_what_it_draws_at_once(
    models: Models, recipe: Callable[[str], Path], tmp_path: Path, sampler: str | None
) -> None:
    t = "{layers.0.w: {search: [0, 1], step: 0.125}, '*': {search: [0, 1], step: 0.25}}"
    path = recipe(f"{{use: interpolate, of: [a, b], with: {{t: {t}}}}}")

    def go(trials: int, out: Path) -> list[tuple[object, object]]:
        found = mergekit_lite.search(
            path, score=near(models, 0.3), goal="min", models=models, trials=trials, sampler=sampler, out=out
        )
        return [(t.values, t.scores) for t in found.trials]

    whole = go(16, tmp_path / "whole")
    for trials in (1, 6, 11, 16):
        pieces = go(trials, tmp_path / "pieces")
    assert pieces == whole and len(whole) == 16
