"""Stored numbers that are not finite, counted without torch as torch counts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes_for_runs import digests, merged, write_folder

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.errors import InputError, StoppedError
from mergekit_lite.run.nonfinite import nonfinite, note

# Exponents of ones are rare in random bytes.
ONES = [bytes.fromhex(top) for top in ["80", "ff", "7f", "7c", "807f", "80ff", "007c", "f07f", "f0ff", "7f7f", "ff7e"]]


@settings(max_examples=500)
@given(
    st.sampled_from(sorted(TORCH_DTYPES)),
    st.binary(max_size=200),
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from(ONES)), max_size=9),
)
def test_as_torch_counts(code: str, data: bytes, ones: list[tuple[int, bytes]]) -> None:
    dtype = TORCH_DTYPES[code]
    raw = bytearray(data[: len(data) // dtype.itemsize * dtype.itemsize])
    part = 4 if dtype.is_complex else dtype.itemsize
    for place, top in ones:
        end = (place + 1) * part
        if end <= len(raw) and len(top) <= part:
            raw[end - len(top) : end] = top
    stored = torch.frombuffer(raw, dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype)
    # The real and the imaginary part of a complex number are two numbers.
    numbers = torch.view_as_real(stored) if dtype.is_complex else stored
    expected = int((~torch.isfinite(numbers.to(torch.float64))).sum())
    assert nonfinite(code, memoryview(raw)) == expected


def test_noted_or_refused() -> None:
    meta = TensorMeta("w", (4,), "F32", "a.safetensors", 8, 16)
    found: dict[str, int] = {}
    note(meta, 0, found, True)
    assert found == {}
    note(meta, 2, found, False)
    note(meta, 1, found, False)
    assert found == {"a.safetensors:w": 3}
    with pytest.raises(InputError, match=r"`w` in `a\.safetensors`"):
        note(meta, 1, found, True)


SHAPE = (40, 257)
SAVED = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float8_e5m2": 57344.0, "float8_e4m3fn": 448.0}


def recipe(folder: Path, text: str, tensors: dict[str, dict[str, torch.Tensor]], **save: str) -> Path:
    """A recipe over models that hold these tensors; `text` are its steps, of which `m` is saved."""
    for name, mine in tensors.items():
        write_folder(folder / name, mine)
    models = ", ".join(f"{name}: {folder / name}" for name in tensors)
    saves = "".join(f", {key}: {value}" for key, value in save.items())
    (folder / "r.yaml").write_text(
        f"version: 1\nmodels: {{{models}}}\nsteps:\n  {text}\nsave: {{step: m, to: {folder / 'out'}{saves}}}\n"
    )
    return folder / "r.yaml"


@pytest.mark.parametrize("dtype", SAVED)
def test_what_is_out_of_range_is_counted_on_every_dtype(tmp_path: Path, dtype: str) -> None:
    """Against the definition: more than half a step above the largest number. NaN and what rounds down do not count."""
    top = SAVED[dtype]
    kind = getattr(torch, dtype)
    below = torch.nextafter(torch.tensor(top), torch.tensor(0.0))
    x = torch.ones(SHAPE, dtype=torch.float64)
    x[0, :6] = torch.tensor([top, -top, float(below), top * 1.1, -top * 1.2, float("nan")], dtype=torch.float64)
    x[39, 256] = top * 1.3
    made = recipe(tmp_path, "m: {use: linear, of: [a, b]}", {"a": {"w": x}, "b": {"w": x.clone()}}, dtype=dtype)
    made.write_text(made.read_text() + "compute: float64\n")
    result = merged(made)
    assert result.overflow == {"w": 3}
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out/model.safetensors")["w"].float()
    saturates = dtype == "float8_e4m3fn"  # has no infinity
    assert result.output_nonfinite == {"w": int((~torch.isfinite(stored)).sum())} == {"w": 1 if saturates else 4}
    assert stored[39, 256] == (448.0 if saturates else torch.inf) and stored[0, 4] == -stored[39, 256]
    assert torch.equal(stored[0, :3].to(kind), x[0, :3].to(kind))


def test_float64_that_float32_cannot_hold(tmp_path: Path) -> None:
    x = torch.full(SHAPE, 1e300, dtype=torch.float64)
    made = recipe(tmp_path, "m: {use: linear, of: [a, b]}", {"a": {"w": x}, "b": {"w": x}}, dtype="float32")
    made.write_text(made.read_text() + "compute: float64\n")
    assert merged(made).overflow == {"w": x.numel()}


def spoilt(**values: float) -> dict[str, torch.Tensor]:
    tensors = {name: torch.ones(SHAPE) for name in ("sound", "spoilt")}
    for name, value in values.items():
        tensors[name][3, 5] = value
    return tensors


def test_made_by_the_merge_of_finite_numbers(tmp_path: Path) -> None:
    """3e38 + 3e38 is beyond float32: the inputs are sound, the output is not; `strict` stops there, and goes on."""
    tensors = {"a": spoilt(spoilt=3e38), "b": spoilt(spoilt=3e38)}
    made = recipe(tmp_path, "m: {use: linear, of: [a, b], with: {normalize: false}}", tensors)
    with pytest.raises(StoppedError, match=r"NaN or infinite numbers in `spoilt`, which the inputs do not hold"):
        run(plan(load_recipe(made)), strict=True)
    result = run(plan(load_recipe(made)), resume=True)
    assert (result.nonfinite, result.output_nonfinite, result.overflow) == ({}, {"spoilt": 1}, {})


@pytest.mark.parametrize("kind", ["copied", "converted"])
def test_passed_on(tmp_path: Path, kind: str) -> None:
    save = {"dtype": "bfloat16"} if kind == "converted" else {}
    made = recipe(tmp_path, "m: {use: passthrough, of: a}", {"a": spoilt(spoilt=float("nan"))}, **save)
    result = merged(made)
    assert result.output_nonfinite == {"spoilt": 1}
    assert list(result.nonfinite.values()) == [1]


def test_without_torch_and_with_two_threads_they_are_the_same(tmp_path: Path) -> None:
    tensors = {"a": spoilt(spoilt=float("inf")), "b": spoilt(sound=3e38), "c": spoilt(sound=3e38)}
    made = recipe(tmp_path, "m: {use: linear, of: [a, b, c], with: {normalize: false}}", tensors)
    code = (
        "import json, sys\nfrom mergekit_lite import load_recipe, plan, run\n"
        "r = run(plan(load_recipe(sys.argv[1])), threads=2)\n"
        "print(json.dumps([dict(r.output_nonfinite), [*r.shards.values()][0]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(made)], capture_output=True, text=True, check=True)
    found: list[Any] = json.loads(done.stdout)
    (tmp_path / "out").rename(tmp_path / "first")
    result = merged(made, block=1000)
    assert result.output_nonfinite == found[0] == {"sound": 1, "spoilt": 1}
    assert digests(result) == list(found[1].values())


def test_a_resumed_run_tells_what_was_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of finished units stand in the journal; a journal of an earlier version has none for outputs."""
    from mergekit_lite.run import perform

    tensors = {"a": spoilt(spoilt=3e38, sound=float("nan")), "b": spoilt(spoilt=3e38)}
    made = recipe(tmp_path, "m: {use: linear, of: [a, b], with: {normalize: false}}", tensors)

    def stop(*arguments: Any) -> Any:
        raise StoppedError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(perform, "shard_digests", stop)
        with pytest.raises(StoppedError):
            merged(made)
    journal = tmp_path / "out.partial/journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    old = [{key: value for key, value in line.items() if key != "output_nonfinite"} for line in lines]
    result = run(plan(load_recipe(made)), resume=True)
    assert result.resumed == sum("unit" in line for line in lines) >= 2
    assert result.output_nonfinite == {"spoilt": 1, "sound": 1} and sum(result.nonfinite.values()) == 1
    (tmp_path / "out").rename(tmp_path / "out.partial")
    journal.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in old))
    result = run(plan(load_recipe(made)), resume=True)
    assert result.output_nonfinite == {} and sum(result.nonfinite.values()) == 1
