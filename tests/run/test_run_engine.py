"""The streaming engine against whole tensors in memory, and against itself with other threads and blocks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from recipes_for_runs import SHAPES, STEPS, digests, merged, write_models, write_recipe
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lite import InputError, load_recipe, merge_in_memory, plan, run
from mergekit_lite.methods.registry import get
from mergekit_lite.methods.spec import Slot
from mergekit_lite.methods.whole import apply, evaluate
from mergekit_lite.run import execute


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def half_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("half"), torch.bfloat16)


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", STEPS)
def test_threads_and_blocks_do_not_change_a_byte(name: str, half_models: Path, tmp_path: Path) -> None:
    found = []
    for number, (threads, block) in enumerate([(1, None), (2, None), (2, 1), (1, 300_000)]):
        recipe = write_recipe(tmp_path / "recipe.yaml", half_models, STEPS[name], tmp_path / f"out{number}")
        found.append(digests(merged(recipe, threads=threads, block=block)))
    assert found[1:] == found[:1] * 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ties_is_what_whole_tensors_give(dtype: str, models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models, STEPS["ties_by_tensor"], tmp_path / "out", f"compute: {dtype}\n")
    merged(recipe, threads=2)
    ours, compute = load(tmp_path / "out"), getattr(torch, dtype)
    base, *tuned = (load(models / name) for name in ("base", "a", "b", "c"))
    params = {"weight": (1.0,) * 3, "density": (0.2,) * 3, "lambda": 1.0, "scope": "tensor", "aggregate": "mean"}
    for name in SHAPES:
        deltas = [t[name].to(compute) - base[name].to(compute) for t in tuned]
        settings = {**params, "zero_sign": "majority", "select": "exact"}
        delta = apply(get("ties"), deltas, settings, compute=compute) if deltas[0].numel() else deltas[0]
        assert torch.equal(ours[name], (base[name].to(compute) + delta).float()), name
    assert torch.equal(ours["model.position_ids"], base["model.position_ids"])


def test_global_thresholds_rank_all_tensors_together(models: Path, tmp_path: Path) -> None:
    steps = "d: {use: delta, of: a, base: base}\n  s: {use: sparsify, of: d, with: {density: 0.05, scope: global}}\n"
    merged(write_recipe(tmp_path / "r.yaml", models, steps + "  m: {use: add, of: s, base: base}", tmp_path / "out"))
    base, tuned, ours = load(models / "base"), load(models / "a"), load(tmp_path / "out")
    everything = torch.cat([(tuned[name] - base[name]).flatten() for name in SHAPES])
    count = int(0.05 * everything.numel())
    bound = everything.abs().sort(descending=True).values[count - 1]
    for name in SHAPES:
        delta = tuned[name] - base[name]
        kept = torch.where(delta.abs() >= bound, delta, 0)
        assert torch.equal(ours[name], base[name] + kept), name


def test_linear_is_the_weighted_mean_of_float64(models: Path, tmp_path: Path) -> None:
    merged(write_recipe(tmp_path / "r.yaml", models, STEPS["linear"], tmp_path / "out"))
    ours, a, b, c = load(tmp_path / "out"), *(load(models / name) for name in ("a", "b", "c"))
    for name in SHAPES:
        exact = (0.2 * a[name].double() + 0.3 * b[name].double() + 1.5 * c[name].double()) / 2.0
        torch.testing.assert_close(ours[name].double(), exact, rtol=1e-6, atol=1e-9)


def test_passthrough_copies_every_byte(half_models: Path, tmp_path: Path) -> None:
    merged(write_recipe(tmp_path / "r.yaml", half_models, "m: {use: passthrough, of: a}", tmp_path / "out"))
    ours, theirs = load(tmp_path / "out"), load(half_models / "a")
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_interpolation_ends_are_the_inputs_whatever_the_other_holds(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nmodels: {a: ./a, b: ./b}\n"
        "steps: {m: {use: interpolate, of: [a, b], with: {t: 1}}}\nsave: {to: out}\n"
    )
    sound = torch.randn(7, dtype=torch.float16)
    broken = torch.full((7,), torch.inf, dtype=torch.float16)
    assert torch.equal(merge_in_memory(load_recipe(recipe), {"a": {"w": broken}, "b": {"w": sound}})["w"], sound)


def test_two_saves_share_a_result_and_a_run(models: Path, tmp_path: Path) -> None:
    names = ", ".join(f"{name}: {models / name}" for name in ("base", "a", "b"))
    text = (
        f"version: 1\nmodels: {{{names}}}\nsteps:\n  d: {{use: delta, of: a, base: base}}\n"
        "  half: {use: add, base: base, of: {d: {weight: 0.5}}}\n  whole: {use: add, base: base, of: d}\n"
        f"save:\n  - {{step: half, to: {tmp_path / 'half'}}}\n"
        f"  - {{step: whole, to: {tmp_path / 'whole'}, dtype: bfloat16}}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    result = merged(tmp_path / "r.yaml", threads=2)
    # Every number of the two models once, however many saves use it; the buffer of integers once per save.
    assert result.bytes_read == 2 * sum(t.numel() * t.element_size() for t in load(models / "a").values())
    half, whole, base, a = (load(f) for f in (tmp_path / "half", tmp_path / "whole", models / "base", models / "a"))
    for name in SHAPES:
        assert torch.equal(half[name], base[name] + 0.5 * (a[name] - base[name]))
        assert torch.equal(whole[name], (base[name] + (a[name] - base[name])).bfloat16())


def test_a_result_with_a_shape_of_its_own_inside_a_step(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    shapes = {"layers.0.tall": (14, 3), "layers.0.wide": (3, 14), "layers.0.bias": (14,), "scale": ()}
    states = {x: {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()} for x in ("o", "a", "b")}
    text = "version: 1\nmodels: {o: ./o, a: ./a, b: ./b}\nsteps: {m: {use: knots, base: o, of: [a, b], "
    (tmp_path / "r.yaml").write_text(text + "with: {scope: global, density: 0.4}}}\nsave: {to: out}\n")
    ours = merge_in_memory(load_recipe(tmp_path / "r.yaml"), states)
    inputs = [[states[x][name] - states["o"][name] for x in ("a", "b")] for name in shapes]
    expected = evaluate(get("knots")(Slot(0), Slot(1), scope="global", density=0.4), inputs)
    for (name, result), delta in zip(ours.items(), expected, strict=True):
        torch.testing.assert_close(result, states["o"][name] + delta)


def test_in_memory_gives_the_bytes_of_a_run(models: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", models, STEPS["staged"], tmp_path / "out")
    merged(path)
    memory = merge_in_memory(load_recipe(path), {name: load(models / name) for name in ("base", "a", "b", "c")})
    ours = load(tmp_path / "out")
    assert list(memory) == list(ours)
    assert all(torch.equal(memory[name], ours[name]) for name in ours)


def test_a_stopped_run_goes_on_to_the_same_bytes(
    half_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digests(merged(write_recipe(tmp_path / "r.yaml", half_models, STEPS["ties"], tmp_path / "whole")))
    made = plan(load_recipe(write_recipe(tmp_path / "r.yaml", half_models, STEPS["ties"], tmp_path / "out")), threads=1)
    monkeypatch.setattr(execute, "SAFE_SECONDS", 0.0)

    class Unplugged(Exception):
        pass

    def unplug(progress: execute.Progress) -> None:
        if progress.phase == "merge" and progress.tensors == 5:
            raise Unplugged

    with pytest.raises(Unplugged):
        run(made, threads=1, progress=unplug)
    assert not (tmp_path / "out").exists()
    # The statistics over all tensors are taken from the journal: a broken measure would be noticed.
    result = run(made, threads=2, resume=True)
    assert digests(result) == whole
    assert result.resumed >= 4
    assert result.bytes_read < run_bytes(half_models)


def test_an_input_that_changes_after_it_was_read_is_not_locked(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models")
    made = plan(load_recipe(write_recipe(tmp_path / "r.yaml", models, STEPS["linear"], tmp_path / "out")))
    shard = next((models / "b").glob("*.safetensors"))

    def touch(progress: execute.Progress) -> None:
        if progress.done == progress.total:
            os.utime(shard, ns=(0, 0))

    with pytest.raises(InputError, match="changed"):
        run(made, threads=1, progress=touch)
    assert not (tmp_path / "out").exists()


def run_bytes(models: Path) -> int:
    """Bytes of one pass over all four models."""
    return sum(file.stat().st_size for file in models.glob("*/*.safetensors"))
