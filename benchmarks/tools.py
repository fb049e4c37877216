"""The programs that are measured: this one, mergekit, sd-mecha. Each runs a case as a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml
from cases import SD_MECHA, Case
from process import Usage, clear, run, weight_files
from safetensors import safe_open
from safetensors.torch import save_file

MERGE = (sys.executable, "-m", "mergekit_lite")


class Tool(Protocol):
    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    def takes(self, case: Case) -> bool:
        """Whether the program has this merge."""
        ...

    def prepare(self, case: Case, models: Path) -> None:
        """What has to be there before the first run, outside of the measured time."""
        ...

    def merge(self, case: Case, models: Path, out: Path) -> Usage:
        """Merge the models and remove the result. Raises FailedRun."""
        ...


@dataclass(frozen=True)
class Ours:
    """`merge run`."""

    threads: int
    name: str = "mergekit_lite"

    def takes(self, case: Case) -> bool:
        return True

    def prepare(self, case: Case, models: Path) -> None:
        """Nothing has to be."""

    def merge(self, case: Case, models: Path, out: Path) -> Usage:
        target = out / "merged"
        recipe = write_recipe(case.recipe(models, target), out / "recipe.yaml")
        clear(target)
        used = run([*MERGE, "run", str(recipe), "--threads", str(self.threads)])
        clear(target)
        return used


@dataclass(frozen=True)
class Mergekit:
    """mergekit-yaml of another environment. `--lazy-unpickle` changes nothing for safetensors, `--async-write` costs
    memory, and `--low-cpu-memory` keeps tensors on an accelerator, so that none of them is of use here."""

    executable: Path
    threads: int
    dtype: str
    name: str = "mergekit"

    def takes(self, case: Case) -> bool:
        return case.mergekit(Path(), self.dtype) is not None

    def prepare(self, case: Case, models: Path) -> None:
        """Nothing has to be."""

    def merge(self, case: Case, models: Path, out: Path) -> Usage:
        target = out / "merged-mergekit"
        made = case.mergekit(models, self.dtype)
        assert made is not None
        recipe = write_recipe(made, out / "mergekit.yaml")
        clear(target)
        options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "-j", str(self.threads)]
        used = run([str(self.executable), str(recipe), str(target), *options], _clean())
        clear(target)
        return used


@dataclass(frozen=True)
class SdMecha:
    """sd-mecha of another environment, by sd_mecha_merge.py. It reads single files: they are made here, beside the
    models, on the first use."""

    python: Path
    threads: int
    name: str = "sd-mecha"

    def takes(self, case: Case) -> bool:
        return case.label in SD_MECHA

    def prepare(self, case: Case, models: Path) -> None:
        for name in case.inputs:
            single = self._single(models, name)
            if not single.exists():
                single.parent.mkdir(exist_ok=True)
                tensors = {}
                for file in weight_files([models / name]):
                    with safe_open(file, "pt") as opened:
                        tensors.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
                save_file(tensors, single)

    def merge(self, case: Case, models: Path, out: Path) -> Usage:
        target = out / "merged-sd-mecha.safetensors"
        clear(target)
        tuned = [str(self._single(models, name)) for name in case.inputs if name != "base"]
        base = ["--base", str(self._single(models, "base"))] if "base" in case.inputs else []
        script = str(Path(__file__).with_name("sd_mecha_merge.py"))
        command: Sequence[str] = [str(self.python), script, case.label, str(target), str(self.threads), *tuned, *base]
        used = run(command, _clean())
        clear(target)
        return used

    @staticmethod
    def _single(models: Path, name: str) -> Path:
        return models / "single" / f"{name}.safetensors"


def write_recipe(recipe: object, path: Path) -> Path:
    """A recipe as YAML, in the order of its keys."""
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _clean() -> dict[str, str]:
    """The environment without this program's import path, which is not that of the other one."""
    return {key: text for key, text in os.environ.items() if not key.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
