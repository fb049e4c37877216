"""Saves as adapters in the streaming engine: the same bytes however made, and what NumPy makes of the deltas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipes_for_runs import CONFIG, STEPS, digests, merged, write_models, write_recipe
from safetensors.torch import load_file, save_file

from mergekit_lite import RecipeError, load_recipe, merge_in_memory, plan, run
from mergekit_lite.methods.low_rank import low_rank, needed
from mergekit_lite.methods.spec import Block
from mergekit_lite.plan.lock import relative
from mergekit_lite.report.verify import verify
from mergekit_lite.run import execute

SAVES = {
    "fixed": "rank: 7",
    "randomised": "rank: 7, svd: randomised",
    "energy": "energy: 0.3",
    "energy_at_most": "energy: 0.9, rank: 20, svd: randomised",
    "targets": 'rank: 3, targets: ["*.mlp.*", lm_head.weight], dtype: float32',
}
LORA = ", as: lora, base: base, targets: ['*.weight'], "


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), torch.bfloat16)


def recipe_of(path: Path, models: Path, save: str, step: str = "ties") -> Path:
    lora = LORA if "targets" not in save else LORA.replace(" targets: ['*.weight'],", "")
    return write_recipe(path / "r.yaml", models, STEPS[step], path / "out", save=lora + save)


@pytest.mark.parametrize("save", SAVES)
def test_threads_and_blocks_do_not_change_a_byte(save: str, models: Path, tmp_path: Path) -> None:
    found = []
    for number, (threads, block) in enumerate([(1, None), (2, None), (2, 1)]):
        (tmp_path / str(number)).mkdir()
        found.append(
            digests(merged(recipe_of(tmp_path / str(number), models, SAVES[save]), threads=threads, block=block))
        )
        assert not verify(str(tmp_path / str(number) / "out")).faults
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize("save", ["fixed", "energy"])
def test_a_stopped_run_goes_on_to_the_same_bytes(save: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = merged(recipe_of(tmp_path / "whole", models, SAVES[save]))
    made = plan(load_recipe(recipe_of(tmp_path, models, SAVES[save])), threads=1)

    class Unplugged(Exception):
        pass

    def unplug(progress: execute.Progress) -> None:
        if progress.phase == "merge" and progress.tensors == 2:
            raise Unplugged

    with pytest.raises(Unplugged):
        run(made, threads=1, progress=unplug)
    assert not (tmp_path / "out").exists()
    result = run(made, threads=2, resume=True)
    assert digests(result) == digests(whole) and result.resumed >= 2
    # What the units done before had to tell is not lost.
    assert list(result.errors.values()) == list(whole.errors.values())


def test_the_lock_holds_the_errors_and_runs_again(models: Path, tmp_path: Path) -> None:
    first = merged(recipe_of(tmp_path, models, SAVES["energy"]))
    lock = load_recipe(tmp_path / "out/recipe.lock.yaml").lock
    assert lock is not None and lock["outputs"][0]["error"] == relative(first.errors[str(tmp_path / "out")])
    again = run(plan(load_recipe(tmp_path / "out/recipe.lock.yaml"), out=tmp_path / "again"))
    assert digests(again) == digests(first) and not again.changed


def test_the_plan_knows_every_byte_of_a_fixed_rank(models: Path, tmp_path: Path) -> None:
    """With `energy` it knows the most that it can be."""
    for number, (save, exact) in enumerate([("rank: 7", True), ("energy: 0.3", False)]):
        (tmp_path / str(number)).mkdir()
        made = plan(load_recipe(recipe_of(tmp_path / str(number), models, save)))
        result = run(made)
        size = (tmp_path / str(number) / "out/adapter_model.safetensors").stat().st_size
        assert (made.bytes_written == size == result.bytes_written) if exact else made.bytes_written > size
        assert result.plan is not None and (result.plan.digest == made.digest) is exact


def test_a_delta_keeps_what_its_base_would_round_away(tmp_path: Path) -> None:
    """Factors come from the delta itself where a step adds one to its base, not from the sum's difference."""
    base, change = torch.full((6, 5), 1e4), torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 6)) * 1e-5
    for name, value in (("base", base), ("zero", torch.zeros(6, 5)), ("small", change)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        save_file({"a.weight": value}, tmp_path / name / "model.safetensors")
    text = f"version: 1\nmodels: {{base: {tmp_path}/base, zero: {tmp_path}/zero, small: {tmp_path}/small}}\nsteps:\n"
    text += "  d: {use: delta, of: small, base: zero}\n  m: {use: add, of: d, base: base}\n"
    text += f"save: {{step: m, as: lora, base: base, rank: 1, to: {tmp_path}/out}}\n"
    (tmp_path / "r.yaml").write_text(text)
    result = run(plan(load_recipe(tmp_path / "r.yaml")))
    factors = load_file(tmp_path / "out/adapter_model.safetensors")
    a, b = (factors[f"base_model.model.a.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(b @ a, change, rtol=1e-5, atol=0)
    assert relative(result.errors[str(tmp_path / "out")])["all"] < 1e-6


SHAPES = st.one_of(
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.tuples(*[st.integers(2, 4)] * 3),
    st.tuples(*[st.integers(2, 3)] * 4),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SHAPES, st.integers(0, 2**20), st.booleans(), st.sampled_from(["exact", "randomised"]), st.data())
def test_factors_are_the_best_of_their_rank(
    shape: tuple[int, ...], seed: int, transposed: bool, svd: str, data: st.DataObject
) -> None:
    """NumPy's decomposition gives the least error there is; it sets the rank that an energy needs, too."""
    transposed = transposed and len(shape) == 2
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = delta.reshape(shape[0], -1).numpy()
    matrix = matrix.T if transposed else matrix
    rank = data.draw(st.integers(1, min(matrix.shape)))
    found = low_rank([delta], rank, svd, transposed, "float64", Block(0, seed)).numpy()
    a = found[: rank * matrix.shape[1]].reshape(rank, -1)
    b = found[a.size : a.size + rank * matrix.shape[0]].reshape(-1, rank)
    assert len(found) == a.size + b.size + 2
    values = np.linalg.svd(matrix, compute_uv=False)
    least = float(np.sqrt((values[rank:] ** 2).sum()))
    error = float(np.linalg.norm(matrix - b @ a))
    assert error <= least + 1e-9 if svd == "exact" else error <= 1.5 * least + 1e-9
    np.testing.assert_allclose(found[-2:], [np.linalg.norm(matrix), error], atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), atol=1e-9)
    energy = data.draw(st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]))
    full = min(matrix.shape)
    count = int(needed([delta], full, energy, "exact", transposed, Block(0, seed)))
    kept = np.cumsum(values**2) / (values**2).sum()
    assert count == full if energy == 1 else kept[count - 1] >= energy - 1e-12
    assert count == 1 or kept[count - 2] < energy


def test_deltas_of_zero_and_of_no_number() -> None:
    zero = low_rank([torch.zeros(4, 3)], 2, "exact", False, "float32", Block(0, 1))
    assert torch.equal(zero, torch.zeros(2 * 7 + 2))
    assert int(needed([torch.zeros(4, 3)], 3, 0.9, "exact", False, Block(0, 1))) == 1
    spoilt = torch.zeros(4, 3)
    spoilt[1, 1] = torch.nan
    assert bool(low_rank([spoilt], 2, "exact", False, "float32", Block(0, 1)).isnan().all())


@pytest.mark.parametrize(("save", "message"), [
    ("rank: 0", "`rank` must be a whole number above 0"),
    ("rank: 1.5", "`rank` must be a whole number"),
    ("energy: 0", "`energy` must lie in"),
    ("energy: true", "`energy` must lie in"),
    ("svd: randomised, energy: 0.9", "needs `rank`"),
    ("svd: quick, rank: 3", "`svd` must be exact or randomised"),
    ("rank: 3, shard: 1GB", "an adapter is one file"),
    ("rank: 3, targets: []", "`targets` must be globs"),
    ("dtype: float32", "needs `rank` or `energy`"),
    ("rank: 3, targets: 'nothing*'", "changes nothing of `base`"),
])  # fmt: skip
def test_wrong_saves(save: str, message: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(load_recipe(recipe_of(tmp_path, models, save)))


@pytest.mark.parametrize(("save", "message"), [
    ("rank: 3", "belongs to a save with `as`"),
    ("as: loha, rank: 3, base: base", "`as` must be lora"),
    ("as: lora, rank: 3", "names its `base`"),
    ("as: lora, rank: 3, base: nobody", "no model or step `nobody`"),
    ("as: lora, rank: 3, base: base", "no module's weight or bias"),
])  # fmt: skip
def test_wrong_saves_without_a_base(save: str, message: str, models: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", models, STEPS["ties"], tmp_path / "out", save=f", {save}")
    with pytest.raises(RecipeError, match=message):
        plan(load_recipe(path))


def test_there_are_no_adapters_in_memory(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path, models, "rank: 2"))
    state = load_file(models / "a/model-00001-of-00002.safetensors")
    with pytest.raises(RecipeError, match="not made in memory"):
        merge_in_memory(recipe, dict.fromkeys(("base", "a", "b", "c"), state))
