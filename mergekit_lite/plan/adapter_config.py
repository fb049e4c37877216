"""The adapter_config.json of an adapter that is saved, so that peft scales the product of the factors by exactly 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint.meta import Checkpoint

# The ends of names of transformers' classes, and the tasks that peft has for them.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def adapter_config(
    config: Mapping[str, Any],
    base: Checkpoint | None,
    ranks: Mapping[str, int],
    whole: Sequence[str],
    biases: bool,
    transposed: bool,
    tied: bool,
) -> dict[str, Any]:
    """The configuration. `ranks` gives the rank of the factors by module, `whole` are modules that are kept whole,
    `biases` tells that modules with factors have biases of their own, `tied` that a head follows the embedding."""
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {_exactly(module): rank for module, rank in ranks.items() if rank != usual}
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else ""
    task = next((task for end, task in _TASKS.items() if isinstance(named, str) and named.endswith(end)), None)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None if base is None or base.adapter is not None else base.location,
        "revision": None if base is None else base.revision,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "modules_to_save": list(whole) or None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        **({"ensure_weight_tying": True} if tied else {}),
    }


def lokr_config(lora: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a LoKr adapter with the ranks and modules of that of a LoRA adapter: with a left half of one
    number, and cores for kernels."""
    same = ("task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "rank_pattern", "alpha_pattern")
    return {
        "peft_type": "LOKR",
        **{key: lora[key] for key in (*same, "target_modules", "modules_to_save")},
        "alpha": lora["lora_alpha"],
        "decompose_both": False,
        "decompose_factor": 1,
        "use_effective_conv2d": True,
        "init_weights": True,
    }


def _exactly(module: str) -> str:
    """A pattern of peft's for one module: it would take a bare name for the end of others too."""
    return f"^{re.escape(module)}"
