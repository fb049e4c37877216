"""FP8 with scales is read as numbers; what other methods have made is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mergekit_lite import InputError, load_recipe, merge_in_memory, plan, run
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.unpack import Unpacker
from mergekit_lite.cli.app import execute

NAME = "model.layers.0.self_attn.q_proj.weight"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


def write(folder: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any] | None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    made = {"model_type": "llama", "num_hidden_layers": 1, **config}
    (folder / "config.json").write_text(json.dumps(made | ({"quantization_config": said} if said else {})))
    return folder


def codes(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def numbers(checkpoint: Checkpoint) -> dict[str, Tensor]:
    with Reader(checkpoint.shards) as reader:
        return {n: reader.read(m, 0, m.numel).view(m.shape) for n, m in checkpoint.tensors.items()}


def product(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Number by number, the scale looked up for each."""
    rows, columns = (torch.arange(size) // each for size, each in zip(weight.shape[-2:], block, strict=True))
    return weight.float() * scale.float()[..., rows[:, None], columns[None, :]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (200, 130), (3, 5), (2, 140, 129)])
def test_blocks_of_deepseek(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = codes(*shape)
    *lead, rows, columns = shape
    scale = (torch.rand(*lead, -(-rows // 128), -(-columns // 128)) + 0.01).to(dtype)
    tensors = {NAME: weight, f"{NAME}_scale_inv": scale, "model.norm.weight": torch.ones(4)}
    checkpoint = open_checkpoint(str(write(tmp_path, tensors, FP8, dtype="bfloat16")), None)
    assert checkpoint.tensors.keys() == {NAME, "model.norm.weight"} and "quantization_config" not in checkpoint.config
    assert torch.equal(numbers(checkpoint)[NAME], product(weight, scale, (128, 128)))
    assert checkpoint.tensors[NAME].saved == "BF16" and checkpoint.tensors[NAME].stored == "F8_E4M3"


@pytest.mark.parametrize(
    ("strategy", "more", "scale", "block"),
    [
        ("tensor", {}, (1,), (10**6, 10**6)),
        ("tensor", {}, (), (10**6, 10**6)),
        ("channel", {}, (96, 1), (1, 10**6)),
        ("channel", {}, (96,), (1, 10**6)),
        ("block", {"block_structure": [32, 16]}, (3, 5), (32, 16)),
    ],
)
def test_compressed_tensors(
    tmp_path: Path, strategy: str, more: dict[str, Any], scale: tuple[int, ...], block: tuple[int, int]
) -> None:
    weight, factors = codes(96, 72), torch.rand(scale).bfloat16() + 0.01
    tensors = {
        NAME: weight,
        f"{NAME}_scale": factors,
        "model.layers.0.self_attn.q_proj.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    checkpoint = open_checkpoint(str(write(tmp_path, tensors, compressed(strategy, **more))), None)
    assert list(checkpoint.tensors) == [NAME]
    grid = factors.reshape(scale if len(scale) == 2 else (-1, 1))
    assert torch.equal(numbers(checkpoint)[NAME], product(weight, grid, block))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_part_is_the_part_of_the_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fp8_parts"
    if not path.exists():
        write(path, {NAME: codes(200, 131), f"{NAME}_scale_inv": torch.rand(2, 2)}, FP8)
    checkpoint = open_checkpoint(str(path), None)
    meta = checkpoint.tensors[NAME]
    start = data.draw(st.integers(0, meta.numel))
    stop = data.draw(st.integers(start, meta.numel))
    with Reader(checkpoint.shards) as reader:
        assert torch.equal(Unpacker(reader).load(meta, start, stop), reader.read(meta, 0, meta.numel)[start:stop])


def test_a_merge_is_that_of_the_numbers(tmp_path: Path) -> None:
    """transformers reads the same model on the CPU as bfloat16; in memory and from the disk the bits are the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    state = LlamaForCausalLM(config).bfloat16().state_dict()
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        if "_proj" not in name:
            stored[name] = value
            continue
        stored[name] = (value.float() * 1000).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.rand(-(-len(value) // 128), -(-value.shape[1] // 128)) / 1000
    said = {"architectures": ["LlamaForCausalLM"], **config.to_dict(), "dtype": "bfloat16"}
    write(tmp_path / "a", stored, FP8, **{key: value for key, value in said.items() if key != "quantization_config"})
    for number, (threads, block) in enumerate([(1, None), (2, 1000)]):
        text = f"version: 1\nmodels: {{a: {tmp_path / 'a'}}}\nsteps: {{m: {{use: linear, of: [a, a]}}}}\n"
        (tmp_path / "r.yaml").write_text(f"{text}save: {{to: {tmp_path / f'out{number}'}}}\n")
        run(plan(load_recipe(tmp_path / "r.yaml")), threads=threads, block=block)
    assert (tmp_path / "out0/model.safetensors").read_bytes() == (tmp_path / "out1/model.safetensors").read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "out0/config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).state_dict()
    ours = load_file(tmp_path / "out0/model.safetensors")
    assert ours.keys() == state.keys() == theirs.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, theirs[name]) for name, value in ours.items())
    memory = merge_in_memory(
        load_recipe(tmp_path / "r.yaml"), {"a": stored}, config={**said, "quantization_config": FP8}
    )
    assert memory.keys() == ours.keys() and all(torch.equal(memory[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({NAME: None}, "is a scale, and its weight"),
        ({f"{NAME}_scale_inv": None}, "has no scale beside it"),
        ({NAME: torch.ones(256, 384).bfloat16()}, "its weight is stored as BF16, not in FP8"),
        ({f"{NAME}_scale_inv": torch.ones(2, 4)}, "has the shape 2×4, which does not fit its weight of 256×384"),
        ({f"{NAME}_scale_inv": torch.ones(3, 2)}, "only one number or 256×1 or 2×3 for blocks of 128×128 would"),
        ({f"{NAME}_scale_inv": torch.ones(2, 3).int()}, "is a scale, but stored as I32"),
        ({f"{NAME}_scale_inv": torch.ones(0)}, "has the shape 0"),
        ({NAME: codes(256)}, "does not fit its weight of 256"),
    ],
)
def test_scales_that_do_not_fit(
    tmp_path: Path, change: Mapping[str, Tensor | None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors: dict[str, Tensor | None] = {NAME: codes(256, 384), f"{NAME}_scale_inv": torch.rand(2, 3)}
    there = {name: value for name, value in (tensors | dict(change)).items() if value is not None}
    folder = write(tmp_path / "a", {**there, "model.norm.weight": torch.ones(4)}, FP8)
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder), None)
    assert any(says in p.message and str(folder / "model.safetensors") in p.message for p in caught.value.problems)
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodels:\n  a: {folder}\nsave: {{step: a, to: {tmp_path / 'out'}}}\n")
    assert execute(["plan", str(tmp_path / "r.yaml")]) == 4
    assert "r.yaml:3:" in capsys.readouterr().err


PACKED = {**compressed("channel"), "format": "pack-quantized"}
INTEGERS = compressed("channel", type="int")
GROUPS = compressed("group", group_size=128)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes (4-bit)"),
        ({"load_in_8bit": True}, "bitsandbytes (8-bit)"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "hqq\x1b[2J"}, "the method `hqq"),
        ({"quant_method": 5}, "an unknown method"),
        ("fp8", "an unknown method"),
        (PACKED, "compressed-tensors (pack-quantized)"),
        (INTEGERS, "compressed-tensors (float-quantized)"),
        (GROUPS, "compressed-tensors (float-quantized)"),
        ({**compressed("tensor"), "transform_config": {"a": 1}}, "compressed-tensors (float-quantized)"),
        ({**FP8, "weight_block_size": [0, "x"]}, "FP8"),
    ],
)
def test_other_methods_are_refused_by_name(
    tmp_path: Path, said: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "a", {NAME: codes(8, 8)}, said)
    steps = f"steps: {{m: {{use: linear, of: [a]}}}}\nsave: {{to: {tmp_path / 'out'}}}\n"
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodels: {{a: {folder}}}\n{steps}")
    assert execute(["plan", str(tmp_path / "r.yaml")]) == 3
    err = " ".join(capsys.readouterr().err.split())
    assert f"`a` is quantised: its numbers are codes of {name}" in err and str(folder / "config.json") in err
    assert "hint: merge the model that it was made from" in err and "\x1b" not in err


def test_names_that_only_look_like_scales(tmp_path: Path) -> None:
    tensors = {"logit_scale": torch.ones(1), "a.layer_scale": torch.ones(4), "a.layer": torch.ones(4)}
    checkpoint = open_checkpoint(str(write(tmp_path, tensors, None)), None)
    assert checkpoint.tensors.keys() == tensors.keys()
    plain = open_checkpoint(str(write(tmp_path, {NAME: codes(8, 8)}, None)), None)
    assert plain.tensors[NAME].packed is None
