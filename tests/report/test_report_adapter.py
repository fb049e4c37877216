"""`merge doctor` on adapters: a sound one passes, each damage fails the check that is about it, and the lock counts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_lite
from mergekit_lite.report.health import health

sys.path.append(str(Path(__file__).parents[1]))
from adapter_files import factors, write_adapter

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
WEIGHTS = "adapter_model.safetensors"
Checkpoint = Callable[..., Path]


def verdicts(folder: Path) -> dict[str, str]:
    return {check.name: check.verdict for check in health(str(folder))}


def adapter(folder: Path) -> Path:
    return write_adapter(folder, factors({Q: (8, 8), UP: (16, 8)}), base_model_name_or_path="org/base")


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Damage: another tensor of this name, or none."""
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"base_model.model.{name}"]
    save_file({**tensors, **({} if tensor is None else {f"base_model.model.{name}": tensor})}, folder / WEIGHTS)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a NaN": (lambda f: change(f, f"{Q}.lora_B.weight", torch.full((8, 4), float("nan"))), "numbers"),
    "a factor alone": (lambda f: change(f, f"{Q}.lora_A.weight", None), "adapter"),
    "factors of two ranks": (lambda f: change(f, f"{Q}.lora_A.weight", torch.ones(3, 8)), "ranks"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "adapter"),
    "another kind": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}'), "adapter"),
    "a cut file": (cut, "adapter"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "adapter"),
}


def test_a_sound_adapter(tmp_path: Path) -> None:
    checks = list(health(str(adapter(tmp_path / "a"))))
    assert {check.verdict for check in checks} == {"ok"}
    told = {check.name: check.detail for check in checks}
    assert list(told) == ["weights", "adapter", "ranks", "base", "numbers"]
    assert told["adapter"].startswith("LoRA, 2 modules") and told["ranks"] == "4" and "`org/base`" in told["base"]


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(tmp_path: Path, name: str) -> None:
    damage, wanted = DAMAGE[name]
    folder = adapter(tmp_path / "a")
    damage(folder)
    found = verdicts(folder)
    assert [check for check, verdict in found.items() if verdict == "fail"] == [wanted]


def test_an_adapter_without_the_name_of_its_base(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", factors({Q: (8, 8)}))
    assert verdicts(folder)["base"] == "warn"


def test_every_byte_of_an_adapter_is_heard_of(tmp_path: Path) -> None:
    heard: list[int] = []

    def start(total: int) -> Callable[[int], None]:
        heard.append(-total)
        return heard.append

    list(health(str(adapter(tmp_path / "a")), start=start))
    assert sum(heard) == 0 and heard[0] == -4 * (4 * 8 + 8 * 4 + 4 * 8 + 16 * 4)


def test_an_adapter_that_a_run_saved(tmp_path: Path, tiny_checkpoint: Checkpoint) -> None:
    """Its lock is held against it; a changed byte of its weights is seen though all numbers stay finite."""
    base, tuned = (tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "tuned")))
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(
        f"version: 1\nmodels: {{base: {base}, tuned: {tuned}}}\nsteps: {{m: {{use: delta, of: tuned, base: base}}}}\n"
        f"save: {{to: {out}, as: lora, base: base, rank: 2, targets: ['*q_proj.weight']}}\n"
    )
    mergekit_lite.run(mergekit_lite.plan(mergekit_lite.load_recipe(recipe)))
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert set(verdicts(out).values()) == {"ok"} and verdicts(out)["lock"] == "ok"
    data = bytearray((out / WEIGHTS).read_bytes())
    data[-4] ^= 1
    (out / WEIGHTS).write_bytes(data)
    assert {check: verdict for check, verdict in verdicts(out).items() if verdict != "ok"} == {"lock": "fail"}
