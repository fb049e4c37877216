"""The `save` section: which step goes to which folder, in which dtype, in files of which size, and to the Hub."""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.lora import FORMS, read_lora
from mergekit_lite.recipe.lora import KEYS as LORA_KEYS
from mergekit_lite.recipe.masks import KEYS as MASKS_KEYS
from mergekit_lite.recipe.masks import read_masks
from mergekit_lite.recipe.model import Ref, Save
from mergekit_lite.recipe.node import ListNode, MapNode, Node, ScalarNode, describe
from mergekit_lite.recipe.push import read_push
from mergekit_lite.recipe.tokenizer import read_native

DEFAULT_SHARD = 5 * 10**9
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
QUANTIZE = ("fp8",)
SAVE_KEYS = (
    "step", "to", "dtype", "quantize", "shard", "push", "tokenizer", "chat_template", *LORA_KEYS, "tasks", "threshold",
    "compress",
)  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) ?([A-Za-z]{1,3})")
_MAX_PATH = 4096
_EXAMPLE = "for example `save: {to: out/merged, dtype: bfloat16}`"
_DTYPE_HINT = f"one of {', '.join(f'`{name}`' for name in DTYPES)}"


def read_saves(
    node: Node | None, top: Mark, read_ref: Callable[[Node, str], Ref | None], problems: list[Problem]
) -> list[Save]:
    """The saves that `node` writes: one mapping or a list. No `save` at all is one save whose folder `--out` gives.

    `read_ref(node, what)` reads a reference to a model or a step; `top` is the mark for a recipe without `save`.
    """
    if node is None:
        return [Save(None, None, None, DEFAULT_SHARD, top)]
    items = node.items if isinstance(node, ListNode) else (node,)
    if not items:
        problems.append(Problem("`save` is an empty list", node.mark, _EXAMPLE))
    saves: list[Save] = []
    for item in items:
        if isinstance(item, MapNode):
            saves.append(_read_save(item, read_ref, problems))
        else:
            problems.append(Problem(f"a save must be a mapping, not {describe(item)}", item.mark, _EXAMPLE))
    if len(items) > 1:
        for save in saves:
            if save.to is None:
                hint = "with several saves each one names its folder: `to: out/name`"
                problems.append(Problem("this save has no `to`", save.mark, hint))
    _check_folders(saves, problems)
    return saves


def read_size(value: object) -> int | None:
    """A size in bytes (`5GB`, `500MB`, `2GiB`, `1.5 GB`, a number of bytes), or None where it is not a size above 0."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value > 0 else None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match.group(2).lower() not in units:
        return None
    whole, _, part = match.group(1).partition(".")
    # Integers, because a float would make 4.35GB a byte short.
    size = int(whole + part) * units[match.group(2).lower()] // 10 ** len(part)
    return size if size > 0 else None


def _read_save(node: MapNode, read_ref: Callable[[Node, str], Ref | None], problems: list[Problem]) -> Save:
    step, to, dtype, shard, push, quantize = None, None, None, DEFAULT_SHARD, None, None
    for key, entry in node.entries.items():
        value = entry.value.value if isinstance(entry.value, ScalarNode) else None
        mark = entry.value.mark
        if key == "step":
            step = read_ref(entry.value, "`step`")
        elif key == "to":
            if isinstance(value, str) and value.strip() and "\0" not in value and len(value) <= _MAX_PATH:
                to = value
            else:
                message = f"`to` must be a folder, not {describe(entry.value)}"
                problems.append(Problem(message, mark, "for example `to: out/merged`; a number needs quotes"))
        elif key == "dtype":
            dtype = SHORT_DTYPES.get(value, value) if isinstance(value, str) else None
            if dtype not in DTYPES:
                near = suggest(value, DTYPES) if isinstance(value, str) else _DTYPE_HINT
                problems.append(Problem(f"`dtype` must be a floating type, not {describe(entry.value)}", mark, near))
                dtype = None
        elif key == "quantize":
            quantize = value if isinstance(value, str) and value in QUANTIZE else None
            if quantize is None:
                message = f"`quantize` must be fp8, not {describe(entry.value)}"
                hint = "leave it out to save numbers as they are; `dtype` says in which type"
                problems.append(Problem(message, mark, hint))
        elif key == "shard":
            size = read_size(value)
            if size is None:
                message = f"`shard` must be a size above 0, not {describe(entry.value)}"
                problems.append(Problem(message, mark, "for example `5GB`, `500MB`, `2GiB` or a number of bytes"))
            shard = size or DEFAULT_SHARD
        elif key in (*LORA_KEYS, *MASKS_KEYS, "tokenizer", "chat_template"):
            continue  # read together below
        elif key == "push":
            push = read_push(entry.value, problems)
        else:
            problems.append(Problem(f"`save` has no key `{key}`", entry.mark, suggest(key, SAVE_KEYS)))
    lora, masks = None, None
    kind = node.get("as")
    if kind is not None and _kind(node) not in (*FORMS, "masks"):
        message = f"`as` must be {', '.join(FORMS)} or masks, not {describe(kind)}"
        problems.append(Problem(message, kind.mark, "leave it out to save a whole model"))
        others = []
    elif _kind(node) == "masks":
        masks = read_masks(node, read_ref, problems)
        others = [key for key in LORA_KEYS if key in node.entries and key not in MASKS_KEYS]
    else:
        lora = read_lora(node, read_ref, problems) if set(node.entries) & set(LORA_KEYS) else None
        others = [key for key in MASKS_KEYS if key in node.entries and key not in LORA_KEYS]
    for key in others:
        hint = "remove it" if "as" in node.entries else "add `as: masks` for a mask store, or remove it"
        problems.append(Problem(f"`{key}` belongs to another kind of save", node.entries[key].mark, hint))
    tokenizer = read_native(node.get("tokenizer"), node.get("chat_template"), read_ref, problems)
    if (lora is not None or masks is not None) and tokenizer is not None:
        hint = "save the model whole, or leave out `tokenizer` and `chat_template`"
        what = "an adapter" if masks is None else "a mask store"
        problems.append(Problem(f"{what} has the vocabulary of its base", _mark_of(node), hint))
    if "quantize" in node.entries and "as" in node.entries:
        hint = "leave out `quantize`, or save a whole model"
        what = "a mask store" if masks is not None else "an adapter"
        problems.append(Problem(f"{what} is not stored in FP8", node.entries["quantize"].mark, hint))
    if quantize is not None and dtype is not None and dtype.startswith("float8"):
        hint = "`dtype` is that of all other tensors: `bfloat16`, or leave it out"
        problems.append(Problem(f"`quantize: {quantize}` with `dtype: {dtype}`", node.entries["dtype"].mark, hint))
    return Save(step, to, dtype, shard, _mark_of(node), lora, push, tokenizer, masks, quantize)


def _kind(node: MapNode) -> object:
    found = node.get("as")
    return found.value if isinstance(found, ScalarNode) else None


def _mark_of(node: MapNode) -> Mark:
    """Where findings about a save as a whole point: at its folder, or at its first line."""
    entry = node.entries.get("to")
    return node.mark if entry is None else entry.value.mark


def _check_folders(saves: Sequence[Save], problems: list[Problem]) -> None:
    """Report saves into one folder, or into a folder inside another save's. Paths count as text, `..` resolved."""
    taken: dict[Path, Save] = {}
    above: dict[Path, Save] = {}
    for save in saves:
        if save.to is None:
            continue
        folder = Path(os.path.abspath(os.path.expanduser(save.to)))
        around = next((taken[parent] for parent in folder.parents if parent in taken), None) or above.get(folder)
        if folder in taken:
            hint = f"the save on line {taken[folder].mark.line} writes there; give each save a folder of its own"
            problems.append(Problem(f"two saves go to the folder `{save.to}`", save.mark, hint))
        elif around is not None:
            hint = f"the other one is on line {around.mark.line}; put them side by side"
            problems.append(Problem(f"`{save.to}` and `{around.to}` lie inside one another", save.mark, hint))
        taken.setdefault(folder, save)
        above |= {parent: save for parent in folder.parents if parent not in above}
