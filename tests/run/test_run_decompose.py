"""`decompose` in a recipe: what is written, what is told of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from recipes_for_runs import CONFIG, digests, write_folder
from safetensors.torch import load_file, save_file

from mergekit_lite import RecipeError, load_recipe, merge_in_memory, plan, run
from mergekit_lite.cli.app import execute
from mergekit_lite.run.progress import Progress

SHAPES = {
    "a.weight": (60, 40),
    "b.weight": (30, 8, 3, 3),
    "small.weight": (6, 6),
    "bias": (60,),
    "other.weight": (50, 40),
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for number, name in enumerate(("m", "n")):
        drawn = torch.Generator().manual_seed(number)
        write_folder(tmp_path / name, {k: torch.randn(s, generator=drawn).bfloat16() for k, s in SHAPES.items()})
    return tmp_path


def recipe(folder: Path, settings: str, save: str = "", more: str = "", step: str = "small") -> Path:
    text = f"""version: 1
models: {{m: {folder}/m, n: {folder}/n}}
steps:
  mean: {{use: linear, of: [m, n]}}
  small: {{use: decompose, of: mean, with: {settings}}}
  {more}
save: {{step: {step}, to: {folder}/out{save}}}
"""
    (folder / "r.yaml").write_text(text)
    return folder / "r.yaml"


def lock_of(folder: Path) -> Any:
    return yaml.safe_load((folder / "recipe.lock.yaml").read_text())["lock"]["outputs"][0]


def mean(folder: Path, name: str) -> np.ndarray:
    found = [load_all(folder / model)[name].double().numpy() for model in ("m", "n")]
    return (found[0] + found[1]).reshape(len(found[0]), -1) / 2


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


SETTINGS = "{rank: 3, share: {other.*: 1, else: 0.1}}"


def test_what_is_written_and_told(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", str(recipe(models, SETTINGS, ", dtype: float32")), "--json"]) == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    got = load_all(models / "out")
    errors, told, nbytes, of = {}, {}, 0, 0
    for name, tensor in got.items():
        assert tuple(tensor.shape) == SHAPES[name]
        w, made = mean(models, name), tensor.double().numpy().reshape(SHAPES[name][0], -1)
        if name not in ("a.weight", "b.weight"):
            np.testing.assert_allclose(made, w, rtol=1e-6)
            continue
        rows, columns = w.shape
        kept = rows // 10
        # What is left of W has the rank, or lies in rows that are kept.
        assert np.linalg.matrix_rank(made[[i for i in range(rows) if not np.allclose(made[i], w[i])]], tol=1e-4) == 3
        module = name.removesuffix(".weight")
        errors[module] = np.linalg.norm(w - made) / np.linalg.norm(w)
        stable = [np.linalg.norm(m) ** 2 / np.linalg.norm(m, 2) ** 2 for m in (w, made)]
        told[module] = {"rank": 3, "rows": kept, "stable_rank": pytest.approx(stable, rel=1e-5)}
        nbytes += 4 * (3 * rows + 3 * columns + kept * columns) + 4 * kept
        of += 4 * w.size
    assert len(told) == 2
    for found in (output, lock_of(models / "out")):
        assert found["error"]["modules"] == pytest.approx(errors, rel=1e-5)
        assert found["decomposed"] == {"bytes": nbytes, "of": of, "modules": told}


def test_the_lines_at_the_end(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", str(recipe(models, "{rank: 3}"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("error 0.") and lines[1].endswith("of the norm of the weights, in 3 modules")
    # rank 3 of 60 x 40, 50 x 40 and 30 x 72 in bfloat16, with 6, 5 and 3 rows and their numbers.
    parts = 2 * (3 * (100 + 90 + 102) + 6 * 40 + 5 * 40 + 3 * 72) + 4 * 14
    assert lines[3].startswith(f"as low rank and rows {parts / 1000:.1f} kB in place of {2 * 6560 / 1000:.1f} kB · ")
    assert "stable rank" in lines[3]


def test_threads_blocks_and_memory_change_nothing(models: Path) -> None:
    path = recipe(models, "{rank: 5, share: 0.2, svd: randomised}")
    seen = []
    for threads, block in ((1, None), (2, 97)):
        result = run(
            plan(load_recipe(path), out=models / f"out{threads}", threads=threads), threads=threads, block=block
        )
        lock = lock_of(models / f"out{threads}")
        seen.append((digests(result), lock["error"], lock["decomposed"]))
    assert seen[0] == seen[1]
    states = {name: load_all(models / name) for name in ("m", "n")}
    inside = merge_in_memory(load_recipe(path), states)
    written = load_all(models / "out1")
    assert inside.keys() == written.keys() and all(torch.equal(inside[k], written[k]) for k in written)


def test_a_step_that_goes_on_reads_the_same_tensor_without_figures(models: Path) -> None:
    first = run(plan(load_recipe(recipe(models, SETTINGS))))
    more = "again: {use: linear, of: [small], with: {weight: 2, normalize: false}}"
    second = run(plan(load_recipe(recipe(models, SETTINGS, "2", more, "again"))))
    assert first.decomposed and not second.decomposed and not second.errors
    a, b = load_all(models / "out"), load_all(models / "out2")
    assert all(torch.equal(2 * a[k], b[k]) for k in a)


def test_what_stays_is_copied(models: Path) -> None:
    path = recipe(models, "{rank: 3, share: {a.*: 0.1, else: 1}}")
    path.write_text(path.read_text().replace("of: mean", "of: m"))
    made = plan(load_recipe(path))
    assert [t.name for t in made.outputs[0].tensors if not t.copied] == ["a.weight"]
    path.write_text(path.read_text().replace("else: 1", "else: 0.1"))
    made = plan(load_recipe(path))
    assert {t.name for t in made.outputs[0].tensors if t.copied} == {"bias", "small.weight"}


def test_a_model_with_nan_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("m", "n"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        x = torch.ones(20, 20)
        x[0, 0] = torch.nan
        save_file({"x.weight": x}, tmp_path / name / "model.safetensors")
    assert execute(["run", str(recipe(tmp_path, "{rank: 2}"))]) == 0
    out, err = capsys.readouterr()
    assert "error not a number of the norm" in out and "NaN" in err
    assert lock_of(tmp_path / "out")["decomposed"]["modules"]["x"]["stable_rank"] == [None, None]


@pytest.mark.parametrize(
    "settings, said",
    [
        ("{rank: 0}", "`rank` must lie in [1, inf), not 0"),
        ("{rank: 2.5}", "`rank` is a whole number"),
        ("{share: 1.1}", "`share` must lie in [0, 1], not 1.1"),
        ("{share: -0.1}", "`share` must lie in [0, 1]"),
        ("{svd: quick}", "`svd` is one of exact | randomised"),
        ("{rows: 3}", "`rows`"),
    ],
)
def test_wrong_settings_are_told_at_their_line(settings: str, said: str, models: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(recipe(models, settings)))
    (problem,) = caught.value.problems
    assert said in problem.message and problem.mark is not None and problem.mark.line == 5
    assert not (models / "out").exists()


def test_it_takes_one_model(models: Path) -> None:
    path = recipe(models, "{rank: 2}")
    path.write_text(path.read_text().replace("of: mean", "of: [m, n]"))
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(path))
    (problem,) = caught.value.problems
    assert problem.mark is not None and problem.mark.line == 5 and "decompose" in problem.message


def test_a_stopped_run_tells_the_same_once_it_has_gone_on(models: Path) -> None:
    class Unplugged(Exception):
        pass

    def unplug(progress: Progress) -> None:
        if progress.phase == "merge":
            raise Unplugged

    made = plan(load_recipe(recipe(models, SETTINGS)))
    with pytest.raises(Unplugged):
        run(made, threads=1, progress=unplug)
    stopped = run(made, resume=True)
    assert stopped.resumed
    whole = run(plan(load_recipe(recipe(models, SETTINGS, "2"))))
    assert digests(stopped) == digests(whole)
    assert list(stopped.decomposed.values()) == list(whole.decomposed.values())
    assert lock_of(models / "out")["error"] == lock_of(models / "out2")["error"]


def test_several_saves_of_which_one_in_fp8(models: Path) -> None:
    path = recipe(models, "{rank: 3}")
    saves = [f"{{step: small, to: {models}/plain}}", f"{{step: small, to: {models}/fp8, quantize: fp8}}"]
    text = path.read_text().split("save:")[0] + f"save: [{', '.join(saves)}, {{step: mean, to: {models}/mean}}]\n"
    path.write_text(text)
    result = run(plan(load_recipe(path)))
    # In FP8 the tensors that become codes tell of the codes; a kernel of four axes stays, and tells of its parts.
    assert set(result.decomposed[f"{models}/plain"]["modules"]) == {"a", "b", "other"}
    assert set(result.decomposed[f"{models}/fp8"]["modules"]) == {"b"}
    assert set(result.errors[f"{models}/fp8"]) == {"a", "b", "other", "small"}
    assert f"{models}/mean" not in result.decomposed and f"{models}/mean" not in result.errors
    whole, left = result.errors[f"{models}/plain"]["b"]
    assert result.errors[f"{models}/fp8"]["b"] == (whole, left) and 0 < left < whole


def test_the_lock_makes_the_same_again(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", str(recipe(models, SETTINGS))]) == 0
    assert execute(["verify", str(models / "out")]) == 0
    assert execute(["run", str(models / "out/recipe.lock.yaml"), "--out", str(models / "again")]) == 0
    assert lock_of(models / "again")["decomposed"] == lock_of(models / "out")["decomposed"]
    assert "warning" not in capsys.readouterr().err


def test_a_rank_that_leaves_everything_as_it_is_is_told(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", str(recipe(models, "{rank: 400}"))]) == 0
    out, err = capsys.readouterr()
    assert "warning: nothing of `small` is decomposed" in err and "as low rank" not in out
    assert "decomposed" not in lock_of(models / "out")
