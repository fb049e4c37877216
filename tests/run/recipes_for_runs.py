"""Checkpoints large enough for many blocks, and recipes that take every way through the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lite import Result, load_recipe, plan, run

# Sizes that are no multiple of a block, one that is cut into several, a scalar, an empty one and a buffer of integers.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (300, 700),
    "model.layers.0.mlp.up_proj.weight": (190, 701),
    "model.layers.0.norm.weight": (701,),
    "model.layers.1.mlp.up_proj.weight": (190, 701),
    "model.layers.1.norm.weight": (701,),
    "model.layers.2.mlp.up_proj.weight": (190, 701),
    "model.layers.2.norm.weight": (701,),
    "model.scale": (),
    "model.nothing": (0, 5),
    "lm_head.weight": (300, 700),
}
CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": False}

# Every public method, every reach, chains of them, curves, globs, results used twice, several saves.
STEPS: Mapping[str, str] = {
    "linear": "m: {use: linear, of: {a: {weight: 0.2}, b: {weight: 0.3}, c: {weight: 1.5}}}",
    "interpolate": 'm: {use: interpolate, of: [a, b], with: {t: {"*.mlp.*": {across: [0.0, 0.9]}, else: 0.5}}}',
    "slerp": "m: {use: slerp, of: [a, b], with: {t: {across: [0.1, 0.9], else: 0.5}}}",
    "slerp_rows": "m: {use: slerp, of: [a, b], with: {t: 0.3, mode: row}}",
    "task_arithmetic": "m: {use: task_arithmetic, base: base, of: [a, b, c], with: {lambda: 0.4}}",
    "ties": "m: {use: ties, base: base, of: [a, b, c]}",
    "ties_by_tensor": "m: {use: ties, base: base, of: [a, b, c], with: {scope: tensor, zero_sign: majority}}",
    "dare_linear": "m: {use: dare_linear, base: base, of: [a, b], with: {drop_rate: 0.5}}",
    "dare_ties": "m: {use: dare_ties, base: base, of: [a, b, c], with: {drop_rate: 0.7}}",
    "breadcrumbs": "m: {use: breadcrumbs, base: base, of: [a, b], with: {density: 0.3, gamma: 0.05}}",
    "breadcrumbs_by_row": "m: {use: breadcrumbs, base: base, of: [a, b], with: {density: 0.3, scope: row}}",
    "breadcrumbs_ties": "m: {use: breadcrumbs_ties, base: base, of: [a, b, c], with: {density: 0.3, scope: global}}",
    "stack": "m: {use: stack, of: [{model: a, layers: [0, 2]}, {model: b, layers: [1, 3]}], rest: c}",
    "model_stock": "m: {use: model_stock, base: base, of: [a, b, c]}",
    "model_stock_by_row": "m: {use: model_stock, base: base, of: [a, b, c], with: {granularity: row}}",
    "nuslerp": "m: {use: nuslerp, base: base, of: {a: {weight: 0.3}, b: {weight: 0.7}}}",
    "karcher": "m: {use: karcher, of: [a, b, c]}",
    "geometric_median": "m: {use: geometric_median, of: [a, b, c]}",
    "della": "m: {use: della, base: base, of: [a, b, c], with: {density: 0.5}}",
    "sce": "m: {use: sce, base: base, of: [a, b, c], with: {select_topk: 0.3}}",
    "pcb": "m: {use: pcb, base: base, of: [a, b, c], with: {ratio: 0.2}}",
    "consensus": "m: {use: consensus, base: base, of: [a, b, c], with: {lambda: 0.3}}",
    "iso_c": "m: {use: iso_c, base: base, of: [a, b, c]}",
    "decompose": "m: {use: decompose, of: a, with: {rank: 9, share: 0.05, svd: randomised}}",
    "knots_global": "m: {use: knots, base: base, of: [a, b], with: {scope: global, rank: 20, svd: randomised}}",
    "tsv_m_randomised": "m: {use: tsv_m, base: base, of: [a, b], with: {rank_share: 0.02, svd: randomised}}",
    "staged": """
  da: {use: delta, of: a, base: base}
  db: {use: delta, of: b, base: base}
  sa: {use: sparsify, of: da, with: {density: 0.3, keep: largest}}
  sb: {use: sparsify, of: db, with: {density: 0.2, keep: random, rescale: true}}
  mixed: {use: interpolate, of: [sa, sb], with: {t: {across: [0.0, 1.0], else: 0.5}}}
  turned: {use: slerp, of: [a, c], with: {t: 0.4}}
  m: {use: add, base: turned, of: [mixed, sa]}""",
}


def write_models(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """`base`, `a`, `b` and `c` below `folder`; the fine-tunes lie near the base, as real ones do."""
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}
    for name in ("base", "a", "b", "c"):
        tensors = {
            key: (value if name == "base" else value + 0.01 * torch.randn(value.shape, generator=generator)).to(dtype)
            for key, value in base.items()
        }
        tensors["model.position_ids"] = torch.arange(12).reshape(3, 4) + len(name)
        write_folder(folder / name, tensors)
    return folder


def write_folder(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """A checkpoint in two shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    names = list(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def write_recipe(path: Path, models: Path, steps: str, to: Path, extra: str = "", save: str = "") -> Path:
    """A recipe over the models of `write_models`; `extra` are lines at its top, `save` more settings of the save."""
    names = ", ".join(f"{name}: {models / name}" for name in ("base", "a", "b", "c"))
    text = f"version: 1\nseed: 3\n{extra}models: {{{names}}}\nsteps:\n  {steps}\nsave: {{to: {to}, step: m{save}}}\n"
    path.write_text(text, encoding="utf-8")
    return path


def merged(path: Path, *, threads: int = 1, block: int | None = None) -> Result:
    """Load, plan and run a recipe."""
    return run(plan(load_recipe(path), threads=threads), threads=threads, block=block)


def digests(result: Result) -> list[str]:
    return [digest for files in result.shards.values() for digest in files.values()]
