"""Families against transformers: tiny random models are saved, and what the files hold must be what the family says."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from mergekit_lite.family.data import families
from mergekit_lite.family.family import family_of

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 40,
}
GROUPED = TEXT | {"num_key_value_heads": 2}
VISION = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 8,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
T5: dict[str, Any] = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 40, "n_positions": 16}
DISTIL = {"dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 4, "vocab_size": 40}

# config class, model class, settings, family, layers per stack
CASES: list[tuple[str, str, dict[str, Any], str, dict[str, int]]] = [
    ("LlamaConfig", "LlamaForCausalLM", GROUPED, "llama", {"layers": 3}),
    ("LlamaConfig", "LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, "llama", {"layers": 3}),
    ("LlamaConfig", "LlamaModel", GROUPED, "llama", {"layers": 3}),
    ("LlamaConfig", "LlamaForCausalLM", GROUPED | {"num_hidden_layers": 1}, "llama", {"layers": 1}),
    ("MistralConfig", "MistralForCausalLM", GROUPED, "llama", {"layers": 3}),
    ("Qwen2Config", "Qwen2ForCausalLM", GROUPED | {"tie_word_embeddings": True}, "llama", {"layers": 3}),
    ("Qwen3Config", "Qwen3ForCausalLM", GROUPED | {"head_dim": 4}, "llama", {"layers": 3}),
    ("GemmaConfig", "GemmaForCausalLM", GROUPED | {"head_dim": 4}, "llama", {"layers": 3}),
    ("Gemma2Config", "Gemma2ForCausalLM", GROUPED | {"head_dim": 4}, "llama", {"layers": 3}),
    ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | {"head_dim": 4}, "llama", {"layers": 3}),
    ("Phi3Config", "Phi3ForCausalLM", GROUPED | {"pad_token_id": 0}, "llama", {"layers": 3}),
    ("OlmoConfig", "OlmoForCausalLM", GROUPED, "llama", {"layers": 3}),
    ("Olmo2Config", "Olmo2ForCausalLM", GROUPED, "llama", {"layers": 3}),
    ("MixtralConfig", "MixtralForCausalLM", GROUPED | {"num_local_experts": 3}, "mixtral", {"layers": 3}),
    ("PhimoeConfig", "PhimoeForCausalLM", GROUPED | {"num_local_experts": 3}, "mixtral", {"layers": 3}),
    (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        GROUPED | EXPERTS | {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "mlp_only_layers": [1]},
        "qwen_moe",
        {"layers": 3},
    ),
    (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        GROUPED | EXPERTS | {"moe_intermediate_size": 8},
        "qwen_moe",
        {"layers": 3},
    ),
    ("OlmoeConfig", "OlmoeForCausalLM", GROUPED | EXPERTS, "qwen_moe", {"layers": 3}),
    ("GPT2Config", "GPT2LMHeadModel", GPT2, "gpt2", {"h": 3}),
    ("GPT2Config", "GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}, "gpt2", {"h": 3}),
    ("GPT2Config", "GPT2Model", GPT2, "gpt2", {"h": 3}),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT, "gpt_neox", {"layers": 3}),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT | {"tie_word_embeddings": True}, "gpt_neox", {"layers": 3}),
    ("BertConfig", "BertForMaskedLM", TEXT, "bert", {"layers": 3}),
    ("BertConfig", "BertForPreTraining", TEXT, "bert", {"layers": 3}),
    ("BertConfig", "BertModel", TEXT, "bert", {"layers": 3}),
    ("RobertaConfig", "RobertaForMaskedLM", TEXT, "roberta", {"layers": 3}),
    ("DistilBertConfig", "DistilBertForMaskedLM", DISTIL, "distilbert", {"layers": 3}),
    ("ElectraConfig", "ElectraForMaskedLM", TEXT | {"embedding_size": 16}, "electra", {"layers": 3}),
    ("ViTConfig", "ViTForImageClassification", VISION, "vit", {"layers": 2}),
    ("ViTConfig", "ViTModel", VISION, "vit", {"layers": 2}),
    ("DeiTConfig", "DeiTModel", VISION, "vit", {"layers": 2}),
    (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 8},
        "clip",
        {"text": 3, "vision": 2},
    ),
    ("CLIPTextConfig", "CLIPTextModel", TEXT, "clip_text", {"text": 3}),
    ("CLIPVisionConfig", "CLIPVisionModelWithProjection", VISION, "clip_vision", {"vision": 2}),
    (
        "T5Config",
        "T5ForConditionalGeneration",
        T5 | {"num_decoder_layers": 3},
        "t5",
        {"encoder": 2, "decoder": 3},
    ),
    ("T5Config", "T5EncoderModel", T5, "t5", {"encoder": 2}),
    (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {"text_config": GROUPED | {"head_dim": 4}, "vision_config": VISION, "mm_tokens_per_image": 4},
        "llama",
        {"layers": 3},
    ),
]
# Where a module's name in memory differs from its name on disk.
ON_DISK = {
    "GPTNeoXForCausalLM": {"lm_head.weight": "embed_out.weight"},
    "Gemma3ForConditionalGeneration": {
        "model.language_model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    },
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{len(case[2])}")
def test_a_saved_model_is_what_its_family_says(
    case: tuple[str, str, dict[str, Any], str, dict[str, int]], tmp_path: Path
):
    config_class, model_class, settings, family_name, layers = case
    torch.manual_seed(0)
    getattr(hf, model_class)(getattr(hf, config_class)(**settings)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    model = getattr(hf, model_class).from_pretrained(tmp_path)
    family = family_of(config, names)

    assert family.name == family_name
    assert {stack.name: stack.count for stack in family.stacks} == layers
    seen: dict[str, set[int]] = defaultdict(set)
    for name in names:
        layer = family.layer(name)
        number = re.search(r"\.?(?:layers?|h|block)\.(\d+)\.", name)
        if number is None or name.startswith("vision_tower."):
            assert layer is None and family.depth(name) is None, name
            continue
        assert layer is not None, name
        assert layer.index == int(number[1])
        assert f"{layer.prefix}{layer.index}.{layer.rest}" == name
        assert family.renumbered(name, 7) == name.replace(number[0], number[0].replace(number[1], "7"), 1)
        seen[layer.stack].add(layer.index)
        last = layers[layer.stack] - 1
        assert family.depth(name) == (layer.index / last if last else 0.0)
        expert = re.search(r"experts\.(\d+)\.", name)
        assert family.expert(name) == (int(expert[1]) if expert else None)
    assert seen == {stack: set(range(count)) for stack, count in layers.items()}

    # What transformers ties shares its storage in the loaded model.
    on_disk = ON_DISK.get(model_class, {})
    storages: dict[int, set[str]] = defaultdict(set)
    for name, tensor in model.state_dict(keep_vars=True).items():
        storages[tensor.data_ptr()].add(on_disk.get(name, name))
    shared = [group for group in storages.values() if len(group) > 1]
    expected = {(alias, kept) for group in shared for kept in group & set(names) for alias in group - {kept}}
    loaded = {name for group in storages.values() for name in group}
    assert {pair for pair in family.tied if pair[0] in loaded} == expected


def test_every_model_type_knows_the_default_of_its_tied_embeddings():
    checked = 0
    for model_type, family in families().items():
        rules = [rule for rule in family.tied if rule.when]
        if not rules or model_type not in hf.CONFIG_MAPPING:
            continue
        expected = hf.CONFIG_MAPPING[model_type]().tie_word_embeddings
        without_key = {"model_type": model_type}
        names = [rule.template.replace("{body}", "") + "x" for rule in family.stacks]
        names = [name.replace("{i}", "0") for name in names]
        tied = dict(family_of(without_key, names).tied)
        for rule in rules:
            assert (rule.alias.replace("{head}", "") in tied) is expected, model_type
        checked += 1
    assert checked > 20
