from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from raw_safetensors import put_floats

from mergekit_lite.checkpoint.extras import copy_extras, output_config
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import InputError, StoppedError

COPIED = [
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "cl100k.tiktoken",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
]  # fmt: skip
LEFT = ["modeling_x.py", "pytorch_model.bin", "model.safetensors.bak", "training_args.bin", "README.md", "optimizer.pt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "donor"
    made.mkdir()
    put_floats(made / "model.safetensors", "a")
    return made


@pytest.fixture
def to(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


def donor(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), None)


def test_what_is_copied_and_what_is_not(folder: Path, to: Path) -> None:
    for name in [*COPIED, *LEFT]:
        (folder / name).write_text(f"content of {name}")
    (folder / "config.json").write_text("{}")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("rag")
    (templates / "x.py").write_text("import os")
    config = {"z": 1, "a": [0.5, float("inf")], "name": "ü"}
    names = copy_extras(donor(folder), to, config)
    assert names == tuple(sorted([*COPIED, "config.json", "additional_chat_templates/rag.jinja"]))
    assert {str(p.relative_to(to)) for p in to.rglob("*") if p.is_file()} == set(names)
    assert all((to / name).read_text() == f"content of {name}" for name in COPIED)
    text = (to / "config.json").read_text()
    assert json.loads(text) == config and list(json.loads(text)) == ["z", "a", "name"]
    assert text.startswith('{\n  "z": 1,') and text.endswith("}\n")


def test_content_is_copied_not_the_link_and_a_second_copy_replaces(folder: Path, to: Path) -> None:
    (folder / "real.txt").write_text("words")
    (folder / "vocab.txt").symlink_to("real.txt")
    for _ in range(2):
        assert copy_extras(donor(folder), to, {}) == ("vocab.txt",)
    assert (to / "vocab.txt").read_text() == "words" and not (to / "vocab.txt").is_symlink()


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/x.jinja", "additional_chat_templates"])
def test_link_out_of_the_folder_stops_before_anything_is_written(name: str, folder: Path, to: Path) -> None:
    secret = folder.parent / "secret"
    if "/" in name:
        (folder / name).parent.mkdir()
    if name == "additional_chat_templates":
        secret.mkdir()
        (secret / "x.jinja").write_text("x")
    else:
        secret.write_text("x")
    (folder / name).symlink_to(secret)
    with pytest.raises(InputError, match="outside its folder"):
        copy_extras(donor(folder), to, {"a": 1})
    assert list(to.iterdir()) == []


def test_pipe_instead_of_a_file_does_not_wait(folder: Path, to: Path) -> None:
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(InputError, match="not a regular file"):
        copy_extras(donor(folder), to, {})


def test_output_folder_that_is_gone(folder: Path, to: Path) -> None:
    to.rmdir()
    with pytest.raises(StoppedError, match="cannot write into"):
        copy_extras(donor(folder), to, {"a": 1})


def test_checkpoint_without_a_folder_gives_config_only(to: Path) -> None:
    bare = Checkpoint("memory", None, None, {}, {}, ())
    assert copy_extras(bare, to, {"a": 1}) == ("config.json",)
    assert copy_extras(bare, to, {}) == ()


@pytest.mark.parametrize(
    "config, dtype, wanted",
    [
        ({"torch_dtype": "float32"}, "BF16", {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, "bfloat16", {"dtype": "bfloat16"}),
        ({"dtype": None, "torch_dtype": "x"}, "F16", {"dtype": "float16", "torch_dtype": "float16"}),
        ({"a": 1}, "F64", {"a": 1, "dtype": "float64"}),
        ({"text_config": {"torch_dtype": "x"}}, "F16", {"text_config": {"torch_dtype": "float16"}}),
        (
            {"dtype": "x", "vision_config": {"a": 1}, "quantization_config": {"dtype": "x"}, "vocab": {"dtype": 7}},
            "F32",
            {
                "dtype": "float32",
                "vision_config": {"a": 1},
                "quantization_config": {"dtype": "x"},
                "vocab": {"dtype": 7},
            },
        ),
        ({"dtype": "float32"}, None, {"dtype": "float32"}),
        ({"dtype": "float32"}, "F8_E4M3", {"dtype": "float32"}),
        ({}, "F32", {}),
    ],
)
def test_output_dtype_in_the_config(config: dict[str, Any], dtype: str | None, wanted: dict[str, Any]) -> None:
    before = json.dumps(config)
    found = output_config(config, dtype)
    assert found == wanted and list(found) == list(wanted)
    assert json.dumps(config) == before


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_transformers_reads_the_dtype(key: str | None, folder: Path, to: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=1, intermediate_size=8).to_dict()
    config.pop("dtype", None)
    if key:
        config[key] = "float32"
    copy_extras(donor(folder), to, output_config(config, "BF16"))
    assert str(transformers.AutoConfig.from_pretrained(to).dtype) == "torch.bfloat16"
