"""FP8 weights with scales beside them become numbers; other ways to quantise are told by name. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.meta import DTYPE_CODES, MERGEABLE, Packed, TensorMeta
from mergekit_lite.errors import InputError, Problem

KEY = "quantization_config"
SCALES = ("_scale_inv", "_scale")  # what the names of FP8 weights are followed by in those of their scales
# What quantises activations and the cache of keys and values: nothing that a weight needs.
_BESIDE = ("input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale")
_CODES = ("F8_E4M3", "F8_E5M2")
_FACTORS = ("F32", "F16", "BF16", "F64", "F8_E8M0")
_AGAIN = "the file is damaged, or its shards belong to different versions: download it again"
_BLOCK = (128, 128)
_NAMES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4",
    "torchao": "torchao",
    "modelopt": "ModelOpt",
    "fbgemm_fp8": "FBGEMM FP8",
}


@dataclass(frozen=True, slots=True)
class Codes:
    """What a configuration says of quantisation: which method made codes of the numbers, and whether they are read as
    numbers, with scales in blocks of `block` where there are blocks. `where` is the path of the configuration."""

    name: str
    read: bool
    block: tuple[int, int] | None = None
    where: str = ""

    @property
    def says(self) -> str:
        """For messages, behind the model's name."""
        return f"is quantised: its numbers are codes of {self.name}{f' ({self.where})' if self.where else ''}"

    @property
    def hint(self) -> str:
        if self.name in ("GPTQ", "AWQ"):
            return "merge the model that it was made from, and quantise the result: rounding cannot be undone"
        return (
            "merge the model that it was made from, or save this one in bfloat16 first (transformers: "
            "`model.dequantize()`, `save_pretrained`)"
        )


def refused(config: Mapping[str, Any], folder: Path | None) -> Codes | None:
    """The codes of a checkpoint that are fit for copying only, by the `config` in its `folder`; None where there are
    none."""
    said = codes_of(config)
    return None if said is None else replace(said, where=str(folder / "config.json") if folder is not None else "")


def codes_of(config: Mapping[str, Any]) -> Codes | None:
    """What the configuration, or its part for text or images, says of quantisation."""
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        said = part.get(KEY)
        if isinstance(said, Mapping) and said:
            return _codes(said)
        if said:
            return Codes("an unknown method", False)
    return None


def _codes(said: Mapping[str, Any]) -> Codes:
    method = said.get("quant_method")
    if method == "fp8":
        size = said.get("weight_block_size", list(_BLOCK))
        return Codes("FP8", size is None or _pair(size) is not None, _pair(size))
    if method == "compressed-tensors":
        return _compressed(said)
    if method == "bitsandbytes" or said.get("load_in_4bit") or said.get("load_in_8bit"):
        bits = "4-bit" if said.get("load_in_4bit") else "8-bit" if said.get("load_in_8bit") else ""
        return Codes(f"bitsandbytes{f' ({bits})' if bits else ''}", False)
    known = _NAMES.get(method) if isinstance(method, str) else None
    return Codes(known or (f"the method `{method[:50]}`" if isinstance(method, str) else "an unknown method"), False)


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 2**31 for n in size):
        return size[0], size[1]
    return None


def _compressed(said: Mapping[str, Any]) -> Codes:
    """compressed-tensors, of which FP8 with one scale for a tensor, a row or a block is read."""
    kind = said.get("format")
    name = f"compressed-tensors ({kind[:50]})" if isinstance(kind, str) else "compressed-tensors"
    groups, sparse = said.get("config_groups"), said.get("sparsity_config")
    plain = not isinstance(sparse, Mapping) or sparse.get("format", "dense") == "dense"
    if kind not in ("float-quantized", "naive-quantized") or not isinstance(groups, Mapping) or not plain:
        return Codes(name, False)
    block = None
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            return Codes(name, False)
        strategy, size = weights.get("strategy"), _pair(weights.get("block_structure"))
        if strategy not in ("tensor", "channel", "block") or not weights.get("symmetric", True):
            return Codes(name, False)
        if strategy == "block" and (size is None or block not in (None, size)):
            return Codes(name, False)
        block = size or block
    return Codes(name, not said.get("transform_config"), block)


def with_numbers(
    config: Mapping[str, Any], tensors: Mapping[str, TensorMeta]
) -> tuple[dict[str, Any], dict[str, TensorMeta]]:
    """Configuration and tensors with the scales of FP8 weights put to their weights, so that the weights are numbers.

    Nothing changes where there are none, or where another method has made the codes. Raises InputError for scales
    without a weight, FP8 weights without scales where the configuration promises them, and scales that do not fit
    their weight.
    """
    said = codes_of(config)
    there = any(
        meta.dtype in _CODES and any(f"{name}{end}" in tensors for end in SCALES) for name, meta in tensors.items()
    )
    if (said is not None and not said.read) or (said is None and not there):
        return dict(config), dict(tensors)
    codes = said or Codes("FP8", True, _BLOCK)
    saved = _saved(config)
    scales = {name: weight for name in tensors if (weight := _weight_of(name, tensors)) is not None}
    problems = list(_lost(scales, tensors))
    found: dict[str, TensorMeta] = {}
    for name, meta in tensors.items():
        scale = next((tensors[f"{name}{end}"] for end in SCALES if scales.get(f"{name}{end}") == name), None)
        if name in scales or (name.endswith(_BESIDE) and meta.numel <= 1):
            continue
        if scale is not None and meta.dtype in _CODES:
            block = _block_of(meta, scale, codes.block)
            if block is None:
                problems.append(_misfit(meta, scale, codes.block))
            found[name] = replace(meta, dtype="F32", packed=Packed(meta.dtype, saved, scale, block or (1, 1)))
            continue
        if meta.dtype in _CODES and said is not None:
            message = f"`{name[:200]}` in `{meta.file}` is stored in FP8 and has no scale beside it"
            problems.append(Problem(message, None, _AGAIN))
        found[name] = meta
    if problems:
        raise InputError(problems)
    return without_key(config), found


def without_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the configuration that says nothing of quantisation."""
    return {
        key: {k: v for k, v in value.items() if k != KEY} if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != KEY
    }


def _saved(config: Mapping[str, Any]) -> str:
    """The dtype that the configuration states for the weights; float32, which holds them exactly, where it does not."""
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        for key in ("dtype", "torch_dtype"):
            code = DTYPE_CODES.get(said) if isinstance(said := part.get(key), str) else None
            if code in MERGEABLE and code not in _CODES:
                return code or "F32"
    return "F32"


def _weight_of(name: str, tensors: Mapping[str, TensorMeta]) -> str | None:
    """The weight that a tensor of this name is the scale of; None where it is no scale. The weight may be missing."""
    for end in SCALES:
        stem = name.removesuffix(end)
        if stem != name:
            weight = tensors.get(stem)
            sure = end == "_scale_inv" or stem.endswith(".weight")
            return stem if sure or (weight is not None and weight.dtype in _CODES) else None
    return None


def _lost(scales: Mapping[str, str], tensors: Mapping[str, TensorMeta]) -> Iterator[Problem]:
    for name, weight in scales.items():
        place = f"`{name[:200]}` in `{tensors[name].file}`"
        if weight not in tensors:
            yield Problem(f"{place} is a scale, and its weight `{weight[-200:]}` is missing", None, _AGAIN)
        elif tensors[weight].dtype not in _CODES:
            message = f"{place} is a scale, but its weight is stored as {tensors[weight].dtype}, not in FP8"
            yield Problem(message, None, _AGAIN)
        elif tensors[name].dtype not in _FACTORS:
            yield Problem(f"{place} is a scale, but stored as {tensors[name].dtype}", None, _AGAIN)


def _block_of(weight: TensorMeta, scale: TensorMeta, block: tuple[int, int] | None) -> tuple[int, int] | None:
    """Of how many rows and columns each scale is; None where the shapes do not fit."""
    if len(weight.shape) < 2:
        return (1, 1) if scale.numel == 1 else None
    *lead, rows, columns = weight.shape
    if scale.numel == 1:
        return rows, columns
    if scale.shape in ((*lead, rows, 1), (*lead, rows)):
        return 1, max(1, columns)
    if lead and scale.shape in ((*lead, 1, 1), tuple(lead)):
        return rows, columns
    if block is not None and scale.shape == (*lead, -(-rows // block[0]), -(-columns // block[1])):
        return block
    return None


def _misfit(weight: TensorMeta, scale: TensorMeta, block: tuple[int, int] | None) -> Problem:
    def text(shape: tuple[int, ...]) -> str:
        return "×".join(map(str, shape)) or "a scalar"

    fit = ["one number"]
    if len(weight.shape) > 1:
        *lead, rows, columns = weight.shape
        fit.append(text((*lead, rows, 1)))
        if block is not None:
            blocks = text((*lead, -(-rows // block[0]), -(-columns // block[1])))
            fit.append(f"{blocks} for blocks of {block[0]}×{block[1]}")
    return Problem(
        f"`{scale.name[:200]}` in `{scale.file}` has the shape {text(scale.shape)}, which does not fit its weight of "
        f"{text(weight.shape)}: only {' or '.join(fit)} would",
        None,
        "is `weight_block_size` in config.json that of these files? If so the file is damaged: download it again",
    )
