"""What is measured: every public method that makes a model of models, its settings, and what other tools call it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.methods.registry import all_methods, expand
from mergekit_lite.methods.spec import REQUIRED, Call, Method, Slot

# Settings that are required, or that say more about cost than the default does. All others are the defaults.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "bang": {"head": {"lm_head.*": "linear", "else": "none"}, "temperature": 2.0},
    "breadcrumbs": {"density": 0.9},
    "breadcrumbs_ties": {"density": 0.9},
    "consensus": {"lambda": 0.5},
    "dare_linear": {"drop_rate": 0.5},
    "dare_ties": {"drop_rate": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "interpolate": {"t": 0.4},
    "magprune": {"density": 0.5},
    "nearswap": {"t": 1e-4},
    "sce": {"select_topk": 0.5},
    "share": {"layers": [0]},
    "slerp": {"t": 0.4},
    "slice": {"d_ff": 32},
    "sparsify": {"density": 0.2},
    "task_arithmetic": {"lambda": 0.4},
    "tucker": {"rank": 32},
    "wudi": {"steps": 10},  # of 300: the cost of a step, and little else
}
# A method once more, with other settings: label -> (method, settings).
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ties_tensor": ("ties", {"scope": "tensor"}),
    "slerp_row": ("slerp", {"t": 0.4, "mode": "row"}),
    "model_stock_row": ("model_stock", {"granularity": "row"}),
}
# What makes no model of models by itself.
PARTS: Mapping[str, str] = {
    "add": "takes a delta",
    "delta": "gives a delta",
    "importance": "gives scores",
    "keep_shared": "takes masks",
    "merge_experts": "takes a mixture of experts",
    "moe": "gives a mixture of experts",
    "take_important": "takes scores",
    "transplant": "takes two tokenizers",
}
STRUCTURE = ("stack", "linear+ties")
# What mergekit has too: parameters beside a model, parameters of the merge. Its numbers are those of SETTINGS.
MERGEKIT: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "arcee_fusion": ({}, {}),
    "breadcrumbs": ({"weight": 1.0, "density": 0.9, "gamma": 0.01}, {"normalize": False, "lambda": 0.3}),
    "breadcrumbs_ties": ({"weight": 1.0, "density": 0.9, "gamma": 0.01}, {"normalize": False, "lambda": 0.3}),
    "dare_linear": ({"weight": 1.0, "density": 0.5}, {"normalize": False}),
    "dare_ties": ({"weight": 1.0, "density": 0.5}, {"normalize": True}),
    "della": ({"weight": 1.0, "density": 0.5, "epsilon": 0.15}, {"normalize": True}),
    "della_linear": ({"weight": 1.0, "density": 0.5, "epsilon": 0.15}, {"normalize": False}),
    "karcher": ({}, {}),
    "linear": ({"weight": 1.0}, {"normalize": True}),
    "model_stock": ({}, {}),
    "model_stock_row": ({}, {"filter_wise": True}),
    "multislerp": ({"weight": 1.0}, {}),
    "nearswap": ({}, {"t": 1e-4}),
    "nuslerp": ({"weight": 1.0}, {"nuslerp_row_wise": False, "nuslerp_flatten": True}),
    "passthrough": ({}, {}),
    "ram": ({}, {}),
    "ramplus_tl": ({}, {}),
    "sce": ({}, {"select_topk": 0.5}),
    "slerp": ({}, {"t": 0.4}),
    "task_arithmetic": ({"weight": 1.0}, {"normalize": False, "lambda": 0.4}),
    "ties_tensor": ({"weight": 1.0, "density": 0.2}, {"normalize": True}),
}
# What sd-mecha has too; benchmarks/sd_mecha_merge.py says how.
SD_MECHA = ("geometric_median", "linear", "model_stock", "slerp", "task_arithmetic", "ties_tensor")


@dataclass(frozen=True)
class Case:
    """One merge: its label, the steps of its recipe, the models whose weights it reads, whether it works on whole
    matrices, whether it needs statistics."""

    label: str
    steps: Mapping[str, Any]
    inputs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    matrix: bool = False
    statistics: bool = False

    def recipe(self, models: Path, out: Path) -> dict[str, Any]:
        """The recipe, as data for YAML."""
        named = {name: str((models / name).resolve()) for name in self.inputs}
        return {"version": 1, "models": named, "steps": dict(self.steps), "save": {"to": str(out.resolve())}}

    def mergekit(self, models: Path, dtype: str) -> dict[str, Any] | None:
        """The same merge in mergekit's language, with arithmetic in `dtype`, or None where mergekit has none."""
        method = VARIANTS[self.label][0] if self.label in VARIANTS else self.label
        paths = {name: str((models / name).resolve()) for name in self.inputs}
        types = {"dtype": dtype, "out_dtype": "bfloat16"}
        if self.label == "stack":
            of = self.steps["merged"]["of"]
            slices = [{"sources": [{"model": paths[s["model"]], "layer_range": list(s["layers"])}]} for s in of]
            return {"merge_method": "passthrough", "slices": slices, **types}
        if self.label not in MERGEKIT:
            return None
        beside, shared = MERGEKIT[self.label]
        tuned = [name for name in self.inputs if name != "base"]
        base = "base" if "base" in self.inputs else tuned[0] if method in ("slerp", "arcee_fusion") else None
        listed = [{"model": paths[n], **({"parameters": dict(beside)} if beside else {})} for n in tuned]
        made: dict[str, Any] = {"merge_method": method, "models": listed, "parameters": dict(shared), **types}
        return made | ({"base_model": paths[base]} if base else {})


def case(label: str, layers: int, tunes: int = 3) -> Case:
    """The merge called `label`, of models with `layers` layers, of `tunes` fine-tunes where the method takes as many.
    Raises KeyError where there is none."""
    if label == "stack":
        half = layers // 2
        of = [{"model": "tune1", "layers": [0, half]}, {"model": "tune2", "layers": [half, layers]}]
        return Case(label, {"merged": {"use": "stack", "of": of}}, ("tune1", "tune2"))
    if label == "linear+ties":
        steps = {
            "mean": {"use": "linear", "of": ["tune1", "tune2"]},
            "merged": {"use": "ties", "base": "base", "of": ["mean", "tune3"]},
        }
        return Case(label, steps, ("base", "tune1", "tune2", "tune3"))
    name, settings = VARIANTS.get(label, (label, SETTINGS.get(label, {})))
    method = all_methods()[name]
    low, high = method.inputs
    names = [f"tune{i}" for i in range(1, max(low, min(tunes, high or tunes)) + 1)]
    step: dict[str, Any] = {"use": name}
    inputs = list(names)
    if method.base == "required" or (method.base == "optional" and method.takes == "delta"):
        step["base"] = "base"
        inputs = ["base", *names]
    if method.param("like") is not None:
        step["like"] = "base"
        inputs = ["base", *names]
    references = [p.name for p in method.params if p.kind == "reference" and p.per_input and p.default is REQUIRED]
    step["of"] = {n: {r: r + n[4:] for r in references} for n in names} if references else names
    inputs += [r + n[4:] for r in references for n in names]
    if settings:
        step["with"] = dict(settings)
    return Case(label, {"merged": step}, tuple(inputs), settings, _matrix(method, settings), bool(references))


def labels() -> list[str]:
    """Every merge there is, in alphabetical order but for `linear`, which comes first: the others are held against
    it."""
    public = [m.name for m in all_methods().values() if m.public and m.name not in PARTS]
    return sorted({*public, *VARIANTS, *STRUCTURE}, key=lambda name: (name != "linear", name))


@functools.cache
def _parts(method: Method, settings: tuple[tuple[str, Any], ...]) -> tuple[Method, ...]:
    """The methods that a composite is made of."""
    found: list[Method] = []

    def walk(call: Call | Slot) -> None:
        if isinstance(call, Call):
            found.append(call.method)
            for below in call.inputs:
                walk(below)

    slots = [Slot(i) for i in range(max(2, method.inputs[0]))]
    walk(expand(method(*slots, **dict(settings))))
    return tuple(found)


def _matrix(method: Method, settings: Mapping[str, Any]) -> bool:
    if not method.composite:
        params = {**{p.name: p.default for p in method.params}, **settings}
        return method.reach_of(params) == "matrix"
    return any(m.reach == "matrix" for m in _parts(method, tuple(settings.items())))
