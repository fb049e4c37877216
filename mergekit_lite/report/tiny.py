"""A tiny random model with the architecture of a config.json, built by transformers from its own classes.

Sizes are shrunk, everything else is kept. No code comes from a checkpoint, and nothing is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lite.errors import InputError, Problem
from mergekit_lite.lazy import Tensor, torch

LAYERS, HEADS, VOCABULARY, POSITIONS, LABELS = 2, 4, 64, 40, 5
# Sizes that could be mistaken for each other differ.
_SIZES = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "word_embed_proj_dim": 32, "embedding_size": 16,
    "head_dim": 8, "d_kv": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "qk_head_dim": 20, "v_head_dim": 10,
    "q_lora_rank": 24, "kv_lora_rank": 16,
    "intermediate_size": 40, "d_ff": 40, "ffn_dim": 40, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "n_inner": 40,
    "hidden_dim": 40, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "projection_dim": 24,
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "n_positions": POSITIONS, "n_ctx": POSITIONS,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "num_encoder_layers",
           "encoder_layers", "decoder_layers")  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
          "decoder_attention_heads")  # fmt: skip
_MOST = _SIZES | {
    **dict.fromkeys(_LAYERS, LAYERS),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "n_group"), 2),
    **dict.fromkeys(("first_k_dense_replace", "topk_group"), 1),
}
# What would load code, kernels or weights from elsewhere, or names a storage format.
_DROPPED = {"auto_map", "quantization_config", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
            "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
            "_experts_implementation", "_experts_implementation_internal", "use_kernels",
            "use_pretrained_backbone", "id2label", "label2id", "architectures"}  # fmt: skip


_HINT = "spaces of a model that transformers does not have are proved in Python, with mergekit_lite.align.prove"


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model in float64 and eval mode, example inputs for it by name, and its config.json."""

    model: Any
    inputs: Mapping[str, Tensor]
    config: Mapping[str, Any]

    def outputs(self, weights: Mapping[str, Tensor] | None = None, model: Any = None) -> list[Tensor]:
        """What the model, or another one of its class, makes of the inputs; with other weights where some are given."""
        with torch.no_grad():
            return _compared(
                torch.func.functional_call(model or self.model, dict(weights or {}), (), dict(self.inputs))
            )


def tiny_model(config: Mapping[str, Any], parameters: int, most: int = 50_000_000) -> Tiny:
    """A tiny random model of this config.json. A checkpoint of no more than `most` `parameters` may keep its sizes
    where a smaller model cannot be built.

    InputError where transformers is not installed, does not know the model type, or cannot build such a model.
    """
    library = transformers()
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(
            Problem("config.json names no model type, so there is no model to prove spaces on", None, _HINT)
        )
    try:
        known = library.AutoConfig.for_model(**_kept(config))
    except Exception as fault:  # what a class of configuration raises is its own affair
        message = f"transformers knows no model of type `{model_type}` with this config.json: {_first(fault)}"
        raise InputError(Problem(message, None, _HINT)) from fault
    tries = [shrunk(known.to_dict())] + ([_kept(known.to_dict())] if parameters <= most else [])
    faults = []
    for sizes in tries:
        try:
            return _built(library, sizes, config.get("architectures"))
        except Exception as fault:  # transformers and the model's own code raise whatever they raise
            faults.append(_first(fault))
    raise InputError(Problem(f"transformers cannot build a small model of type `{model_type}`: {faults[0]}"))


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """A full configuration with small sizes, its sections too."""
    made = _kept(config)
    layers = next((made[key] for key in _LAYERS if isinstance(made.get(key), int)), 0)
    heads = next((made[key] for key in _HEADS if isinstance(made.get(key), int)), HEADS)
    for key, value in made.items():
        if isinstance(value, dict) and key.endswith("_config"):
            made[key] = shrunk(value)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            if key == "num_key_value_heads":
                made[key] = min(value, HEADS if value == heads else 2)
            elif key.endswith("_token_id"):
                made[key] = value if value < 3 else 2
            else:
                made[key] = min(value, _MOST.get(key, value))
        elif isinstance(value, list):
            made[key] = _shorter(key, value, layers)
        elif isinstance(value, dict) and any(isinstance(part, list) for part in value.values()):
            # Factors for each frequency fit no other width of heads.
            made[key] = {"rope_type": "default", "rope_theta": value.get("rope_theta", 10000.0)}
    return made


def _shorter(key: str, value: list[Any], layers: int) -> list[Any]:
    if key == "hidden_sizes":
        return [16 * (i + 1) for i in range(len(value))]
    if key == "depths":
        return [min(depth, 2 if i == 0 else 1) for i, depth in enumerate(value)]
    if len(value) == layers and layers > LAYERS and all(isinstance(part, str | int | float) for part in value):
        # Layers of both kinds where there are two.
        other = next((part for part in value if part != value[0]), value[0])
        return [value[0], other]
    return value


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _kept(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in _DROPPED
    }


def _built(transformers: Any, sizes: dict[str, Any], architectures: Any) -> Tiny:
    """The model that gives scores; where there is none, the first one that runs."""
    # Grouped kernels for experts do not take float64.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = transformers.AutoConfig.for_model(**sizes, num_labels=LABELS, **eager)
    found: Tiny | None = None
    fault: Exception | None = None
    for make in _classes(transformers, architectures):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = make(config).double().eval()
                tiny = Tiny(model, _inputs(model), {**config.to_dict(), "architectures": [type(model).__name__]})
                scored = any("logits" in name for name in model(**tiny.inputs))
        except Exception as raised:
            # Where the class that config.json names fails, the others' complaint that it is not theirs says nothing.
            fault = raised if fault is None or "Unrecognized configuration class" in str(fault) else fault
            continue
        if scored:
            return tiny
        found = found or tiny
    if found is None:
        assert fault is not None
        raise fault
    return found


def _classes(transformers: Any, architectures: Any) -> Iterator[Callable[[Any], Any]]:
    for name in architectures if isinstance(architectures, list) else ():
        named = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            yield named
    for head in ("MaskedLM", "CausalLM", "Seq2SeqLM", "ImageClassification", "ZeroShotImageClassification"):
        yield getattr(transformers, f"AutoModelFor{head}").from_config
    yield transformers.AutoModel.from_config


def _inputs(model: Any) -> dict[str, Tensor]:
    """Two examples of whatever the model takes: tokens of the vocabulary without the special ones, pictures."""
    taken = inspect.signature(model.forward).parameters
    sections = [model.config, *(getattr(model.config, name, None) for name in ("text_config", "vision_config"))]
    stated = {
        key: value for section in reversed(sections) if section is not None for key, value in vars(section).items()
    }
    made: dict[str, Tensor] = {}
    if "input_ids" in taken:
        made["input_ids"] = torch.randint(3, stated["vocab_size"], (2, 7))
    if "decoder_input_ids" in taken:
        made["decoder_input_ids"] = torch.randint(3, stated["vocab_size"], (2, 5))
    if "pixel_values" in taken and "num_channels" in stated:
        size = stated.get("image_size", 32)
        made["pixel_values"] = torch.randn(2, stated["num_channels"], size, size, dtype=torch.float64)
    return made


def _compared(outputs: Mapping[str, Any]) -> list[Tensor]:
    """The scores; where a model gives none, its projected embeddings; where it has none either, all that it gives."""
    from mergekit_lite.align.prove import floating

    for part in ("logits", "_embeds", ""):
        named = floating([value for name, value in outputs.items() if part in name])
        if named:
            return named
    return []


def transformers() -> Any:
    """The library. Raises InputError where it is not installed."""
    try:
        import transformers
    except ImportError as fault:
        hint = "pip install transformers"
        raise InputError(Problem("a proof needs transformers, which is not installed", None, hint)) from fault
    return transformers


def _first(fault: Exception) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0][:300] if lines else type(fault).__name__
