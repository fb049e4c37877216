"""Merges of adapters by their factors alone: what whole deltas give, what is planned, and what it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import factors, write_adapter
from recipes_for_runs import CONFIG, digests
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.methods import Slot, get
from mergekit_lite.methods.whole import evaluate
from mergekit_lite.plan.budget import memory_bytes
from mergekit_lite.plan.model import Plan
from tests.faults.memory import merge, named_figure

# Matrices, one that is wider than all factors together, one narrower, and a layer that one adapter leaves as it is.
SHAPES = {"a": (24, 16), "b": (9, 40), "c": (40, 3), "d": (12, 12)}
LINEAR = {"a": (24, 16), "b": (9, 40)}
MERGES = [
    ("knots", {"merge": "ties", "density": 0.4}),
    ("knots", {"merge": "linear", "lambda": 0.7}),
    ("knots", {"merge": "dare_ties", "density": 0.5}),
    ("knots", {"merge": "dare_linear", "density": 0.5, "rank": 2}),
    ("core_space", {}),
    ("core_space", {"merge": "iso_c", "lambda": 0.5}),
    ("core_space", {"merge": "ties", "density": 0.5, "rank": 2}),
    ("core_space", {"merge": "dare_ties", "density": 0.5, "svd": "randomised", "rank": 3}),
]
RANKS = (3, 2, 4)
SCALE = 8  # lora_alpha, over the rank


def names_of(made: Plan) -> set[str]:
    return {node.method.name for unit in made.units for node in unit.nodes if node.method is not None}


@pytest.fixture
def deltas(tmp_path: Path) -> list[dict[str, Tensor]]:
    """A base, adapters `l0` to `l2` and, for whole deltas, models that are the base with them, in float64; the base is
    small numbers, so that sums keep the deltas. Gives the deltas by the tensors' names."""
    base = {f"{n}.weight": 1e-3 * torch.randn(s, generator=torch.Generator().manual_seed(9)) for n, s in SHAPES.items()}
    write_model(tmp_path / "base", base)
    found = []
    for i, rank in enumerate(RANKS):
        shapes = {n: s for n, s in SHAPES.items() if n != "d" or i != 1}
        made = factors(shapes, rank, seed=i)
        write_adapter(tmp_path / f"l{i}", made)
        delta = {
            f"{n}.weight": SCALE / rank * made[f"{n}.lora_B.weight"].double() @ made[f"{n}.lora_A.weight"].double()
            for n in shapes
        }
        found.append({n: delta.get(n, torch.zeros(value.shape).double()) for n, value in base.items()})
        write_model(tmp_path / f"whole{i}", {n: base[n].double() + found[i][n] for n in base})
    return found


def write_model(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(dict(tensors), folder / "model.safetensors")


def recipe(folder: Path, use: str, settings: Mapping[str, Any], form: str, save: str = "", compute: str = "") -> Path:
    models = ", ".join(f"m{i}: {form.format(folder=folder, i=i)}" for i in range(3))
    step = f"s: {{use: {use}, base: base, of: [m0, m1, m2], missing: zero_delta, with: {json.dumps(settings)}}}"
    text = f"version: 1\n{compute}models: {{base: {folder}/base, {models}}}\nsteps: {{{step}}}\n"
    (folder / "r.yaml").write_text(f"{text}save: {{to: {folder}/out{save}}}\n")
    return folder / "r.yaml"


ALONE = "{{adapter: {folder}/l{i}}}"
FOLDED = "{{path: {folder}/base, adapter: {folder}/l{i}}}"
WHOLE = "{folder}/whole{i}"
LORA = ", as: lora, base: base, rank: 99"


@pytest.mark.parametrize(("use", "settings"), MERGES)
def test_factors_give_what_whole_deltas_give(
    use: str, settings: dict[str, Any], deltas: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    """Adapters alone, adapters on their base, and whole models in double precision: random masks included."""
    found = {}
    of_factors, of_deltas = {"merge_factors", "core_factors"}, {"merge_in_shared", "core_space"}
    for form, compute in ((ALONE, ""), (FOLDED, ""), (WHOLE, "compute: float64\n")):
        path, out = recipe(tmp_path, use, settings, form, compute=compute), tmp_path / f"o{len(found)}"
        made = plan(load_recipe(path), out=out)
        assert names_of(made).isdisjoint(of_factors if form == WHOLE else of_deltas)
        run(made)
        found[form] = load_file(out / "model.safetensors")
    base = load_file(tmp_path / "base/model.safetensors")
    for name, wanted in found[WHOLE].items():
        change = (wanted.double() - base[name]).abs().max()
        # Masks are drawn by the names of all that a delta is made of, a base among them.
        for form in (FOLDED,) if "dare" in str(settings) else (ALONE, FOLDED):
            torch.testing.assert_close(found[form][name].double(), wanted.double(), rtol=0, atol=1e-6 * float(change))


@pytest.mark.parametrize(("use", "settings"), [m for m in MERGES if "dare" not in str(m) and "rank" not in m[1]])
def test_as_an_adapter_nothing_of_the_tensors_size_is_made(
    use: str, settings: dict[str, Any], deltas: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    path = recipe(tmp_path, use, settings, ALONE, LORA)
    made = plan(load_recipe(path))
    for unit in made.units:
        rows, columns = SHAPES[unit.name.removeprefix("base_model.model.").removesuffix(".lora")]
        merged = max(node.numel for node in unit.nodes)
        assert merged <= min(rows, sum(RANKS)) * (rows + columns) + 2
        assert not {"widen", "multiply", "low_rank"} & {n.method.name for n in unit.nodes if n.method is not None}
    result = run(made, threads=2)
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    errors = result.errors[str(tmp_path / "out")]
    for name in SHAPES:
        (wanted,) = evaluate(
            get(use)(*map(Slot, range(3)), **settings), [[d[f"{name}.weight"] for d in deltas]], compute=torch.float64
        )
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        size = float(wanted.norm())
        assert errors[name][0] == pytest.approx(size, rel=1e-5)
        assert float((b @ a - wanted).norm()) <= 1e-6 * size and errors[name][1] <= 1e-6 * size
        assert len(a) <= sum(RANKS)


@pytest.mark.parametrize(("save", "rank"), [("rank: 4", 4), ("energy: 0.8", None), ("rank: 99", 9)])
def test_a_sum_of_adapters_is_saved_by_its_factors(
    save: str, rank: int | None, deltas: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    """Errors are those of the nearest matrix of the rank; no rank is more than the factors can have."""
    settings = {"lambda": 0.5, "weight": 1.5}
    made = plan(load_recipe(recipe(tmp_path, "task_arithmetic", settings, ALONE, f", as: lora, base: base, {save}")))
    assert names_of(made) == {"low_rank_of_factors"}
    result = run(made)
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, (whole, left) in result.errors[str(tmp_path / "out")].items():
        wanted = 0.75 * torch.stack([d[f"{name}.weight"] for d in deltas]).sum(0)
        squares = torch.linalg.svdvals(wanted) ** 2
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        need = next(r for r in range(1, len(squares) + 1) if float(squares[:r].sum()) >= 0.8 * float(squares.sum()))
        assert len(a) == (need if rank is None else min(rank, *SHAPES[name], 7 if name == "d" else 9))
        assert whole == pytest.approx(float(wanted.norm()), rel=1e-5)
        assert float((b @ a - wanted).norm()) == pytest.approx(left, rel=1e-3, abs=1e-6 * whole)
        assert left**2 == pytest.approx(float(squares[len(a) :].sum()), rel=1e-3, abs=1e-10 * whole**2)


def test_an_adapter_on_its_base_is_saved_with_a_smaller_rank(deltas: list[dict[str, Tensor]], tmp_path: Path) -> None:
    models = f"base: {tmp_path}/base, m: {{path: {tmp_path}/base, adapter: {tmp_path}/l2}}"
    text = f"version: 1\nmodels: {{{models}}}\nsave: {{step: m, as: lora, base: base, rank: 2, to: {tmp_path}/out}}\n"
    (tmp_path / "r.yaml").write_text(text)
    made = plan(load_recipe(tmp_path / "r.yaml"))
    assert names_of(made) == {"low_rank_of_factors"} and made.bytes_input < 8 * sum(
        RANKS[2] * sum(shape) for shape in SHAPES.values()
    )
    run(made)
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    for name in SHAPES:
        u, s, vh = torch.linalg.svd(deltas[2][f"{name}.weight"])
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        torch.testing.assert_close(b @ a, (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=1e-6 * float(s[0]))


def test_threads_do_not_change_a_byte(deltas: list[dict[str, Tensor]], tmp_path: Path) -> None:
    found = []
    for number, threads in enumerate((1, 3)):
        made = plan(load_recipe(recipe(tmp_path, "knots", {}, FOLDED)), out=tmp_path / str(number), threads=threads)
        found.append(digests(run(made, threads=threads)))
    assert found[0] == found[1]


def test_what_needs_whole_deltas_gets_them(deltas: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """A global scope, and a whole model among the adapters."""
    made = plan(load_recipe(recipe(tmp_path, "knots", {"scope": "global"}, ALONE)))
    assert "merge_factors" not in names_of(made)
    path = recipe(tmp_path, "knots", {}, FOLDED)
    path.write_text(
        path.read_text().replace(f"{{path: {tmp_path}/base, adapter: {tmp_path}/l1}}", f"{tmp_path}/whole1")
    )
    assert "merge_factors" not in names_of(plan(load_recipe(path)))


def test_a_number_that_is_none_shows(deltas: list[dict[str, Tensor]], tmp_path: Path) -> None:
    file = tmp_path / "l1/adapter_model.safetensors"
    stored = load_file(file)
    stored["base_model.model.a.lora_A.weight"][0, 0] = torch.nan
    save_file(stored, file)
    run(plan(load_recipe(recipe(tmp_path, "core_space", {}, FOLDED))))
    got = load_file(tmp_path / "out/model.safetensors")
    assert bool(got["a.weight"].isnan().all()) and bool(got["b.weight"].isfinite().all())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say what a process has")
@pytest.mark.parametrize(("use", "save"), [("knots", ""), ("core_space", LORA)])
def test_the_planned_memory_is_kept(use: str, save: str, tmp_path: Path) -> None:
    """As much as the plan says, and much less than whole deltas take."""
    shapes = {"a": (1500, 1100), "b": (1100, 1500)}
    write_model(tmp_path / "base", {f"{n}.weight": torch.randn(s) for n, s in shapes.items()})
    for i in range(3):
        write_adapter(tmp_path / f"l{i}", factors(shapes, 16, seed=i))
    path = recipe(tmp_path, use, {}, ALONE, save)
    refused = merge("run", str(path), "--memory", "60MB", "--threads", "1")
    figure = named_figure(refused)
    assert refused.code == 3 and figure is not None
    kept = merge("run", str(path), "--memory", figure, "--threads", "1")
    assert kept.code == 0, kept.err
    assert kept.peak <= memory_bytes(figure)
    of_factors = plan(load_recipe(path), threads=1, check_output=False).peak_bytes
    whole = plan(
        load_recipe(recipe(tmp_path, "knots", {"scope": "global"}, ALONE, save)), threads=1, check_output=False
    )
    assert of_factors < whole.peak_bytes / (3 if save else 2)
