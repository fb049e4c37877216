from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from raw_safetensors import entry, put, put_floats

from mergekit_lite.checkpoint.find import INDEX, open_checkpoint
from mergekit_lite.checkpoint.hub import is_hub_id
from mergekit_lite.errors import InputError, Mark

MARK = Mark("recipe.yaml", 3, 5, "  a: ./model", 7)


def put_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def sharded(folder: Path) -> Path:
    """Three tensors in two shards with their index, the first shard's tensors not in order of name."""
    folder.mkdir(parents=True, exist_ok=True)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    put_floats(folder / first, "z", "a")
    put_floats(folder / second, "m")
    put_index(folder, {"a": first, "m": second, "z": first})
    (folder / "config.json").write_text('{"model_type": "llama", "limit": [0.0, Infinity]}')
    return folder


def fails(location: str | Path, *messages: str, revision: str | None = None) -> InputError:
    """Opens what must not open; every problem has the mark, and the messages stand in the problems in this order."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(location), revision, mark=MARK, offline=True)
    text = str(caught.value)
    assert re.search(".*".join(map(re.escape, messages)), text, re.DOTALL), text
    assert all(problem.mark == MARK and problem.hint for problem in caught.value.problems)
    return caught.value


def test_sharded_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    found = open_checkpoint(str(folder), None)
    assert list(found.tensors) == ["z", "a", "m"]
    assert [os.path.basename(meta.file)[6:11] for meta in found.tensors.values()] == ["00001", "00001", "00002"]
    assert found.config == {"model_type": "llama", "limit": [0.0, float("inf")]}
    assert (found.folder, found.revision, found.notes, len(found.shards)) == (folder, None, (), 2)


@pytest.mark.parametrize("location", ["models/one", "./models/one", "models/one/", "models/one/model.safetensors"])
def test_local_path_wins_over_the_hub_and_is_relative_to_the_current_folder(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/one").mkdir(parents=True)
    put_floats(tmp_path / "models/one/model.safetensors", "a")
    (tmp_path / "models/one/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = open_checkpoint(location, None, offline=True)
    assert found.folder == tmp_path / "models/one" and list(found.tensors) == ["a"]
    assert found.tensors["a"].file == str(tmp_path / "models/one/model.safetensors")


def test_home_folder_and_missing_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_floats(tmp_path / "x.safetensors", "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/x.safetensors", None).config == {}


def test_which_files_of_a_folder_are_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    for name in ("consolidated.safetensors", "consolidated.00.safetensors", "adapter_model.safetensors"):
        put_floats(folder / name, "a", "other")
    (folder / INDEX).unlink()
    assert list(open_checkpoint(str(folder), None).tensors) == ["z", "a", "m"]  # a complete set of numbered shards
    put_floats(folder / "vision.safetensors", "v")
    assert list(open_checkpoint(str(folder), None).tensors) == ["z", "a", "m", "v"]  # and an unrelated file
    put_floats(folder / "model.safetensors", "single")
    assert list(open_checkpoint(str(folder), None).tensors) == ["single"]


def test_single_file_beside_an_index_is_read_as_transformers_does(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    put_floats(folder / "model.safetensors", "single")
    found = open_checkpoint(str(folder), None)
    assert list(found.tensors) == ["single"] and "as in transformers" in found.notes[0].message
    put_index(folder, {"single": "model.safetensors"})
    assert open_checkpoint(str(folder), None).notes == ()


def test_index_decides_between_copies_and_leaves_tensors_out(tmp_path: Path) -> None:
    put_floats(tmp_path / "one.safetensors", "a", "b", "stale")
    put_floats(tmp_path / "two.safetensors", "b", "c")
    put_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    found = open_checkpoint(str(tmp_path), None)
    assert {n: os.path.basename(m.file)[:3] for n, m in found.tensors.items()} == {"a": "one", "b": "two", "c": "two"}
    assert [note.message.split()[0] for note in found.notes] == ["1"]


def test_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    put_floats(tmp_path / "one.safetensors", "a", "b")
    put_floats(tmp_path / "two.safetensors", "b")
    fails(tmp_path, "1 tensors in two files each: b (two.safetensors and one.safetensors)")


def test_missing_shards_come_all_at_once(tmp_path: Path) -> None:
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    put_floats(tmp_path / names[1], "a")
    fails(tmp_path, "lacks 3 of its 4 shards", names[0], names[2], names[3])
    put_index(tmp_path, {f"t{i}": name for i, name in enumerate(names)})
    fails(tmp_path, "lacks 3 of its 4 shards", names[0], names[2], names[3])


def test_damaged_shards_come_all_at_once(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            os.truncate(folder / name, (folder / name).stat().st_size - 1)
    error = fails(folder, "00001-of-00002.safetensors", "1 of", "00002-of-00002.safetensors", "1 of")
    assert len(error.problems) == 2


def test_index_promises_a_tensor_that_the_shard_lacks(tmp_path: Path) -> None:
    put_floats(tmp_path / "one.safetensors", "a")
    put_floats(tmp_path / "two.safetensors", "b")
    put_index(tmp_path, {"a": "two.safetensors", "b": "two.safetensors", "gone": "one.safetensors"})
    fails(tmp_path, "promises 2 tensors that its shards lack: a (two.safetensors), gone (one.safetensors)")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "C:x", "a\0"]
)
def test_index_may_name_files_of_its_folder_only(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    put_floats(tmp_path / "x.safetensors", "a")
    put_index(folder, {"a": name})
    fails(folder, "names a file outside its folder")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}, "x"])
def test_index_without_a_weight_map(weight_map: object, tmp_path: Path) -> None:
    put_index(tmp_path, weight_map)
    fails(tmp_path, "no `weight_map`")


def test_empty_checkpoint_and_empty_index(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors", {})
    fails(tmp_path, "holds no tensors")
    (tmp_path / "model.safetensors").unlink()
    put_index(tmp_path, {})
    fails(tmp_path, "holds no tensors")


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    put_floats(tmp_path / "secret.safetensors", "a")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    fails(folder, "is a link to", "outside its folder")
    # The user may point at a link: then the user chose the target.
    assert list(open_checkpoint(str(folder / "model.safetensors"), None).tensors) == ["a"]
    (tmp_path / "secret.json").write_text('{"token": "x"}')
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    fails(folder / "model.safetensors", "is a link to", "outside its folder")


def test_links_inside_the_folder_and_a_linked_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    put_floats(folder / "weights.safetensors", "a")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    (tmp_path / "alias").symlink_to(folder)
    assert list(open_checkpoint(str(tmp_path / "alias"), None).tensors) == ["a"]


def test_circle_of_links_and_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_checkpoint(str(tmp_path), None)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("nothing")
    with pytest.raises(InputError, match="No such file"):
        open_checkpoint(str(tmp_path), None)


def hub_cache(cache: Path, commit: str = "0" * 39 + "1") -> Path:
    """The layout of huggingface_hub's cache: snapshots of links to blobs. Returns the snapshot."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    put_floats(repo / "blobs" / "abc", "a")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    return snapshot


def test_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub")
    assert list(open_checkpoint(str(snapshot), None).tensors) == ["a"]
    # Another repository's blobs are out of bounds.
    other = tmp_path / "hub/models--org--other/blobs"
    other.mkdir(parents=True)
    shutil.move(tmp_path / "hub/models--org--name/blobs/abc", other / "abc")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "abc")
    fails(snapshot, "outside its folder")


def test_folder_that_only_resembles_the_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    shutil.move(tmp_path / "models--org--name", tmp_path / "plain")
    fails(tmp_path / "plain/snapshots" / snapshot.name, "outside its folder")


def test_snapshot_whose_blobs_lie_in_the_store_shared_by_all_repositories(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    store = tmp_path / "blobs" / "ab"
    store.mkdir(parents=True)
    blob = tmp_path / "models--org--name/blobs/abc"
    shutil.move(blob, store / "hash")
    blob.symlink_to(store / "hash")
    fails(snapshot, "outside its folder")
    (tmp_path / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert list(open_checkpoint(str(snapshot), None).tensors) == ["a"]


def test_hub_model_in_the_cache_gives_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = hub_cache(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = open_checkpoint("org/name", None, offline=True)
    assert (found.revision, found.folder, list(found.tensors)) == ("0" * 39 + "1", snapshot, ["a"])
    fails("org/name", "`org/name` at revision `v9` is not", "hf download org/name --revision v9", revision="v9")
    fails("org/gone", "`org/gone` is not, or not wholly, in the cache", "hf download org/gone")
    (tmp_path / "org" / "gone2").mkdir(parents=True)
    fails("org/gone", "did you mean `org/gone2`?")


def test_missing_path_names_its_siblings(tmp_path: Path) -> None:
    (tmp_path / "llama-chat").mkdir()
    put_floats(tmp_path / "soup.safetensors", "a")
    fails(tmp_path / "lama-chat", "there is no checkpoint at", f"did you mean `{tmp_path}/llama-chat`?")
    fails(tmp_path / "soop.safetensors", f"did you mean `{tmp_path}/soup.safetensors`?")
    fails(tmp_path / "zzz", "holds llama-chat, soup.safetensors")
    fails(tmp_path / "no" / "such", "Hub id such as")
    fails("", "there is no checkpoint at ``")
    fails("a\0b", "there is no checkpoint at")


def test_revision_of_a_local_folder(tmp_path: Path) -> None:
    fails(sharded(tmp_path), "on this disk, where there are no revisions", revision="main")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt"])
def test_pickled_weights_are_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    fails(tmp_path, "pickled weights", "save_pretrained")
    fails(tmp_path / name, "is not a .safetensors file", "save_pretrained")


def test_folders_without_weights(tmp_path: Path) -> None:
    fails(tmp_path, "holds no .safetensors file")
    put_floats(tmp_path / "adapter_model.safetensors", "a")
    fails(tmp_path, "holds an adapter", f"{{path: BASE, adapter: {tmp_path}}}")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"[]", "is not a JSON object"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"a":1' + b"0" * 5000 + b"}", "a number that is too long"),
        (b" " * (16 * 2**20 + 1), "more than 16777216 bytes"),
    ],
    ids=["array", "cut", "empty", "latin", "deep", "rather deep", "long number", "large"],
)
def test_config_that_is_no_object(text: bytes, message: str, tmp_path: Path) -> None:
    put_floats(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_bytes(text)
    fails(tmp_path, "config.json", message)


def test_metadata_of_the_first_shard_wins(tmp_path: Path) -> None:
    for i in (1, 2):
        header = {"__metadata__": {"by": str(i), f"only{i}": "x"}, f"t{i}": entry()}
        put(tmp_path / f"m-0000{i}-of-00002.safetensors", header, b"1234")
    assert open_checkpoint(str(tmp_path), None).metadata == {"by": "1", "only1": "x", "only2": "x"}


def test_what_looks_like_a_hub_id() -> None:
    assert all(map(is_hub_id, ["org/name", "Org-1/na.me_2", "_a/b", "a/b"]))
    wrong = [
        "name",
        "a/b/c",
        "./a",
        "../a",
        "/a",
        "~/a",
        "a/",
        "a b/c",
        "a--b/c",
        "a/..",
        "a/b.safetensors",
        "a/b\n",
        "a/é",
    ]
    assert not any(map(is_hub_id, wrong))
