"""What a mixture of experts that is built from dense models is called and says of itself, style by style. Data only, no
torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

# The weights of a dense feed-forward part: into the hidden units twice, and out of them.
DENSE = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
# Positions are computed from the configuration; old checkpoints store them all the same.
COMPUTED = "self_attn.rotary_emb.inv_freq"

_LLAMA = frozenset(
    {"input_layernorm.weight", "post_attention_layernorm.weight"} | {f"self_attn.{x}_proj.weight" for x in "qkvo"}
)
_QKV_BIAS = frozenset(f"self_attn.{x}_proj.bias" for x in "qkv")
_O_BIAS = frozenset({"self_attn.o_proj.bias"})
_QK_NORM = frozenset(f"self_attn.{x}_norm.weight" for x in "qk")

# What a dense model's configuration means by a key that it leaves out. The mixture's class may take another value for
# granted (Mixtral turns positions at a base of 1e6), so it is written out.
_EVERY = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_UNSAID: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_EVERY, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        **_EVERY,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {**_EVERY, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {**_EVERY, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
}
_THETA = 10000.0  # the base at which all of these turn positions unless they say otherwise
# What says nothing of a mixture: code of its own, parallelism, and attention in windows by layer.
_LEFT_OUT = ("auto_map", "pretraining_tp", "mlp_bias", "layer_types", "max_window_layers")


@dataclass(frozen=True, slots=True)
class Style:
    """A mixture as one `model_type` has it.

    `classes` is what the names of its classes begin with. `part` stands before its tensors in a layer, `weights` are
    the gate, up and down matrices of an expert, without `part`. `shared` stands before those of the shared expert,
    which there must be where `needs_shared`; `shared_gate` is the weight of the gate that scales it, `balance` the
    vector of one number for each expert that the router adds. `kept` are the other tensors of a dense model's layer
    that there is a place for, None for all. `says` is what config.json gets beside the numbers of the mixture, which
    stand under the keys in `counts`. `window` tells that attention may be within a window, `dense` that some layers may
    have no experts. There must be `least` experts.
    """

    model_type: str
    classes: str
    counts: Mapping[str, str]
    says: Mapping[str, Any]
    kept: frozenset[str] | None
    part: str = "mlp."
    weights: tuple[str, ...] = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    shared: str | None = None
    needs_shared: bool = False
    shared_gate: str | None = None
    balance: str | None = None
    window: bool = False
    dense: bool = True
    least: int = 1

    def expert(self, number: int) -> list[str]:
        """The names of an expert's matrices, in the order of `DENSE`, without what stands before them in a layer."""
        return [f"{self.part}experts.{number}.{name}" for name in self.weights]

    def shared_expert(self) -> list[str]:
        """The same of the shared expert."""
        assert self.shared is not None
        return [f"{self.part}{self.shared}{name}" for name in self.weights]


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of a mixture: `experts` of `units` hidden units each, of which a token goes to `chosen`; a shared
    expert of `shared` units, 0 where there is none; the first `dense` layers have no experts."""

    experts: int
    chosen: int
    units: int
    shared: int
    dense: int


_MIXTRAL = Style(
    "mixtral",
    "Mixtral",
    {"experts": "num_local_experts", "chosen": "num_experts_per_tok", "units": "intermediate_size"},
    {"output_router_logits": False},
    _LLAMA,
    part="block_sparse_moe.",
    weights=("w1.weight", "w3.weight", "w2.weight"),
    window=True,
    dense=False,
)
_QWEN = {
    "experts": "num_experts",
    "chosen": "num_experts_per_tok",
    "units": "moe_intermediate_size",
    "listed_dense": "mlp_only_layers",
}
_QWEN2 = Style(
    "qwen2_moe",
    "Qwen2Moe",
    {**_QWEN, "shared": "shared_expert_intermediate_size", "qkv_bias": "qkv_bias"},
    {"norm_topk_prob": True, "decoder_sparse_step": 1, "output_router_logits": False},
    _LLAMA | _QKV_BIAS,
    shared="shared_expert.",
    needs_shared=True,
    shared_gate="shared_expert_gate.weight",
)
_QWEN3 = Style(
    "qwen3_moe",
    "Qwen3Moe",
    _QWEN,
    {"norm_topk_prob": True, "decoder_sparse_step": 1, "output_router_logits": False},
    _LLAMA | _QKV_BIAS | _O_BIAS | _QK_NORM,
)
_DEEPSEEK_COUNTS = {
    "experts": "n_routed_experts",
    "chosen": "num_experts_per_tok",
    "units": "moe_intermediate_size",
    "shared_experts": "n_shared_experts",
    "dense": "first_k_dense_replace",
}
# The first DeepSeek-MoE: Llama's attention. transformers has no class for it, the Hub has.
_DEEPSEEK_HUB = "deepseek-ai/deepseek-moe-16b-base--"
_DEEPSEEK = Style(
    "deepseek",
    "Deepseek",
    _DEEPSEEK_COUNTS,
    {
        "norm_topk_prob": True,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "auto_map": {
            "AutoConfig": f"{_DEEPSEEK_HUB}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_DEEPSEEK_HUB}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_DEEPSEEK_HUB}modeling_deepseek.DeepseekForCausalLM",
        },
    },
    _LLAMA | _QKV_BIAS | _O_BIAS,
    shared="shared_experts.",
)
_LIMITED = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
_V2 = replace(
    _DEEPSEEK,
    model_type="deepseek_v2",
    classes="DeepseekV2",
    says={**_LIMITED, "scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 1},
    kept=None,
    needs_shared=True,
)
_V3 = replace(
    _V2,
    model_type="deepseek_v3",
    classes="DeepseekV3",
    says={
        **_LIMITED,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    },
    balance="gate.e_score_correction_bias",
    least=2,  # a group of experts is worth what its two best are worth
)
# DeepSeek-V3's experts under attention like Llama's, which transformers has a class for.
_GLM = replace(
    _V3,
    model_type="glm4_moe",
    classes="Glm4Moe",
    counts={**_DEEPSEEK_COUNTS, "qkv_bias": "attention_bias", "qk_norm": "use_qk_norm", "turned": "turned"},
    says={**_LIMITED, "num_nextn_predict_layers": 0},
    kept=_LLAMA | _QKV_BIAS | _QK_NORM,
)
# By the name that a recipe calls it, and by the dense models' type.
STYLES: Mapping[str, Mapping[str, Style]] = {
    "mixtral": {"llama": _MIXTRAL, "mistral": _MIXTRAL},
    "qwen2_moe": {"qwen2": _QWEN2, "llama": _QWEN2, "mistral": _QWEN2},
    "qwen3_moe": {"qwen3": _QWEN3},
    "deepseek": {"llama": _DEEPSEEK, "mistral": _DEEPSEEK, "deepseek_v2": _V2, "deepseek_v3": _V3},
    "glm4_moe": {"llama": _GLM, "mistral": _GLM, "qwen2": _GLM, "qwen3": _GLM},
}
_DENSE_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
}


def window_lost(style: Style, config: Mapping[str, Any]) -> int | None:
    """How far a token of the dense model sees, where the mixture has no windows; None where nothing is lost."""
    dense = str(config["model_type"])
    window = config.get("sliding_window", _UNSAID.get(dense, {}).get("sliding_window"))
    used = dense == "mistral" or bool(config.get("use_sliding_window"))
    return window if used and isinstance(window, int) and not style.window else None


def mixture_config(style: Style, config: Mapping[str, Any], numbers: Numbers, layer: frozenset[str]) -> dict[str, Any]:
    """config.json of the mixture, made of the dense model's. `layer` are the names of the tensors of a layer."""
    dense = str(config["model_type"])
    made: dict[str, Any] = copy.deepcopy(dict(config))
    if dense != style.model_type:
        made = {key: value for key, value in made.items() if key not in _LEFT_OUT}
        for key, value in _UNSAID[dense].items():
            # Null counts as left out, but for a window, where it means none.
            if made.get(key) is None and not (key == "sliding_window" and key in made):
                made[key] = value
        if made.get("num_key_value_heads") is None:
            made["num_key_value_heads"] = made.get("num_attention_heads")
        turning = made.get("rope_parameters")
        if made.get("rope_theta") is None and not (isinstance(turning, dict) and "rope_theta" in turning):
            made["rope_theta"] = _THETA
        if window_lost(style, config) is not None:
            made |= {"sliding_window": None, "use_sliding_window": False}
    made["model_type"] = style.model_type
    stated = config.get("architectures")
    if isinstance(stated, list):
        named = [str(name) for name in stated]
        made["architectures"] = [style.classes + name.removeprefix(_DENSE_CLASSES[dense]) for name in named]
    made |= style.says
    told: dict[str, Any] = {
        "experts": numbers.experts,
        "chosen": numbers.chosen,
        "units": numbers.units,
        "shared": numbers.shared,
        "shared_experts": numbers.shared // numbers.units or None,
        "dense": numbers.dense,
        "listed_dense": list(range(numbers.dense)),
        "qkv_bias": bool(_QKV_BIAS & layer),
        "qk_norm": bool(_QK_NORM & layer),
    }
    for what, key in style.counts.items():
        if what in told:
            made[key] = told[what]
    if "turned" in style.counts:
        _turn_all(made)
    return made


def _turn_all(made: dict[str, Any]) -> None:
    """Says that all of a head's coordinates turn with the position, where the dense model says nothing else: GLM's
    configuration would mean half of them."""
    turning = made.get("rope_parameters")
    if isinstance(turning, dict):
        turning.setdefault("partial_rotary_factor", 1.0)
    made.setdefault("partial_rotary_factor", turning["partial_rotary_factor"] if isinstance(turning, dict) else 1.0)
