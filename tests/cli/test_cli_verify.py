"""`merge verify` and `merge run LOCK`: an output held against its lock, and made again from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from cli_process import Ran
from safetensors.torch import load_file, save_file

Merge = Callable[..., Ran]
LOCK = "recipe.lock.yaml"


def test_whole_and_not(merge: Merge, folder: Path) -> None:
    assert merge("run", "ties.yaml").code == 0
    ran = merge("verify", "out/ties")
    size = sum(path.stat().st_size for path in Path("out/ties").iterdir() if path.name not in (LOCK, "README.md"))
    told = f"as the lock says: out/ties · 1 shard · 7 tensors · 2 other files · {size / 1000:.1f} kB\n"
    assert (ran.code, ran.out, ran.err) == (0, told, "")
    shard = Path("out/ties/model.safetensors")
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\x80\x7f"
    shard.write_bytes(data)
    Path("out/ties/config.json").unlink()
    ran = merge("verify", "out/ties")
    assert ran.code == 1
    assert ran.out.splitlines() == [
        "fail  model.safetensors: has another BLAKE3 digest than the lock says",
        "fail  config.json: is missing",
        f"fail  model.safetensors  {last_tensor(shard)}: 1 number NaN or infinite",
        "not as the lock says: 3 faults in out/ties",
    ]
    made = merge("verify", "out/ties", "--json")
    assert (made.code, made.json["whole"]) == (1, False)
    assert [(fault["file"], fault["tensor"]) for fault in made.json["faults"]] == [
        ("model.safetensors", None), ("config.json", None), ("model.safetensors", last_tensor(shard)),
    ]  # fmt: skip
    assert made.json["covered"] == {"shards": True, "files": True, "lock": True, "inputs": False}


def last_tensor(shard: Path) -> str:
    from mergekit_lite.checkpoint.header import read_header

    return read_header(shard, "").tensors[-1].name


def test_nothing_to_verify(merge: Merge, folder: Path) -> None:
    for place in ("none", "base"):
        ran = merge("verify", place, "--json")
        assert (ran.code, ran.json["error"]["exit_code"]) == (4, 4)
    assert "`base` has no recipe.lock.yaml" in ran.err


def test_inputs(merge: Merge, folder: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    assert merge("run", "ties.yaml").code == 0
    ran = merge("verify", "out/ties", "--inputs")
    assert (ran.code, ran.out.split(" · ")[4]) == (0, "the inputs")
    tiny_checkpoint(folder / "math", seed=77)
    shutil.rmtree("code")
    assert merge("verify", "out/ties").code == 0
    ran = merge("verify", "out/ties", "--inputs")
    assert ran.code == 1
    assert ran.out.splitlines()[:2] == [
        "fail  input code: there is no checkpoint at `./code`",
        "fail  input: `model.safetensors` of `math` has other content than when the lock was made",
    ]


def test_names_cannot_drive_the_terminal(merge: Merge, folder: Path) -> None:
    assert merge("run", "ties.yaml").code == 0
    Path("out/ties/\x1b[31m.safetensors").write_bytes(b"")
    ran = merge("verify", "out/ties")
    assert ran.code == 1 and "\x1b" not in ran.out and "\\x1b[31m.safetensors" in ran.out


def test_no_torch_is_needed(process: Callable[..., Ran], folder: Path) -> None:
    import subprocess
    import sys

    assert process("run", "ties.yaml").code == 0
    code = "import sys; from mergekit_lite.cli.app import execute; execute(['verify', 'out/ties', '--inputs']); "
    code += "print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"


def test_a_lock_of_a_moved_output_in_a_folder_that_is_only_read(merge: Merge, folder: Path) -> None:
    assert merge("run", "ties.yaml").code == 0
    shutil.move("out/ties", "kept")
    shards = Path("kept/model.safetensors").read_bytes()
    before = {path.name: path.stat().st_mtime_ns for path in Path("kept").iterdir()}
    os.chmod("kept", 0o555)
    try:
        # Where the recipe said, which is free now, and elsewhere.
        for arguments, place in ([], "out/ties"), (["--out", "other"], "other"):
            ran = merge("run", f"kept/{LOCK}", *arguments, "--json")
            assert (ran.code, ran.err, ran.json["changed"]) == (0, "", [])
            assert (Path(place) / "model.safetensors").read_bytes() == shards
            assert merge("verify", place).code == 0
        assert {path.name: path.stat().st_mtime_ns for path in Path("kept").iterdir()} == before
    finally:
        os.chmod("kept", 0o755)
    assert merge("run", f"kept/{LOCK}").code == 3  # taken
    shutil.rmtree("math")
    ran = merge("run", f"kept/{LOCK}", "--out", "third")
    assert (ran.code, Path("third").exists()) == (4, False)
    assert "there is no checkpoint at `./math`" in ran.err


def test_where_numbers_come_from_is_told(merge: Merge, folder: Path) -> None:
    """NaN of an input, what the merge made, and what the dtype cannot hold are three warnings."""
    for name in ("math", "code"):
        path = Path(name, "model.safetensors")
        tensors = load_file(path)
        if name == "math":
            tensors["model.norm.weight"][0] = torch.nan
        tensors["lm_head.weight"][0, 0] = 3e38
        tensors["model.embed_tokens.weight"][0, 0] = 1e9
        save_file(tensors, path, {"format": "pt"})
    text = "version: 1\nmodels: {math: ./math, code: ./code}\n"
    text += "steps: {soup: {use: linear, of: [math, code], with: {normalize: false}}}\n"
    Path("soup.yaml").write_text(text + "save: {to: out/soup, dtype: float16}\n", encoding="utf-8")
    ran = merge("run", "soup.yaml", "--json")
    assert ran.code == 0
    names = ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")
    assert ran.json["output_nonfinite"] == dict.fromkeys(names, 1)
    first, passed, made, out = (warning["message"] for warning in ran.json["warnings"])
    assert first.startswith("the inputs hold 1 NaN")
    assert passed == f"the output has 1 NaN or infinite number from the inputs: `{names[0]}` (1)"
    assert made == f"the merge made 1 NaN or infinite number of finite ones: `{names[1]}` (1)"
    assert out.startswith(f"1 number out of the range of the dtype saved in: `{names[2]}` (1)")
    ran = merge("run", "soup.yaml", "--out", "out/strict", "--strict", "--set", "models.math=./code")
    assert (ran.code, Path("out/strict").exists()) == (5, False)
    assert "`--resume`" in ran.err
