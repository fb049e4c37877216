"""A finished output passes; whatever is changed in it afterwards is found, and told by file and tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from report_files import LLAMA, llama, write
from safetensors.torch import load_file, save_file

import mergekit_lite
from mergekit_lite.checkpoint.header import read_header
from mergekit_lite.errors import InputError
from mergekit_lite.plan.lock import sealed
from mergekit_lite.report.folder import Fault
from mergekit_lite.report.reread import CHUNK, reread
from mergekit_lite.report.verify import verify

LOCK, INDEX = "recipe.lock.yaml", "model.safetensors.index.json"
CARD = "README.md"  # for people: no lock speaks of it
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with several shards, a tokenizer and templates, of checkpoints that are gone afterwards."""
    home = tmp_path_factory.mktemp("merged")
    for place, name in enumerate("ab"):
        write(home / name, llama(place), LLAMA)
        (home / name / "tokenizer.json").write_text('{"model": {}}')
        (home / name / "additional_chat_templates").mkdir()
        (home / name / "additional_chat_templates/rag.jinja").write_text("{{ x }}")
    recipe = home / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nmodels: {{a: {home / 'a'}, b: {home / 'b'}}}\n"
        f"steps: {{mean: {{use: interpolate, of: [a, b], with: {{t: 0.25}}}}}}\n"
        f"save: {{to: {home / 'out'}, shard: 300}}\n"
    )
    read = mergekit_lite.load_recipe(recipe, ["steps.mean.with.t=0.75"])
    mergekit_lite.run(mergekit_lite.plan(read))
    for name in "ab":
        shutil.rmtree(home / name)
    return home / "out"


@pytest.fixture
def output(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "moved"))


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    assert len(found) > 2
    return found


def home(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def faults(folder: Path) -> list[Fault]:
    return list(verify(str(folder), threads=2).faults)


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def relock(folder: Path) -> None:
    """Make the lock say what is there now: what is found then is found without a digest."""
    text = (folder / LOCK).read_text()
    body = text.partition("# What this run")[0]
    data = yaml.safe_load(text)
    (mine,) = data["lock"]["outputs"]
    for file in [*mine["shards"], *mine["files"]]:
        raw = (folder / file["file"]).read_bytes()
        file |= {"bytes": len(raw), "blake3": blake3(raw).hexdigest()}
    (folder / LOCK).write_text(sealed(body + yaml.safe_dump({"lock": data["lock"]})))


def test_a_moved_output_without_its_inputs_is_whole(output: Path) -> None:
    found = verify(str(output))
    assert (found.faults, found.notes, found.sealed) == ((), (), True)
    assert found.shards == len(shards(output)) and found.tensors == len(llama())
    everything = [path for path in output.rglob("*") if path.is_file() and path.name not in (LOCK, CARD)]
    assert found.files == len(everything) - found.shards
    assert found.nbytes == sum(path.stat().st_size for path in everything)
    relock(output)
    assert faults(output) == []


def spoil(value: float, tensor: str = EMBEDDING) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = home(folder, tensor)
        with path.open("r+b") as file:
            meta = next(m for m in read_header(path, path.name).tensors if m.name == tensor)
            file.seek(meta.start + meta.nbytes - 4)
            file.write(torch.tensor(value).numpy().tobytes())

    return damage


def swap(folder: Path) -> None:
    one, other, *_ = shards(folder)
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def edit(file: str, old: str, new: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return damage


def untie(folder: Path) -> None:
    """A head beside the embedding it is tied to, in the index and the lock as well, but with other numbers."""
    path = home(folder, EMBEDDING)
    tensors = load_file(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(size))["__metadata__"]
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path, metadata)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = path.name
    index["metadata"]["total_size"] += tensors[EMBEDDING].nbytes
    (folder / INDEX).write_text(json.dumps(index))


def other_metadata(folder: Path) -> None:
    path = shards(folder)[1]
    save_file(load_file(path), path, {"format": "pt"})


def remap(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shards(folder)[0].name
    index["metadata"]["total_size"] += 1
    (folder / INDEX).write_text(json.dumps(index))


def link_out(folder: Path) -> None:
    shard = shards(folder)[0]
    shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


# What is done, and what is found: file, tensor, a piece of the message.
FIRST = "model-00001-of-"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str | None, str]] = {
    "bit of a header": (lambda f: flip(shards(f)[0], 20), FIRST, None, "another BLAKE3"),
    "bit of a header's length": (lambda f: flip(shards(f)[0], 6), FIRST, None, "claims a header"),
    "bit of a tensor": (lambda f: flip(shards(f)[0], -4), FIRST, None, "another BLAKE3"),
    "bit of the index": (lambda f: flip(f / INDEX, 40), INDEX, None, "another BLAKE3"),
    "bit of the configuration": (lambda f: flip(f / "config.json", 5), "config.json", None, "another BLAKE3"),
    "bit of the tokenizer": (lambda f: flip(f / "tokenizer.json", 3), "tokenizer.json", None, "another BLAKE3"),
    "bit of the lock": (lambda f: flip(f / LOCK, 9), LOCK, None, "is n"),
    "lock cut in two": (lambda f: os.truncate(f / LOCK, 400), LOCK, None, "is no lock"),
    "lock without its last line": (edit(LOCK, "\n# blake3:", "\n# blake4:"), LOCK, None, "lacks its last line"),
    "lock of nothing": (edit(LOCK, "outputs:", "outputz:"), LOCK, None, "is not as the run wrote it"),
    "truncated": (lambda f: os.truncate(shards(f)[0], shards(f)[0].stat().st_size - 1), FIRST, None, "truncated"),
    "appended": (lambda f: shards(f)[0].open("ab").write(b"x"), FIRST, None, "after its last tensor"),
    "shard removed": (lambda f: shards(f)[0].unlink(), FIRST, None, "is missing"),
    "shard too many": (lambda f: save_file({"x": torch.ones(1)}, f / "x.safetensors"), "x.safetensors", None, "not wr"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin", None, "not write"),
    "shards swapped": (swap, FIRST, None, "the lock says"),
    "shard elsewhere": (link_out, FIRST, None, "outside its folder"),
    "configuration removed": (lambda f: (f / "config.json").unlink(), "config.json", None, "is missing"),
    "configuration of no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json", None, "is not JSON"),
    "index removed": (lambda f: (f / INDEX).unlink(), INDEX, None, "is missing"),
    "template changed": (
        lambda f: (f / "additional_chat_templates/rag.jinja").write_text("{{ y }}"),
        "additional_chat_templates/rag.jinja", None, "another BLAKE3",
    ),
    "template added": (
        lambda f: (f / "additional_chat_templates/more.jinja").write_text("x"),
        "additional_chat_templates/more.jinja", None, "was not written by the run",
    ),
    "code added": (lambda f: (f / "modeling_x.py").write_text(""), "modeling_x.py", None, "was not written by the run"),
    "recipe of another number": (edit("recipe.yaml", "0.25", "0.26"), "recipe.yaml", None, "another BLAKE3"),
}  # fmt: skip
# Found with every digest in the lock corrected.
RELOCKED: dict[str, tuple[Callable[[Path], object], str, str | None, str]] = {
    "NaN": (spoil(float("nan")), "", EMBEDDING, "1 number NaN or infinite"),
    "infinity": (spoil(float("-inf"), "model.norm.weight"), "", "model.norm.weight", "1 number NaN or infinite"),
    "untied": (untie, "", "lm_head.weight", f"differs from `{EMBEDDING}`"),
    "metadata": (other_metadata, "model-00002-of-", None, "other metadata"),
    "index": (remap, INDEX, "model.norm.weight", "does not say that the tensor is in"),
    "size in the index": (remap, INDEX, None, "`total_size` is"),
    "recipe": (edit("recipe.yaml", "interpolate", "slerp"),
               "recipe.yaml", None, f"is not the recipe in {LOCK}"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(output: Path, name: str) -> None:
    damage, file, tensor, told = DAMAGES[name]
    damage(output)
    found = faults(output)
    assert any(f.file.startswith(file) and f.tensor == tensor and told in f.message for f in found), found


@pytest.mark.parametrize("name", RELOCKED)
def test_damage_that_no_digest_shows(output: Path, name: str) -> None:
    damage, file, tensor, told = RELOCKED[name]
    damage(output)
    relock(output)
    found = faults(output)
    assert any(f.file.startswith(file) and f.tensor == tensor and told in f.message for f in found), found
    assert not any("BLAKE3" in f.message or f.file == LOCK for f in found)


def test_two_swapped_shards_are_both_named(output: Path) -> None:
    swap(output)
    named = {f.file for f in faults(output) if "the lock says" in f.message or "than the lock" in f.message}
    assert named == {path.name for path in shards(output)[:2]}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_byte_of_every_file_is_covered(merged: Path, data: Any) -> None:
    files = sorted(path for path in merged.rglob("*") if path.is_file() and path.name != CARD)
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != before[place]))
    path.write_bytes(before[:place] + bytes([value]) + before[place + 1 :])
    try:
        assert path.relative_to(merged).as_posix() in {fault.file for fault in faults(merged)}
    finally:
        path.write_bytes(before)


def test_a_lock_of_an_earlier_version(output: Path) -> None:
    """It says nothing of files beside the shards, and has no last line: they are looked at as far as may be."""
    text = re.sub(r"\n      files:\n(        .*\n)+", "\n", (output / LOCK).read_text())
    (output / LOCK).write_text(text[: text.index("# blake3")])
    found = verify(str(output))
    assert (found.faults, found.files, found.sealed) == ((), 0, None)
    assert "earlier version" in found.notes[0]
    edit("config.json", "{", "[")(output)
    flip(shards(output)[0], -4)
    assert {f.file for f in faults(output)} == {"config.json", shards(output)[0].name}
    (output / INDEX).unlink()
    assert INDEX in {f.file for f in faults(output)}


def test_files_that_change_nothing_are_noted(output: Path) -> None:
    (output / "notes.md").write_text("# Model")
    (output / ".cache").mkdir()
    found = verify(str(output))
    assert found.faults == () and found.notes == ("not of the run, and not looked at: `notes.md`",)


def test_the_card_is_the_users_to_change(output: Path) -> None:
    (output / CARD).write_text("# Model")
    assert (verify(str(output)).faults, verify(str(output)).notes) == ((), ())
    (output / CARD).unlink()
    assert (verify(str(output)).faults, verify(str(output)).notes) == ((), ())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda f: None, "there is no folder"),
        (lambda f: f.with_name("out.partial").mkdir(), "unfinished run in `out.partial`"),
        (lambda f: f.mkdir(), f"has no {LOCK}"),
        (lambda f: (f.mkdir(), (f / "journal.jsonl").touch()), "is an unfinished output"),
        (lambda f: f.touch(), "is a file"),
        (lambda f: (f.mkdir(), (f / LOCK).write_text("version: 1\nmodels: {a: x}\nsave: {step: a}\n")), "is a recipe"),
    ],
)
def test_where_there_is_nothing_to_hold_against(tmp_path: Path, make: Callable[[Path], object], told: str) -> None:
    make(tmp_path / "out")
    with pytest.raises(InputError, match=re.escape(told)):
        verify(str(tmp_path / "out"))


def test_a_lock_may_not_name_files_outside(output: Path) -> None:
    edit(LOCK, "file: config.json", "file: ../config.json")(output)
    assert "names a file outside the folder: `../config.json`" in [f.message for f in faults(output)]


def test_a_file_of_many_chunks_is_read_once(tmp_path: Path) -> None:
    """Numbers at both ends of chunks are seen, the digest is that of the file, every byte is heard of once."""
    large = torch.zeros(CHUNK // 2 + 3, dtype=torch.bfloat16)
    large[[0, CHUNK // 2 - 1, CHUNK // 2, -1]] = float("inf")
    half = torch.zeros(5, dtype=torch.float16)
    half[4] = float("nan")
    tensors = {"a": torch.zeros(7, dtype=torch.uint8), "large": large, "z": half, "none": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors", "x")
    heard: list[int] = []
    seen = reread(tmp_path / "x.safetensors", header.tensors, {"large", "none"}, 1, heard.append)
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert (seen.nbytes, seen.blake3, sum(heard)) == (len(raw), blake3(raw).hexdigest(), len(raw))
    assert seen.nonfinite == {"large": 4, "z": 1}
    stored = large.view(torch.uint8).numpy().tobytes()
    assert seen.tensors == {"large": blake3(stored).hexdigest(), "none": blake3(b"").hexdigest()}
