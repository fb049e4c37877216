"""Adapters that are read, and what is said of those that are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import CONFIG, factors, write_adapter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_lite.checkpoint.adapter import open_adapter, with_adapter
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import InputError, Mark

MARK = Mark("recipe.yaml", 3, 5)
Q = {"layers.0.q_proj": (6, 8)}


def fails(folder: Path | str, *parts: str, revision: str | None = None) -> None:
    """Opening says all of `parts` and where the recipe names the adapter, and gives advice."""
    with pytest.raises(InputError) as caught:
        open_adapter(str(folder), revision, mark=MARK, offline=True)
    for part in parts:
        assert part in str(caught.value)
    assert all(problem.mark == MARK for problem in caught.value.problems)
    assert all(problem.hint for problem in caught.value.problems)


def test_what_is_read_of_an_adapter(tmp_path: Path) -> None:
    tensors = factors(Q, rank=4)
    tensors["norm.weight"] = torch.ones(8)
    tensors["embed.base_layer.weight"] = torch.ones(3, 8)
    tensors["embed.lora_embedding_A"], tensors["embed.lora_embedding_B"] = torch.ones(2, 3), torch.ones(8, 2)
    base = "org/base"
    write_adapter(tmp_path, tensors, base_model_name_or_path=base, fan_in_fan_out=True, use_rslora=True)
    found = open_adapter(str(tmp_path), None)
    low = found.low_rank["layers.0.q_proj"]
    assert (low.a.shape, low.b.shape, low.scale, low.embedding) == ((4, 8), (6, 4), 8 / 2, False)
    assert found.low_rank["embed"].embedding and found.low_rank["embed"].scale == pytest.approx(8 / 2**0.5)
    assert sorted(found.whole) == ["embed.weight", "norm.weight"]
    assert (found.base, found.transposed, found.retied, found.revision) == (base, True, False, None)
    assert [Path(file.path).name for file in found.files] == ["adapter_model.safetensors", "adapter_config.json"]


def test_magnitudes_under_both_of_their_names(tmp_path: Path) -> None:
    for name in ("lora_magnitude_vector", "lora_magnitude_vector.weight"):
        write_adapter(tmp_path, {**factors(Q), f"layers.0.q_proj.{name}": torch.ones(6)}, use_dora=True)
        magnitude = open_adapter(str(tmp_path), None).low_rank["layers.0.q_proj"].magnitude
        assert magnitude is not None and magnitude.shape == (6,)


@pytest.mark.parametrize("kind", ["ADALORA", "OFT", "VERA", None, 3])
def test_other_kinds_of_adapters(kind: Any, tmp_path: Path) -> None:
    fails(write_adapter(tmp_path, factors(Q), peft_type=kind), "what is read is LORA", "merge_and_unload")


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_what_is_no_change_of_weights(kind: str, tmp_path: Path) -> None:
    fails(write_adapter(tmp_path, factors(Q), peft_type=kind), f"of the type {kind}", "load this adapter on the result")


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3"])
def test_tensors_of_another_kind(kind: str, tmp_path: Path) -> None:
    fails(write_adapter(tmp_path, factors(Q), peft_type=kind, r=2, alpha=2), "2 tensors that are no part of")


def test_halves_without_their_partners(tmp_path: Path) -> None:
    parts = {f"q.{name}": torch.ones(2, 2) for name in ("lokr_w1", "lokr_w2_a")}
    fails(write_adapter(tmp_path, parts, peft_type="LOKR", r=2, alpha=2), "2 tensors without their partners")
    for settings_, message in (({"alpha": "x"}, "`alpha` is a number"), ({"r": 0}, "`r` is above 0")):
        fails(write_adapter(tmp_path, parts, **{"peft_type": "LOKR", "r": 2, "alpha": 2, **settings_}), message)
    for patterns in ("alpha_pattern", "rank_pattern"):
        wrong = {patterns: {"(a|a)*c": 1}}
        fails(write_adapter(tmp_path, parts, peft_type="LOKR", r=2, alpha=2, **wrong), f"in `{patterns}` is no simple")


def test_pickled_weights_are_read_where_that_is_asked_for(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors(Q))
    plain = open_adapter(str(tmp_path), None).low_rank["layers.0.q_proj"]
    state = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "adapter_model.bin")
    fails(tmp_path, "holds no adapter_model.safetensors", "--allow-pickle")
    found = open_adapter(str(tmp_path), None, pickled=True).low_rank["layers.0.q_proj"]
    assert (found.a.shape, found.b.shape, found.scale) == (plain.a.shape, plain.b.shape, plain.scale)
    data = (tmp_path / "adapter_model.bin").read_bytes()
    for meta in (found.a, found.b):
        stored = data[meta.start : meta.start + meta.nbytes]
        assert stored == state[meta.name].numpy().tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "changes the base"),
        ({"lora_alpha": None}, "`lora_alpha` is a number"),
        ({"lora_alpha": "8"}, "`lora_alpha` is a number"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` is a number"),
        ({"use_rslora": "yes"}, "`use_rslora` is true or false"),
        ({"alpha_pattern": [1]}, "`alpha_pattern` maps"),
        ({"alpha_pattern": {"q_proj": True}}, "`alpha_pattern` maps"),
        ({"alpha_pattern": {"(": 1}}, "no simple pattern"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "no simple pattern"),
    ],
)
def test_settings_that_are_not_carried_out(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    fails(write_adapter(tmp_path, factors(Q), **settings), message)


def test_all_faults_of_a_configuration_come_at_once(tmp_path: Path) -> None:
    fails(write_adapter(tmp_path, factors(Q), lora_alpha=None, use_qalora=True), "lora_alpha", "QALoRA")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft_type": "LORA"', "\x00", "[" * 100_000])
def test_a_configuration_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, factors(Q))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        open_adapter(str(tmp_path), None)


@pytest.mark.parametrize(
    ("settings", "more", "less", "shown"),
    [
        ({}, [], ["lora_A.weight"], "lora_B.weight"),
        ({}, [], ["lora_B.weight"], "lora_A.weight"),
        ({"use_dora": True}, [], [], "lora_A.weight"),
        ({}, ["lora_magnitude_vector"], [], "lora_magnitude_vector"),
        ({}, ["lora_embedding_A"], [], "lora_embedding_A"),
    ],
)
def test_a_factor_without_its_partner(
    settings: dict[str, Any], more: list[str], less: list[str], shown: str, tmp_path: Path
) -> None:
    tensors = factors(Q) | {f"layers.0.q_proj.{name}": torch.ones(6) for name in more}
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(tuple(less) or "?")}
    fails(write_adapter(tmp_path, kept, **settings), "without their partners", f"layers.0.q_proj.{shown}")


def test_tensors_that_are_no_part_of_lora(tmp_path: Path) -> None:
    write_adapter(tmp_path, {**factors(Q), "layers.0.q_proj.lora_E": torch.ones(4)})
    fails(tmp_path, "no part of LoRA", "lora_E")
    save_file({"layers.0.q_proj.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    fails(tmp_path, "no part of LoRA", "layers.0.q_proj.weight")
    save_file({}, tmp_path / "adapter_model.safetensors")
    fails(tmp_path, "holds no tensors")


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    fails(tmp_path / "missing", "there is no adapter")
    fails(tmp_path, "holds no adapter", "without `path` and `adapter`")
    fails(tmp_path, "where there are no revisions", revision="main")
    write_adapter(tmp_path, factors(Q))
    fails(tmp_path / "adapter_model.safetensors", "is not a folder")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "x")
    fails(tmp_path, "holds no adapter_model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    fails(tmp_path, "pickled weights", "safe_serialization")
    (tmp_path / "x").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").unlink()
    fails(tmp_path, "lacks its adapter_config.json")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", factors(Q))
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match="outside its folder"):
        open_adapter(str(folder), None)


def test_a_truncated_file(tmp_path: Path) -> None:
    file = write_adapter(tmp_path, factors(Q)) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        open_adapter(str(tmp_path), None)


def test_a_whole_model_is_asked_for(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors(Q))
    with pytest.raises(InputError, match=re.escape(f"{{path: BASE, adapter: {tmp_path}}}")):
        open_checkpoint(str(tmp_path), None)


@pytest.mark.parametrize(
    ("named", "location", "warned"),
    [
        ("org/other", "org/base", True),
        ("org/base", "org/base", False),
        ("org/other", "./base", False),
        ("/home/me/base", "org/base", False),
        (None, "org/base", False),
    ],
)
def test_another_base_is_only_a_warning(named: str | None, location: str, warned: bool, tmp_path: Path) -> None:
    adapter = open_adapter(str(write_adapter(tmp_path, factors(Q), base_model_name_or_path=named)), None)
    found = with_adapter(Checkpoint(location, None, None, {}, {}, ()), adapter, MARK)
    assert [("org/other" in note.message, note.mark) for note in found.notes] == [(True, MARK)] * warned
    assert found.adapter is adapter and found.shards == adapter.files


WORDS = st.sampled_from(["layers", "0", "1", "10", "q_proj", "o_proj", "x"])
PATTERNS = st.sampled_from(
    ["q_proj", "layers.1", r"layers\.[01]\.", r"^layers\.0", r"\.*_proj", ".*", "(q|o)_proj", "1.q_proj", "x$", "."]
)


@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(PATTERNS, unique=True, max_size=4))
def test_patterns_are_tried_as_peft_does(words: list[str], patterns: list[str]) -> None:
    """The oracle is peft's own rule: the first key for which `(.*\\.)?(key)$` matches."""
    from mergekit_lite.checkpoint.patterns import Numbers

    module = ".".join(words)
    numbers = {pattern: number + 1.0 for number, pattern in enumerate(patterns)}
    theirs = next((n for key, n in numbers.items() if re.match(rf"(.*\.)?({key})$", module)), 8.0)
    config = {"alpha_pattern": numbers, "lora_alpha": CONFIG["lora_alpha"]}
    assert Numbers(config)(module, "alpha_pattern", "lora_alpha") == theirs


def test_patterns_that_backtrack_without_end_are_refused_before_they_are_tried(tmp_path: Path) -> None:
    """Without that this test would not end."""
    module = "a" * 60 + ".b"
    for pattern in ("(a|a)*c", "(a*)*c", "a*a*a*a*a*a*a*a*c", "(?:a+)+c", "((a|a)(a|a))c"):
        fails(write_adapter(tmp_path, factors({module: (6, 8)}), alpha_pattern={pattern: 1}), "no simple pattern")
    found = open_adapter(str(write_adapter(tmp_path, factors({module: (6, 8)}), alpha_pattern={"a*a*c": 1})), None)
    assert found.low_rank[module].scale == 2


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    write_adapter(tmp_path, {**factors(Q), "x.lora_\x1b[31m": torch.ones(1)})
    with pytest.raises(InputError) as caught:
        open_adapter(str(tmp_path), None)
    assert "\x1b" not in str(caught.value) and "\\x1b" in str(caught.value)


def test_the_configuration_is_part_of_the_inputs(tmp_path: Path) -> None:
    """Its digest is that of the file's bytes."""
    import hashlib

    write_adapter(tmp_path, factors(Q))
    file = open_adapter(str(tmp_path), None).files[1]
    text = (tmp_path / "adapter_config.json").read_bytes()
    assert (file.nbytes, file.header_sha256) == (len(text), hashlib.sha256(text).hexdigest())
    assert json.loads(text)["lora_alpha"] == 8
