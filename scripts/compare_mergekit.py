"""Holds this program against mergekit itself: the same recipes on the same tiny checkpoints.

    python scripts/compare_mergekit.py /path/to/mergekit-yaml [--write docs/compat.md]

mergekit is not a dependency: install it in an environment of its own and name its executable; `mergekit-multi` beside
it runs the recipes of one method in one process. Models are Llama-shaped, four layers, float32. Every method without
randomness gets 20 random settings: plain numbers, gradients, filters, which models. The figure is the largest
difference of an entry relative to the largest entry of its tensor, over all tensors and settings.

Rows with `compat` have settings in which the two decide otherwise unless the recipe says `compat: true`: densities that
round badly, weights of both signs and such that add up to 0, changes next to nothing, tensors of zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.errors import MergeError

LAYERS, HIDDEN, INNER, VOCABULARY = 4, 16, 32, 40
ROUND_BADLY = 50  # the vocabulary of the models for `compat`
SETTINGS = 20
TUNED = "abcdef"
SLIGHT = "stu"  # changes so small that mergekit's `sce` gives all models one weight
EMPTY = "z"  # a model whose value projections are 0
SAME = "w"  # a model that has left the query projections as the base has them
BADLY = (0.145, 0.285, 0.29, 0.565, 0.57, 0.575, 0.58)  # times 800, those models' embedding, next to a whole number
BEGIN, END = "<!-- table: scripts/compare_mergekit.py -->", "<!-- end of table -->"
Recipe = dict[str, Any]


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the models' tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        lead = f"model.layers.{layer}."
        found |= {f"{lead}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        found |= {f"{lead}mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        found[f"{lead}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{lead}{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


def write_models(folder: Path, vocabulary: int) -> None:
    """A base, six fine-tunes of it, and the models that `compat` is for."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: 0.1 * draw(shape) for name, shape in shapes(vocabulary).items()}
    models = {"base": base}
    for name in TUNED:
        models[name] = {key: x + 0.05 * draw(tuple(x.shape)) * draw(tuple(x.shape)) for key, x in base.items()}
    for name in SLIGHT:
        models[name] = {key: x + 3e-4 * draw(tuple(x.shape)) for key, x in base.items()}
    models[EMPTY] = {key: 0 * x if "v_proj" in key else x for key, x in models["a"].items()}
    models[SAME] = {key: base[key] if "q_proj" in key else x for key, x in models["b"].items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    for name, tensors in models.items():
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")


def value(rng: random.Random, low: float, high: float) -> Any:
    """A number between `low` and `high`, a gradient, or a list of filters."""

    def number() -> float:
        return round(rng.uniform(low, high), 3)

    def gradient() -> list[float]:
        return [number() for _ in range(rng.randint(2, 5))]

    kind = rng.randrange(3)
    if kind == 0:
        return number()
    if kind == 1:
        return gradient()
    return [{"filter": "self_attn", "value": gradient()}, {"filter": "mlp", "value": number()}, {"value": number()}]


class Maker:
    """Random recipes over the models in `folder`."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder = folder
        self.rng = rng

    def recipe(self, method: str, inputs: int, base: str | None, shared: Recipe, per_input: dict[str, Any]) -> Recipe:
        """A merge of some fine-tunes: methods without parameters differ in these."""
        models = [
            {"model": str(self.folder / name), "parameters": {key: draw() for key, draw in per_input.items()}}
            for name in self.rng.sample(TUNED, inputs)
        ]
        made: Recipe = {"merge_method": method, "models": models, "parameters": shared, "dtype": "float32"}
        return made | ({"base_model": str(self.folder / base)} if base else {})

    def listed(self, method: str, names: Sequence[str], base: str | None, shared: Recipe, **per_input: Any) -> Recipe:
        """A merge of these models with these parameters beside them, in mergekit's numbers."""
        given = [dict(zip(per_input, values, strict=True)) for values in zip(*per_input.values(), strict=True)]
        models = [
            {"model": str(self.folder / name), **({"parameters": own} if own else {})}
            for name, own in zip(names, given or [{}] * len(names), strict=True)
        ]
        made: Recipe = {"merge_method": method, "models": models, "parameters": shared, "dtype": "float32"}
        return made | {"compat": True} | ({"base_model": str(self.folder / base)} if base else {})

    def in_compat(self, method: str) -> Recipe:
        """A merge in which the two programs decide otherwise without `compat`."""
        names = self.rng.sample(TUNED, 3)
        opposed = [round(self.rng.uniform(0.2, 1.0), 3), round(self.rng.uniform(-1.0, -0.2), 3), 0.5]
        nothing = self.rng.choice([[0.25, 0.5, -0.75], [1.0, -1.0, 0.0]])
        match method:
            case "ties" | "dare_ties" | "della":
                density = [self.rng.choice(BADLY) if method == "ties" else 1.0 for _ in names]
                shared: Recipe = {"normalize": True}
                return self.listed(method, names, "base", shared, weight=opposed, density=density)
            case "breadcrumbs" | "breadcrumbs_ties":
                ties = method == "breadcrumbs_ties"
                density = [self.rng.choice((*BADLY, 0.05)) for _ in names]
                gamma = [self.rng.choice(BADLY[:3]) for _ in names]
                weight = opposed if ties else nothing
                return self.listed(
                    method, names, "base", {"normalize": True}, weight=weight, density=density, gamma=gamma
                )
            case "task_arithmetic" | "dare_linear" | "della_linear":
                return self.listed(method, names, "base", {"normalize": True}, weight=nothing)
            case "sce":
                return self.listed(method, SLIGHT, "base", {"select_topk": self.rng.choice((0.01, *BADLY, 1.0))})
            case "slerp":
                return self.listed(method, [EMPTY], "base", {"t": round(self.rng.random(), 3)})
            case "nuslerp":
                shared = {"nuslerp_flatten": self.flag(), "nuslerp_row_wise": self.flag()}
                if self.flag():
                    return self.listed(method, ["c", SAME], "base", shared, weight=[0.4, 0.9])
                return self.listed(
                    method, ["c", EMPTY], None, shared, weight=self.rng.choice(([0.5, -0.5], [0.3, 0.7]))
                )
        raise ValueError(method)

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def between(self, low: float, high: float) -> Callable[[], Any]:
        return lambda: value(self.rng, low, high)

    def delta(self, method: str, *, rescale: bool = True, density: Any = None, **more: Any) -> Recipe:
        shared = {"normalize": self.flag(), "lambda": self.between(0.2, 1.2)()}
        shared |= {"rescale": self.flag()} if rescale else {}
        per_input = {"weight": self.between(0.1, 1.0), "density": density or self.between(0.2, 0.9), **more}
        return self.recipe(method, 3, "base", shared, per_input)

    def make(self, method: str) -> Recipe:
        weight = {"weight": self.between(0.1, 1.0)}
        match method:
            case "linear":
                return self.recipe(method, 3, None, {"normalize": self.flag()}, weight)
            case "slerp" | "nearswap":
                high = 1.0 if method == "slerp" else 0.05
                return self.recipe(method, 1, "base", {"t": value(self.rng, 0.0 if high == 1 else 0.001, high)}, {})
            case "passthrough":
                return self.recipe(method, 1, None, {}, {"scale": self.between(-1.0, 2.0)})
            case "task_arithmetic":
                return self.delta(method, rescale=False)
            case "ties":
                return self.delta(method)
            case "dare_linear" | "dare_ties" | "della_linear" | "della":
                return self.delta(method, density=lambda: 1.0)
            case "breadcrumbs" | "breadcrumbs_ties":
                return self.delta(method, gamma=self.between(0.06, 0.1))
            case "nuslerp":
                shared = {"nuslerp_flatten": self.flag(), "nuslerp_row_wise": self.flag()}
                return self.recipe(method, 2, "base" if self.flag() else None, shared, weight)
            case "multislerp":
                base = "base" if self.flag() else None
                return self.recipe(method, self.rng.randint(2, 4), base, {"normalize_weights": True}, weight)
            case "karcher":
                return self.recipe(method, 3, None, {"max_iter": self.rng.randint(1, 20), "tol": 1e-9}, {})
            case "sce":
                return self.recipe(method, 3, "base", {"select_topk": self.between(0.2, 1.0)()}, {})
            case "ram":
                return self.recipe(method, 3, "base", {"epsilon": self.rng.uniform(1e-3, 2e-2)}, {})
            case "ramplus_tl":
                ratios: dict[str, Any] = {
                    "epsilon": self.rng.uniform(1e-3, 2e-2),
                    "r": self.rng.uniform(0.05, 0.5),
                    "alpha": 0.2,
                }
                return self.recipe(method, 3, "base", ratios, {})
            case "model_stock":
                return self.recipe(method, self.rng.randint(2, 4), "base", {"filter_wise": self.flag()}, {})
            case "arcee_fusion":
                return self.recipe(method, 1, "base", {}, {})
            case "slices":
                return self.slices()
        raise ValueError(method)

    def slices(self) -> Recipe:
        """Three slices of different lengths, merged and put one above the other."""
        spans = [(0, 2), (1, 4), (3, 4)]
        slices = []
        for start, stop in spans:
            shift = self.rng.randint(-start, LAYERS - stop)
            sources = [
                {"model": str(self.folder / "base"), "layer_range": [start, stop]},
                {"model": str(self.folder / self.rng.choice(TUNED)), "layer_range": [start + shift, stop + shift]},
            ]
            slices.append({"sources": sources, "parameters": {"t": value(self.rng, 0.0, 1.0)}})
        base = str(self.folder / "base")
        return {"merge_method": "slerp", "base_model": base, "slices": slices, "dtype": "float32"}


METHODS = (
    "linear", "slerp", "passthrough", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della_linear", "della",
    "breadcrumbs", "breadcrumbs_ties", "nuslerp", "multislerp", "karcher", "sce", "ram", "ramplus_tl", "model_stock",
    "nearswap", "arcee_fusion", "slices",
)  # fmt: skip
IN_COMPAT = (
    "ties", "dare_ties", "della", "breadcrumbs", "breadcrumbs_ties", "task_arithmetic", "dare_linear", "della_linear",
    "sce", "slerp", "nuslerp",
)  # fmt: skip
MARK = " compat"  # after the name of a method whose settings are those of `in_compat`


def compare(method: str, recipes: list[Recipe], multi: Path, folder: Path) -> str:
    """The row of one method: the largest relative difference, or what went wrong."""
    theirs, ours = folder / method / "theirs", folder / method / "ours"
    theirs.mkdir(parents=True)
    documents = [{"name": f"merge{number}", **recipe} for number, recipe in enumerate(recipes)]
    config = folder / method / "all.yaml"
    config.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    command = [str(multi), str(config), "-I", str(theirs), "--no-copy-tokenizer", "--no-write-model-card"]
    done = subprocess.run(command, capture_output=True, text=True, env=_clean(), check=False)
    if done.returncode:
        return f"| {method} | mergekit fails: {done.stderr.strip().splitlines()[-1][:80]} | |"
    worst, where = 0.0, ""
    for number, recipe in enumerate(recipes):
        file = folder / method / f"{number}.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        try:
            run(plan(load_recipe(file), out=ours / str(number)), threads=1)
        except MergeError as error:
            return f"| {method} | not supported: {error.problems[0].message} | |"
        expected, found = load(theirs / f"merge{number}"), load(ours / str(number))
        if expected.keys() != found.keys():
            return f"| {method} | other tensors: {sorted(expected.keys() ^ found.keys())[:3]} | |"
        for name, x in expected.items():
            gap = float((found[name].double() - x.double()).abs().max() / x.double().abs().max().clamp(min=1e-30))
            if gap > worst or gap != gap:
                worst, where = gap, f"`{name}`, setting {number}"
    return f"| {method} | {worst:.1e} | {where} |"


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def _clean() -> dict[str, str]:
    """The environment without this program's import path, which is not that of the other one."""
    return {key: text for key, text in os.environ.items() if not key.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executable", type=Path, help="mergekit-yaml of an environment that has mergekit")
    parser.add_argument("--write", type=Path, help="a Markdown file whose table is replaced")
    parser.add_argument(
        "--only",
        nargs="*",
        default=(*METHODS, *(m + MARK for m in IN_COMPAT)),
        help="methods to compare, `ties compat` with the settings for `compat`",
    )
    options = parser.parse_args()
    rows = ["| method | largest relative difference | where |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder / "models", VOCABULARY)
        write_models(folder / "compat", ROUND_BADLY)
        for method in options.only:
            plain = method.removesuffix(MARK)
            maker = Maker(folder / ("models" if plain == method else "compat"), random.Random(method))
            make = maker.make if plain == method else maker.in_compat
            recipes = [make(plain) for _ in range(SETTINGS)]
            rows.append(compare(method, recipes, options.executable.parent / "mergekit-multi", folder))
            print(rows[-1], flush=True)
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
        options.write.write_text(text[:before] + "\n\n" + "\n".join(rows) + "\n\n" + text[after:], encoding="utf-8")


if __name__ == "__main__":
    main()
