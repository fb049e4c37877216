"""The models of eight tasks in a mask store on disk (`make reproduce`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from eight_merges import Bench, Settings
from safetensors.torch import load_file, save_file

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.report.store import look_at_store


def store(bench: Bench) -> dict[str, float]:
    """A mask store of all tasks on disk: its bytes in percent of as many checkpoints, those that it would take if each
    task's masks were coded by their entropy, those that it takes with `compress`, and the normalised accuracy of the
    models that are read back from the latter. Raises ValueError where the plain store gives other models."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("base", *bench.tasks):
            (place / name).mkdir()
            save_file(bench.models[name], place / name / "model.safetensors")
        models = {name: str(place / name) for name in ("base", *bench.tasks)}
        steps: dict[str, Any] = {f"of_{t}": {"use": "delta", "of": t, "base": "base"} for t in bench.tasks}
        steps["multi"] = {"use": "linear", "of": list(steps), "with": {"normalize": False}}
        saved: Settings = {"step": "multi", "as": "masks", "base": "base", "tasks": bench.tasks}
        saved["threshold"] = bench.thresholds
        _save(place, models, steps, {**saved, "to": str(place / "store")})
        _save(place, models, steps, {**saved, "compress": "zstd", "to": str(place / "compressed")})
        seen = look_at_store(open_checkpoint(str(place / "store"), None), masks=True)
        small = look_at_store(open_checkpoint(str(place / "compressed"), None))
        assert seen is not None and seen.coded is not None and small is not None
        found = {}
        for task in bench.tasks:
            for kind in ("store", "compressed"):
                out = place / "again" / kind / task
                _save(place, {"m": f"{place / kind}#{task}"}, {}, {"step": "m", "to": str(out)})
            plain, found[task] = (
                load_file(place / "again" / kind / task / "model.safetensors") for kind in ("store", "compressed")
            )
            if any(not torch.equal(plain[name], value) for name, value in found[task].items()):
                raise ValueError(f"the two stores give other models for `{task}`")
        return {
            "stored": 100 * seen.nbytes / seen.apart,
            "coded": 100 * seen.coded / seen.apart,
            "compressed": 100 * small.nbytes / small.apart,
            "from the store": bench.normalized(found, "test"),
        }


def _save(place: Path, models: Mapping[str, str], steps: Mapping[str, Any], save: Settings) -> None:
    path = place / "recipe.yaml"
    data = {"version": 1, "models": dict(models), "steps": dict(steps), "save": dict(save)}
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    run(plan(load_recipe(path), threads=1), threads=1)
