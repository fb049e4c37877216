"""The look at a checkpoint against what went into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from report_files import LLAMA, llama, noise, write

from mergekit_lite.errors import InputError
from mergekit_lite.report.look import look, open_location


def test_a_decoder(tmp_path: Path) -> None:
    tensors = llama()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    tensors["model.positions"] = torch.arange(9)
    write(tmp_path / "m", tensors, LLAMA, shards=2)
    (tmp_path / "m/tokenizer.json").write_text("{}")
    (tmp_path / "m/notes.bin").write_text("not listed")
    seen = look(open_location(str(tmp_path / "m")))
    assert (seen.family, seen.model_type, seen.architectures) == ("llama", "llama", ("LlamaForCausalLM",))
    (stack,) = seen.stacks
    assert (stack.layers, stack.key, stack.stated) == (3, "num_hidden_layers", 3)
    weights = [t for t in tensors.values() if t.is_floating_point()]
    assert seen.parameters == sum(t.numel() for t in weights) and seen.others == 9
    assert seen.bytes == sum(t.nbytes for t in tensors.values())
    assert {d.dtype: (d.tensors, d.numbers) for d in seen.dtypes} == {"F32": (7, 144), "I64": (1, 9), "BF16": (1, 4)}
    assert seen.dtypes[0].dtype == "F32"
    assert [(s.bytes, s.tensors) for s in seen.shards] == [
        (file.stat().st_size, count)
        for file, count in zip(sorted((tmp_path / "m").glob("*.safetensors")), (5, 4), strict=True)
    ]
    (tie,) = seen.tied
    assert (tie.alias, tie.stored) == ("lm_head.weight", ("model.embed_tokens.weight",))
    assert (seen.vocabulary, seen.hidden, seen.experts) == (6, 4, None)
    assert list(seen.beside) == ["config.json", "model.safetensors.index.json", "tokenizer.json"]


def test_experts_by_name_and_by_configuration(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": 8}
    name = "model.layers.0.block_sparse_moe"
    apart = {f"{name}.experts.{e}.w1.weight": torch.ones(2) for e in range(3)}
    assert look(write(tmp_path / "a", apart, config)).experts == 3
    assert look(write(tmp_path / "b", {f"{name}.gate.weight": torch.ones(2)}, config)).experts == 8


def test_text_part_of_a_larger_model(tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 11, "hidden_size": 5}}
    seen = look(write(tmp_path / "m", {"x": torch.ones(1)}, config))
    assert (seen.vocabulary, seen.hidden) == (11, 5)


def test_json_holds_plain_data(tmp_path: Path) -> None:
    import json

    seen = look(write(tmp_path / "m", {"x": noise(torch.float8_e5m2, 4, 0)}, LLAMA))
    made = json.loads(json.dumps(seen.as_json(), allow_nan=False))
    assert made["dtypes"] == [{"dtype": "F8_E5M2", "tensors": 1, "numbers": 4, "bytes": 4}]


def test_a_location_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        open_location(str(tmp_path / "none"))
