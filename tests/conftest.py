"""What tests of several folders share."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
NAMES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (16, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}

# No test writes into the user's cache, its processes included.
os.environ["MERGEKIT_LITE_CACHE"] = "0"


@pytest.fixture
def tiny_checkpoint() -> Callable[..., Path]:
    """A function that writes a checkpoint of one file, `names` giving its tensors' shapes, and returns its folder:
    `tiny_checkpoint(folder, names=NAMES, dtype=torch.float32, seed=0, config=CONFIG)`."""

    def make(
        folder: Path,
        names: Mapping[str, tuple[int, ...]] = NAMES,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        config: Mapping[str, Any] | None = CONFIG,
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make


@dataclass(frozen=True)
class Demo:
    """The demo as `make demo` leaves it in `folder`, and what that printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`make demo` in a copy of the project, once for all workers, with this Python in place of a new environment."""
    here = tmp_path_factory.getbasetemp()
    shared = (here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "demo_of_documents"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "printed").exists():
            (shared / "printed").write_text(_make_demo(shared), encoding="utf-8")
    return Demo(shared, (shared / "printed").read_text(encoding="utf-8"))


def _make_demo(folder: Path) -> str:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("scripts", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, words in (("python", []), ("merge", ["-m", "mergekit_lite"])):
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *words])} "$@"\n')
        (tools / name).chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "VENV"))}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80", "NO_COLOR": "1"}
    printed = []
    # The statistics are what the recipes of `fisher` and `regmean` read, the experts what that of `merge_experts` does.
    experts = [sys.executable, "scripts/reproduce/expert_merges.py", "--seeds", "0", "--steps", "2"]
    for command in (
        ["make", "--no-print-directory", "demo"],
        [sys.executable, "scripts/statistics_digits.py"],
        experts,
    ):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return printed[0]
