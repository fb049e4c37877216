"""What a plan says of its time: how it grows, and whether it is near what the benchmarks measured."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_lite import load_recipe, plan
from mergekit_lite.plan.estimate import seconds
from mergekit_lite.plan.model import Plan
from mergekit_lite.plan.words import about

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from cases import case  # noqa: E402
from make_models import SIZES  # noqa: E402
from sparse import Shape, write_sparse  # noqa: E402

RESULTS: dict[str, Any] = json.loads((BENCHMARKS / "results.json").read_text(encoding="utf-8"))["costs"]
MODELS = ("base", "tune1", "tune2", "tune3")


def planned(folder: Path, recipe: dict[str, Any]) -> Plan:
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return plan(load_recipe(folder / "r.yaml"), threads=2, check_output=False)


def estimated(folder: Path, label: str, shapes: Mapping[str, Shape], threads: int) -> float:
    """Seconds of a benchmark's merge of models with these tensors, which are holes in files."""
    for name in MODELS:
        write_sparse(folder / name, shapes, 10**13, {"model_type": "synthetic"})
    return seconds(planned(folder, case(label, 1).recipe(folder, folder / "out")), threads)


@pytest.mark.parametrize("label", ["passthrough", "linear", "slerp", "ties", "della"])
def test_time_grows_with_the_size(label: str, tmp_path: Path) -> None:
    few, some, many = (
        estimated(tmp_path / str(n), label, {f"w{i}": (4096, 4096) for i in range(n)}, 2) for n in (4, 8, 16)
    )
    assert few > 0
    assert math.isclose(many - some, 2 * (some - few), rel_tol=0.01)


def test_more_threads_take_less_time(tmp_path: Path) -> None:
    shapes = {f"w{i}": (8192, 8192) for i in range(30)}
    one, two = (estimated(tmp_path, "ties", shapes, threads) for threads in (1, 2))
    start = estimated(tmp_path / "small", "ties", {"w": (2, 2)}, 1)
    assert math.isclose(one - start, 2 * (two - start), rel_tol=0.01)


@pytest.mark.parametrize("label", ["tsv_m", "iso_c"])
def test_matrices_cost_by_their_shape(label: str, tmp_path: Path) -> None:
    """A decomposition takes the smaller side squared times the larger; one tensor is for one thread."""

    def cost(*shape: int, threads: int = 1) -> float:
        return estimated(tmp_path / "x".join(map(str, (*shape, threads))), label, {"w": shape}, threads)

    nothing = cost(2, 2)
    small = cost(4096, 4096) - nothing
    assert small > 10
    assert math.isclose(cost(8192, 8192) - nothing, 8 * small, rel_tol=0.05)
    assert math.isclose(cost(4096, 8192) - nothing, 2 * small, rel_tol=0.05)
    assert math.isclose(cost(8192, 4096) - nothing, 2 * small, rel_tol=0.05)
    assert math.isclose(cost(4096, 4096, threads=8) - nothing, small, rel_tol=0.05)


@pytest.mark.parametrize("save", [{}, {"as": "lora", "base": "base", "rank": 8}], ids=["decompose", "lora"])
def test_a_result_that_is_a_vector_costs_what_its_matrix_does(save: dict[str, Any], tmp_path: Path) -> None:
    """Factors, and numbers with figures behind them, are stored as one vector."""

    def cost(rows: int) -> float:
        folder = tmp_path / str(rows)
        for name in ("base", "tune1"):
            write_sparse(folder / name, {"x.weight": (rows, 4096)}, 10**13, {"model_type": "synthetic"})
        models = {name: str(folder / name) for name in ("base", "tune1")}
        step = {"use": "linear", "of": ["tune1"], "with": {"weight": 0.5, "normalize": False}}
        if not save:
            step = {"use": "decompose", "of": "tune1", "with": {"rank": 8}}
        recipe = {"version": 1, "models": models, "steps": {"m": step}, "save": {"to": str(folder / "out"), **save}}
        return seconds(planned(folder, recipe), 1)

    nothing, small = cost(2), cost(4096)
    assert small - nothing > 10
    assert math.isclose(cost(8192) - nothing, 2 * (small - nothing), rel_tol=0.05)


@pytest.mark.parametrize("size", list(RESULTS))
def test_time_is_near_what_was_measured(size: str, tmp_path: Path) -> None:
    kind, found = SIZES[size], RESULTS[size]
    shapes = kind.shapes()
    grams = {name: (shape[1], shape[1]) for name, shape in shapes.items() if name.endswith("_proj.weight")}
    for name in (*MODELS, "fisher1", "fisher2", "fisher3"):
        write_sparse(tmp_path / name, shapes, kind.shard, kind.config())
    for number in (1, 2, 3):
        write_sparse(tmp_path / f"gram{number}", grams, kind.shard, kind.config())
    far = {}
    for row in found["rows"]:
        if row["tool"] == "mergekit_lite" and "wall" in row:
            made = planned(tmp_path, case(row["method"], kind.layers).recipe(tmp_path, tmp_path / "out"))
            ratio = seconds(made, found["threads"]) / row["wall"]
            if not 1 / 3 < ratio < 3:
                far[row["method"]] = ratio
    assert far == {}


def test_durations_in_words() -> None:
    said = {0.2: "about 1 s", 59.2: "about 59 s", 59.6: "about 1 min", 200: "about 3 min", 3599: "about 1 h 0 min"}
    assert {duration: about(duration) for duration in said} == said
