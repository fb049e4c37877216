"""Merge two tiny timm models with the command line's own functions and load the result with timm.

    python scripts/load_timm.py

timm needs torchvision in a build that fits torch's, so it is not among what the tests install: run this in an
environment that has both. Exits with 1 where the loaded model is not the mean of the two.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch

import mergekit_lite

SIZES = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 16}


def main() -> int:
    timm, hub = import_module("timm"), import_module("timm.models")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        models = []
        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            models.append(timm.create_model("vit_tiny_patch16_224", num_classes=3, **SIZES))
            hub.save_for_hf(models[-1], folder / name, model_args=SIZES, safe_serialization=True)
        (folder / "r.yaml").write_text(
            f"version: 1\nmodels: {{a: {folder / 'a'}, b: {folder / 'b'}}}\n"
            "steps: {m: {use: interpolate, of: [a, b], with: {t: 0.5}}}\n"
            f"save: {{to: {folder / 'out'}, shard: 10KB}}\n"
        )
        mergekit_lite.run(mergekit_lite.plan(mergekit_lite.load_recipe(folder / "r.yaml")))
        made = timm.create_model(f"local-dir:{folder / 'out'}", pretrained=True).state_dict()
        one, other = (model.state_dict() for model in models)
        far = max(float((made[name] - (one[name] + other[name]) / 2).abs().max()) for name in one)
    print(f"{len(made)} tensors, largest distance from the mean {far:g}")
    return int(made.keys() != one.keys() or far > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
