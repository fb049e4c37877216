"""`merge run`: files, words, JSON and exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from cli_process import Ran
from safetensors.torch import load_file, save_file

from mergekit_lite.cli.run import detail_of, label, passes
from mergekit_lite.run.progress import Progress

Merge = Callable[..., Ran]
SOUP = """\
version: 1
models: {math: ./math, code: ./code}
steps: {soup: {use: linear, of: [math, code]}}
save: {to: out/soup}
"""


def test_the_final_line(process: Merge, folder: Path):
    ran = process("run", "ties.yaml")
    assert (ran.code, ran.err) == (0, "")
    size = sum(file.stat().st_size for file in Path("out/ties").glob("*.safetensors"))
    line = rf"wrote out/ties · 1 shard · {size / 1000:.1f} kB in [\d.]+ s · lock out/ties/recipe.lock.yaml\n"
    assert re.fullmatch(line, ran.out)
    assert Path("out/ties/recipe.lock.yaml").is_file()


def test_one_line_for_each_output(merge: Merge, folder: Path):
    two = SOUP.replace("save: {to: out/soup}", "save: [{to: out/a, shard: 700}, {to: out/b}]")
    Path("two.yaml").write_text(two, encoding="utf-8")
    ran = merge("run", "two.yaml")
    assert [line.split(" · ")[:2] for line in ran.out.splitlines()] == [
        ["wrote out/a", "6 shards"],
        ["wrote out/b", "1 shard"],
    ]


def test_the_numbers_are_right(merge: Merge, folder: Path):
    Path("soup.yaml").write_text(SOUP, encoding="utf-8")
    assert merge("run", "soup.yaml", "--set", "steps.soup.with={weight: 0.5, normalize: false}").code == 0
    math, code, made = (load_file(Path(f) / "model.safetensors") for f in ("math", "code", "out/soup"))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (math[name].double() * 0.5 + code[name].double() * 0.5).float())


def test_json(merge: Merge, folder: Path):
    ran = merge("run", "ties.yaml", "--json")
    data = ran.json
    assert (ran.code, ran.err) == (0, "")
    (output,) = data["outputs"]
    assert (output["to"], output["lock"]) == ("out/ties", "out/ties/recipe.lock.yaml")
    for shard in output["shards"]:
        stored = (Path("out/ties") / shard["file"]).read_bytes()
        assert shard == {"file": shard["file"], "bytes": len(stored), "blake3": blake3(stored).hexdigest()}
    assert data["bytes_written"] == output["bytes"]
    empty = ("nonfinite", "overflow", "changed", "warnings")
    assert {key: len(data[key]) for key in empty} == dict.fromkeys(empty, 0)
    assert data["resumed"] == 0 and data["seconds"] > 0 and data["bytes_read"] > 0


def test_threads_and_block_change_nothing(merge: Merge, folder: Path):
    shards = []
    for number, arguments in enumerate((["--threads", "1"], ["--threads", "2", "--block", "100000"])):
        ran = merge("run", "ties.yaml", "--json", "--out", f"out/{number}", *arguments)
        shards.append(ran.json["outputs"][0]["shards"])
    assert shards[0] == shards[1]


def test_a_lock_runs_to_the_same_bytes(merge: Merge, folder: Path):
    assert merge("run", "ties.yaml").code == 0
    ran = merge("run", "out/ties/recipe.lock.yaml", "--out", "out/again")
    assert (ran.code, ran.err) == (0, "")


def test_other_bytes_than_the_lock_says(merge: Merge, folder: Path):
    assert merge("run", "ties.yaml").code == 0
    lock = Path("out/ties/recipe.lock.yaml").read_text(encoding="utf-8")
    digest = blake3(Path("out/ties/model.safetensors").read_bytes()).hexdigest()
    assert lock.count(digest) == 1
    Path("lock.yaml").write_text(lock.replace(digest, "f" * 64), encoding="utf-8")
    ran = merge("run", "lock.yaml", "--out", "out/again", "--json")
    assert (ran.code, ran.json["changed"]) == (1, ["model.safetensors"])
    assert ran.err.startswith("warning: the bytes differ from what the lock says: `model.safetensors`\nhint: ")


def test_another_input_than_the_lock_says(merge: Merge, folder: Path, tiny_checkpoint: Callable[..., Path]):
    assert merge("run", "ties.yaml").code == 0
    tiny_checkpoint(folder / "math", seed=77)
    ran = merge("run", "out/ties/recipe.lock.yaml", "--out", "out/again")
    assert ran.code == 3
    assert ran.err.startswith("error: `model.safetensors` of `math` has other content than when the lock was made\n")
    assert not Path("out/again").exists()


def spoil(path: Path, **changes: float) -> None:
    """Set the first number of some tensors of a checkpoint."""
    tensors = load_file(path)
    for name, value in changes.items():
        tensors[f"model.layers.0.{name}.weight"].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})


def test_nonfinite_numbers_are_counted(merge: Merge, folder: Path):
    Path("soup.yaml").write_text(SOUP, encoding="utf-8")
    spoil(Path("math/model.safetensors"), **{"mlp.up_proj": float("nan"), "self_attn.q_proj": float("inf")})
    ran = merge("run", "soup.yaml", "--json")
    assert ran.code == 0
    names = [name.rpartition(":")[2] for name in ran.json["nonfinite"]]
    assert sorted(names) == ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert set(ran.json["nonfinite"].values()) == {1}
    assert ran.err.startswith("warning: the inputs hold 2 NaN or infinite numbers: `")
    assert "model.layers.0.mlp.up_proj.weight` (1)" in ran.err
    assert ran.json["warnings"][0]["hint"] == "`--strict` stops there instead"


def test_strict_stops_at_them(merge: Merge, folder: Path):
    Path("soup.yaml").write_text(SOUP, encoding="utf-8")
    spoil(Path("math/model.safetensors"), **{"mlp.up_proj": float("nan")})
    ran = merge("run", "soup.yaml", "--strict")
    assert (ran.code, ran.out) == (4, "")
    assert "model.layers.0.mlp.up_proj.weight" in ran.err
    assert not Path("out/soup").exists()


def test_numbers_out_of_range_are_counted(merge: Merge, folder: Path):
    Path("soup.yaml").write_text(SOUP.replace("out/soup", "out/soup, dtype: float16"), encoding="utf-8")
    spoil(Path("math/model.safetensors"), **{"mlp.up_proj": 1e9})
    ran = merge("run", "soup.yaml", "--json")
    assert (ran.code, ran.json["overflow"]) == (0, {"model.layers.0.mlp.up_proj.weight": 1})
    assert "1 number out of the range of the dtype saved in: `model.layers.0.mlp.up_proj.weight` (1)" in ran.err


def test_nothing_to_resume(merge: Merge, folder: Path):
    ran = merge("run", "ties.yaml", "--resume")
    assert (ran.code, ran.out) == (5, "")
    assert ran.err.startswith("error: there is no unfinished run in `out/ties.partial` to resume\nhint: ")


def test_an_unfinished_run_is_not_overwritten(merge: Merge, folder: Path):
    Path("out/ties.partial").mkdir(parents=True)
    Path("out/ties.partial/something").write_text("x", encoding="utf-8")
    ran = merge("run", "ties.yaml", "--json")
    assert (ran.code, ran.json["error"]["exit_code"]) == (5, 5)
    assert "`--resume` goes on with it" in ran.err


def test_a_damaged_input(merge: Merge, folder: Path):
    path = Path("math/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    ran = merge("run", "ties.yaml")
    assert (ran.code, ran.out) == (4, "")
    assert "math/model.safetensors" in ran.err
    assert not Path("out").exists()


def test_strange_tensor_names_cannot_drive_the_terminal(
    merge: Merge, folder: Path, tiny_checkpoint: Callable[..., Path]
):
    for seed, name in enumerate(("math", "code")):
        tiny_checkpoint(folder / name, {"\x1b[31mred[bold]": (2, 2)}, seed=seed)
    tensors = {"\x1b[31mred[bold]": torch.tensor([[float("nan"), 1], [1, 1]])}
    save_file(tensors, folder / "math" / "model.safetensors", {"format": "pt"})
    Path("soup.yaml").write_text(SOUP, encoding="utf-8")
    for arguments in (
        ["plan", "soup.yaml", "--tensors"],
        ["plan", "soup.yaml", "--json"],
        ["run", "soup.yaml", "--json"],
    ):
        ran = merge(*arguments)
        assert ran.code == 0
        assert "red[bold]" in ran.out
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", ran.err + ran.out)
    assert "\\x1b[31mred[bold]` (1)" in ran.err
    assert any("\x1b[31mred[bold]" in name for name in json.loads(ran.out)["nonfinite"])


@pytest.mark.parametrize("arguments", [["--out", "math"], ["--out", "math/inside"]])
def test_an_output_inside_an_input_is_refused(merge: Merge, folder: Path, arguments: list[str]):
    ran = merge("run", "ties.yaml", *arguments)
    assert ran.code == 3
    assert "lies inside the input" in ran.err


@pytest.mark.parametrize(
    "done, seen", [(1, (1, 1)), (191, (1, 191)), (192, (1, 192)), (193, (2, 1)), (384, (2, 192)), (400, (3, 16))]
)
def test_the_display_counts_passes(done: int, seen: tuple[int, int]):
    progress = Progress("measure", "m", "m", done, 192, 0, 192, 0, 0, 10**9)
    assert passes(progress) == seen
    assert detail_of(progress, 2.1e9) == f"{seen[1]}/192  pass {seen[0]}  2.1 GB/s"
    assert label(progress) == "measure m"


def test_the_display_names_step_and_shard():
    progress = Progress("merge", "layers.0.weight", "merged", 10**9, 10**10, 201, 291, 2, 3, 10**9)
    assert label(progress) == "merged"
    assert detail_of(progress, 1.9e9) == "201/291  shard 2/3  1.9 GB/s"


def test_the_display_shows_a_long_iteration():
    progress = Progress("merge", "layers.0.weight", "merged", 10**9, 10**10, 201, 291, 2, 3, 10**9, (120, 300))
    assert detail_of(progress, 0.0) == "201/291  shard 2/3  iteration 120/300"
