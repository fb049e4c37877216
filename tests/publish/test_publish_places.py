"""What is pushed names no folder of the machine that pushes, and is a merge that others can repeat."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_process import Ran
from safetensors.torch import load_file, save_file
from server import Hub

from mergekit_lite.report.verify import verify
from tests.adapter_files import factors, write_adapter

Merge = Callable[..., Ran]
# Words that stand in no pushed file: the folders above the models.
PRIVATE = ("acme-takeover", "jane-doe", "scratch-disk")
SHAPES = {f"model.layers.{n}.mlp.{part}_proj": (24, 16) for n in range(2) for part in ("gate", "up")}
DARE = "use: dare_linear, base: {base}, of: [{one}, {two}], with: {{drop_rate: 0.5}}"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine: models in the user's home and on a disk, work in a folder of the home. Returns the folder of work."""
    home, disk = tmp_path / "jane-doe", tmp_path / "scratch-disk"
    places = [home / "acme-takeover" / "base", home / "acme-takeover" / "math", disk / "acme-takeover" / "math"]
    for seed, place in enumerate([*places, home / "merges" / "near"]):
        place.mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
        config |= {"_name_or_path": str(place)}
        (place / "config.json").write_text(json.dumps(config))
        notes = {"tokenizer_class": "T", "name_or_path": str(place), "tokenizer_file": f"{place}/tokenizer.json"}
        (place / "tokenizer_config.json").write_text(json.dumps(notes))
    write_adapter(disk / "acme-takeover" / "lora", factors(SHAPES), base_model_name_or_path=str(places[0]))
    monkeypatch.setenv("HOME", str(home))
    return home / "merges"


@pytest.fixture
def work(disk: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of work, as the current one."""
    monkeypatch.chdir(disk)
    return disk


def recipes(root: Path) -> dict[str, str]:
    """Recipes, by name, that name models in every way."""
    math, far = f"{root}/jane-doe/acme-takeover/math", f"{root}/scratch-disk/acme-takeover/math"
    named = f"version: 1\nmodels:\n  base: ../acme-takeover/base\n  one: ~/acme-takeover/math\n  two: {far}\n"
    lora = f"{root}/scratch-disk/acme-takeover/lora"
    return {
        "named": f"{named}steps: {{m: {{{DARE.format(base='base', one='one', two='two')}}}}}\nsave: {{to: out}}\n",
        "in place": (
            f"version: 1\nsteps: {{m: {{{DARE.format(base='../acme-takeover/base', one=math, two=far)}}}}}\n"
            f"save: {{to: {root}/jane-doe/merges/out}}\n"
        ),
        "adapter": (
            f"version: 1\nmodels: {{m: {{path: {math}, adapter: {lora}}}, base: {math}}}\n"
            "steps: {s: {use: linear, of: [m]}}\nsave: {to: out, as: lora, base: base, rank: 4}\n"
        ),
        "order": (
            f"{named}steps: {{p: {{use: permute, of: {math}, like: base}}, m: {{use: linear, of: [p, two]}}}}\n"
            "save: {to: out}\n"
        ),
        "remark": f"# made of {far}/model.safetensors\n{named}steps: {{m: {{use: linear, of: [one, two]}}}}\n",
        "mergekit": (
            f"merge_method: linear\nmodels: [{{model: {math}+{lora}}}, {{model: {far}}}]\n"
            "parameters: {weight: 0.5}\ndtype: float32\n"
        ),
        "two": (
            f"{named}steps: {{m: {{use: linear, of: [one, two]}}}}\n"
            f"save:\n- {{step: m, to: out}}\n- {{step: m, to: {root}/scratch-disk/other}}\n"
        ),
    }


NAMES = list(recipes(Path()))


def pushed(hub: Hub, repo: str) -> dict[str, bytes]:
    return {name: file.read(0, file.size) for name, file in hub.repos[repo].files.items() if name != ".gitattributes"}


@pytest.mark.parametrize("name", NAMES)
def test_no_folder_of_this_machine_is_pushed(name: str, hub: Any, merge: Merge, work: Path, tmp_path: Path) -> None:
    (work / "r.yaml").write_text(recipes(tmp_path)[name])
    out = [] if name in ("two", "in place") else ["--out", "out"]
    # Set, and set again: neither folder is to be seen.
    sets = [f"models.two={tmp_path}/scratch-disk/acme-takeover/{last}" for last in ("none", "math")]
    words = [word for text in sets for word in ("--set", text)] if name in ("named", "order") else []
    ran = merge("run", "r.yaml", *out, *words)
    assert ran.code == 0, ran.err
    before = {path: path.read_bytes() for path in (work / "out").rglob("*") if path.is_file()}
    ran = merge("push", "out", "me/x")
    assert ran.code == 0 and "are pushed by their names alone" in ran.err, ran.err
    files = pushed(hub, "me/x")
    for file, data in files.items():
        for word in (*PRIVATE, str(tmp_path), "work/out", os.sep + "none"):
            assert word.encode() not in data, (file, word)
    assert before == {path: path.read_bytes() for path in (work / "out").rglob("*") if path.is_file()}
    assert merge("verify", "out", "--inputs").code == 0
    # What others download is whole by its own lock, and a second push sends nothing.
    there = tmp_path / "there"
    for file, data in files.items():
        (there / file).parent.mkdir(parents=True, exist_ok=True)
        (there / file).write_bytes(data)
    found = verify(str(there))
    assert (found.faults, found.notes, found.sealed) == ((), (), True)
    assert "nothing has changed" in merge("push", "out", "me/x").out


@pytest.mark.parametrize("name", NAMES)
def test_the_pushed_lock_makes_the_same_bytes_elsewhere(
    name: str, hub: Any, merge: Merge, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine the parents lie beside the lock, by the names that it gives them."""
    (work / "r.yaml").write_text(recipes(tmp_path)[name])
    assert merge("run", "r.yaml", *([] if name in ("two", "in place") else ["--out", "out"])).code == 0
    assert merge("push", "out", "me/x").code == 0
    # The lock here finds its inputs from any folder, save for those that it names from this one.
    if name == "mergekit":
        monkeypatch.chdir(tmp_path)
    assert merge("run", str(work / "out" / "recipe.lock.yaml"), *elsewhere(name, "again")).code == 0
    machine = tmp_path / "machine"
    machine.mkdir()
    (machine / "recipe.lock.yaml").write_bytes(pushed(hub, "me/x")["recipe.lock.yaml"])
    # Which of two folders of one name is which stands in the order of the recipe.
    second = "math-2" if name in ("named", "in place", "order", "remark", "mergekit", "two") else "none"
    for here, last in (
        (tmp_path / "jane-doe" / "acme-takeover" / "base", "base"),
        (tmp_path / "jane-doe" / "acme-takeover" / "math", "math"),
        (tmp_path / "scratch-disk" / "acme-takeover" / "math", second),
        (tmp_path / "scratch-disk" / "acme-takeover" / "lora", "lora"),
    ):
        shutil.copytree(here, machine / last)
    monkeypatch.chdir(machine)
    ran = merge("run", "recipe.lock.yaml", *elsewhere(name, "merged"))
    assert ran.code == 0, ran.err
    for path in (work / "out").glob("*.safetensors"):
        assert (machine / "merged" / path.name).read_bytes() == path.read_bytes()


def elsewhere(name: str, to: str) -> list[str]:
    if name != "two":
        return ["--out", to]
    return ["--set", f"save.0.to={to}", "--set", f"save.1.to={to}-2"]


def test_parents_may_be_named_by_set(hub: Any, merge: Merge, work: Path, tmp_path: Path) -> None:
    """As the card says: the bytes do not depend on where the parents lie."""
    (work / "r.yaml").write_text(recipes(tmp_path)["named"])
    assert merge("run", "r.yaml").code == 0 and merge("push", "out", "me/x").code == 0
    files = pushed(hub, "me/x")
    assert b"--set models." in files["README.md"]
    (work / "their.yaml").write_bytes(files["recipe.lock.yaml"])
    sets = {"base": "jane-doe/acme-takeover/base", "one": "jane-doe/acme-takeover/math"}
    sets["two"] = "scratch-disk/acme-takeover/math"
    words = [word for name, place in sets.items() for word in ("--set", f"models.{name}={tmp_path}/{place}")]
    ran = merge("run", "their.yaml", *words, "--out", "again")
    assert ran.code == 0, ran.err
    assert load_file("again/model.safetensors").keys() == load_file("out/model.safetensors").keys()


def test_what_names_nothing_is_pushed_as_it_is(hub: Any, merge: Merge, work: Path) -> None:
    """Paths below the folder of work, remarks and all."""
    (work / "r.yaml").write_text(
        "# a remark, see /no/such/place\nversion: 1\nmodels: {m: near}\nsave: {step: m, to: out}\n"
    )
    assert merge("run", "r.yaml").code == 0
    ran = merge("push", "out", "me/x")
    assert ran.code == 0 and "names alone" not in ran.err
    files = pushed(hub, "me/x")
    for path in (work / "out").iterdir():
        assert path.name == "README.md" or files[path.name] == path.read_bytes()
    assert "_name_or_path" not in json.loads(files["config.json"])
    assert json.loads(files["tokenizer_config.json"]) == {"tokenizer_class": "T"}
