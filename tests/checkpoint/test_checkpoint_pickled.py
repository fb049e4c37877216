"""Checkpoints of `torch.save`: only where asked for, streamed from where their bytes lie, and never run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lite import InputError, load_recipe, plan, run
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.reader import Reader


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    whole = torch.randn(60, 50, generator=generator)
    return {
        "whole": whole,
        "rows": whole[10:20],  # shares the bytes of the first
        "half": torch.randn(7, 9, generator=generator).bfloat16(),
        "count": torch.arange(11),
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(5, generator=generator)),
        "small": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
    }


def write(folder: Path, value: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / name, **options)
    return folder


def test_the_tensors_are_those_that_torch_loads(state: dict[str, Tensor], tmp_path: Path) -> None:
    for value in (state, {"epoch": 3, "state_dict": state}):
        folder = write(tmp_path / "a", value)
        found = open_checkpoint(str(folder), None, pickled=True)
        assert set(found.tensors) == set(state)
        with Reader(found.shards) as reader:
            for name, tensor in state.items():
                meta = found.tensors[name]
                assert meta.shape == tensor.shape
                read = reader.read(meta, 0, meta.numel).view(torch.uint8)
                assert read.equal(tensor.detach().reshape(-1).view(torch.uint8)), name


def test_a_merge_gives_the_bytes_that_safetensors_give(tmp_path: Path) -> None:
    models: dict[str, dict[str, Tensor]] = {}
    for name in ("a", "b"):
        models[name] = {f"layers.{i}.w": torch.randn(30, 20) for i in range(4)}
        (tmp_path / name).mkdir()
        save_file(models[name], tmp_path / name / "model.safetensors")
    write(tmp_path / "pa", models["a"])
    parts = [dict(list(models["b"].items())[:2]), dict(list(models["b"].items())[2:])]
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        write(tmp_path / "pb", part, file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "pb" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))

    def merged(a: str, b: str, to: str) -> dict[str, Tensor]:
        recipe = tmp_path / f"{to}.yaml"
        recipe.write_text(
            f"version: 1\nmodels: {{a: {tmp_path / a}, b: {tmp_path / b}}}\n"
            f"steps: {{m: {{use: linear, of: [a, b]}}}}\nsave: {{to: {tmp_path / to}}}\n"
        )
        run(plan(load_recipe(recipe), allow_pickle=True))
        return load_file(tmp_path / to / "model.safetensors")

    expected = merged("a", "b", "out")
    for a, b, to in (("pa", "pb", "out1"), ("pa/pytorch_model.bin", "b", "out2")):
        found = merged(a, b, to)
        assert found.keys() == expected.keys()
        assert all(found[name].equal(value) for name, value in expected.items())


def test_only_where_asked_for(state: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write(tmp_path / "a", state)
    for place in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(InputError) as found:
            open_checkpoint(str(place), None)
        assert "--allow-pickle" in (found.value.problems[0].hint or "")
    # An index of safetensors files is no way in, and safetensors come first where both lie there.
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"whole": "pytorch_model.bin"}}))
    for pickled in (False, True):
        with pytest.raises(InputError, match="header"):
            open_checkpoint(str(folder), None, pickled=pickled)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    assert set(open_checkpoint(str(folder), None, pickled=True).tensors) == {"x"}


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.canary),)


def test_what_a_stranger_may_send(state: dict[str, Tensor], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    good = (write(tmp_path / "good", state) / "pytorch_model.bin").read_bytes()

    def refused(match: str, value: Any = None, data: bytes | None = None, **options: Any) -> None:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        folder = write(tmp_path / "bad", value, **options)
        if data is not None:
            (folder / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(InputError, match=match) as found:
            open_checkpoint(str(folder), None, pickled=True)
        assert all(problem.hint for problem in found.value.problems)
        assert not canary.exists()

    refused("more than tensors and plain data", {"w": Evil(canary)})
    refused("more than tensors and plain data", state | {"f": os.path.join})
    refused("before 1.6", state, _use_new_zipfile_serialization=False)
    refused("no dictionary", [torch.ones(2)])
    refused("`n` in .* is no tensor", {"n": 3})
    refused("has no name", {1: torch.ones(2)})
    refused("does not lie in one piece", {"t": torch.ones(2, 3).t()})
    refused("of a kind", {"s": torch.eye(3).to_sparse()})
    refused("of a kind", {"c": torch.ones(2, dtype=torch.complex64).conj()})
    refused("damaged|before 1.6", state, pickle.dumps({"w": Evil(canary)}))
    for cut in (10, len(good) // 2, len(good) - 30):
        refused("damaged|cannot be unpickled|no checkpoint", state, good[:cut])
    with zipfile.ZipFile(tmp_path / "good" / "pytorch_model.bin") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}

    def rewritten(changes: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> bytes:
        with zipfile.ZipFile(tmp_path / "made.zip", "w", method) as made:
            for name, content in {**records, **changes}.items():
                if content is not None:
                    made.writestr(name, content)
        return (tmp_path / "made.zip").read_bytes()

    stem = next(iter(records)).split("/")[0]
    refused("compressed", state, rewritten({}, zipfile.ZIP_DEFLATED))
    refused("other byte order", state, rewritten({f"{stem}/byteorder": b"big"}))
    refused("no checkpoint", state, rewritten({f"{stem}/data.pkl": None}))
    # A record shorter than the tensor that is said to lie in it.
    refused("beyond its record|cannot be unpickled", state, rewritten({f"{stem}/data/0": b"\0" * 8}))


def test_every_truncation_and_flipped_byte_is_an_error_or_harmless(tmp_path: Path) -> None:
    """No exception but ours, and no tensor that reaches out of the file."""
    good = bytearray(
        (write(tmp_path / "a", {"w": torch.ones(3), "v": torch.zeros(2, 2)}) / "pytorch_model.bin").read_bytes()
    )
    path = tmp_path / "a" / "pytorch_model.bin"
    opened = 0
    for place in range(0, len(good), 7):
        for change in (0x01, 0x80, 0xFF):
            data = bytearray(good)
            data[place] ^= change
            path.write_bytes(data)
            try:
                found = open_checkpoint(str(path), None, pickled=True)
            except InputError:
                continue
            opened += 1
            assert all(t.start >= 0 and t.start + t.nbytes <= len(data) for t in found.tensors.values())
    assert opened
