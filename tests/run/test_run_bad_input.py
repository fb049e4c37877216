"""Bad input, one by one, through the command line: the exit code, what the message names, and that nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lite import InputError, StoppedError, load_recipe, plan, run
from mergekit_lite.cli.app import execute
from mergekit_lite.run import start

UP = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"
LINEAR = "m: {use: linear, of: [a, b]}"
TIES = "m: {use: ties, base: base, of: [a, b]}"


@dataclass
class Place:
    """A folder with the checkpoints `base`, `a` and `b`, and the commands run there."""

    folder: Path
    output: Callable[[], Any]

    def recipe(self, steps: str, save: str = "to: out/m", extra: str = "") -> None:
        text = f"version: 1\n{extra}models: {{base: ./base, a: ./a, b: ./b}}\nsteps:\n  {steps}\nsave: {{{save}}}\n"
        (self.folder / "r.yaml").write_text(text, encoding="utf-8")

    def run(self, *flags: str) -> tuple[int, str]:
        """Exit code and stderr of `merge run r.yaml`; stdout must be empty unless the run has succeeded."""
        self.output()
        code = execute(["run", "r.yaml", *flags])
        out, err = self.output()
        assert bool(out) == (code == 0), out
        return code, err

    def refused(self, code: int, *says: str, flags: tuple[str, ...] = ()) -> str:
        """Run, be refused, and find every file and folder as it was."""
        before = tree(self.folder)
        found, err = self.run(*flags)
        assert found == code, err
        for text in says:
            assert text in err, err
        assert "\nhint: " in err
        assert tree(self.folder) == before
        return err

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / WEIGHTS)

    def change(self, name: str, **changes: torch.Tensor | None) -> None:
        """Replace tensors of a checkpoint, or with None remove them; `__` stands for a dot."""
        tensors = self.tensors(name)
        for key, value in changes.items():
            full = key.replace("__", ".")
            tensors.pop(full, None)
            if value is not None:
                tensors[full] = value
        save_file(tensors, self.folder / name / WEIGHTS, {"format": "pt"})

    def header(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Write another header before the same data."""
        path = self.folder / name / WEIGHTS
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    def config(self, name: str, **changes: Any) -> None:
        path = self.folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def tree(folder: Path) -> dict[str, str]:
    """Every path below `folder` with the SHA-256 of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_checkpoint: Callable[..., Path],
) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    for seed, name in enumerate(("base", "a", "b")):
        tiny_checkpoint(tmp_path / name, seed=seed)
    made = Place(tmp_path, capsys.readouterr)
    made.recipe(LINEAR)
    return made


# Files that are not what they say


@pytest.mark.parametrize("cut", [1, 100, 2500])
def test_a_truncated_shard(cut: int, place: Place) -> None:
    path = place.folder / "a" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-cut])
    place.refused(4, f"`./a/{WEIGHTS}` is truncated: {cut} of ", "r.yaml:2:")


def test_a_shard_cut_inside_its_header(place: Place) -> None:
    path = place.folder / "a" / WEIGHTS
    path.write_bytes(path.read_bytes()[:40])
    place.refused(4, f"`./a/{WEIGHTS}` is truncated inside its header")


def test_a_header_longer_than_the_file(place: Place) -> None:
    path = place.folder / "a" / WEIGHTS
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    place.refused(4, f"`./a/{WEIGHTS}` claims a header of {2**62} bytes")


def test_a_tensor_whose_length_is_not_its_shape(place: Place) -> None:
    place.header("a", lambda header: header[UP].update(shape=[17, 8]))
    place.refused(4, UP, f"./a/{WEIGHTS}")


def test_tensors_that_overlap(place: Place) -> None:
    def overlap(header: dict[str, Any]) -> None:
        begin, end = header[UP]["data_offsets"]
        header[UP]["data_offsets"] = [begin - 16, end - 16]

    place.header("a", overlap)
    place.refused(4, f"tensor `{UP}` in `./a/{WEIGHTS}` overlaps")


def test_a_dtype_that_does_not_exist(place: Place) -> None:
    place.header("a", lambda header: header[UP].update(dtype="F23"))
    place.refused(4, UP, "F23", f"./a/{WEIGHTS}")


def shard(place: Place, name: str) -> None:
    """Put a checkpoint into two shards with an index."""
    tensors = place.tensors(name)
    (place.folder / name / WEIGHTS).unlink()
    half = len(tensors) // 2
    weight_map = {}
    for number, part in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, place.folder / name / file)
        weight_map |= dict.fromkeys(part, file)
    index = place.folder / name / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize("outside", ["../b/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "C:\\x"])
def test_an_index_that_names_a_file_outside_its_folder(outside: str, place: Place) -> None:
    shard(place, "a")
    index = place.folder / "a" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][UP] = outside
    index.write_text(json.dumps(data), encoding="utf-8")
    place.refused(4, "names a file outside its folder", outside)


def test_a_shard_that_links_outside_its_folder(place: Place) -> None:
    path = place.folder / "a" / WEIGHTS
    path.unlink()
    path.symlink_to(place.folder / "b" / WEIGHTS)
    place.refused(4, f"a/{WEIGHTS}` is a link to", "outside its folder")


def test_a_missing_shard(place: Place) -> None:
    shard(place, "a")
    (place.folder / "a" / "model-00002-of-00002.safetensors").unlink()
    place.refused(4, "`./a` lacks 1 of its 2 shards: model-00002-of-00002.safetensors")


def test_every_damaged_input_is_named_at_once(place: Place) -> None:
    for name in ("a", "b"):
        path = place.folder / name / WEIGHTS
        path.write_bytes(path.read_bytes()[:-1])
    place.refused(4, f"`./a/{WEIGHTS}` is truncated", f"`./b/{WEIGHTS}` is truncated")


def test_pickled_weights_are_not_read(place: Place) -> None:
    (place.folder / "a" / WEIGHTS).unlink()
    (place.folder / "a" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    place.refused(4, "`./a` holds pickled weights")


# Models that do not go together


def test_models_of_different_shapes(place: Place) -> None:
    place.change("b", **{UP.replace(".", "__"): torch.zeros(15, 8)})
    place.refused(3, UP, "`b` and `a` have different shapes (15×8 and 16×8)", "r.yaml:4:")


def test_a_model_that_lacks_a_tensor(place: Place) -> None:
    place.recipe(TIES)
    place.change("b", **{UP.replace(".", "__"): None})
    err = place.refused(3, f"`b` lacks tensors that others of `m` have: `{UP}`", "r.yaml:4:")
    assert "`missing: base`" in err


@pytest.mark.parametrize("policy", ["base", "skip", "zero_delta"])
def test_what_to_do_with_missing_tensors(policy: str, place: Place) -> None:
    place.recipe(f"m: {{use: task_arithmetic, base: base, of: [a, b], with: {{lambda: 1}}, missing: {policy}}}")
    place.change("b", **{UP.replace(".", "__"): None})
    code, err = place.run()
    assert code == 0, err
    base, a, b, ours = (place.tensors(name) for name in ("base", "a", "b", "out/m"))
    expected = {n: base[n] + (a[n] - base[n]) + (b[n] - base[n]) for n in b}
    if policy == "base":
        expected[UP] = base[UP]
    elif policy == "zero_delta":
        expected[UP] = base[UP] + (a[UP] - base[UP])
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_base_that_lacks_a_tensor(place: Place) -> None:
    place.recipe("m: {use: task_arithmetic, base: base, of: [a, b], with: {lambda: 1}, missing: base}")
    place.change("base", **{UP.replace(".", "__"): None})
    place.refused(3, f"`base` lacks tensors that others of `m` have: `{UP}`", "`missing: skip`")


def test_integers_where_others_hold_numbers(place: Place) -> None:
    place.change("b", **{UP.replace(".", "__"): torch.ones(16, 8, dtype=torch.int32)})
    place.refused(3, "`b` stores as I32 what `a` stores as numbers", UP)


def test_buffers_of_integers_are_those_of_the_base(place: Place) -> None:
    place.recipe(TIES)
    for name, first in (("base", 0), ("a", 5), ("b", 9)):
        buffers = {
            "model__position_ids": torch.arange(first, first + 4),
            "model__mask": torch.tensor([first > 5, True]),
        }
        place.change(name, **buffers)
    assert place.run()[0] == 0
    ours = place.tensors("out/m")
    assert torch.equal(ours["model.position_ids"], torch.arange(4))
    assert torch.equal(ours["model.mask"], torch.tensor([False, True]))


def test_a_quantised_checkpoint(place: Place) -> None:
    place.config("a", quantization_config={"quant_method": "awq"})
    place.refused(3, "`a` is quantised: its numbers are codes", "r.yaml:4:")
    place.recipe("m: {use: stack, of: [a]}", save="to: out/m, dtype: float16")
    place.refused(3, "`m` is quantised: its numbers are codes", "r.yaml:5:")
    place.recipe("m: {use: stack, of: [a]}")
    assert place.run()[0] == 0
    assert (place.folder / "out/m" / WEIGHTS).stat().st_size > 0


def test_two_tensors_that_the_configuration_calls_one(place: Place) -> None:
    place.config("a", tie_word_embeddings=True)
    place.config("b", tie_word_embeddings=True)
    place.refused(4, "`lm_head.weight` and `model.embed_tokens.weight` differ", f"a/{WEIGHTS}", f"b/{WEIGHTS}")
    for name in ("a", "b"):
        place.change(name, lm_head__weight=place.tensors(name)["model.embed_tokens.weight"].clone())
    assert place.run()[0] == 0
    assert "lm_head.weight" not in place.tensors("out/m")


# Recipes that make no model


@pytest.mark.parametrize(
    "steps, says",
    [
        (
            "d: {use: delta, of: a, base: base}\n  m: {use: ties, base: d, of: [b]}",
            "`d` is a delta and cannot be a base",
        ),
        ("m: {use: add, of: a, base: base}", "`add` takes deltas, `a` is a whole model"),
        ("m: {use: delta, of: a, base: base}", "`m` is a delta, not a model to save"),
        (
            "d: {use: delta, of: a, base: base}\n  m: {use: linear, of: [b, d]}",
            "`d` is a delta, `b` is a weight",
        ),
        ("m: {use: ties, of: [a, b]}", "`ties` takes deltas, `a` is a whole model"),
        (
            'm: {use: ties, base: base, of: [a, b], with: {scope: global, density: {"*.mlp.*": 0.1, else: 0.3}}}',
            "measures all tensors at once, so its settings cannot differ between tensors",
        ),
        (
            "m: {use: ties, base: base, of: [a, b], with: {scope: global, density: {across: [0.1, 0.3], else: 1}}}",
            "measures all tensors at once, so its settings cannot differ between tensors",
        ),
        ("m: {use: slerp, of: [a, b], with: {t: {across: [0, 1]}}}", "no rule of `t` applies to"),
        ("m: {use: stack, of: [{model: a, layers: [0, 3]}]}", "`a` has layers 0 to 1, `layers` asks for [0, 3)"),
    ],
)
def test_steps_that_cannot_be(steps: str, says: str, place: Place) -> None:
    place.recipe(steps)
    place.refused(3, says, "--> r.yaml:")


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("null\n", "r.yaml"),
        ("- a\n- b\n", "list"),
        ("just words\n", "text"),
        ("42\n", "number"),
        ("version: 1\nmodels: {a: ./a}\nmodels: {b: ./b}\n", "r.yaml:3:1"),
        ("version: 1\n---\nversion: 1\n", "r.yaml:2:1"),
        ("version: 1\nmodels: [a, b]\nsteps: 3\n", "r.yaml:2:"),
        ("a: &x [1]\nb: {<<: *x}\n", "r.yaml:"),
        ("a: !!python/object/apply:os.system ['touch pwned']\n", "r.yaml:1:"),
        ("kind: Pod\napiVersion: v1\n", "apiVersion"),
        ("version: 1\nmodels: {a: ./a\n", "r.yaml:"),
        ("\0\1\2", "r.yaml"),
    ],
)
def test_recipes_that_are_none(text: str, says: str, place: Place) -> None:
    (place.folder / "r.yaml").write_text(text, encoding="utf-8")
    place.refused(3, says, "r.yaml")


def test_a_glob_that_matches_nothing_is_warned_of(place: Place) -> None:
    place.recipe('m: {use: slerp, of: [a, b], with: {t: {"*.mpl.*": 0.1, else: 0.5}}}')
    code, err = place.run()
    assert code == 0
    assert err.startswith("warning: `*.mpl.*` matches no tensor, so this value of `t` is never used\n  --> r.yaml:4:")


# Where the output goes


def test_an_output_folder_that_holds_something(place: Place) -> None:
    (place.folder / "out/m").mkdir(parents=True)
    (place.folder / "out/m/mine.txt").write_text("mine", encoding="utf-8")
    place.refused(3, "the output folder `out/m` exists and is not empty", "r.yaml:5:")
    (place.folder / "out/m/mine.txt").unlink()
    assert place.run()[0] == 0


def test_an_output_that_is_a_file(place: Place) -> None:
    (place.folder / "out").write_text("mine", encoding="utf-8")
    place.refused(3, "the output `out/m` lies below a file: `out`")
    place.recipe(LINEAR, save="to: out")
    place.refused(3, "the output `out` exists and is not a folder")


@pytest.mark.parametrize("to", ["a", "a/merged", "./a/../a/x/y", "link/z"])
def test_an_output_inside_an_input(to: str, place: Place) -> None:
    (place.folder / "link").symlink_to("b")
    place.recipe(LINEAR, save=f"to: {to}")
    place.refused(3, f"the output `{Path(to)}` lies inside the input", "r.yaml:5:")


def test_an_output_beside_an_input_of_one_file(place: Place) -> None:
    (place.folder / "r.yaml").write_text(
        "version: 1\nmodels: {a: a/model.safetensors, b: b/model.safetensors}\n"
        f"steps: {{{LINEAR}}}\nsave: {{to: a/merged}}\n",
        encoding="utf-8",
    )
    assert place.run()[0] == 0


@pytest.mark.parametrize("to", [".", "..", "x/.."])
def test_an_output_without_a_name(to: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = place.folder / "empty" / "inner"
    empty.mkdir(parents=True)
    monkeypatch.chdir(empty)
    recipe = f"version: 1\nmodels: {{a: {place.folder}/a}}\nsave: {{step: a, to: {to}}}\n"
    (place.folder / "r.yaml").write_text(recipe, encoding="utf-8")
    before = tree(place.folder)
    assert execute(["run", str(place.folder / "r.yaml")]) == 3
    assert "does not end in the name of a folder" in place.output()[1]
    assert tree(place.folder) == before


# Disks that are too small


@pytest.fixture
def small_disk(place: Place) -> Iterator[Path]:
    """A file system of 256 KiB; the test is skipped where none can be mounted."""
    disk = place.folder / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def large(place: Place) -> None:
    """Give the models a tensor of 400 KB."""
    for name in ("base", "a", "b"):
        place.change(name, large=torch.randn(100_000))


def test_a_disk_that_is_too_small(small_disk: Path, place: Place) -> None:
    large(place)
    place.recipe(LINEAR, save="to: disk/new/m")
    place.refused(5, "bytes free, the output needs 40", f"the disk of `{small_disk}`")


def test_too_little_room_for_all_outputs_together(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output would fit, both do not."""
    large(place)
    text = (place.folder / "r.yaml").read_text()
    saves = "save:\n  - {step: m, to: out/one}\n  - {step: m, to: out/two, dtype: float16}\n"
    (place.folder / "r.yaml").write_text(text[: text.index("save:")] + saves, encoding="utf-8")
    monkeypatch.setattr(start, "free_bytes", lambda path: 500_000)
    place.refused(5, "has 500,000 bytes free, the output needs 60")


def test_a_disk_that_fills_up_at_the_end(small_disk: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards fit, the tokenizer does not: the run is refused, or where somebody else took the room meanwhile it
    stops, and goes on once there is room."""
    place.recipe(LINEAR, save="to: disk/m")
    (place.folder / "a" / "tokenizer.json").write_bytes(b" " * 100_000)
    (small_disk / "other").write_bytes(b"x" * 200_000)
    place.refused(5, "bytes free, the output needs 10")
    with monkeypatch.context() as patch:
        patch.setattr(start, "free_bytes", lambda path: 1 << 30)
        code, err = place.run()
    assert code == 5 and "No space left on device" in err and "--resume" in err
    assert not (small_disk / "m").exists()
    (small_disk / "other").unlink()
    code, err = place.run("--resume")
    assert code == 0, err
    assert (small_disk / "m" / "tokenizer.json").stat().st_size == 100_000
    assert not (small_disk / "m.partial").exists()


def test_a_file_that_may_not_grow(place: Place) -> None:
    """What a quota does: space seems free, and cannot be had."""
    large(place)
    place.recipe(LINEAR, save="to: out/deep/m")
    before = tree(place.folder)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "mergekit_lite", "run", "r.yaml"],
        env=os.environ | {"PYTHONPATH": str(root)},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 5, done.stderr
    assert "cannot create `out/deep/m.partial/model.safetensors`" in done.stderr and "needs 40" in done.stderr
    assert tree(place.folder) == before


# Numbers that are none


def spoil(place: Place, name: str, tensor: str, *values: float) -> None:
    tensors = place.tensors(name)
    tensors[tensor].view(-1)[: len(values)] = torch.tensor(values)
    save_file(tensors, place.folder / name / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    "step", [LINEAR, TIES, "m: {use: slerp, of: [a, b], with: {t: 0.5}}", "m: {use: stack, of: [a]}"]
)
def test_nan_and_inf_are_counted(step: str, place: Place) -> None:
    place.recipe(step)
    spoil(place, "a", UP, float("nan"), float("inf"), -float("inf"))
    spoil(place, "a", "model.norm.weight", float("nan"))
    code, err = place.run()
    assert code == 0, err
    assert err.startswith("warning: the inputs hold 4 NaN or infinite numbers: ")
    assert f"a/{WEIGHTS}:{UP}` (3)" in err and f"a/{WEIGHTS}:model.norm.weight` (1)" in err


@pytest.mark.parametrize("step", [LINEAR, TIES, "m: {use: stack, of: [a]}"])
def test_strict_stops_at_them(step: str, place: Place) -> None:
    place.recipe(step)
    spoil(place, "a", UP, float("inf"))
    inputs = {name: tree(place.folder / name) for name in ("base", "a", "b")}
    code, err = place.run("--strict")
    assert code == 4
    assert f"`{UP}` in `{place.folder}/a/{WEIGHTS}` holds NaN or infinite numbers" in err
    assert not (place.folder / "out/m").exists()
    assert {name: tree(place.folder / name) for name in inputs} == inputs
    # Work had begun, and what is finished is good: without the flag the run goes on.
    assert place.run("--resume")[0] == 0


# Inputs that change


def test_an_input_that_changes_after_the_plan(place: Place) -> None:
    made = plan(load_recipe("r.yaml"))
    place.change("b", **{UP.replace(".", "__"): torch.zeros(16, 8)})
    before = tree(place.folder)
    with pytest.raises(InputError, match=r"b/model.safetensors` changed since it was planned"):
        run(made)
    assert tree(place.folder) == before


def test_an_input_that_goes_away_during_the_run(place: Place) -> None:
    for name in ("base", "a", "b"):
        place.change(name, large=torch.randn(2_000_000))
    made = plan(load_recipe("r.yaml"), threads=1)

    def shorten(progress: Any) -> None:
        os.truncate(place.folder / "b" / WEIGHTS, 100)

    with pytest.raises(InputError, match=r"b/model.safetensors`"):
        run(made, threads=1, progress=shorten)
    assert not (place.folder / "out/m").exists()
    with pytest.raises((InputError, StoppedError)):
        run(made, resume=True)
