"""What a plan says, held against the safetensors library, the files that a run writes, and the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lite import RecipeError, load_recipe, plan, run
from mergekit_lite.plan.model import Plan

ROOT = Path(__file__).parents[2]
SHAPES = {
    "model.embed_tokens.weight": (50, 40),
    "model.layers.0.mlp.up_proj.weight": (60, 40),
    "model.layers.1.mlp.up_proj.weight": (60, 40),
    "model.norm.weight": (40,),
    "model.scale": (),
    "model.nothing": (0, 3),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`base`, `a`, `b`: numbers of several dtypes, integers and booleans."""
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {
            key: torch.randn(shape, generator=generator).to(DTYPES[number % len(DTYPES)])
            for number, (key, shape) in enumerate(SHAPES.items())
        }
        tensors["model.position_ids"] = torch.arange(7) + seed
        tensors["model.mask"] = torch.tensor([True, False, seed > 0])
        write(tmp_path / name, tensors)
    return tmp_path


def write(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", dict(metadata or {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}), encoding="utf-8")


def planned(models: Path, step: str, save: str = "", extra: str = "", **options: Any) -> Plan:
    """The plan of a recipe of one step `m` over the models."""
    names = ", ".join(f"{name}: {models / name}" for name in ("base", "a", "b"))
    path = models / "r.yaml"
    path.write_text(
        f"version: 1\n{extra}models: {{{names}}}\nsteps:\n  m: {step}\nsave: {{step: m, to: {models / 'out'}{save}}}\n",
        encoding="utf-8",
    )
    return plan(load_recipe(path), **({"threads": 1} | options))


LINEAR = "{use: linear, of: [a, b]}"
TIES = "{use: ties, base: base, of: [a, b]}"
DARE = "{use: dare_ties, base: base, of: [a, b], with: {drop_rate: 0.5}}"


@pytest.mark.parametrize("save", ["", ", shard: 9KB", ", dtype: bfloat16, shard: 5KB", ", dtype: float8_e4m3fn"])
def test_headers_and_offsets_are_what_the_library_reads(save: str, models: Path) -> None:
    made = planned(models, LINEAR, save)
    result = run(made, threads=1)
    (output,) = made.outputs
    written = sum(file.stat().st_size for file in (models / "out").glob("*.safetensors"))
    assert made.bytes_written == result.bytes_written == written
    seen = []
    for shard in output.shards:
        path = models / "out" / shard.file
        data = path.read_bytes()
        assert len(data) == shard.nbytes and data.startswith(shard.header)
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {tensor.name for tensor in shard.tensors}
            assert file.metadata()["format"] == "pt"
            for tensor in shard.tensors:
                theirs = file.get_tensor(tensor.name)
                assert (theirs.shape, theirs.dtype) == (tensor.shape, CODES[tensor.dtype])
                stored = data[tensor.start : tensor.start + tensor.nbytes]
                assert stored == bytes(theirs.reshape(-1).view(torch.uint8).tolist())
                seen.append(tensor.name)
    with safe_open(models / "base" / "model.safetensors", "pt") as file:
        assert sorted(seen) == sorted(file.keys())
    limit = {"": 5e9, ", shard: 9KB": 9000, ", dtype: bfloat16, shard: 5KB": 5000}.get(save, 5e9)
    for shard in output.shards:
        assert len(shard.tensors) == 1 or sum(t.nbytes for t in shard.tensors) <= limit


def test_element_methods_read_every_number_once(models: Path) -> None:
    made = planned(models, LINEAR)
    a = load_file(models / "a" / "model.safetensors")
    nbytes = {name: tensor.numel() * tensor.element_size() for name, tensor in a.items()}
    copied = nbytes["model.position_ids"] + nbytes["model.mask"]
    assert made.bytes_read == 2 * (sum(nbytes.values()) - copied) + copied
    assert run(made, threads=1).bytes_read == made.bytes_read


@pytest.mark.parametrize("step", [TIES, TIES.replace("[a, b]", "[a, b], with: {scope: tensor}"), DARE])
def test_bytes_of_measured_methods_are_no_less_than_what_is_read(step: str, models: Path) -> None:
    made = planned(models, step)
    once = sum(
        t.numel() * t.element_size()
        for name in ("base", "a", "b")
        for key, t in load_file(models / name / "model.safetensors").items()
        if t.is_floating_point() or name == "base"
    )
    assert once <= run(made, threads=1).bytes_read <= made.bytes_read <= 5 * once


# The digest names the bytes that come out


def test_the_digest_is_one_for_one_result(models: Path) -> None:
    digest = planned(models, DARE).digest
    for options in ({"threads": 2}, {"block": 1 << 20}, {"out": models / "elsewhere"}):
        assert planned(models, DARE, **options).digest == digest


@pytest.mark.parametrize(
    "step, save, extra",
    [
        (DARE, "", "seed: 1\n"),
        (DARE.replace("0.5", "0.25"), "", ""),
        (DARE.replace("[a, b]", "[b, a]"), "", ""),
        (DARE.replace("[a, b]", "{a: {weight: 2}, b: {}}"), "", ""),
        (DARE, ", dtype: float32", ""),
        (DARE, ", shard: 9KB", ""),
        (DARE, "", "compute: float64\n"),
        (TIES, "", ""),
    ],
)
def test_another_recipe_has_another_digest(step: str, save: str, extra: str, models: Path) -> None:
    assert planned(models, step, save, extra).digest != planned(models, DARE).digest


def change_dtype(tensors: dict[str, Tensor]) -> dict[str, str]:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float32)
    return {"format": "pt"}


def change_metadata(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {"format": "pt", "note": "other"}


def change_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    tensors["model.more"] = torch.zeros(3)
    return {"format": "pt"}


@pytest.mark.parametrize("change", [change_dtype, change_metadata, change_names])
@pytest.mark.parametrize("name", ["base", "a"])
def test_another_input_header_has_another_digest(
    name: str, change: Callable[[dict[str, Tensor]], dict[str, str]], models: Path
) -> None:
    step = TIES.replace("[a, b]", "[a, b], missing: skip")
    before = planned(models, step).digest
    path = models / name / "model.safetensors"
    tensors = load_file(path)
    metadata = change(tensors)
    write(models / name, tensors, metadata)
    assert planned(models, step).digest != before


def test_what_only_a_shared_statistic_reads_counts_too(models: Path) -> None:
    """Layer 1 of the merge is left out of the output, but the threshold over all tensors looks at it."""
    ties = TIES.replace("[a, b]", "[a, b], with: {scope: global}")
    steps = f"{{use: stack, of: [{{model: t, layers: [0, 1]}}]}}\n  t: {ties}"
    whole = planned(models, steps)
    assert len(whole.pools) > 0
    digests = {whole.digest}
    # The layer that is left out moves to a file of its own, whose header then changes.
    for note in ("one", "two"):
        tensors = load_file(models / "base" / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        apart = {name: tensors.pop(name)} if name in tensors else {
            name: load_file(models / "base" / "apart.safetensors")[name]
        }  # fmt: skip
        save_file(tensors, models / "base" / "model.safetensors", {"format": "pt"})
        save_file(apart, models / "base" / "apart.safetensors", {"note": note})
        weight_map = dict.fromkeys(tensors, "model.safetensors") | dict.fromkeys(apart, "apart.safetensors")
        (models / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        digests.add(planned(models, steps).digest)
    assert len(digests) == 3


# Findings


def test_steps_that_nothing_uses_are_warned_of(models: Path) -> None:
    made = planned(models, LINEAR + "\n  idle: {use: ties, base: base, of: [a, b]}")
    (warning,) = made.warnings
    assert warning.message == "step `idle` is used by nothing and will not run"
    assert warning.mark is not None and warning.mark.line == 5
    assert [step.name for step in made.steps] == ["m"]


def test_models_that_nothing_uses_are_not_opened(models: Path) -> None:
    (models / "base" / "model.safetensors").write_bytes(b"broken")
    assert set(planned(models, LINEAR).checkpoints) == {"a", "b"}


def test_all_faults_come_at_once(models: Path) -> None:
    for name in ("a", "b"):
        tensors = load_file(models / name / "model.safetensors")
        tensors["model.norm.weight"] = torch.zeros(41 if name == "a" else 40)
        del tensors["model.scale" if name == "b" else "model.nothing"]
        write(models / name, tensors)
    with pytest.raises(RecipeError) as found:
        planned(models, TIES + "\n  n: {use: linear, of: [a, base]}")
    text = str(found.value)
    for part in ("`a` and `base` have different shapes (41 and 40)", "`b` lacks tensors", "`a` lacks tensors"):
        assert part in text


# Memory, as the kernel counts it


PROGRAM = """
import ctypes, sys, threading, time
from mergekit_lite import load_recipe, plan, run

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

def peak(work):
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier run has left must not hide what this one needs
    ended = threading.Event()
    before = anonymous()
    seen = [before]
    def watch():
        while not ended.is_set():
            seen.append(max(seen.pop(), anonymous()))
            time.sleep(0.002)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    work()
    ended.set()
    watcher.join()
    return seen[0] - before

run(plan(load_recipe(sys.argv[1]), threads=2), threads=2)  # modules are loaded and caches filled
for path in sys.argv[2:]:
    # A short run may be over between two looks on a busy machine, so each is made several times.
    made = [plan(load_recipe(path), threads=2, out=f"{path}.{number}") for number in range(4)]
    print(made[0].peak_bytes, max(peak(lambda: run(one, threads=2)) for one in made))
"""
MEGA = 1_000_000
MEMORY = {
    "linear": LINEAR,
    "slerp": "{use: slerp, of: [a, b], with: {t: 0.4}}",
    "ties": TIES.replace("[a, b]", "[a, b], with: {scope: tensor}"),
    "ties_global": TIES.replace("[a, b]", "[a, b], with: {scope: global}"),
    "dare_ties": DARE,
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel does not say how much memory is used")
@pytest.mark.parametrize("name", MEMORY)
def test_memory_stays_below_the_plan_whatever_the_size(name: str, tmp_path: Path) -> None:
    """A tensor of 16 million numbers would take 64 MB in float32: that it is never there at once shows."""
    recipes = []
    for size in (1, 2, 16):
        folder = tmp_path / str(size)
        folder.mkdir()
        generator = torch.Generator().manual_seed(size)
        base = torch.randn(size * 1000, 1000, generator=generator).bfloat16()
        for number, model in enumerate(("base", "a", "b")):
            write(folder / model, {"w": base * (1 + number / 100), "x": base[:1000] * 1.5})
        planned(folder, MEMORY[name])
        recipes.append(str(folder / "r.yaml"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *recipes],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (small_plan, small), (large_plan, large) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert small_plan == large_plan
    for used, promised in ((small, small_plan), (large, large_plan)):
        # What the first run left in the allocator may hide a part, and the kernel counts whole pages.
        assert used <= promised + 8 * MEGA
    assert large <= small + 24 * MEGA  # one of three inputs in bfloat16 has 32 MB
