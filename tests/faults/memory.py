"""Merges under `--memory`: what the plan says, and the largest anonymous memory that the run then has.

    python tests/faults/memory.py --models DIR --budgets 300MB,500MB,1GB --recipes ties,tsv_m

DIR is made and filled with four models of about 70 million parameters where it does not exist, or of 1.1 billion with
`--large`; recipes and outputs go beside them and outputs are removed. Prints a row for each recipe and budget, and for
each refusal one more with the figure that it names. Leaves with 1 where a run had more than its budget, failed, or made
other bytes than without one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mergekit_lite.plan.budget import memory_bytes

ROOT = Path(__file__).parents[2]
INTERVAL = 0.002  # seconds between two looks at a process's memory
TUNED = "base: base, of: [a, b, c]"
STEPS: Mapping[str, str] = {
    "stack": "m: {use: stack, of: [{model: a, layers: [0, 1]}, {model: b, layers: [1, 2]}], rest: c}",
    "linear": "m: {use: linear, of: [a, b, c], with: {weight: 0.3}}",
    "slerp": "m: {use: slerp, of: [a, b], with: {t: 0.4}}",
    "ties_tensor": f"m: {{use: ties, {TUNED}, with: {{scope: tensor}}}}",
    "ties_global": f"m: {{use: ties, {TUNED}, with: {{scope: global}}}}",
    "dare_ties": f"m: {{use: dare_ties, {TUNED}, with: {{drop_rate: 0.7}}}}",
    "della": f"m: {{use: della, {TUNED}, with: {{density: 0.5}}}}",
    "model_stock": f"m: {{use: model_stock, {TUNED}}}",
    "sce": f"m: {{use: sce, {TUNED}, with: {{select_topk: 0.3}}}}",
    "permute": "p: {use: permute, of: a, with: {like: base, spaces: [mlp, heads]}}\n  m: {use: linear, of: [base, p]}",
    "tsv_m": f"m: {{use: tsv_m, {TUNED}}}",
    "iso_c": f"m: {{use: iso_c, {TUNED}}}",
    "wudi": f"m: {{use: wudi, {TUNED}, with: {{steps: 5}}}}",
    "knots": f"m: {{use: knots, {TUNED}}}",
    "core_space": f"m: {{use: core_space, {TUNED}}}",
    "iso_cts": f"m: {{use: iso_cts, {TUNED}}}",
    "cart": f"m: {{use: cart, {TUNED}}}",
    "star": f"m: {{use: star, {TUNED}}}",
    "ace": f"m: {{use: ace, {TUNED}}}",
    "magprune": "m: {use: magprune, base: base, of: a, with: {density: 0.5, epsilon: 0.3}}",
}
LARGE = {"hidden": 2048, "inner": 5632, "layers": 22, "vocabulary": 32000}  # 1.1 billion parameters


@dataclass(frozen=True)
class Ran:
    """A finished process: its exit code, what it said, the largest RssAnon that was seen of it, in bytes."""

    code: int
    out: str
    err: str
    peak: int


def shapes(hidden: int, inner: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama with heads of 64 and half as many for keys and values."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        for name, shape in {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (hidden // 2, hidden),
            "self_attn.v_proj.weight": (hidden // 2, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }.items():
            found[f"model.layers.{i}.{name}"] = shape
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write_models(folder: Path, hidden: int = 768, inner: int = 2048, layers: int = 8, vocabulary: int = 9000) -> Path:
    """`base`, `a`, `b`, `c` in bfloat16 below `folder`: random numbers, the fine-tunes near the base."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    for number, name in enumerate(("base", "a", "b", "c")):
        drawn, moved = torch.Generator().manual_seed(7), torch.Generator().manual_seed(number)
        tensors = {}
        for key, shape in shapes(hidden, inner, layers, vocabulary).items():
            value = torch.randn(shape, generator=drawn) * 0.02
            if number:
                value += torch.randn(shape, generator=moved) * 0.002
            tensors[key] = value.bfloat16()
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_recipe(path: Path, models: Path, step: str, to: Path) -> Path:
    names = ", ".join(f"{name}: {models / name}" for name in ("base", "a", "b", "c"))
    text = f"version: 1\nseed: 9\nmodels: {{{names}}}\nsteps:\n  {step}\nsave: {{to: {to}, step: m}}\n"
    path.write_text(text, encoding="utf-8")
    return path


def merge(*words: str) -> Ran:
    """`merge` with these words and `--json`, in a process of its own that is watched."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mergekit_lite", *words, "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "MERGEKIT_LITE_CACHE": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    largest = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text(encoding="utf-8"))
        largest = max(largest, int(found[1]) * 1024 if found else 0)
        time.sleep(INTERVAL)
    out, err = process.communicate()
    return Ran(process.returncode, out, err, largest)


def digests(ran: Ran) -> list[str]:
    return [shard["blake3"] for output in json.loads(ran.out)["outputs"] for shard in output["shards"]]


def named_figure(ran: Ran) -> str | None:
    """The budget that a refusal says would do."""
    found = re.search(r"`--memory (\d+MB)` is the least", ran.err)
    return found[1] if found else None


def tried(recipe: Path, out: Path, budget: str, expected: Sequence[str]) -> tuple[list[str], str | None, bool]:
    """Plan and run under a budget: a row of the table, the figure of a refusal, and whether all is well."""
    planned = merge("plan", str(recipe), "--memory", budget)
    if planned.code == 3:
        figure = named_figure(planned)
        refused = merge("run", str(recipe), "--memory", budget)
        ok = figure is not None and refused.code == 3 and not out.exists()
        return [recipe.stem, budget, f"refused, {figure} would do", "", "", "", "ok" if ok else "FAULT"], figure, ok
    data = json.loads(planned.out)
    ran = merge("run", str(recipe), "--memory", budget)
    ok = ran.code == 0 and ran.peak <= memory_bytes(budget) and digests(ran) == list(expected)
    shutil.rmtree(out, ignore_errors=True)
    row = [recipe.stem, budget, f"{data['memory']['peak'] / 1e6:.0f} MB", f"{ran.peak / 1e6:.0f} MB",
           f"{data['block']:,}", str(data["threads"]), "ok" if ok else f"FAULT {ran.err[-300:]}"]  # fmt: skip
    return row, None, ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--budgets", default="300MB,500MB,1GB")
    parser.add_argument("--recipes", default=",".join(STEPS))
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    if not options.models.exists():
        write_models(options.models, **(LARGE if options.large else {}))
    print(f"{'recipe':12} {'budget':>8} {'planned':>22} {'measured':>9} {'block':>8} {'threads':>7}", flush=True)
    well = True
    for name in options.recipes.split(","):
        out = options.models / f"out_{name}"
        recipe = write_recipe(options.models / f"{name}.yaml", options.models, STEPS[name], out)
        free = merge("run", str(recipe))
        expected = digests(free)
        shutil.rmtree(out)
        print(f"{name:12} {'none':>8} {'':>22} {free.peak / 1e6:6.0f} MB", flush=True)
        figures = set()
        waiting = options.budgets.split(",")
        while waiting:
            row, figure, ok = tried(recipe, out, waiting.pop(0), expected)
            well = well and ok
            print("{:12} {:>8} {:>22} {:>9} {:>8} {:>7}  {}".format(*row), flush=True)
            if figure is not None and figure not in figures:
                figures.add(figure)
                waiting.append(figure)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
