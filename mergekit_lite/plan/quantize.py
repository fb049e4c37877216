"""A save in FP8: which weights become codes with scales, and what config.json says of it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lite.checkpoint.meta import MERGEABLE
from mergekit_lite.checkpoint.quantized import KEY
from mergekit_lite.errors import Problem
from mergekit_lite.methods.fp8 import BLOCK, in_bands
from mergekit_lite.methods.spec import Slot
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.lowrank import TURNED, has_factors
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.steps import listed
from mergekit_lite.recipe.model import Save

# Linear layers that choose among experts or give the tokens: few numbers, on which much depends.
_KEPT = ("lm_head", "head", "score", "classifier", "embed_out", "output", "gate", "router", "shared_expert_gate")


@dataclass(frozen=True, slots=True)
class Fp8:
    """A table to be saved in FP8: the weights `codes` get a tensor of scales beside them."""

    table: Table
    codes: frozenset[str]


def in_fp8(builder: Builder, save: Save, step: str, table: Table, problems: list[Problem]) -> tuple[Fp8, list[Problem]]:
    """The table with the weights that become FP8 in bands of rows, and with a configuration that says so; and warnings.
    Faults go to `problems`."""
    call = in_bands()(Slot(0))
    nodes: dict[str, Node] = {}
    uneven: list[str] = []
    turned = TURNED.get(str(table.config.get("model_type")), ())
    for name, node in table.nodes.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if len(node.shape) != 2 or not has_factors(name, node.shape) or table.dtypes[name] not in MERGEABLE:
            continue
        if module in _KEPT or module in turned:
            continue
        # transformers works out from the number of scales how many rows are a block, so that blocks must be alike.
        if any(size > BLOCK and size % BLOCK for size in node.shape):
            uneven.append(name)
        else:
            nodes[name] = builder.call(call, [node], [step], step, name)
    warnings = []
    if uneven:
        message = f"{len(uneven)} weights of `{step}` stay as they are, their sizes being no multiples of {BLOCK}"
        hint = "transformers takes all blocks of a weight to be of one size; config.json names these weights"
        warnings.append(Problem(f"{message}: {listed(uneven)}", save.mark, hint))
    if not nodes:
        message = f"`{step}` has no weight that could be saved in FP8"
        problems.append(Problem(message, save.mark, f"those of linear layers can, in blocks of {BLOCK}×{BLOCK}"))
    if not table.config:
        message = f"`{table.donor}` has no config.json, which would have to say that weights are FP8"
        problems.append(Problem(message, save.mark, "put it into the model's folder, or leave out `quantize`"))
    made = replace(table, nodes={**table.nodes, **nodes}, config=_config(table, nodes))
    return Fp8(made, frozenset(nodes)), warnings


def _config(table: Table, codes: Mapping[str, Node]) -> dict[str, Any]:
    """config.json as DeepSeek-V3 has it. Every module with a matrix that is not FP8 is named: transformers takes all
    linear layers for FP8 that are not."""
    kept = [name.removesuffix(".weight") for name, node in table.nodes.items() if len(node.shape) > 1]
    kept += [alias.removesuffix(".weight") for alias, canonical in table.family.tied if canonical not in codes]
    modules = {name.removesuffix(".weight") for name in codes}
    # Experts that share a tensor are no linear layer: the module above is named.
    above = [name.rpartition(".")[0] for name in kept if name.rpartition(".")[0].endswith(".experts")]
    listed = dict.fromkeys(name for name in [*kept, *above] if name not in modules)
    return {
        **table.config,
        KEY: {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": list(listed),
        },
    }
