"""Models with adapters in the streaming engine: the same bytes in blocks of any size, and what whole tensors give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_files import factors, write_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipes_for_runs import digests, merged, write_folder, write_models
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lite import InputError, RecipeError, load_recipe, merge_in_memory, plan, run
from mergekit_lite.methods.lora import lora
from mergekit_lite.recipe.write import to_yaml

MLP = {f"model.layers.{i}.mlp.up_proj": (190, 701) for i in range(3)}
STEPS = {
    "model": "",
    "linear": "m: {use: linear, of: {x: {weight: 0.3}, y: {weight: 0.7}}}",
    "ties": "m: {use: ties, base: base, of: [x, y, a]}",
    "ties_by_tensor": "m: {use: ties, base: base, of: [x, y], with: {scope: tensor}}",
    "slerp_by_rows": "m: {use: slerp, of: [x, y], with: {t: 0.3, mode: row}}",
    "iso_c": "m: {use: iso_c, base: base, of: [x, y]}",
    "dare_of_one": "m: {use: dare_linear, base: base, of: x, with: {drop_rate: 0.5}}",
    "stack": "m: {use: stack, of: [{model: x, layers: [0, 2]}, {model: y, layers: [1, 3]}], rest: x}",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of other runs in bfloat16, and adapters `x` (plain) and `y` (DoRA, with whole tensors) of `base`."""
    folder = write_models(tmp_path_factory.mktemp("models"), torch.bfloat16)
    x = factors({**MLP, "lm_head": (300, 700)}, rank=5, dtype=torch.bfloat16)
    x["model.embed_tokens.lora_embedding_A"] = torch.randn(3, 300)
    x["model.embed_tokens.lora_embedding_B"] = torch.randn(700, 3) / 8
    write_adapter(folder / "x", x, alpha_pattern={"lm_head": 1, r"layers\.1\..*": 3})
    y = factors(MLP, rank=2, seed=1)
    y |= {f"{module}.lora_magnitude_vector": torch.rand(190) + 0.5 for module in MLP}
    y["model.layers.0.norm.weight"] = torch.rand(701)
    write_adapter(folder / "y", y, use_dora=True, use_rslora=True)
    return folder


def write_recipe(folder: Path, models: Path, steps: str, to: Path) -> Path:
    names = [f"base: {models}/base", f"a: {models}/a"]
    names += [f"{name}: {{path: {models}/base, adapter: {models}/{name}}}" for name in ("x", "y")]
    body = f"steps:\n  {steps}\n" if steps else ""
    text = f"version: 1\nmodels: {{{', '.join(names)}}}\n{body}save: {{to: {to}, step: {'m' if steps else 'x'}}}\n"
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder / "recipe.yaml"


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", STEPS)
def test_threads_and_blocks_do_not_change_a_byte(name: str, models: Path, tmp_path: Path) -> None:
    found = []
    for number, (threads, block) in enumerate([(1, None), (2, None), (2, 1), (1, 300_000)]):
        recipe = write_recipe(tmp_path, models, STEPS[name], tmp_path / f"out{number}")
        found.append(digests(merged(recipe, threads=threads, block=block)))
    assert found[1:] == found[:1] * 3


def folded(models: Path, name: str) -> dict[str, Tensor]:
    """The base with an adapter, worked out in float64."""
    weights = {key: value.double() for key, value in load(models / "base").items()}
    adapter = load_file(models / name / "adapter_model.safetensors")
    adapter = {key.removeprefix("base_model.model."): value.double() for key, value in adapter.items()}
    config = json.loads((models / name / "adapter_config.json").read_text())
    for key, value in adapter.items():
        module, found, _ = key.partition(".lora_A.")
        if found:
            alpha = {"lm_head": 1, "model.layers.1.mlp.up_proj": 3}.get(module, 8) if name == "x" else 8
            scale = alpha / (len(value) ** 0.5 if config.get("use_rslora") else len(value))
            made = weights[f"{module}.weight"] + scale * adapter[f"{module}.lora_B.weight"] @ value
            if f"{module}.lora_magnitude_vector" in adapter:
                made *= (adapter[f"{module}.lora_magnitude_vector"] / made.norm(dim=1)).unsqueeze(1)
            weights[f"{module}.weight"] = made
        elif "lora" not in key:
            weights[key] = value
    if name == "x":
        a, b = (adapter[f"model.embed_tokens.lora_embedding_{part}"] for part in "AB")
        weights["model.embed_tokens.weight"] += 8 / 3 * (b @ a).T
    return weights


def test_a_linear_merge_is_that_of_folded_models(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, models, STEPS["linear"], tmp_path / "out")
    run(plan(load_recipe(recipe, ["save.dtype=float32"])))
    x, y = folded(models, "x"), folded(models, "y")
    for name, value in load(tmp_path / "out").items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), 0.3 * x[name] + 0.7 * y[name], rtol=1e-5, atol=1e-6)


def test_the_result_is_rounded_once(models: Path, tmp_path: Path) -> None:
    """Half a unit in the last place of bfloat16, and a trace for the arithmetic in float32."""
    merged(write_recipe(tmp_path, models, "", tmp_path / "out"))
    exact = folded(models, "x")
    for name, value in load(tmp_path / "out").items():
        bound = exact[name].abs() * 2**-9 * 2.001 + 1e-6
        assert bool(((value.double() - exact[name]).abs() <= bound).all()), name


def test_what_no_adapter_changes_is_copied(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, models, "", tmp_path / "out")
    made = plan(load_recipe(recipe))
    changed = {f"{module}.weight" for module in MLP} | {"lm_head.weight", "model.embed_tokens.weight"}
    assert {t.name for output in made.outputs for t in output.tensors if not t.copied} == changed


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 70), rank=st.integers(1, 6), dora=st.booleans(),
    transposed=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_a_row_does_not_depend_on_the_rows_beside_it(
    rows: int, columns: int, rank: int, dora: bool, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    a = torch.randn(rank, rows if transposed else columns, generator=generator)
    b = torch.randn(columns if transposed else rows, rank, generator=generator)
    magnitude = torch.rand(columns if transposed else rows, generator=generator)

    def fold(start: int, stop: int) -> Tensor:
        cut = (a[:, start:stop], b) if transposed else (a, b[start:stop])
        return lora([weight[start:stop], *cut, magnitude[start:stop]], 0.7, transposed, dora and not transposed)

    whole = fold(0, rows)
    exact = weight.double() + 0.7 * (b.double() @ a.double()).T.reshape(rows, columns) if transposed else (
        weight.double() + 0.7 * b.double() @ a.double()
    )  # fmt: skip
    if dora and not transposed:
        exact = exact * (magnitude.double() / exact.norm(dim=1)).unsqueeze(1)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-4, atol=1e-4)
    for start in range(rows):
        assert torch.equal(fold(start, start + 1)[0].view(torch.int32), whole[start].view(torch.int32))


def test_factors_of_zero_return_the_base_bit_for_bit() -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-45, 3e38], [-1.5, 0.1, -0.0, 0.0]])
    result = lora([weight, torch.zeros(2, 4), -torch.zeros(2, 2)], 2.0, False, False)
    assert torch.equal(result.view(torch.int32), weight.view(torch.int32))


def test_a_unit_reads_the_whole_factor_once(tmp_path: Path) -> None:
    """A tensor of many blocks: the factors are not read again for each of them, and the plan says what is read."""
    weights = {"model.layers.0.mlp.up_proj.weight": torch.randn(4000, 500), "lm_head.weight": torch.randn(4, 4)}
    write_folder(tmp_path / "base", weights)
    write_adapter(tmp_path / "x", factors({"model.layers.0.mlp.up_proj": (4000, 500)}, rank=40))
    text = f"version: 1\nmodels: {{x: {{path: {tmp_path}/base, adapter: {tmp_path}/x}}}}\nsave: {{step: x}}\n"
    (tmp_path / "r.yaml").write_text(text)
    made = plan(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "out")
    stored = (4000 * 500 + 16 + 40 * 4500) * 4
    assert made.bytes_read == run(made, block=70_000).bytes_read == stored


def test_what_is_not_finite_in_an_adapter_is_counted_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "base", {"a.weight": torch.ones(900, 300), "b": torch.ones(2)})
    parts = factors({"a": (900, 300)})
    parts["a.lora_A.weight"][1, 2] = float("nan")
    parts["a.lora_B.weight"][3, 0] = float("inf")
    write_adapter(tmp_path / "x", parts)
    text = f"version: 1\nmodels: {{x: {{path: {tmp_path}/base, adapter: {tmp_path}/x}}}}\nsave: {{step: x}}\n"
    (tmp_path / "r.yaml").write_text(text)
    result = run(plan(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "out"), block=1)
    file = f"{tmp_path}/x/adapter_model.safetensors:base_model.model.a.lora_"
    assert result.nonfinite == {f"{file}A.weight": 1, f"{file}B.weight": 1}


def test_the_lock_holds_the_adapter(models: Path, tmp_path: Path) -> None:
    """It runs again to the same bytes; another `lora_alpha` and other factors are seen before anything is merged."""
    write_adapter(tmp_path / "x", factors(MLP))
    text = f"version: 1\nmodels: {{x: {{path: {models}/base, adapter: {tmp_path}/x}}}}\nsave: {{step: x}}\n"
    (tmp_path / "r.yaml").write_text(text)
    first = run(plan(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "out"))
    lock = tmp_path / "out/recipe.lock.yaml"
    again = run(plan(load_recipe(lock), out=tmp_path / "again"))
    assert digests(again) == digests(first) and not again.changed
    write_adapter(tmp_path / "x", factors(MLP), lora_alpha=9)
    with pytest.raises(RecipeError, match=r"`adapter_config.json` of `x` has other content"):
        run(plan(load_recipe(lock), out=tmp_path / "other"))
    write_adapter(tmp_path / "x", factors(MLP, seed=5))
    with pytest.raises(RecipeError, match=r"`adapter_model.safetensors` of `x` has other content"):
        run(plan(load_recipe(lock), out=tmp_path / "other"))


def test_a_change_of_the_scale_is_another_plan(models: Path, tmp_path: Path) -> None:
    text = f"version: 1\nmodels: {{x: {{path: {models}/base, adapter: {tmp_path}/x}}}}\nsave: {{step: x}}\n"
    (tmp_path / "r.yaml").write_text(text)
    found = set()
    for settings_ in ({}, {"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 1}}):
        write_adapter(tmp_path / "x", factors(MLP), **settings_)
        found.add(plan(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "out").digest)
    assert len(found) == 4


def test_an_adapter_that_changes_after_the_plan_stops_the_run(models: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "x", factors(MLP))
    text = f"version: 1\nmodels: {{x: {{path: {models}/base, adapter: {tmp_path}/x}}}}\nsave: {{step: x}}\n"
    (tmp_path / "r.yaml").write_text(text)
    made = plan(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "out")
    write_adapter(tmp_path / "x", factors(MLP), lora_alpha=99)
    with pytest.raises(InputError, match="changed since it was planned"):
        run(made)


def test_in_memory_there_are_no_adapters(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, models, STEPS["linear"], tmp_path / "out"))
    with pytest.raises(RecipeError, match=r"`x` has an adapter(.|\n)*merge_and_unload"):
        merge_in_memory(recipe, {name: {} for name in ("base", "a", "x", "y")})


def test_an_output_inside_the_adapter_is_refused(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, models, "", models / "x/out")
    with pytest.raises(RecipeError, match="lies inside the input"):
        plan(load_recipe(recipe))


def test_memory_grows_with_the_factors(tmp_path: Path) -> None:
    """The plan counts what is held beside the blocks."""
    save_to = tmp_path / "base"
    save_to.mkdir()
    save_file({"a.weight": torch.zeros(64, 40_000)}, save_to / "model.safetensors")
    text = f"version: 1\nmodels: {{x: {{path: {save_to}, adapter: {tmp_path}/x}}}}\nsave: {{step: x}}\n"
    (tmp_path / "r.yaml").write_text(text)
    peaks = []
    for rank in (1, 33):
        write_adapter(tmp_path / "x", factors({"a": (64, 40_000)}, rank=rank))
        peaks.append(plan(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "out", threads=1).peak_bytes)
    assert peaks[1] - peaks[0] >= 32 * 40_000 * 4


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A base, and what two adapters of it add, of which each has a module that the other lacks."""
    shapes = {"one": (12, 9), "two": (7, 10), "three": (8, 8), "none": (5, 4)}
    base = {f"{module}.weight": torch.randn(shape) for module, shape in shapes.items()}
    write_folder(tmp_path / "base", {**base, "norm": torch.ones(3)})
    deltas = []
    for seed, names in ((1, ("one", "two")), (2, ("one", "three"))):
        parts = factors({module: shapes[module] for module in names}, rank=2, seed=seed)
        write_adapter(tmp_path / f"x{seed}", parts)
        deltas.append({f"{m}.weight": 4 * parts[f"{m}.lora_B.weight"] @ parts[f"{m}.lora_A.weight"] for m in names})
    return base, deltas[0], deltas[1]


def adapters_alone(tmp_path: Path, step: str, save: str = "") -> Path:
    models = f"base: {tmp_path}/base, x: {{adapter: {tmp_path}/x1}}, y: {{adapter: {tmp_path}/x2}}"
    text = f"version: 1\nmodels: {{{models}}}\nsteps: {{m: {{{step}}}}}\nsave: {{step: m, to: {tmp_path}/out{save}}}\n"
    (tmp_path / "alone.yaml").write_text(text)
    return tmp_path / "alone.yaml"


WEIGHTED = "of: {x: {weight: 0.5}, y: {weight: -2}}"


def test_adapters_alone_are_deltas(pair: tuple[dict[str, Tensor], ...], tmp_path: Path) -> None:
    """What one of them lacks it does not change; what none has is copied."""
    base, one, two = pair
    step = f"use: task_arithmetic, {WEIGHTED}, base: base, with: {{lambda: 1}}, missing: zero_delta"
    merged(adapters_alone(tmp_path, step))
    found = load(tmp_path / "out")
    for name, value in base.items():
        wanted = value + 0.5 * one.get(name, torch.zeros(())) - 2 * two.get(name, torch.zeros(()))
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["none.weight"], base["none.weight"])
    plain = adapters_alone(tmp_path, "use: ties, of: [x, y], base: base, missing: zero_delta")
    assert f"x: {{adapter: {tmp_path}/x1}}" in to_yaml(load_recipe(plain))


def test_a_sum_of_adapters_is_an_adapter_of_the_sum_of_their_ranks(
    pair: tuple[dict[str, Tensor], ...], tmp_path: Path
) -> None:
    _, one, two = pair
    step = f"use: task_arithmetic, {WEIGHTED}, base: base, with: {{lambda: 1}}, missing: zero_delta"
    result = run(plan(load_recipe(adapters_alone(tmp_path, step, ", as: lora, base: base, rank: 4"))))
    parts = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {key.split(".")[2] for key in parts} == {"one", "two", "three"}
    for module in ("one", "two", "three"):
        a, b = (parts[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        name = f"{module}.weight"
        wanted = 0.5 * one.get(name, torch.zeros(())) - 2 * two.get(name, torch.zeros(()))
        torch.testing.assert_close(b @ a, wanted, rtol=1e-5, atol=1e-5)
    assert all(left <= 1e-6 * whole for whole, left in result.errors[str(tmp_path / "out")].values())


def test_what_is_no_delta_without_its_base(pair: tuple[dict[str, Tensor], ...], tmp_path: Path) -> None:
    write_adapter(tmp_path / "x1", {**factors({"one": (12, 9)}), "norm.weight": torch.ones(3)})
    with pytest.raises(RecipeError, match="only the factors of LoRA are a delta without a base"):
        plan(load_recipe(adapters_alone(tmp_path, "use: linear, of: [x, y]")))
