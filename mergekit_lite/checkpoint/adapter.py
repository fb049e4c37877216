"""Finds an adapter that peft saved and reads its configuration and header. No torch, and never a byte of a tensor.

An adapter is a stranger's: nothing that its configuration names is opened, and its patterns are matched only where that
takes little time.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.header import read_header
from mergekit_lite.checkpoint.hub import Listing, Unreachable, cached, fetch, fetch_beside, is_hub_id, is_offline, look
from mergekit_lite.checkpoint.inside import inside, parse_object, read_bytes
from mergekit_lite.checkpoint.lycoris import KINDS, config_faults, product
from mergekit_lite.checkpoint.lycoris import key as named
from mergekit_lite.checkpoint.meta import Adapter, Checkpoint, LowRank, Product, ShardFile, TensorMeta
from mergekit_lite.checkpoint.patterns import MOST_STEPS, Numbers, is_number, simple, steps
from mergekit_lite.checkpoint.pickled import read_pickled
from mergekit_lite.checkpoint.remote import headers_at
from mergekit_lite.errors import InputError, Mark, Problem

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_ABSENT = "name the folder that peft's `save_pretrained` wrote, or download it again"
_MAX_CONFIG_BYTES = 16 * 2**20
PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|lora_B\.bias)")
_FOLD = "fold it in with peft: `merge_and_unload()`, then `save_pretrained(...)`, and name that folder as the model"
_KEEP = "save those tensors of the state dict alone whose names hold `flora_layer.param_`"
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT")
_PROMPT = "it adds to the model's input, not to its weights: merge the base, and load this adapter on the result"
# What changes the meaning of the factors, or what they are applied to.
_UNREAD: Mapping[str, str] = {
    "target_parameters": "adapts parameters that are no module's weight (`target_parameters`)",
    "layer_replication": "repeats layers of its base (`layer_replication`)",
    "trainable_token_indices": "trains rows of the embedding (`trainable_token_indices`)",
    "alora_invocation_tokens": "is switched on by tokens (aLoRA) and has no weights of its own",
    "use_qalora": "uses QALoRA, whose factors have other shapes",
    "use_bdlora": "uses BD-LoRA, whose factors have other shapes",
    "arrow_config": "routes between adapters (Arrow)",
    "kasa_config": "uses KaSA, which changes the base's weights when it is loaded",
    "monteclora_config": "uses MonteCLoRA, which draws its weights at random",
}
# Where one of these stands in the configuration, peft changes the base's weights before it adds the adapter.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "kasa")


def open_adapter(
    location: str,
    revision: str | None,
    *,
    mark: Mark | None = None,
    offline: bool = False,
    pickled: bool = False,
    stream: bool = False,
) -> Adapter:
    """The adapter at `location`: a folder as peft's `save_pretrained` leaves it, otherwise a Hub id with `revision`.
    `pickled` reads `adapter_model.bin` too, as plain data, where there is nothing else. `stream` downloads no weights
    that lie on the Hub as safetensors: their header is read by ranges.

    Raises InputError, with `mark` in every problem, for whatever is missing, unreachable, corrupt, or not a LoRA
    adapter that can be added to the weights of a base.
    """
    try:
        folder, commit, far = _folder(location, revision, offline, pickled, stream)
        return _read(location, commit, folder, pickled, far)
    except InputError as error:
        raise InputError([replace(problem, mark=problem.mark or mark) for problem in error.problems]) from error


def with_adapter(base: Checkpoint, adapter: Adapter, mark: Mark | None = None) -> Checkpoint:
    """The base with an adapter to be added to it. A note tells where the adapter names another base."""
    notes = base.notes
    named = adapter.base
    # A folder may have any name; two ids on the Hub are two models.
    if named and named != base.location and is_hub_id(named) and is_hub_id(base.location):
        message = f"the adapter `{adapter.location}` says that it was made for `{named}`, not for `{base.location}`"
        hint = "is this its base? Names and shapes fit or the plan stops, but weights of another model spoil the result"
        notes = (*notes, Problem(message, mark, hint))
    return replace(base, shards=(*base.shards, *adapter.files), notes=notes, adapter=adapter)


def _folder(
    location: str, revision: str | None, offline: bool, pickled: bool, stream: bool
) -> tuple[Path, str | None, Listing | None]:
    """The folder, the commit, and what the Hub has there where the folder lacks the weights."""
    path = Path(os.path.abspath(os.path.expanduser(location)))
    if location and os.path.exists(path):
        if revision is not None:
            hint = f"leave out `@{revision}`, or rename the folder if the adapter on the Hub is meant"
            raise InputError(f"`{location}` is on this disk, where there are no revisions", hint=hint)
        if not path.is_dir():
            raise InputError(f"the adapter `{location}` is not a folder", hint=f"name the folder that holds {CONFIG}")
        return path, None, None
    if not is_hub_id(location):
        hint = f"give a folder that holds {CONFIG} and {WEIGHTS}, or a Hub id such as `organisation/name`"
        raise InputError(f"there is no adapter at `{location}`", hint=hint)
    more = (PICKLED,) if pickled else ()
    if not stream or is_offline(offline):
        return *fetch(location, revision, offline=offline, more=more), None
    try:
        seen = look(location, revision)
    except Unreachable as error:
        try:
            return *fetch(location, revision, offline=True, more=more), None
        except InputError:
            raise error from None
    if WEIGHTS not in seen.files:
        return *fetch(location, seen.commit, more=more), None
    folder = fetch_beside(location, seen.commit, [CONFIG])
    return folder, seen.commit, None if cached(location, seen.commit, [WEIGHTS]) else seen


def _read(location: str, revision: str | None, folder: Path, pickled: bool, far: Listing | None) -> Adapter:
    try:
        names = {*os.listdir(folder), *(far.files if far is not None else ())}
    except OSError as error:
        raise InputError(f"cannot read the folder `{location}`: {error.strerror}") from error
    if CONFIG not in names:
        if WEIGHTS in names:
            hint = f"it says how the factors are scaled; copy it from where the adapter was saved into `{location}`"
            raise InputError(f"the adapter `{location}` lacks its {CONFIG}", hint=hint)
        hint = "a whole model is named by its place alone, without `path` and `adapter`"
        raise InputError(f"`{location}` holds no adapter: there is no {CONFIG}", hint=hint)
    config, config_file = _config(inside(folder, CONFIG))
    problems = _unreadable(location, config)
    if problems:
        raise InputError(problems)
    if far is not None:
        (header,) = headers_at(location, far, [WEIGHTS])
    elif WEIGHTS in names:
        header = read_header(inside(folder, WEIGHTS), os.path.join(location, WEIGHTS))
    elif PICKLED in names and pickled:
        header = read_pickled(inside(folder, PICKLED), os.path.join(location, PICKLED))
    else:
        hint = (
            "pickled weights can run code, so they are read only with `--allow-pickle`, as plain data; or load it with "
            "peft's `PeftModel.from_pretrained(...)` and save it with `save_pretrained(..., safe_serialization=True)`"
        )
        raise InputError(f"the adapter `{location}` holds no {WEIGHTS}", hint=hint if PICKLED in names else _ABSENT)
    low_rank, products, whole = _modules(location, config, {meta.name: meta for meta in header.tensors})
    base = config.get("base_model_name_or_path")
    return Adapter(
        location=location,
        revision=revision,
        folder=folder,
        low_rank=low_rank,
        whole=whole,
        files=(header.shard, config_file),
        transposed=config.get("fan_in_fan_out") is True,
        retied=config.get("ensure_weight_tying") is True,
        base=base if isinstance(base, str) else None,
        products=products,
        kind=config["peft_type"],
    )


def _config(path: Path) -> tuple[dict[str, Any], ShardFile]:
    """The configuration, and the file's identity, taken before it is read so that a later change shows."""
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}", hint="download it again") from error
    text = read_bytes(path, _MAX_CONFIG_BYTES)
    digest = hashlib.sha256(text).hexdigest()
    return parse_object(text, path), ShardFile(str(path), found.st_size, found.st_mtime_ns, digest)


def _unreadable(location: str, config: Mapping[str, Any]) -> list[Problem]:
    """What in the configuration cannot be carried out, or is no configuration of peft's."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        shown = f"of the type {kind}" if isinstance(kind, str) else f"without a `peft_type` in its {CONFIG}"
        message = f"the adapter `{location}` is {shown}; what is read is LORA (with DoRA), LOHA, LOKR, IA3 and FLORA"
        return [Problem(message, None, _PROMPT if kind in _PROMPTS else _FOLD)]
    problems = [
        Problem(f"the adapter `{location}` {what}, which is not supported", None, _FOLD)
        for key, what in _UNREAD.items()
        if config.get(key)
    ]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        message = f"the adapter `{location}` was made with `init_lora_weights: {init}`, which changes the base as well"
        hint = "save it with peft's `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it"
        problems.append(Problem(message, None, hint))
    flags = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying")
    faults = [f"`{key}` is true or false" for key in flags if not isinstance(config.get(key, False), bool | None)]
    if kind != "LORA":
        faults += config_faults(kind, config)
    elif not is_number(config.get("lora_alpha")):
        faults.append("`lora_alpha` is a number")
    for name in ("alpha_pattern", "rank_pattern") if kind == "LOKR" else ("alpha_pattern",):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(is_number, patterns.values())):
            faults.append(f"`{name}` maps names to numbers")
        else:
            faults += [f"`{key[:200]}` in `{name}` is no simple pattern" for key in patterns if not simple(key)]
    hint = f"correct {CONFIG}, or {_FOLD}"
    return problems + [Problem(f"the {CONFIG} of `{location}` is wrong: {fault}", None, hint) for fault in faults]


def _modules(
    location: str, config: Mapping[str, Any], metas: Mapping[str, TensorMeta]
) -> tuple[dict[str, LowRank], dict[str, Product], dict[str, TensorMeta]]:
    """The tensors of the file by what they belong to. Raises InputError for a factor without its partner and for names
    that no such adapter has."""
    parts: dict[str, dict[str, TensorMeta]] = {}
    whole: dict[str, TensorMeta] = {}
    unknown: list[str] = []
    kind = config["peft_type"]
    form = _KEY if kind == "LORA" else named(kind)
    for key, meta in metas.items():
        # peft wrote `lora_magnitude_vector.weight` for a while.
        name = key.removeprefix(PREFIX).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        match = form.fullmatch(name)
        if match is not None:
            parts.setdefault(match["module"], {})[match["part"]] = meta
        elif re.search(r"lora_|hada_|lokr_|ia3_|flora_layer", name) or not key.startswith(PREFIX):
            unknown.append(key)
        else:
            # A layer that is adapted and saved whole stands inside its wrapper.
            whole[name.replace(".base_layer.", ".")] = meta
    problems = []
    if unknown:
        shown = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "IA3": "(IA)^3", "FLORA": "FLoRA"}[kind]
        message = f"the adapter `{location}` holds {len(unknown)} tensors that are no part of {shown}: {_few(unknown)}"
        problems.append(Problem(message, None, _KEEP if kind == "FLORA" else _FOLD))
    if not metas:
        problems.append(Problem(f"the adapter `{location}` holds no tensors", None, "download it again"))
    if steps(parts, config) > MOST_STEPS:
        message = f"the adapter `{location}` has too many patterns in `alpha_pattern`, or too long names of modules"
        raise InputError(message, hint=_FOLD)
    number = Numbers(config)
    low_rank: dict[str, LowRank] = {}
    products: dict[str, Product] = {}
    alone: list[str] = []
    for module, found in parts.items():
        if kind == "LORA" and (low := _low_rank(module, found, config, number)) is not None:
            low_rank[module] = low
        elif kind != "LORA" and (made := product(config, module, found, number)) is not None:
            products[module] = made
        else:
            alone += [meta.name for meta in found.values()]
    if alone:
        message = f"the adapter `{location}` holds {len(alone)} tensors without their partners: {_few(alone)}"
        hint = "every `lora_A` needs its `lora_B`, with `use_dora` also its `lora_magnitude_vector`: download it again"
        problems.append(Problem(message, None, hint if kind == "LORA" else "download it again"))
    if problems:
        raise InputError(problems)
    return low_rank, products, whole


def _low_rank(
    module: str, found: Mapping[str, TensorMeta], config: Mapping[str, Any], number: Numbers
) -> LowRank | None:
    """What is added to one module; None where parts of it are missing or do not go together."""
    embedding = "lora_embedding_A" in found
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    magnitude, bias = found.get("lora_magnitude_vector"), found.get("lora_B.bias")
    known = {a, b, "lora_magnitude_vector", *(() if embedding else ("lora_B.bias",))}
    if not {a, b} <= set(found) <= known or (magnitude is not None) != (config.get("use_dora") is True):
        return None
    rank = found[a].shape[0] if found[a].shape else 0
    alpha = number(module, "alpha_pattern", "lora_alpha")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank) if rank else 0.0
    return LowRank(found[a], found[b], float(scale), embedding, magnitude, bias)


def _few(names: list[str]) -> str:
    shown = ", ".join(f"`{name[:200]}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
