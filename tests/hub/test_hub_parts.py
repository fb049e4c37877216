"""Models on the Hub whose tensors are put together of several stored ones: FP8 with scales, tasks of a mask store."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from server import Hub

import mergekit_lite
from mergekit_lite.merge import Fetch

SHAPES = {"model.layers.0.mlp.up_proj.weight": (200, 130), "model.norm.weight": (130,)}


def numbers(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def in_fp8(seed: int) -> dict[str, bytes]:
    """A model whose only matrix is in FP8, with a scale for each block of 128 by 128."""
    values = numbers(seed)
    name = next(iter(SHAPES))
    scales = torch.rand((2, 2), generator=torch.Generator().manual_seed(seed)) + 0.1
    stored = {**values, name: (values[name] * 50).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": said}
    return {"model.safetensors": save(stored), "config.json": json.dumps(config).encode()}


def merged(recipe: str, fetch: Fetch, to: str) -> bytes:
    Path("r.yaml").write_text(recipe)
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), out=to, threads=2, fetch=fetch)
    mergekit_lite.run(plan, threads=2, block=1 << 10)
    return Path(to, "model.safetensors").read_bytes()


def task(place: str) -> str:
    return f'version: 1\nmodels: {{m: "{place}"}}\nsave: {{step: m}}\n'


def test_scales_are_streamed_with_their_weights(hub: Hub, here: Path) -> None:
    for seed in (1, 2):
        hub.add(f"org/m{seed}", in_fp8(seed))
    recipe = "version: 1\nsteps: {m: {use: linear, of: [org/m1, org/m2]}}\nsave: {step: m}\n"
    streamed = merged(recipe, "stream", "far")
    assert not list((here / "cache").rglob("*.safetensors"))
    assert streamed == merged(recipe, "cache", "near")
    means = []
    for seed in (1, 2):
        Path("x.safetensors").write_bytes(in_fp8(seed)["model.safetensors"])
        stored = load_file("x.safetensors")
        name = next(iter(SHAPES))
        wide = stored[f"{name}_scale_inv"].repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :130]
        means.append(stored[name].float() * wide)
    found = load_file("far/model.safetensors")[name]
    assert torch.allclose(found.float(), (means[0] + means[1]) / 2, rtol=1e-6)


def test_a_task_of_a_store_is_streamed_by_its_own_files(hub: Hub, here: Path) -> None:
    for seed, name in enumerate(("base", "math", "code")):
        Path(name).mkdir()
        Path(name, "model.safetensors").write_bytes(save(numbers(seed)))
        Path(name, "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    Path("store.yaml").write_text(
        "version: 1\nmodels: {base: ./base, math: ./math, code: ./code}\n"
        "steps: {sum: {use: task_arithmetic, base: base, of: [math, code], with: {lambda: 1}}}\n"
        "save: {step: sum, as: masks, base: base, tasks: [math, code], to: store}\n"
    )
    mergekit_lite.run(mergekit_lite.plan(mergekit_lite.load_recipe("store.yaml"), threads=1), threads=1)
    files = {path.name: path.read_bytes() for path in Path("store").iterdir()}
    commit = hub.add("org/store", files).refs["main"]
    hub.log.clear()
    streamed = merged(task(f"org/store#code@{commit}"), "stream", "far")
    asked = {request.path for request in hub.log if request.path.endswith(".safetensors")}
    assert not any("mask-math" in path for path in asked) and any("mask-code" in path for path in asked)
    assert not list((here / "cache").rglob("*.safetensors"))
    assert streamed == merged(task(f"org/store#code@{commit}"), "cache", "near")
    merged(task("./store#code"), "cache", "local")
    found, there = load_file("far/model.safetensors"), load_file("local/model.safetensors")
    assert all(torch.equal(found[name], there[name]) for name in SHAPES)
