"""Saves in FP8: what transformers loads, codes and scales as a formula gives them, the same bytes however it runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mergekit_lite import InputError, InterruptedRun, load_recipe, merge_in_memory, plan, run
from mergekit_lite.cli.app import execute
from mergekit_lite.recipe.read import parse
from mergekit_lite.recipe.write import to_yaml

COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}


def llama(**more: Any) -> Any:
    config = {**COMMON, "hidden_size": 256, "intermediate_size": 640, **more}
    return LlamaForCausalLM(LlamaConfig(**config))


def moe() -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **sizes, num_experts=4, num_experts_per_tok=2))


MODELS: Mapping[str, Callable[[], Any]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "odd sizes": lambda: llama(intermediate_size=300),
    "experts": moe,
}
LINEAR = "m: {use: linear, of: {a: {weight: 0.75}, b: {weight: 0.25}}}"


def write_models(folder: Path, make: Callable[[], Any] = llama, dtype: torch.dtype = torch.bfloat16) -> None:
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        model.to(dtype).save_pretrained(folder / name)


def recipe(folder: Path, save: str, steps: str = LINEAR, to: str = "out", extra: str = "") -> Path:
    models = f"models: {{a: {folder / 'a'}, b: {folder / 'b'}}}"
    path = folder / f"{to}.yaml"
    text = f"version: 1\n{extra}{models}\nsteps: {{{steps}}}\nsave: {{step: m, to: {folder / to}{save}}}\n"
    path.write_text(text)
    return path


def merged(path: Path, threads: int = 1, block: int | None = None, **flags: Any) -> Any:
    return run(plan(load_recipe(path), threads=threads), threads=threads, block=block, **flags)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def by_hand(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales, block by block."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns)
    for i, j in itertools.product(range(rows), range(columns)):
        place = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
        largest = float(weight[place].abs().max())
        scales[i, j] = largest / 448 if largest else 1.0
        codes[place] = (weight[place] / scales[i, j]).clamp(-448, 448).to(codes.dtype)
    return codes, scales


def numbers(found: Mapping[str, Tensor], name: str) -> Tensor:
    scales = found[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return found[name].float() * scales[: found[name].shape[0], : found[name].shape[1]]


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_loads_it(tmp_path: Path, kind: str) -> None:
    write_models(tmp_path, MODELS[kind])
    result = merged(recipe(tmp_path, ", quantize: fp8"))
    merged(recipe(tmp_path, ", dtype: float32", to="plain"))
    found, plain = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    codes = {name for name, value in found.items() if value.dtype == torch.float8_e4m3fn}
    kept = {"experts": 14 + 18, "odd sizes": 8}.get(kind, 14)
    assert len(codes) == {"experts": 32}.get(kind, kept)
    assert not any(part in name for name in codes for part in ("norm", "embed", "lm_head", "gate.weight"))
    for name, value in plain.items():
        if name not in codes:
            assert torch.equal(found[name], value.bfloat16())
            continue
        expected, scales = by_hand(value)
        assert torch.equal(found[name].float(), expected.float()) and torch.equal(found[f"{name}_scale_inv"], scales)
        # A code has three bits behind the first, so that it is off by half of the last of them at most.
        assert ((numbers(found, name) - value).abs() <= value.abs() / 16 + found[f"{name}_scale_inv"].max() / 512).all()
    assert found.keys() == plain.keys() | {f"{name}_scale_inv" for name in codes}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["quantization_config"]["weight_block_size"] == [128, 128]
    # On a CPU transformers multiplies by the scales as it loads; the model is that of these numbers, to the bit.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    state = {n: numbers(found, n) if n in codes else found[n].float() for n in plain}
    save_file(state, tmp_path / "plain/model.safetensors", {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    ids = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs, exact = loaded(ids).logits, whole(ids).logits, expected(ids).logits
    assert torch.equal(ours, exact)
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.15
    # What a run tells of its error is what the numbers show.
    (errors,) = result.errors.values()
    assert errors.keys() == {name.removesuffix(".weight") for name in codes}
    for name in codes:
        norm, left = errors[name.removesuffix(".weight")]
        assert math.isclose(norm, float(plain[name].double().norm()), rel_tol=1e-6)
        assert math.isclose(left, float((plain[name] - numbers(found, name)).double().norm()), rel_tol=1e-5)


STEPS = {
    "linear": (LINEAR, ""),
    "ties": ("m: {use: ties, of: [a, b], base: a, with: {density: 0.3}}", ""),
    "spectral": ("m: {use: tsv_m, of: [a, b], base: a}", ""),
    "double": (LINEAR, "compute: float64\n"),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_same_bytes(tmp_path: Path, name: str) -> None:
    """With any threads and blocks, in one file or several; the numbers are those of the merge without `quantize`."""
    write_models(tmp_path)
    steps, extra = STEPS[name]
    found = []
    for number, (threads, block) in enumerate([(1, None), (3, 1000)]):
        result = merged(recipe(tmp_path, ", quantize: fp8", steps, f"out{number}", extra), threads, block)
        found.append((tensors(tmp_path / f"out{number}"), result))
    assert (tmp_path / "out0/model.safetensors").read_bytes() == (tmp_path / "out1/model.safetensors").read_bytes()
    assert list(found[0][1].errors.values()) == list(found[1][1].errors.values())
    merged(recipe(tmp_path, ", quantize: fp8, shard: 300KB", steps, "shards", extra))
    shards = tensors(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert shards.keys() == found[0][0].keys()
    assert all(torch.equal(v.view(torch.uint8), found[0][0][n].view(torch.uint8)) for n, v in shards.items())
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == shards.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in shards.values())
    merged(recipe(tmp_path, ", dtype: float64" if extra else ", dtype: float32", steps, "plain", extra))
    for key, value in tensors(tmp_path / "plain").items():
        if f"{key}_scale_inv" in shards:
            assert torch.equal(shards[key].float(), by_hand(value)[0].float())
    assert execute(["verify", str(tmp_path / "shards")]) == 0


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """To the same bytes, and to the same errors, though parts of them were found before."""
    write_models(tmp_path)
    whole = merged(recipe(tmp_path, ", quantize: fp8", to="whole"))
    seen = itertools.count()

    def stop(progress: Any) -> None:
        if next(seen) == 12:
            raise KeyboardInterrupt

    path = recipe(tmp_path, ", quantize: fp8")
    with pytest.raises(InterruptedRun):
        merged(path, progress=stop)
    result = merged(path, resume=True)
    assert 10 < result.resumed < len(plan(load_recipe(path), check_output=False).units)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert list(result.errors.values()) == list(whole.errors.values())


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    write_models(tmp_path)
    merged(recipe(tmp_path, ", quantize: fp8"))
    path = tmp_path / "again.yaml"
    path.write_text(f"version: 1\nmodels: {{x: {tmp_path / 'out'}}}\nsave: {{step: x, to: {tmp_path / 'again'}}}\n")
    merged(path)
    found, again = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    for name, value in again.items():
        expected = numbers(found, name).bfloat16() if f"{name}_scale_inv" in found else found[name]
        assert torch.equal(value, expected)
    assert "quantization_config" not in (tmp_path / "again/config.json").read_text()


def test_in_memory(tmp_path: Path) -> None:
    write_models(tmp_path)
    path = recipe(tmp_path, ", quantize: fp8")
    merged(path)
    states = {name: tensors(tmp_path / name) for name in "ab"}
    config = json.loads((tmp_path / "a/config.json").read_text())
    found, expected = merge_in_memory(load_recipe(path), states, config=config), tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(v.view(torch.uint8), expected[n].view(torch.uint8)) for n, v in found.items())


NAME = "model.layers.0.mlp.up_proj.weight"


def change(folder: Path, make: Callable[[Tensor], None]) -> None:
    state = tensors(folder)
    make(state[NAME])
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_numbers_out_of_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Infinities become the largest number of their block and are counted, NaN stays; a block of zeros stays one."""
    write_models(tmp_path, dtype=torch.float32)

    def spoil(weight: Tensor) -> None:
        weight[0, 0], weight[130, 1], weight[5, 7] = math.inf, -math.inf, math.nan
        weight[256:384, 128:] = 0
        weight[384:, :128] = 1e-44

    change(tmp_path / "a", spoil)
    path = tmp_path / "r.yaml"
    text = f"version: 1\nmodels: {{a: {tmp_path / 'a'}}}\nsteps: {{m: {{use: linear, of: [a], with: {{weight: 2}}}}}}\n"
    path.write_text(f"{text}save: {{to: {tmp_path / 'out'}, quantize: fp8}}\n")
    with pytest.raises(InputError, match="NaN or infinite"):
        merged(path, strict=True)
    result = merged(path, resume=True)
    assert result.overflow == {NAME: 2} and result.output_nonfinite == {NAME: 1}
    found = tensors(tmp_path / "out")
    made, scales = found[NAME].float(), found[f"{NAME}_scale_inv"]
    assert made[0, 0] == 448 and made[130, 1] == -448 and made[5, 7].isnan() and int(made.isnan().sum()) == 1
    assert scales.isfinite().all() and scales[2, 1] == 1 and not made[256:384, 128:].any()
    assert scales[0, 0] < 0.1  # the infinity had no say
    assert not numbers(found, NAME)[384:, :128].gt(1e-40).any()
    error = execute(["run", str(path), "--out", str(tmp_path / "again")])
    told = " ".join(capsys.readouterr().err.split())
    assert error == 0 and f"2 numbers out of the range of the dtype saved in: `{NAME}`" in told


@pytest.mark.parametrize(
    ("save", "says"),
    [
        (", quantize: int4", "`quantize` must be fp8, not the text `int4`"),
        (", quantize: 8", "`quantize` must be fp8"),
        (", quantize: fp8, dtype: float8_e5m2", "`quantize: fp8` with `dtype: float8_e5m2`"),
        (", quantize: fp8, as: lora, base: a, rank: 2", "an adapter is not stored in FP8"),
    ],
)
def test_wrong_recipes(tmp_path: Path, save: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, save)
    assert execute(["plan", str(path)]) == 3
    err = capsys.readouterr().err
    assert says in err and "out.yaml:4:" in err and "hint: " in err


def test_models_that_cannot_be_saved_in_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path / "gpt2", lambda: GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=1, n_head=2, vocab_size=96)))
    assert execute(["plan", str(recipe(tmp_path / "gpt2", ", quantize: fp8"))]) == 3
    assert "`m` has no weight that could be saved in FP8" in capsys.readouterr().err
    write_models(tmp_path)
    for name in "ab":
        (tmp_path / name / "config.json").unlink()
    assert execute(["plan", str(recipe(tmp_path, ", quantize: fp8"))]) == 3
    assert "`a` has no config.json" in capsys.readouterr().err
    assert execute(["plan", str(recipe(tmp_path, ", quantize: fp8", "m: {use: delta, of: a, base: b}"))]) == 3
    assert "`m` is a delta" in capsys.readouterr().err


def test_the_recipe_is_written_as_it_was_read(tmp_path: Path) -> None:
    text = recipe(tmp_path, ", dtype: float16, quantize: fp8").read_text()
    first, problems = parse(text, "r.yaml")
    assert first is not None and not problems and first.saves[0].quantize == "fp8"
    second, problems = parse(to_yaml(first), "r.yaml")
    assert second is not None and not problems and to_yaml(second) == to_yaml(first)
    assert "quantize: fp8" in to_yaml(first)
