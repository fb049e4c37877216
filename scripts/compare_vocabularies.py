"""Holds vocabularies against mergekit's: the same recipes on pairs of tiny models with tokenizers of their own.

    python scripts/compare_vocabularies.py /path/to/mergekit-yaml [--write docs/compat.md]

mergekit is not a dependency: install it in an environment of its own and name its executable. For each pair of
scripts/vocabulary_models.py and each wish for a vocabulary the two outputs are compared: the tokens, the ids of those
that the first model has, the rows of config.json, and token by token the merged rows of every tensor with a vocabulary,
padding included. Ids of tokens that are new to the first model are in no fixed order in mergekit, so rows are found by
token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from vocabulary_models import PAIRS

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.errors import MergeError

BEGIN, END = "<!-- table: scripts/compare_vocabularies.py -->", "<!-- end of vocabularies -->"
TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


def wishes(folder: Path) -> dict[str, dict[str, Any]]:
    """What the recipes ask of the vocabulary. The last wish chooses rows one by one."""
    a, b = str(folder / "a"), str(folder / "b")
    chosen = {
        "<|new|>": {"source": {"kind": "model_token", "model": b, "token_id": 7}},
        "<|none|>": {"source": {"kind": "zero"}},
        "e": {"source": b, "force": True},
        "a": {"source": {"kind": "model_token", "model": a, "token": "t"}, "force": True},
    }
    return {
        "base": {"tokenizer_source": "base"},
        "union": {"tokenizer_source": "union"},
        "the other model": {"tokenizer_source": b},
        "union, padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
        "chosen rows": {"tokenizer": {"source": "union", "tokens": chosen}},
    }


def recipe(folder: Path, wish: dict[str, Any]) -> dict[str, Any]:
    models = [{"model": str(folder / name), "parameters": {"weight": w}} for name, w in (("a", 0.7), ("b", 0.3))]
    merge: dict[str, Any] = {"merge_method": "linear", "base_model": str(folder / "a"), "models": models}
    return {**merge, "dtype": "float32", **wish}


def compare(folder: Path, made: dict[str, Any], theirs: Path, ours: Path, executable: Path) -> str:
    """`same`, with the largest difference of a row, or what differs."""
    file = theirs.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(made), encoding="utf-8")
    environment = {key: text for key, text in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(executable), str(file), str(theirs), "--no-write-model-card"],
        capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    failed = f"mergekit fails: {done.stderr.strip().splitlines()[-1][:80]}" if done.returncode else None
    try:
        run(plan(load_recipe(file), out=ours), threads=1)
    except MergeError as error:
        return f"{failed or 'mergekit runs'}; here: {error.problems[0].message}"
    if failed is not None:
        return f"{failed}; runs here"
    vocabularies = [ids(place) for place in (theirs, ours)]
    if vocabularies[0].keys() != vocabularies[1].keys():
        return f"other tokens: {sorted(vocabularies[0].keys() ^ vocabularies[1].keys())[:3]}"
    lead = ids(folder / ("b" if str(made.get("tokenizer_source", "")).endswith("/b") else "a"))
    moved = [token for token in lead if len({lead[token], *(found[token] for found in vocabularies)}) > 1]
    if moved:
        return f"other ids: {moved[:3]}"
    sizes = [json.loads((place / "config.json").read_text(encoding="utf-8"))["vocab_size"] for place in (theirs, ours)]
    if len(set(sizes)) > 1:
        return f"vocab_size {sizes[0]} and {sizes[1]}"
    worst = 0.0
    tensors = [load(place) for place in (theirs, ours)]
    for name in TENSORS:
        if name not in tensors[0]:
            continue
        tokens = list(lead | vocabularies[0])
        x, y = (t[name][[found[token] for token in tokens]] for t, found in zip(tensors, vocabularies, strict=True))
        worst = max(worst, float((x - y).abs().max() / x.abs().max()))
        padding = [t[name][len(tokens) :] for t in tensors]
        if padding[0].shape != padding[1].shape:
            return f"{name}: {len(padding[0])} and {len(padding[1])} rows of padding"
        if padding[0].numel():
            worst = max(worst, float((padding[0] - padding[1]).abs().max() / x.abs().max()))
    return f"same tokens, ids and size; rows differ by {worst:.1e}"


def ids(folder: Path) -> dict[str, int]:
    found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    return found


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executable", type=Path, help="mergekit-yaml of an environment that has mergekit")
    parser.add_argument("--write", type=Path, help="a Markdown file whose table is replaced")
    parser.add_argument("--only", nargs="*", default=list(PAIRS), help="pairs to compare")
    options = parser.parse_args()
    rows = ["| pair | vocabulary | result |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as place:
        for name in options.only:
            folder = Path(place) / name
            PAIRS[name](folder)
            for number, (wish, keys) in enumerate(wishes(folder).items()):
                theirs, ours = folder / f"theirs{number}", folder / f"ours{number}"
                result = compare(folder, recipe(folder, keys), theirs, ours, options.executable)
                rows.append(f"| {name} | {wish} | {result} |")
                print(rows[-1], flush=True)
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
        options.write.write_text(text[:before] + "\n\n" + "\n".join(rows) + "\n\n" + text[after:], encoding="utf-8")


if __name__ == "__main__":
    main()
