"""Sees a GGUF file, or the parts of one, as a checkpoint: tensors by the names that transformers gives them.

Names and types are looked up in the tables of the `gguf` library, which works the numbers out as well, when they are
read. Taken are the families whose tensors llama.cpp stores as they are, save for the rows of `q_proj` and `k_proj` of
Llama, which it reorders.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mergekit_lite.checkpoint.extras import tokenizer_files
from mergekit_lite.checkpoint.gguf_header import Entry, GgufHeader, Value, read_gguf_header
from mergekit_lite.checkpoint.inside import inside, read_object
from mergekit_lite.checkpoint.meta import Checkpoint, Packed, TensorMeta
from mergekit_lite.errors import InputError, Problem, printable

SUFFIX = ".gguf"
_MAX_CONFIG_BYTES = 16 * 2**20
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_LAYERS = 1 << 12
# What transformers calls the tensors of Llama, Qwen2, Qwen3 and Mistral.
_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")
_INSIDE = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")
_HINT = "name the model that it was made from, or one that has been dequantised, in safetensors"


@dataclass(frozen=True, slots=True)
class _Family:
    """What transformers makes of an architecture of GGUF: its model type and class. `reordered` tells that rows of
    `q_proj` and `k_proj` have another order in GGUF."""

    model_type: str
    architecture: str
    reordered: bool = False


_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", reordered=True),
    "mistral": _Family("mistral", "MistralForCausalLM", reordered=True),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM"),
}
# Keys of GGUF's metadata behind the architecture's name -> those of config.json. All but the last two must be there.
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
}
_OPTIONAL = ("attention.head_count_kv", "rope.freq_base")
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


def gguf_files(folder: Path, location: str) -> list[str] | None:
    """The files of the only GGUF model in a folder; None where there is none, or safetensors beside it. Raises
    InputError where there are several."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read the folder `{location}`: {error.strerror}") from error
    found = [name for name in names if name.endswith(SUFFIX)]
    if not found or any(name.endswith(".safetensors") for name in names):
        return None
    models = {(part["stem"], part["count"]) if (part := _PART.fullmatch(name)) else name for name in found}
    if len(models) > 1:
        listed = ", ".join(f"`{name[:200]}`" for name in found[:5])
        raise InputError(f"`{location}` holds {len(models)} GGUF models: {listed}", hint="name the file that is meant")
    return parts_of(found[0])


def parts_of(name: str) -> list[str]:
    """The files of the model that the file `name` is, or is a part of."""
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    return [f"{part['stem']}-{n:05d}-of-{part['count']}{SUFFIX}" for n in range(1, min(int(part["count"]), 10_000) + 1)]


def open_gguf(location: str, folder: Path, files: Sequence[str], shown: str, *, linked: bool = False) -> Checkpoint:
    """The checkpoint of a GGUF model's `files` in `folder`, which messages call `shown`. `linked` allows them to be
    links, since the user named one.

    config.json is that of the folder, or else made from the metadata where that has what it takes. The tokenizer inside
    is not taken; files of one beside the model are. Raises InputError, also where the gguf library is missing.
    """
    library = _library()
    sizes = {int(kind): size for kind, size in library.GGML_QUANT_SIZES.items()}
    headers = []
    problems: list[Problem] = []
    for file in files:
        try:
            path = folder / file if linked else inside(folder, file)
            headers.append(read_gguf_header(path, os.path.join(shown, file), sizes))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    first = os.path.join(shown, files[0])
    name, family = _family(headers[0].metadata, first)
    _check_parts(headers, first)
    tensors, notes = _tensors(library, name, family, headers, first)
    if os.path.lexists(folder / "config.json"):
        config = read_object(inside(folder, "config.json"), _MAX_CONFIG_BYTES)
    else:
        config, more = _config(name, family, headers[0], tensors, first)
        notes += more
    checkpoint = Checkpoint(
        location=location,
        revision=None,
        folder=folder,
        config=config,
        tensors=tensors,
        shards=tuple(header.shard for header in headers),
    )
    if "tokenizer.ggml.model" in headers[0].metadata and not tokenizer_files(checkpoint):
        message = f"the tokenizer inside `{first}` is not taken, and there are no files of one beside it"
        hint = "put those of the model that it was made from beside it, or let another model lead the merge"
        notes.append(Problem(message, None, hint))
    return Checkpoint(location, None, folder, config, tensors, checkpoint.shards, notes=tuple(notes))


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        hint = "`pip install 'mergekit_lite[gguf]'`"
        raise InputError("a GGUF file is read with the library `gguf`, which is not installed", hint=hint) from error
    library: ModuleType = gguf
    return library


def _family(metadata: Mapping[str, Value], shown: str) -> tuple[str, _Family]:
    """The architecture's name, and what it is in transformers."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise InputError(f"`{shown}` does not say of which architecture it is", hint="download it again")
    if name not in _FAMILIES:
        known = ", ".join(f"`{each}`" for each in _FAMILIES)
        message = f"`{shown}` is of the architecture `{printable(name[:50])}`; of GGUF, {known} are read"
        raise InputError(message, hint=_HINT)
    title = metadata.get("general.name")
    # llama.cpp has one architecture for both; transformers tells them apart like this.
    if name == "llama" and isinstance(title, str) and "mistral" in title.lower():
        return name, _FAMILIES["mistral"]
    return name, _FAMILIES[name]


def _check_parts(headers: Sequence[GgufHeader], shown: str) -> None:
    count = headers[0].metadata.get("split.count", 1)
    if count not in (0, len(headers)):
        hint = "name its first file, `...-00001-of-...`, with all others beside it under their own names"
        raise InputError(f"`{shown}` is one of {count} parts, and {len(headers)} are here", hint=hint)
    for number, header in enumerate(headers):
        place = header.metadata.get("split.no", 0)
        if place != number:
            raise InputError(f"`{header.shard.path}` says that it is part number {place}, not {number}", hint=_HINT)


def _tensors(
    library: ModuleType, name: str, family: _Family, headers: Sequence[GgufHeader], shown: str
) -> tuple[dict[str, TensorMeta], list[Problem]]:
    layers = headers[0].metadata.get(f"{name}.block_count")
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise InputError(f"`{shown}` does not say how many layers it has", hint="download it again")
    names = _names(library, name, layers)
    tensors: dict[str, TensorMeta] = {}
    unknown: list[str] = []
    notes: list[Problem] = []
    for header in headers:
        for entry in header.entries:
            if entry.name in _ROPE:
                message = f"`{entry.name}` of `{shown}`, which stretches the context, is not taken over"
                hint = "copy `rope_scaling`, or `rope_parameters`, from the config.json of the model it was made from"
                notes.append(Problem(message, None, hint))
                continue
            stem, dot, last = entry.name.rpartition(".")
            if stem not in names or last not in ("weight", "bias"):
                unknown.append(entry.name)
                continue
            there = f"{names[stem]}{dot}{last}"
            if there in tensors:
                raise InputError(f"two parts of `{shown}` hold `{printable(entry.name)}`", hint="download it again")
            tensors[there] = _meta(library, there, entry, _heads(there, entry, headers[0], name, family, shown), header)
    if unknown:
        listed = ", ".join(f"`{printable(each)}`" for each in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        message = f"`{shown}` holds tensors that a model of `{family.model_type}` does not have: {listed}{more}"
        raise InputError(message, hint=_HINT)
    if not tensors:
        raise InputError(f"`{shown}` holds no tensors", hint="download it again")
    return tensors, notes


def _names(library: ModuleType, name: str, layers: int) -> dict[str, str]:
    """The names that transformers has, by those of GGUF, without `.weight` or `.bias`."""
    known = {text: number for number, text in library.MODEL_ARCH_NAMES.items()}
    table = library.get_tensor_name_map(known["llama" if name == "mistral" else name], layers)
    ours = [*_OUTSIDE, *(f"model.layers.{layer}.{part}" for layer in range(layers) for part in _INSIDE)]
    return {theirs: our for our in ours if (theirs := table.get_name(our)) is not None}


def _heads(there: str, entry: Entry, header: GgufHeader, name: str, family: _Family, shown: str) -> int:
    """Of how many heads the rows of a tensor have llama.cpp's order; 0 for all others."""
    module = there.split(".")[-2]
    if not family.reordered or module not in ("q_proj", "k_proj"):
        return 0
    key = f"{name}.attention.head_count"
    heads = header.metadata.get(key)
    if module == "k_proj":
        heads = header.metadata.get(f"{key}_kv", heads)
    rows = entry.shape[0] if entry.shape else 1
    if type(heads) is not int or heads < 1 or rows % heads or rows // heads % 2:
        message = f"`{shown}` does not say of how many heads the {rows} rows of `{printable(entry.name)}` are"
        raise InputError(message, hint=_HINT)
    return heads


def _meta(library: ModuleType, there: str, entry: Entry, heads: int, header: GgufHeader) -> TensorMeta:
    kind = library.GGMLQuantizationType(entry.kind)
    numbers, nbytes = library.GGML_QUANT_SIZES[kind]
    numel = 1
    for size in entry.shape:
        numel *= size
    file, size = header.shard.path, numel // numbers * nbytes
    if kind.name in _PLAIN and not heads:
        return TensorMeta(there, entry.shape, kind.name, file, entry.start, size)
    if kind.name not in _PLAIN and not _undone(kind):
        message = f"`{printable(entry.name)}` in `{file}` is stored as {kind.name}, which the gguf library cannot undo"
        raise InputError(message, hint=_HINT)
    saved = kind.name if kind.name in ("F16", "BF16") else "F32"
    packed = Packed(kind.name, saved, group=(numbers, nbytes), heads=heads)
    return TensorMeta(there, entry.shape, "F32", file, entry.start, size, packed)


@functools.cache
def _undone(kind: Any) -> bool:
    """Whether the gguf library works out numbers of this type: it has no list of them."""
    import numpy as np

    library = _library()
    try:
        library.quants.dequantize(np.zeros(library.GGML_QUANT_SIZES[kind][1], dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _config(
    name: str, family: _Family, header: GgufHeader, tensors: Mapping[str, TensorMeta], shown: str
) -> tuple[dict[str, Any], list[Problem]]:
    """What config.json would say, and notes on it; an empty one where the metadata lacks what it takes."""
    metadata = header.metadata
    made: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    lacking = []
    for key, ours in _KEYS.items():
        value = metadata.get(f"{name}.{key}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            made[ours] = value
        elif key not in _OPTIONAL:
            lacking.append(f"{name}.{key}")
    embedding = tensors.get("model.embed_tokens.weight")
    if lacking or embedding is None:
        what = ", ".join(f"`{key}`" for key in lacking) or "the embedding"
        message = f"no config.json can be made for `{shown}`: it lacks {what}"
        return {}, [Problem(message, None, "put that of the model that it was made from beside it")]
    length = metadata.get(f"{name}.attention.key_length")
    if length is None and family.reordered:  # there all of a head is turned
        length = metadata.get(f"{name}.rope.dimension_count")
    if isinstance(length, int):
        made["head_dim"] = length
    made |= dict(_biases(family, tensors))
    made["vocab_size"] = embedding.shape[0]
    made["tie_word_embeddings"] = "lm_head.weight" not in tensors
    for key, ours in _TOKENS.items():
        if isinstance(number := metadata.get(f"tokenizer.ggml.{key}"), int):
            made[ours] = number
    notes = []
    scaling = [key for key in metadata if key.startswith(f"{name}.rope.scaling.")]
    if scaling and metadata.get(f"{name}.rope.scaling.type") != "none":
        message = f"`{shown}` stretches the context (`{printable(scaling[0])}`), of which config.json will say nothing"
        notes.append(Problem(message, None, "put the config.json of the model that it was made from beside it"))
    return made, notes


def _biases(family: _Family, tensors: Mapping[str, TensorMeta]) -> Iterator[tuple[str, bool]]:
    if family.model_type == "llama":
        yield "attention_bias", any(name.endswith("_proj.bias") and ".self_attn." in name for name in tensors)
        yield "mlp_bias", any(name.endswith("_proj.bias") and ".mlp." in name for name in tensors)
