"""`merge plan --check`: each thing that makes a lock stale is told in a line, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_process import Ran

from mergekit_lite.plan import digest, lock
from mergekit_lite.run import digest as bytes_of_files

Merge = Callable[..., Ran]
STACKED = """\
version: 1
models: {base: ./base, math: ./math}
steps:
  merged: {use: interpolate, of: [base, math], with: {t: {"*q_proj*": 0.2, "*proj*": 0.7, else: 0.5}}}
save: {to: out/ties}
"""


@pytest.fixture
def locked(merge: Merge, folder: Path) -> Path:
    """The folder with the finished output of ties.yaml."""
    assert merge("run", "ties.yaml").code == 0
    return folder


def changes(merge: Merge, *words: str) -> list[dict[str, Any]]:
    """What makes the lock stale, held against the exit code and against what a person reads."""
    ran = merge("plan", "ties.yaml", "--check", "out/ties", "--json", *words)
    found = json.loads(ran.out)
    assert ran.code == (1 if found["changes"] else 0) and found["stale"] == bool(found["changes"]), ran
    shown = merge("plan", "ties.yaml", "--check", "out/ties", *words)
    assert shown.code == ran.code
    head, *lines = shown.out.splitlines()
    assert head == f"{'stale' if found['stale'] else 'up to date'}: out/ties/recipe.lock.yaml"
    assert [line.split()[0] for line in lines] == [change["what"] for change in found["changes"]]
    return found["changes"]


def put(recipe: str, *pairs: tuple[str, str]) -> None:
    for old, new in pairs:
        assert old in recipe
        recipe = recipe.replace(old, new)
    Path("ties.yaml").write_text(recipe, encoding="utf-8")


def test_nothing_has_changed(merge: Merge, locked: Path):
    assert changes(merge) == []
    ran = merge("plan", "ties.yaml", "--check", "out/ties/recipe.lock.yaml")
    assert (ran.code, ran.err) == (0, "")
    # Words that mean the same, and what a lock leaves out.
    text = Path("ties.yaml").read_text(encoding="utf-8")
    put(text, ("version: 1\n", "# a comment\nversion: 1\nseed: 0\ncompute: float32\n"))
    assert changes(merge) == []
    put(text, ("bfloat16}", "bfloat16, push: {repo: me/x}}"))
    assert changes(merge) == [] == changes(merge, "--offline")
    assert changes(merge, "--threads", "1", "--block", "64") == []


def test_the_lock_itself_is_up_to_date(merge: Merge, locked: Path):
    assert merge("plan", "out/ties/recipe.lock.yaml", "--check", "out/ties").code == 0


def test_settings(merge: Merge, locked: Path):
    put(Path("ties.yaml").read_text(encoding="utf-8"), ("density: 0.3", "density: 0.4"))
    (found,) = changes(merge)
    assert found == {"what": "recipe", "place": "steps.merged.of.code.density", "locked": "0.3", "now": "0.4"}
    assert changes(merge, "--set", "steps.merged.of.code.density=0.3") == []


def test_another_word_for_a_number_changes_the_headers_and_is_told(merge: Merge, locked: Path):
    put(Path("ties.yaml").read_text(encoding="utf-8"), ("weight: 1.0", "weight: 1"))
    (found,) = changes(merge)
    assert (found["place"], found["locked"], found["now"]) == ("steps.merged.of.math.weight", "1.0", "1")


def test_inputs_of_other_shapes_change_the_files_too(merge: Merge, folder: Path, tiny_checkpoint: Callable[..., Path]):
    text = "version: 1\nmodels: {math: ./math}\nsteps: {m: {use: passthrough, of: math}}\nsave: {to: out/ties}\n"
    Path("ties.yaml").write_text(text, encoding="utf-8")
    assert merge("run", "ties.yaml").code == 0
    before = (folder / "out/ties/model.safetensors").stat().st_size
    tiny_checkpoint(folder / "math", names={"model.norm.weight": (8,)})
    found = {change["what"]: change for change in changes(merge)}
    assert set(found) == {"input", "output"} and found["output"]["locked"] == f"{before} bytes"


def test_the_seed(merge: Merge, locked: Path):
    put(Path("ties.yaml").read_text(encoding="utf-8"), ("version: 1\n", "version: 1\nseed: 7\n"))
    assert changes(merge) == [{"what": "seed", "place": "seed", "locked": "0", "now": "7"}]


def test_what_is_new_and_what_is_gone(merge: Merge, locked: Path):
    put(
        Path("ties.yaml").read_text(encoding="utf-8"),
        ("      code: {weight: 0.8, density: 0.3}\n", ""),
        ("base: base", "base: base\n    with: {lambda: 0.9}"),
    )
    found = {change["place"]: (change["locked"], change["now"]) for change in changes(merge)}
    assert found["steps.merged.of.code"] == ('{"weight": 0.8, "density": 0.3}', None)
    assert found["steps.merged.with"] == (None, '{"lambda": 0.9}')


def test_the_order_of_inputs_and_of_globs_counts(merge: Merge, locked: Path):
    text = Path("ties.yaml").read_text(encoding="utf-8")
    math, code = text.splitlines(keepends=True)[7:9]
    put(text, (math + code, code + math))
    assert [change["place"] for change in changes(merge)] == ["steps.merged.of"]
    put(STACKED, ("out/ties", "out/stacked"))
    assert merge("run", "ties.yaml").code == 0
    assert merge("plan", "ties.yaml", "--check", "out/stacked").code == 0
    put(STACKED, ("out/ties", "out/stacked"), ('"*q_proj*": 0.2, "*proj*": 0.7', '"*proj*": 0.7, "*q_proj*": 0.2'))
    ran = merge("plan", "ties.yaml", "--check", "out/stacked", "--json")
    assert [change["place"] for change in json.loads(ran.out)["changes"]] == ["steps.merged.with.t"]


def test_another_dtype(merge: Merge, locked: Path):
    put(Path("ties.yaml").read_text(encoding="utf-8"), ("bfloat16", "float32"))
    assert changes(merge) == [{"what": "recipe", "place": "save.dtype", "locked": "bfloat16", "now": "float32"}]


def test_shards(merge: Merge, locked: Path):
    found = changes(merge, "--set", "save.shard=1KB")
    assert [change["place"] for change in found if change["what"] == "recipe"] == ["save.shard"]
    gone = next(c for c in found if c["place"] == "out/ties: model.safetensors")
    assert gone["now"] is None and sum(change["locked"] is None and change["what"] == "output" for change in found) > 1


def test_out_says_where_the_output_lies_and_is_no_change(merge: Merge, folder: Path):
    assert merge("run", "ties.yaml", "--out", "elsewhere").code == 0
    assert merge("plan", "ties.yaml", "--check", "elsewhere").code == 0
    put(Path("ties.yaml").read_text(encoding="utf-8"), ("out/ties", "out/two"))
    ran = merge("plan", "ties.yaml", "--check", "elsewhere", "--json")
    assert [change["place"] for change in json.loads(ran.out)["changes"]] == ["save.to"]
    assert merge("plan", "ties.yaml", "--check", "elsewhere", "--out", "elsewhere").code == 0


def test_an_input_with_other_numbers(merge: Merge, locked: Path, tiny_checkpoint: Callable[..., Path]):
    tiny_checkpoint(locked / "code", seed=99)
    (found,) = changes(merge)
    assert (found["what"], found["place"]) == ("input", "code: model.safetensors")
    assert found["locked"].startswith("blake3 ") and found["now"] != found["locked"]


def test_an_input_of_another_size_is_not_read(merge: Merge, locked: Path, monkeypatch: pytest.MonkeyPatch):
    from mergekit_lite.report import stale

    read: list[Path] = []
    monkeypatch.setattr(stale, "file_digests", lambda paths, threads: read.extend(paths) or {str(p): "" for p in paths})
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(locked / "code/model.safetensors")
    save_file({**tensors, "x": torch.ones(2)}, locked / "code/model.safetensors")
    put(
        Path("ties.yaml").read_text(encoding="utf-8"),
        ("base: base\n", "base: base\n    missing: skip\n"),
    )
    ran = merge("plan", "ties.yaml", "--check", "out/ties", "--json")
    found = [change for change in json.loads(ran.out)["changes"] if change["what"] == "input"]
    assert "code: model.safetensors" in [change["place"] for change in found]
    assert locked / "code/model.safetensors" not in read


def test_digests_are_remembered_while_size_and_times_stand(
    merge: Merge, locked: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A second look reads no weight; a file that was written since is read again."""
    from mergekit_lite.report import stale
    from mergekit_lite.run import remembered

    monkeypatch.setenv("MERGEKIT_LITE_CACHE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "REST", 0)
    read: list[str] = []

    def digests(paths: list[Path], threads: int) -> dict[str, str]:
        read.extend(path.parent.name for path in paths)
        return bytes_of_files.file_digests(paths, threads)

    monkeypatch.setattr(stale, "file_digests", digests)
    assert merge("plan", "ties.yaml", "--check", "out/ties").code == 0
    assert sorted(read) == ["base", "code", "math"]
    read.clear()
    assert merge("plan", "ties.yaml", "--check", "out/ties").code == 0
    assert read == []
    data = bytearray((locked / "math/model.safetensors").read_bytes())
    data[-1] ^= 1
    (locked / "math/model.safetensors").write_bytes(data)
    assert [change["place"] for change in changes(merge)] == ["math: model.safetensors"]
    assert set(read) == {"math"}


def test_other_arithmetic(merge: Merge, locked: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digest, "ARITHMETIC", digest.ARITHMETIC + 1)
    (found,) = changes(merge)
    assert found["what"] == "method" and found["locked"] != found["now"]


def test_another_torch_is_a_note(merge: Merge, locked: Path, monkeypatch: pytest.MonkeyPatch):
    plain = lock.version
    monkeypatch.setattr(lock, "version", lambda name: "99.1" if name == "torch" else plain(name))
    ran = merge("plan", "ties.yaml", "--check", "out/ties")
    assert ran.code == 0 and "here 99.1" in ran.err


def test_a_package_of_methods_in_another_version(merge: Merge, folder: Path, monkeypatch: pytest.MonkeyPatch):
    versions = {"merge-clip": "1.0"}
    plain = lock.version
    monkeypatch.setattr(lock, "package_of", lambda name: "merge-clip")
    monkeypatch.setattr(lock, "version", lambda name: versions.get(name) or plain(name))
    assert merge("run", "ties.yaml").code == 0
    assert yaml.safe_load(Path("out/ties/recipe.lock.yaml").read_text())["lock"]["made_with"]["merge-clip"] == "1.0"
    assert changes(merge) == []
    versions["merge-clip"] = "1.1"
    assert changes(merge) == [{"what": "method", "place": "merge-clip", "locked": "1.0", "now": "1.1"}]


def test_a_lock_that_was_edited(merge: Merge, locked: Path):
    path = locked / "out/ties/recipe.lock.yaml"
    path.write_text(path.read_text().replace("weight: 0.8", "weight: 0.9"))
    assert [change["what"] for change in changes(merge)] == ["lock", "recipe"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--check", "nowhere"], 4, "there is no lock"),
        (["--check", "ties.yaml"], 4, "does not say what a run wrote"),
        (["--check", "base/config.json"], 4, "is no lock"),
        (["--check", "out/ties", "--dag"], 2, "`--check`"),
        (["--check", "out/ties", "--tensors"], 2, "`--check`"),
        (["--check", "out/ties", "--sandbox", "base"], 2, "outside the sandbox"),
    ],
)
def test_wrong_use(merge: Merge, locked: Path, words: list[str], code: int, message: str):
    ran = merge("plan", "ties.yaml", *words)
    assert (ran.code, ran.out) == (code, "") and message in ran.err, ran


def test_a_missing_input_is_no_answer(merge: Merge, locked: Path):
    (locked / "math/model.safetensors").unlink()
    for words in ([], ["--offline"]):
        assert merge("plan", "ties.yaml", "--check", "out/ties", *words).code == 4


def test_in_a_sandbox(merge: Merge, locked: Path):
    assert merge("plan", "ties.yaml", "--check", "out/ties", "--sandbox", ".").code == 0


def test_a_recipe_of_mergekits(merge: Merge, folder: Path):
    text = "merge_method: linear\nmodels:\n- {model: ./math, parameters: {weight: 0.6}}\n- {model: ./code, parameters: "
    Path("ties.yaml").write_text(text + "{weight: [0.1, 0.4]}}\ndtype: bfloat16\n", encoding="utf-8")
    assert merge("run", "ties.yaml", "--out", "out/ties").code == 0
    assert changes(merge) == []
    put(Path("ties.yaml").read_text(), ("[0.1, 0.4]", "[0.1, 0.5]"))
    assert [change["what"] for change in changes(merge)] == ["recipe"]


def test_an_adapter_whose_ranks_are_found_by_the_run(merge: Merge, folder: Path):
    """Its plan is not known before, so the digest of the plan is not compared, but the rest is."""
    text = "version: 1\nmodels: {base: ./base, math: ./math}\nsteps: {d: {use: delta, of: math, base: base}}\n"
    Path("ties.yaml").write_text(text + "save: {to: out/ties, as: lora, base: base, energy: 0.6}\n", encoding="utf-8")
    ran = merge("run", "ties.yaml")
    assert ran.code == 0, ran.err
    assert changes(merge) == []
    put(Path("ties.yaml").read_text(), ("0.6", "0.7"))
    assert [change["place"] for change in changes(merge)] == ["save.energy"]
