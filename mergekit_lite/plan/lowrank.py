"""A save as an adapter: which changes become factors, which are kept whole, and where all of it lies. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_lite.checkpoint.adapter import PREFIX, WEIGHTS
from mergekit_lite.checkpoint.meta import DTYPE_NAMES, MERGEABLE, Checkpoint
from mergekit_lite.checkpoint.writer import encode_header
from mergekit_lite.errors import Mark, Problem
from mergekit_lite.methods.lokr import halving, measuring_kernels, most_rank, part_shapes
from mergekit_lite.methods.low_rank import (
    FIGURES,
    factor_shapes,
    factoring,
    factoring_factors,
    full_rank,
    measuring,
    measuring_factors,
)
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.methods.spec import Slot
from mergekit_lite.plan.adapter_config import adapter_config, lokr_config
from mergekit_lite.plan.factors import summed_factors, unfolded
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.layout import SAVE_DTYPES, nbytes
from mergekit_lite.plan.model import Node, Output, OutShard, OutTensor
from mergekit_lite.plan.steps import Faults, listed
from mergekit_lite.plan.words import shape as sizes
from mergekit_lite.recipe.model import AsLora, Save
from mergekit_lite.recipe.value import glob_matches

# Modules that look up rows: their weights are as good as never of low rank, and peft stores their factors otherwise.
_LOOKUPS = ("wte", "wpe", "shared", "relative_attention_bias")
# Layers of GPT-2 and its kin whose weights are stored as in x out.
TURNED = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
}
_OF_MODULES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
Ranks = Mapping[str, int]


@dataclass
class Parts:
    """What an adapter is made of, by the tensors' names in the base: `factors` are deltas that become two factors,
    `biases` those of the same modules, `whole` tensors of modules that are kept as they are."""

    factors: dict[str, Node] = field(default_factory=dict)
    biases: dict[str, Node] = field(default_factory=dict)
    whole: dict[str, Node] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def modules(self, names: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def parts_of(
    builder: Builder, save: Save, step: str, table: Table, base: Table, problems: list[Problem]
) -> tuple[Parts, list[Problem]]:
    """What the adapter of a save is made of, and warnings. Faults go to `problems`."""
    lora = save.lora
    assert lora is not None
    methods = all_methods()
    faults = Faults()
    hint = f"`{lora.base.name}` must be the model that `{step}` was made from"
    changed: dict[str, Node] = {}
    left: list[str] = []
    for name, node in table.nodes.items():
        same = base.nodes.get(name)
        if same is None or same.shape != node.shape:
            what = "lacks" if same is None else f"has another shape ({sizes(same.shape)}) of"
            faults.add(f"`{lora.base.name}` {what} tensors of `{step}`", lora.base.mark, hint, name)
        elif node is same:
            continue
        elif lora.targets and not any(glob_matches(glob, name) for glob in lora.targets):
            left.append(name)
        elif table.dtypes[name] not in MERGEABLE or base.dtypes[name] not in MERGEABLE:
            if table.space == "weight":
                left.append(name)
        elif name.rpartition(".")[2] not in _OF_MODULES:
            fault = "an adapter cannot change tensors that are no module's weight or bias"
            faults.add(fault, lora.mark, "leave them to the base with `targets`, or save a whole model", name)
        else:
            changed[name] = node
    problems += faults.problems()

    def whole(name: str) -> Node:
        node = changed.get(name, base.nodes[name])
        if table.space == "weight" or name not in changed:
            return node
        return builder.call(methods["add"](Slot(0), Slot(1)), [node, base.nodes[name]], [step] * 2, step, name)

    def delta(name: str) -> Node:
        node = changed[name]
        if table.space == "delta":
            return node
        if summed_factors(node, base.nodes[name]) is not None:
            return unfolded(builder, node, base.nodes[name], (step, name))
        alone = node.method is methods["add"] and dict(node.params)["weight"] == (1.0,)
        if alone and node.inputs[1] is base.nodes[name]:
            return node.inputs[0]  # which no sum with the base has rounded
        return builder.call(methods["delta"](Slot(0), Slot(1)), [node, base.nodes[name]], [step] * 2, step, name)

    made = Parts(dtypes=dict(base.dtypes) | {n: table.dtypes[n] for n in changed})
    low = {name for name in changed if has_factors(name, changed[name].shape)}
    if lora.form == "lokr":
        turned = _turned_of(base)
        low = {n for n in low if f"{n.removesuffix('weight')}bias" not in changed and _is_lokr(n, changed[n], turned)}
    # peft finds modules to save by the ends of their names, and wants all of their tensors.
    keep = {n.rpartition(".")[0] for n in changed if n not in low and f"{n.rpartition('.')[0]}.weight" not in low}
    modules = made.modules(base.nodes)
    keep |= {module for module in modules if module.endswith(tuple(keep))}
    for name in base.nodes:
        module = name.rpartition(".")[0]
        if module in keep:
            made.whole[name] = whole(name)
        elif name in low:
            made.factors[name] = delta(name)
        elif name in changed:
            made.biases[name] = whole(name)
    # With `ensure_weight_tying` peft saves a tied head beside the embedding, and wants it there.
    for alias, canonical in base.family.tied:
        if canonical in made.whole:
            made.whole[alias], made.dtypes[alias] = made.whole[canonical], made.dtypes[canonical]
    warnings = []
    if left:
        message = f"{len(left)} tensors of `{step}` differ from `{lora.base.name}` and stay as they are there"
        warnings.append(Problem(f"{message}: {listed(left)}", lora.mark, "the adapter changes what `targets` matches"))
    if lora.form == "lokr" and changed and not made.factors and not problems:
        message = (
            f"`as: lokr` has factors for none of the tensors that `{step}` changes, and peft loads no such adapter"
        )
        hint = "it is for linear layers and kernels of one or two axes whose biases stay as they are: use `as: lora`"
        problems.append(Problem(message, lora.mark, hint))
    if not changed and not problems:
        message = f"`{step}` changes nothing of `{lora.base.name}` that an adapter could hold"
        problems.append(Problem(message, lora.mark, "look at `targets` and `base`"))
    return made, warnings


def has_factors(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weight of a linear layer or of a convolution that is not taken channel by channel."""
    module, _, last = name.rpartition(".")
    kind = module.rpartition(".")[2]
    lookup = "embed" in kind or kind in _LOOKUPS
    depthwise = len(shape) > 2 and shape[1] == 1
    return last == "weight" and len(shape) > 1 and full_rank(tuple(shape)) > 1 and not lookup and not depthwise


def _turned_of(base: Table) -> tuple[str, ...]:
    return TURNED.get(str(base.config.get("model_type")), ())


def _is_turned(name: str, node: Node, turned: Sequence[str]) -> bool:
    """Whether a weight is that of a layer which stores it as in x out."""
    return name.removesuffix(".weight").rpartition(".")[2] in turned and len(node.shape) == 2


def _is_lokr(name: str, node: Node, turned: Sequence[str]) -> bool:
    """Whether peft's LoKr has layers for a weight: it has none for GPT-2's, nor for kernels of three axes."""
    return len(node.shape) <= 4 and not _is_turned(name, node, turned)


def adapter_output(
    builder: Builder,
    to: str,
    save: Save,
    step: str,
    parts: Parts,
    base: Table,
    checkpoint: Checkpoint | None,
    ranks: Ranks | None,
    recipe_text: str,
) -> Output:
    """The file of an adapter and its configuration. `ranks` gives the rank of every change by the tensor's name;
    without them it is the largest that the save allows. `checkpoint` is the base where that is a model by itself."""
    lora = save.lora
    assert lora is not None
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    spans: list[tuple[str, tuple[int, ...], str, Node, int]] = []  # name, shape, dtype, node, how many rows
    kept: dict[str, int] = {}
    turned = _turned_of(base)
    any_turned = False
    for name, node in parts.factors.items():
        module = name.removesuffix(".weight")
        dtype = _dtype(parts.dtypes[name], save.dtype)
        rank = kept[module] = (ranks or {}).get(name) or most(lora, node)
        transposed = _is_turned(name, node, turned)
        any_turned = any_turned or transposed
        if lora.form == "lokr":
            call = halving(rank)(Slot(0), rank=rank, dtype=DTYPE_NAMES[dtype])
            factors = builder.call(call, [node], [step], step, name)
            shapes = part_shapes(node.shape, rank)
            for part, shape in shapes.items():
                rows.append((f"{PREFIX}{module}.{part}", dtype, shape, nbytes(Node(-1, shape, ""), dtype)))
            spans.append((f"{PREFIX}{module}.lora", (factors.numel - FIGURES,), dtype, factors, len(shapes)))
            continue
        settings = {"rank": rank, "transposed": transposed, "dtype": DTYPE_NAMES[dtype]}
        if (thin := summed_factors(node)) is not None:
            slots = map(Slot, range(len(thin.nodes)))
            call = factoring_factors(rank, node.shape)(*slots, **settings, **thin.settings)
            factors = builder.call(call, thin.nodes, [step] * len(thin.nodes), step, name)
        else:
            factors = builder.call(factoring(rank)(Slot(0), **settings, svd=lora.svd), [node], [step], step, name)
        for part, shape in zip("AB", factor_shapes(node.shape, rank, transposed), strict=True):
            size = nbytes(Node(-1, shape, ""), dtype)
            rows.append((f"{PREFIX}{module}.lora_{part}.weight", dtype, shape, size))
        spans.append((f"{PREFIX}{module}.lora", (factors.numel - FIGURES,), dtype, factors, 2))
    for names, middle in ((parts.biases, "base_layer."), (parts.whole, "")):
        for name, node in names.items():
            module, _, last = name.rpartition(".")
            dtype = _dtype(parts.dtypes[name], save.dtype)
            shown = f"{PREFIX}{module}.{middle}{last}"
            rows.append((shown, dtype, node.shape, nbytes(node, dtype)))
            spans.append((shown, node.shape, dtype, node, 1))
    header, starts = encode_header(rows, {"format": "pt", "mergekit_lite.recipe": recipe_text})
    tensors: list[OutTensor] = []
    row = 0
    for shown, shape, dtype, node, count in spans:
        size = sum(nbytes_ for *_, nbytes_ in rows[row : row + count])
        tensors.append(OutTensor(shown, shape, dtype, node, 0, starts[row], size))
        row += count
    shard = OutShard(WEIGHTS, header, len(header) + sum(size for *_, size in rows), tuple(tensors))
    tied = {alias for alias, canonical in base.family.tied if canonical in parts.whole}
    whole = parts.modules(name for name in parts.whole if name not in tied)
    config = adapter_config(base.config, checkpoint, kept, whole, bool(parts.biases), any_turned, bool(tied))
    if lora.form == "lokr":
        config = lokr_config(config)
    return Output(to, step, (shard,), {}, {}, base.donor, config)


def measured_output(builder: Builder, save: Save, step: str, parts: Parts, base: Table) -> Output:
    """In place of the adapter, the rank that each of its changes needs: a vector of one number by the tensor's name."""
    lora = save.lora
    assert lora is not None and lora.energy is not None
    turned = _turned_of(base)
    tensors: list[OutTensor] = []
    for name, node in parts.factors.items():
        transposed = _is_turned(name, node, turned)
        settings = {"rank": most(lora, node), "energy": lora.energy}
        if lora.form == "lokr" and math.prod(node.shape[2:]) > 1:
            found = builder.call(measuring_kernels()(Slot(0), **settings), [node], [step], step, name)
        elif (thin := summed_factors(node)) is not None:
            call = measuring_factors()(*map(Slot, range(len(thin.nodes))), **settings, **thin.settings)
            found = builder.call(call, thin.nodes, [step] * len(thin.nodes), step, name)
        else:
            call = measuring()(Slot(0), **settings, svd=lora.svd, transposed=transposed)
            found = builder.call(call, [node], [step], step, name)
        tensors.append(OutTensor(name, (1,), "F32", found, 0, 4 * len(tensors), 4))
    return Output("ranks", step, (OutShard("ranks", b"", 4 * len(tensors), tuple(tensors)),), {}, {}, base.donor)


def most(lora: AsLora, node: Node) -> int:
    """The rank of factors for a change, which is at most the one that the save allows: what is a sum of products of
    factors has no more than these have columns."""
    rank = lora.rank
    if lora.form == "lokr":
        full = most_rank(node.shape)
        return full if rank is None else min(rank, full)
    thin = summed_factors(node)
    full = min(full_rank(node.shape), thin.columns if thin is not None else full_rank(node.shape))
    return full if rank is None else min(rank, full)


def _dtype(stored: str, dtype: str | None) -> str:
    return SAVE_DTYPES[dtype] if dtype and stored in MERGEABLE else stored


def needs_ranks(save: Save) -> bool:
    """Whether the ranks of a save's factors are found by looking at the numbers."""
    return save.lora is not None and save.lora.energy is not None


def fault_of(table: Table, name: str, mark: Mark, base: bool) -> Problem | None:
    """What makes a table unfit to be the base of an adapter, or what it leads to."""
    if base and table.space != "weight":
        return Problem(f"`{name}` is a delta and cannot be the base of an adapter", mark, "name a model")
    if table.quantized is not None:
        return Problem(f"`{name}` {table.quantized.says}", mark, table.quantized.hint)
    return None
