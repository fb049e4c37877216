"""Tiny GGUF files, written with the gguf library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Kind = gguf.GGMLQuantizationType
HIDDEN, HEADS, KV, LAYERS, INNER, VOCABULARY = 256, 4, 2, 2, 512, 96
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
# Where the half-precision factors of a group lie: those that the library cannot make are made of random bytes.
_FACTORS = {"Q4_K": (0, 2), "Q6_K": (208,)}


def stored(values: NDArray[np.float32], kind: str, generator: np.random.Generator) -> NDArray[Any]:
    """`values` as GGUF holds them; of types that the library does not make, random numbers in their place."""
    if kind == "F32":
        return values
    if kind not in _FACTORS:
        return gguf.quants.quantize(values, Kind[kind])
    numbers, nbytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = generator.integers(0, 256, (values.size // numbers, nbytes), dtype=np.uint8)
    for place in _FACTORS[kind]:
        factors = generator.uniform(-0.01, 0.01, len(raw)).astype(np.float16)
        raw[:, place : place + 2] = factors.view(np.uint8).reshape(-1, 2)
    return raw.reshape(len(values), -1)


def head_size(arch: str) -> int:
    return 128 if arch == "qwen3" else HIDDEN // HEADS  # what transformers takes for it, whatever the file says


def shapes(arch: str, tied: bool = False, biases: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a tiny model, by the names of GGUF."""
    head = head_size(arch)
    made: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        made["output.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        place = f"blk.{layer}."
        sizes = {"q": HEADS * head, "k": KV * head, "v": KV * head}
        made |= {f"{place}{name}_norm.weight": (HIDDEN,) for name in ("attn", "ffn")}
        made |= {f"{place}attn_{part}.weight": (rows, HIDDEN) for part, rows in sizes.items()}
        if biases:
            made |= {f"{place}attn_{part}.bias": (rows,) for part, rows in sizes.items()}
        if arch == "qwen3":
            made |= {f"{place}attn_{part}_norm.weight": (head,) for part in "qk"}
        made[f"{place}attn_output.weight"] = (HIDDEN, HEADS * head)
        made |= {f"{place}ffn_{name}.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        made[f"{place}ffn_down.weight"] = (HIDDEN, INNER)
    return made


def write_gguf(
    path: Path,
    arch: str = "llama",
    kind: str = "Q8_0",
    *,
    seed: int = 0,
    tied: bool = False,
    biases: bool = False,
    more: Mapping[str, NDArray[Any]] | None = None,
    split: int = 0,
) -> Path:
    """A tiny model of `arch` whose matrices are of `kind`, in one file or in `split` parts."""
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_size(arch))
    if arch == "qwen3":
        writer.add_key_length(head_size(arch))
    writer.add_vocab_size(VOCABULARY)
    for name, shape in shapes(arch, tied, biases).items():
        values = generator.standard_normal(shape).astype(np.float32) * 0.05
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, stored(values, kind, generator), raw_dtype=Kind[kind])
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
