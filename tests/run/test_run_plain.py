"""Sums that NumPy forms where torch is not imported: the bits are torch's; torch is called where they might not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from recipes_for_runs import write_folder, write_recipe
from torch import Tensor

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.methods.spec import keywords
from mergekit_lite.plan.model import Node, OutTensor
from mergekit_lite.run.plain import Numbers, _Loader, _NotFinite, _write

PLAIN = sorted(m.name for m in all_methods().values() if m.plain)
STEPS = {
    "linear": "m: {use: linear, of: {a: {weight: 0.2}, b: {weight: 0.3}, c: {weight: 1.5}}}",
    "one": "m: {use: linear, of: {a: {weight: 1}, b: {weight: -1}, c: {weight: 0}}, with: {normalize: false}}",
    "none": "m: {use: linear, of: {a: {weight: 0}, b: {weight: 0}}, with: {normalize: false}}",
    "huge": "m: {use: linear, of: {a: {weight: 3.0e+38}, b: {weight: 1}}, with: {normalize: false}}",
    "interpolate": "m: {use: interpolate, of: [a, b], with: {t: {across: [0.0, 0.9], else: 0.5}}}",
    "task_arithmetic": "m: {use: task_arithmetic, base: base, of: [a, b, c], with: {lambda: 0.4}}",
    "staged": "d: {use: delta, of: a, base: base}\n  m: {use: add, of: {d: {weight: 0.7}}, base: b}",
}
MERGE = """
import json, sys
import mergekit_lite
found = {}
for number, path in enumerate(sys.argv[1:]):
    made = mergekit_lite.plan(mergekit_lite.load_recipe(path))
    result = mergekit_lite.run(made, threads=2, block=65536 << number % 3)
    found[path] = [result.shards[made.outputs[0].to], dict(result.nonfinite), "torch" in sys.modules]
print(json.dumps(found))
"""


def any_bits(count: int, seed: int, below: float = float("inf")) -> Tensor:
    """Float32 numbers of any bits `below` a magnitude: subnormal ones, zeros of both signs, ties of bfloat16 too."""
    draw = np.random.default_rng(seed)
    bits = draw.integers(0, 1 << 32, count, dtype=np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000  # halfway between two bfloat16
    bits[1::7] &= 0x80FFFFFF
    bits[2::50] &= 0x80000000
    values = bits.view(np.float32)
    return torch.from_numpy(np.where(np.abs(values) < below, values, np.float32(1)))


def write_models(folder: Path, dtype: torch.dtype, spoilt: bool = False) -> Path:
    shapes = {"model.embed_tokens.weight": (301, 700), "model.layers.0.norm.weight": (701,), "model.scale": ()}
    shapes |= {"model.layers.1.norm.weight": (701,), "model.nothing": (0, 5), "model.layers.2.norm.weight": (701,)}
    for number, model in enumerate(("base", "a", "b", "c")):
        tensors = {
            name: any_bits(int(np.prod(shape)), 10 * number + i, 1e30).reshape(shape).to(dtype)
            for i, (name, shape) in enumerate(shapes.items())
        }
        if spoilt and model == "b":
            tensors["model.layers.1.norm.weight"][700] = torch.nan
            tensors["model.embed_tokens.weight"][300, 699] = -torch.inf
        write_folder(folder / model, tensors)
    return folder


def merged_without_torch(paths: list[Path]) -> dict[str, list[object]]:
    command = [sys.executable, "-c", MERGE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONWARNINGS": ""})
    found: dict[str, list[object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("saved", ["bfloat16", "float32"])
def test_the_bytes_are_those_of_torch(stored: str, saved: str, tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", getattr(torch, stored))
    save = f", dtype: {saved}"
    ours, theirs = (
        [
            write_recipe(tmp_path / f"{name}_{who}.yaml", models, steps, tmp_path / who / name, save=save)
            for name, steps in STEPS.items()
            if name != "huge"
        ]
        for who in ("ours", "torch")
    )
    found = merged_without_torch(ours)
    assert not any(imported for _, _, imported in found.values())
    for path, other in zip(ours, theirs, strict=True):
        made = plan(load_recipe(other))
        assert found[str(path)][0] == run(made).shards[made.outputs[0].to], path.stem


@pytest.mark.parametrize(("steps", "spoilt"), [("huge", False), ("linear", True), ("task_arithmetic", True)])
def test_what_is_not_finite_is_left_to_torch(steps: str, spoilt: bool, tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", torch.bfloat16, spoilt)
    ours = write_recipe(tmp_path / "ours.yaml", models, STEPS[steps], tmp_path / "ours")
    theirs = write_recipe(tmp_path / "theirs.yaml", models, STEPS[steps], tmp_path / "theirs")
    result = run(made := plan(load_recipe(theirs)))
    shards, nonfinite, imported = merged_without_torch([ours])[str(ours)]
    assert imported
    assert shards == result.shards[made.outputs[0].to]
    assert nonfinite == dict(result.nonfinite)
    assert sum(result.nonfinite.values()) == (2 if spoilt else 0)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("seed", range(4))
def test_plain_methods_do_with_the_operations_of_numbers(name: str, seed: int) -> None:
    """`plain` promises which operations a method uses: it has no others here, and the inputs stay as they are."""
    method = all_methods()[name]
    draw = np.random.default_rng(seed)
    count = method.inputs[1] or method.inputs[0] + seed
    per_input = count
    count += method.base_last
    settings = {p.name: p.default for p in method.params}
    for p in method.params:
        if p.kind == "number":
            one, *more = draw.choice([0.0, 1.0, -1.0, 0.37, 1e-30], per_input + 1)
            settings[p.name] = (2.5, *more)[:per_input] if p.per_input else float(one)
    xs = [any_bits(5000, 100 * seed + i) for i in range(count)]
    expected = method.fn(xs, **keywords(settings))
    given = [Numbers(x.numpy().copy()) for x in xs]
    with np.errstate(all="ignore"):
        result = method.fn(given, **keywords(settings))
    sound = torch.isfinite(expected)
    assert sound.sum() > 1000
    assert torch.equal(torch.from_numpy(result.values).view(torch.int32)[sound], expected.view(torch.int32)[sound])
    assert all(
        np.array_equal(n.values.view(np.int32), x.numpy().view(np.int32)) for n, x in zip(given, xs, strict=True)
    )


class Bytes:
    """A source of one tensor, and a sink of another."""

    def __init__(self, data: bytes = b""):
        self.data = data

    def read_bytes(self, meta: TensorMeta, start: int, stop: int, buffer: memoryview) -> None:
        buffer[:] = self.data[start:stop]

    def write_bytes(self, output: int, tensor: OutTensor, start: int, data: memoryview) -> None:
        self.data += bytes(data)


def stored_as(dtype: str, values: Tensor) -> bytes:
    sink, shape = Bytes(), tuple(values.shape)
    tensor = OutTensor("x", shape, dtype, Node(0, shape, ""), 0, 0, 4 * values.numel())
    _write(sink, 0, tensor, 0, Numbers(values.numpy()))
    return sink.data


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = any_bits(1 << 20, 7)
    expected = values.to(torch.bfloat16)
    values, expected = values[expected.isfinite()], expected[expected.isfinite()]
    assert stored_as("BF16", values) == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("code", "dtype"), [("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_loading_tells_every_number_that_is_not_finite(code: str, dtype: torch.dtype) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    everything = torch.from_numpy(bits.copy()).view(torch.bfloat16).to(dtype)
    size = dtype.itemsize
    for place in [*range(0, 1 << 16, 61), *(int(b) for b in bits if b & 0x7FFF in (0x7F7F, 0x7F80, 0x7F81, 0x7FFF))]:
        pair = torch.stack([torch.ones((), dtype=dtype), everything[place]])
        source = Bytes(pair.view(torch.uint8).numpy().tobytes())
        meta = TensorMeta("x", (2,), code, "f", 0, 2 * size)
        if everything[place].isfinite():
            assert torch.equal(torch.from_numpy(_Loader(source).load(meta, 0, 2).values), pair.float())
        else:
            with pytest.raises(_NotFinite):
                _Loader(source).load(meta, 0, 2)
