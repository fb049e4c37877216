"""The benchmarks: they cover every method, their models are what they say, one run of them writes its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mergekit_lite import load_recipe, plan, run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import cases  # noqa: E402
import make_models  # noqa: E402
import results  # noqa: E402

LAYERS = make_models.SIZES["tiny"].layers
# Masks of `dare` and `della` depend on the names of steps; only mergekit's `model_stock` goes beyond the base or the
# mean, as opposed deltas make it; its stack takes the head from the last slice.
OTHERWISE = ("dare", "della", "model_stock", "stack")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    make_models.make("tiny", folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def write(recipe: object, path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("label", cases.labels())
def test_every_merge_can_be_planned(label: str, models: Path, tmp_path: Path):
    case = cases.case(label, LAYERS)
    made = plan(load_recipe(write(case.recipe(models, tmp_path / "out"), tmp_path / "r.yaml")))
    assert not made.warnings
    assert set(case.inputs) == set(made.checkpoints)


def native_and_mergekit(label: str, models: Path, folder: Path) -> list[dict[str, torch.Tensor]]:
    case = cases.case(label, LAYERS)
    found = []
    for name, recipe in (("n", case.recipe(models, folder / "n")), ("m", case.mergekit(models, "float32"))):
        file = write(recipe, folder / f"{name}.yaml")
        run(plan(load_recipe(file), out=folder / name), threads=1)
        found.append(weights(folder / name))
    return found


@pytest.mark.parametrize("label", [n for n in cases.MERGEKIT if not n.startswith(OTHERWISE)])
def test_mergekit_is_asked_for_the_same_merge(label: str, models: Path, tmp_path: Path):
    """Read by this program, both recipes give the same weights."""
    mine, theirs = native_and_mergekit(label, models, tmp_path)
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        torch.testing.assert_close(theirs[name], x, rtol=2**-7, atol=1e-6)


def test_models_are_the_same_each_time(models: Path, tmp_path: Path):
    make_models.make("tiny", tmp_path / "again", models=1)
    for name in ("base", "tune1"):
        first, second = weights(models / name), weights(tmp_path / "again" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(x, second[key]) for key, x in first.items())
        assert {x.dtype for x in first.values()} == {torch.bfloat16}


def test_changes_are_those_of_fine_tunes(models: Path):
    """Part of the weights is exactly what it was, the tails are heavy, and models change in directions of their own."""
    base, first, second = (weights(models / name) for name in ("base", "tune1", "tune2"))
    one, two = (
        torch.cat([(tuned[key] - x).float().flatten() for key, x in base.items() if x.ndim == 2])
        for tuned in (first, second)
    )
    assert 0.2 < float((one == 0).float().mean()) < 0.7
    assert float((one**4).mean() / (one**2).mean() ** 2) > 30  # 3 for normal numbers
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.05


def test_sparse_models_are_read_as_whole_ones(tmp_path: Path):
    make_models.make("13B", tmp_path / "13B", models=1)
    files = list((tmp_path / "13B" / "tune1").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 26e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 10e6
    case = cases.case("passthrough", make_models.SIZES["13B"].layers)
    recipe = write(case.recipe(tmp_path / "13B", tmp_path / "out"), tmp_path / "r.yaml")
    assert len(plan(load_recipe(recipe)).outputs[0].tensors) == 3 + 9 * 40


def test_a_run_writes_its_page(models: Path, tmp_path: Path):
    """From the command line to the tables: what stands in the page are the figures of the JSON file."""
    page = tmp_path / "RESULTS.md"
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n", encoding="utf-8")
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--models", str(models.parent), "--repeat", "1"]
    command += ["--out", str(tmp_path / "out"), "--sizes", "tiny", "--json", str(tmp_path / "found.json")]
    command += ["--methods", "linear", "passthrough", "--parts", "costs", "profile", "--profile", "linear"]
    done = subprocess.run([*command, "--write", str(page)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in found["costs"]["tiny"]["rows"]}
    assert set(rows) == {"linear", "passthrough"}
    for row in rows.values():
        assert row["wall"] > 0 and row["cpu"] > 0 and row["peak"] > 10e6 and row["floor"] > 0
        assert row["to_floor"] == pytest.approx(row["wall"] / row["floor"])
    assert rows["linear"]["to_linear_cpu"] == 1
    (profiled,) = found["profile"]["rows"]
    assert profiled["places"]["import"] > 0
    assert sum(profiled["places"].values()) == pytest.approx(profiled["cpu"], rel=0.1)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert f"{rows['linear']['wall']:.2f}" in text
    assert f"{profiled['places']['import']:.2f}" in text
    assert list((tmp_path / "out").glob("merged*")) == []
