"""A sound checkpoint passes; every damage fails the check that is about it; an output of ours is what its lock says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from report_files import LLAMA, llama, write, write_raw
from safetensors.torch import load_file, save_file

import mergekit_lite
from mergekit_lite.report.check import Check
from mergekit_lite.report.health import health

INDEX = "model.safetensors.index.json"


def sound(folder: Path, **config: Any) -> Path:
    """A sharded checkpoint that passes every check."""
    write(folder, llama(), {**LLAMA, **config}, shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def found(folder: Path | str, **options: Any) -> list[Check]:
    return list(health(str(folder), **options))


def verdicts(checks: list[Check]) -> dict[str, set[str]]:
    """The checks that are not ok, by verdict."""
    made: dict[str, set[str]] = {}
    for check in checks:
        if check.verdict != "ok":
            made.setdefault(check.verdict, set()).add(check.name)
    return made


def test_a_sound_checkpoint(tmp_path: Path) -> None:
    checks = found(sound(tmp_path / "m"))
    assert verdicts(checks) == {}
    assert [check.name for check in checks] == [
        "weights", "index", "config", "dtype", "layers", "tokenizer", "tied", "numbers",
    ]  # fmt: skip


def first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def edit(file: str, **changes: Any) -> Callable[[Path], object]:
    """Damage: other values of top-level keys in a JSON file, None takes a key away."""

    def damage(folder: Path) -> None:
        data = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return damage


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Damage: other tensors in the first shard."""

    def damage(folder: Path) -> None:
        tensors = load_file(first(folder))
        change(tensors)
        save_file(tensors, first(folder))

    return damage


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][1, 1] = float("nan")


def lose_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.embed_tokens.weight"]


def lose_a_layer(folder: Path) -> None:
    names = [name for name in llama() if ".layers.1." not in name]
    shutil.rmtree(folder)
    write(folder, {name: llama()[name] for name in names}, LLAMA)
    (folder / "tokenizer.json").write_text("{}")


def untie(folder: Path) -> None:
    shutil.rmtree(folder)
    tensors = llama()
    write(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, LLAMA)
    (folder / "tokenizer.json").write_text("{}")


def flip_in_header(folder: Path) -> None:
    data = bytearray(first(folder).read_bytes())
    place = data.index(b'"F32"')
    data[place + 1] ^= 0x08
    first(folder).write_bytes(data)


def link_out(folder: Path) -> None:
    shard = first(folder)
    shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (lambda f: os.truncate(first(f), first(f).stat().st_size - 1), "fail", "weights"),
    "bytes at the end": (lambda f: first(f).write_bytes(first(f).read_bytes() + b"x"), "fail", "weights"),
    "byte of the header": (flip_in_header, "fail", "weights"),
    "shard removed": (lambda f: first(f).unlink(), "fail", "weights"),
    "shard is a link out": (link_out, "fail", "weights"),
    "tensor lost": (rewrite(lose_a_tensor), "fail", "weights"),
    "index names a file outside": (edit(INDEX, weight_map={"x": "../x.safetensors"}), "fail", "weights"),
    "index without names": (edit(INDEX, weight_map=None), "fail", "weights"),
    "index of another size": (edit(INDEX, metadata={"total_size": 1}), "warn", "index"),
    "no index": (lambda f: (f / INDEX).unlink(), "warn", "index"),
    "tensor not in the index": (rewrite(lambda t: t.update(more=torch.ones(1))), "warn", "weights"),
    "config of no JSON": (lambda f: (f / "config.json").write_text("{"), "fail", "config"),
    "no config": (lambda f: (f / "config.json").unlink(), "warn", "config"),
    "other dtype": (edit("config.json", dtype="bfloat16"), "warn", "dtype"),
    "other dtype, older key": (edit("config.json", dtype=None, torch_dtype="float16"), "warn", "dtype"),
    "more layers stated": (edit("config.json", num_hidden_layers=4), "fail", "layers"),
    "fewer layers stated": (edit("config.json", num_hidden_layers=2), "warn", "layers"),
    "layer lost": (lose_a_layer, "fail", "layers"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "warn", "tokenizer"),
    "tied tensors that differ": (untie, "fail", "tied"),
    "not a number": (rewrite(set_nan), "fail", "numbers"),
    "unfinished run beside it": (lambda f: f.with_name("m.partial").mkdir(), "warn", "run"),
    "unfinished output": (lambda f: (f / "journal.jsonl").write_text("{}"), "fail", "run"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(tmp_path: Path, name: str) -> None:
    damage, verdict, check = DAMAGES[name]
    folder = sound(tmp_path / "m")
    damage(folder)
    assert verdicts(found(folder)) == {verdict: {check}}


def test_two_faults_are_both_told(tmp_path: Path) -> None:
    """A config.json that cannot be read does not hide a broken shard."""
    folder = sound(tmp_path / "m")
    (folder / "config.json").write_text("{")
    os.truncate(first(folder), first(folder).stat().st_size - 1)
    assert verdicts(found(folder)) == {"fail": {"config", "weights"}}


def test_the_faulty_tensor_is_named_and_counted(tmp_path: Path) -> None:
    folder = sound(tmp_path / "m")
    rewrite(set_nan)(folder)
    (check,) = [check for check in found(folder, threads=3) if check.name == "numbers"]
    assert check.detail == "1 NaN or infinite number in `model.embed_tokens.weight`"


def test_tied_tensors_stored_twice_alike(tmp_path: Path) -> None:
    tensors = llama()
    write(tmp_path / "m", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, LLAMA)
    (tied,) = [check for check in found(tmp_path / "m") if check.name == "tied"]
    assert tied.verdict == "ok" and "same bytes" in tied.detail


def test_a_layer_number_of_nine_digits_is_no_burden(tmp_path: Path) -> None:
    write(tmp_path / "m", {**llama(), "model.layers.999999999.x": torch.ones(1)}, LLAMA)
    (layers,) = [check for check in found(tmp_path / "m") if check.name == "layers"]
    assert layers.verdict == "fail" and "999,999,996 numbers without a tensor: 3, 4, 5, 6, 7, ..." in layers.detail


def test_other_kinds_of_checkpoints(tmp_path: Path) -> None:
    assert [(c.name, c.verdict) for c in found(tmp_path / "none")] == [("weights", "fail")]
    write_raw(tmp_path / "f4", "x", "F4", (2, 2), bytes(2))
    (numbers,) = [check for check in found(tmp_path / "f4") if check.name == "numbers"]
    assert "does not know" in numbers.detail
    single = found(tmp_path / "f4/model.safetensors")
    assert "fail" not in verdicts(single)


def test_every_byte_of_the_weights_is_heard_of(tmp_path: Path) -> None:
    totals: list[int] = []
    heard: list[int] = []

    def start(total: int) -> Callable[[int], None]:
        totals.append(total)
        return heard.append

    found(sound(tmp_path / "m"), start=start)
    assert totals == [sum(heard)] == [sum(t.nbytes for t in llama().values())]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of this program: two checkpoints averaged, in several shards."""
    home = tmp_path_factory.mktemp("merged")
    for place, name in enumerate("ab"):
        write(home / name, llama(place), LLAMA)
        (home / name / "tokenizer.json").write_text("{}")
    recipe = home / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nmodels: {{a: {home / 'a'}, b: {home / 'b'}}}\n"
        f"steps: {{mean: {{use: linear, of: [a, b]}}}}\nsave: {{to: {home / 'out'}, shard: 300}}\n"
    )
    mergekit_lite.run(mergekit_lite.plan(mergekit_lite.load_recipe(recipe)))
    return home / "out"


@pytest.fixture
def output(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "renamed"))


def flip_last(folder: Path) -> None:
    """A bit of a number, which nothing but the digest shows."""
    data = bytearray(first(folder).read_bytes())
    data[-4] ^= 1
    first(folder).write_bytes(data)


LOCK_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda f: None, ""),
    "one bit": (flip_last, "another BLAKE3 digest"),
    "truncated": (lambda f: os.truncate(first(f), 100), "other sizes"),
    "shard removed": (lambda f: first(f).unlink(), "are missing"),
    "lock of no YAML": (lambda f: (f / "recipe.lock.yaml").write_text("a: [1"), ""),
}


@pytest.mark.parametrize("name", LOCK_DAMAGES)
def test_an_output_against_its_lock(output: Path, name: str) -> None:
    damage, told = LOCK_DAMAGES[name]
    assert len(list(output.glob("*.safetensors"))) > 1
    damage(output)
    checks = [check for check in found(output) if check.name == "lock"]
    assert {check.verdict for check in checks} == {"ok" if name == "none" else "fail"}
    assert told in checks[0].detail


def test_weights_that_the_run_did_not_write(output: Path) -> None:
    save_file({"x": torch.ones(1)}, output / "extra.safetensors")
    assert verdicts(found(output)) == {"warn": {"lock"}}


def test_a_lock_with_two_outputs_is_met_by_either(output: Path) -> None:
    """Outputs of one recipe share a lock; the one that this folder is stands second here."""
    path = output / "recipe.lock.yaml"
    data = yaml.safe_load(path.read_text())
    (mine,) = data["lock"]["outputs"]
    other = {"to": "other", "shards": [{**shard, "blake3": "0" * 64} for shard in mine["shards"]]}
    data["lock"]["outputs"] = [other, mine]
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    assert [check.verdict for check in found(output) if check.name == "lock"] == ["ok"]
