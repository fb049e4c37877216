"""No code of a stranger's: none is run, none is copied, and no output has it imported."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.checkpoint.extras import find_extras
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.cli.app import execute
from mergekit_lite.errors import InputError

PACKAGE = Path(__file__).parents[2] / "mergekit_lite"
FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
         "generation_config.json", "video_preprocessor_config.json")  # fmt: skip
CODE = {"auto_map": {"AutoModel": "stranger/repository--modeling_x.Model"}}


def with_code(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, **CODE, "text_config": {"a": 1, **CODE, "inner_config": {**CODE}}, "parts": [{**CODE, "b": 2}]}


def names(value: Any) -> set[str]:
    """Every key in JSON data, at any depth."""
    if isinstance(value, dict):
        return set(value) | {name for entry in value.values() for name in names(entry)}
    return {name for entry in value for name in names(entry)} if isinstance(value, list) else set()


@pytest.fixture
def trap(tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the checkpoint `trap`, whose every configuration names code that leaves `sung`."""
    monkeypatch.chdir(tmp_path)
    folder = tiny_checkpoint(tmp_path / "trap")
    config = json.loads((folder / "config.json").read_text())
    for name in FILES:
        (folder / name).write_text(json.dumps(with_code(config if name == "config.json" else {"kept": name})))
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "custom_generate.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'sung')!r}, 'w').close()\n")
    (tmp_path / "r.yaml").write_text("version: 1\nmodels: {m: ./trap}\nsave: {step: m, to: out}\n")
    return folder


def test_no_output_names_code(trap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", "r.yaml"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "`config.json: auto_map`" in told and "`config.json: text_config.inner_config.auto_map`" in told
    assert "own class for its model type" in told and "--keep-auto-map" in told
    out = trap.parent / "out"
    for name in FILES:
        made = json.loads((out / name).read_text())
        assert "auto_map" not in names(made)
        assert made["text_config"] == {"a": 1, "inner_config": {}} and made["parts"] == [{"b": 2}]
        if name != "config.json":
            assert made["kept"] == name
    assert not list(out.glob("**/*.py")) and not (trap.parent / "sung").exists()


def test_the_flag_keeps_what_names_code_but_no_code(trap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", "r.yaml", "--keep-auto-map"]) == 0
    assert "auto_map" not in capsys.readouterr().err
    out = trap.parent / "out"
    assert json.loads((out / "config.json").read_text())["auto_map"] == CODE["auto_map"]
    assert (out / "tokenizer_config.json").read_bytes() == (trap / "tokenizer_config.json").read_bytes()
    assert not list(out.glob("**/*.py"))


def test_a_model_type_without_a_class_of_the_library(trap: Path) -> None:
    pytest.importorskip("transformers", reason="it says which model types it knows")
    opened = open_checkpoint(str(trap), None)
    own, other = (find_extras(opened, {**opened.config, "model_type": t}).notes for t in ("llama", "strange_model"))
    assert "no class of its own" not in own[0].message
    assert "no class of its own for `strange_model`" in other[0].message
    assert "only with the code of its parent" in (other[0].hint or "")


def test_doctor_and_inspect_run_no_code(trap: Path) -> None:
    for words in (["doctor", "trap"], ["doctor", "--spaces", "trap"], ["inspect", "trap", "--spaces", "--stats"]):
        assert execute(words) in (0, 1, 4)
    config = json.loads((trap / "config.json").read_text())
    (trap / "config.json").write_text(json.dumps({**config, "model_type": "strange_model"}))
    assert execute(["doctor", "--spaces", "trap"]) in (1, 4)
    assert not (trap.parent / "sung").exists()


@pytest.mark.parametrize("text", ['{"auto_map": 1', "[]", '{"auto_\\u006dap": ' + "[" * 100 + "]" * 100 + "}"])
def test_a_configuration_that_cannot_be_told_is_refused(text: str, trap: Path) -> None:
    (trap / "tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        find_extras(open_checkpoint(str(trap), None), {})
    assert execute(["run", "r.yaml"]) == 4
    assert not (trap.parent / "out").exists() and not (trap.parent / "out.partial").exists()


def test_an_escaped_or_doubled_key_does_not_pass(trap: Path) -> None:
    (trap / "tokenizer_config.json").write_text('{"auto_map": 1, "a": 2, "auto_\\u006dap": 3}')
    extras = find_extras(open_checkpoint(str(trap), None), {})
    content = extras.files["tokenizer_config.json"]
    assert isinstance(content, bytes) and json.loads(content) == {"a": 2}


def test_nothing_of_ours_asks_for_remote_code() -> None:
    """`trust_remote_code` is passed as False where it is, and stands as no key: transformers then never imports it, nor
    asks whether to."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            assert not (isinstance(node, ast.Constant) and node.value == "trust_remote_code"), path
            found = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            assert found not in ("unpickle", "get_class_from_dynamic_module", "run_path"), path
