"""Models on the Hub whose tensors are put together of several stored ones: FP8 with scales, tasks of a mask store."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
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


def store(tasks: Sequence[str], extra: str = "") -> dict[str, bytes]:
    """The files of a store of these tasks, made in the folder `store`."""
    for seed, name in enumerate(("base", *tasks)):
        Path(name).mkdir()
        Path(name, "model.safetensors").write_bytes(save(numbers(seed)))
        Path(name, "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    names, of = ", ".join(f"{name}: ./{name}" for name in ("base", *tasks)), ", ".join(tasks)
    Path("store.yaml").write_text(
        f"version: 1\nmodels: {{{names}}}\n"
        f"steps: {{sum: {{use: task_arithmetic, base: base, of: [{of}], with: {{lambda: 1}}}}}}\n"
        f"save: {{step: sum, as: masks, base: base, tasks: [{of}], to: store{extra}}}\n"
    )
    mergekit_lite.run(mergekit_lite.plan(mergekit_lite.load_recipe("store.yaml"), threads=1), threads=1)
    return {path.name: path.read_bytes() for path in Path("store").iterdir()}


def test_a_task_of_a_store_is_streamed_by_its_own_files(hub: Hub, here: Path) -> None:
    commit = hub.add("org/store", store(["math", "code"])).refs["main"]
    hub.log.clear()
    streamed = merged(task(f"org/store#code@{commit}"), "stream", "far")
    asked = {request.path for request in hub.log if request.path.endswith(".safetensors")}
    assert not any("mask-math" in path for path in asked) and any("mask-code" in path for path in asked)
    assert not list((here / "cache").rglob("*.safetensors"))
    assert streamed == merged(task(f"org/store#code@{commit}"), "cache", "near")
    merged(task("./store#code"), "cache", "local")
    found, there = load_file("far/model.safetensors"), load_file("local/model.safetensors")
    assert all(torch.equal(found[name], there[name]) for name in SHAPES)


def test_a_task_of_a_coded_store_is_streamed_by_ranges(hub: Hub, here: Path) -> None:
    """Nine tasks lie in two files of coded masks, and only the header of the other task's is read."""
    tasks = [f"t{number}" for number in range(9)]
    files = store(tasks, ", compress: zstd")
    second = "masks-zstd-2.safetensors"
    assert second in files and not any(name.startswith("mask-") for name in files)
    commit = hub.add("org/store", files).refs["main"]
    hub.log.clear()
    streamed = merged(task(f"org/store#t8@{commit}"), "stream", "far")
    reads = [request for request in hub.log if request.method == "GET" and "safetensors" in request.path]
    assert reads and all(request.range for request in reads)
    assert not list((here / "cache").rglob("*.safetensors"))
    asked = Counter(Path(request.path).name for request in reads)
    assert asked["masks-zstd-1.safetensors"] == 1 < asked[second]
    assert streamed == merged(task(f"org/store#t8@{commit}"), "cache", "near")
    assert {Path(found).name for found in (here / "cache").rglob("*.safetensors")} >= {second}
    merged(task("./store#t8"), "cache", "local")
    found, there = load_file("far/model.safetensors"), load_file("local/model.safetensors")
    assert all(torch.equal(found[name], there[name]) for name in SHAPES)


def test_a_damaged_frame_at_the_hub_is_told_with_the_file(hub: Hub, here: Path) -> None:
    """A bit that fell over on the way to the Hub: streamed and cached runs stop, and leave no output."""
    files = store(["math", "code"], ", compress: zstd")
    name = "masks-zstd-1.safetensors"
    whole = bytearray(files[name])
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    whole[(start + len(whole)) // 2] ^= 4
    hub.add("org/store", {**files, name: bytes(whole)})
    for fetch in ("stream", "cache"):
        with pytest.raises(mergekit_lite.InputError, match=name) as fault:
            merged(task("org/store#code"), fetch, f"to-{fetch}")
        assert "frame 0" in fault.value.problems[0].message and not Path(f"to-{fetch}").exists()
