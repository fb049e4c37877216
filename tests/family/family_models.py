"""Tiny random models of every family, in float64, with the names that transformers writes to disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

TEXT = {"vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 20}
GQA = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
MHA = {**TEXT, "num_attention_heads": 3, "max_position_embeddings": 32}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3}
VISION = {**IMAGE, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
ENCODER = {**MHA, "type_vocab_size": 2, "pad_token_id": 0}
T5 = {"vocab_size": 48, "d_model": 24, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 3,
      "relative_attention_num_buckets": 4, "relative_attention_max_distance": 6}  # fmt: skip
RESNET = {"embedding_size": 6, "depths": [2, 2], "num_channels": 3}
GPT2 = {"n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": 48, "n_positions": 32}
DISTILBERT = {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 20, "vocab_size": 48, "max_position_embeddings": 32,
              "pad_token_id": 0}  # fmt: skip
DEEPSEEK = {**TEXT, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 10, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6, "v_head_dim": 5, "moe_intermediate_size": 6, "n_shared_experts": 2,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1, "max_position_embeddings": 32}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tiny:
    """How to make a model: `kind` is the class in transformers, `settings` what its configuration is made with."""

    kind: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    decoder: bool = False


def causal(model_type: str, kind: str, **settings: Any) -> Tiny:
    return Tiny(kind, model_type, {**GQA, **settings}, decoder=True)


MODELS: dict[str, Tiny] = {
    "llama": causal("llama", "LlamaForCausalLM"),
    "llama-tied-bias": causal("llama", "LlamaForCausalLM",
                              tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-mqa": causal("llama", "LlamaForCausalLM", num_key_value_heads=1),
    "llama-mha": causal("llama", "LlamaForCausalLM", num_key_value_heads=4),
    "llama-classifier": causal("llama", "LlamaForSequenceClassification", pad_token_id=0),
    "mistral": causal("mistral", "MistralForCausalLM"),
    "ministral": causal("ministral", "MinistralForCausalLM"),
    "qwen2": causal("qwen2", "Qwen2ForCausalLM"),
    "qwen3": causal("qwen3", "Qwen3ForCausalLM"),
    "gemma": causal("gemma", "GemmaForCausalLM"),
    "gemma2": causal("gemma2", "Gemma2ForCausalLM"),
    "gemma3": causal("gemma3_text", "Gemma3ForCausalLM"),
    "gemma3-images": Tiny("Gemma3ForConditionalGeneration", "gemma3", {
        "text_config": {**GQA, "model_type": "gemma3_text"}, "mm_tokens_per_image": 4,
        "vision_config": {**VISION, "hidden_size": 9, "intermediate_size": 7, "model_type": "siglip_vision_model"},
        }, True),
    "phi3": causal("phi3", "Phi3ForCausalLM", head_dim=6, pad_token_id=0),
    "phi": causal("phi", "PhiForCausalLM", num_attention_heads=3, num_key_value_heads=3, pad_token_id=0),
    "olmo": causal("olmo", "OlmoForCausalLM", head_dim=6),
    "olmo2": causal("olmo2", "Olmo2ForCausalLM", head_dim=6),
    "olmo3": causal("olmo3", "Olmo3ForCausalLM", head_dim=6),
    "apertus": causal("apertus", "ApertusForCausalLM"),
    "arcee": causal("arcee", "ArceeForCausalLM", mlp_bias=True),
    "cohere": causal("cohere", "CohereForCausalLM", head_dim=6),
    "cohere-norms": causal("cohere", "CohereForCausalLM", head_dim=6, use_qk_norm=True),
    "cohere2": causal("cohere2", "Cohere2ForCausalLM"),
    "exaone4": causal("exaone4", "Exaone4ForCausalLM"),
    "glm": causal("glm", "GlmForCausalLM", attention_bias=True, pad_token_id=0),
    "glm4": causal("glm4", "Glm4ForCausalLM", attention_bias=True, pad_token_id=0),
    "granite": causal("granite", "GraniteForCausalLM", head_dim=6),
    "helium": causal("helium", "HeliumForCausalLM", head_dim=6),
    "nemotron": causal("nemotron", "NemotronForCausalLM", attention_bias=True, mlp_bias=True),
    "seed_oss": causal("seed_oss", "SeedOssForCausalLM"),
    "smollm3": causal("smollm3", "SmolLM3ForCausalLM", pad_token_id=0),
    "stablelm": causal("stablelm", "StableLmForCausalLM", head_dim=6, use_qkv_bias=True),
    "starcoder2": causal("starcoder2", "Starcoder2ForCausalLM", head_dim=6),
    "gpt_neox": Tiny("GPTNeoXForCausalLM", "gpt_neox", {**MHA, "rotary_pct": 0.5}, True),
    "gpt_neox-rotary": Tiny("GPTNeoXForCausalLM", "gpt_neox", {**MHA, "rotary_pct": 1.0}, True),
    "gpt2": Tiny("GPT2LMHeadModel", "gpt2", GPT2, True),
    "gpt2-classifier": Tiny("GPT2ForSequenceClassification", "gpt2", {**GPT2, "pad_token_id": 0}, True),
    "mixtral": causal("mixtral", "MixtralForCausalLM", **MOE),
    "phimoe": causal("phimoe", "PhimoeForCausalLM", **MOE, head_dim=6, attention_bias=True, lm_head_bias=True),
    "qwen2_moe": causal("qwen2_moe", "Qwen2MoeForCausalLM", **MOE, head_dim=6, shared_expert_intermediate_size=10,
                        mlp_only_layers=[1]),
    "qwen3_moe": causal("qwen3_moe", "Qwen3MoeForCausalLM", **MOE),
    "olmoe": causal("olmoe", "OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2, head_dim=6),
    "deepseek_v2": Tiny("DeepseekV2ForCausalLM", "deepseek_v2",
                        {**DEEPSEEK, "q_lora_rank": None, "n_routed_experts": 4, "topk_method": "greedy"}, True),
    "deepseek_v3": Tiny("DeepseekV3ForCausalLM", "deepseek_v3",
                        {**DEEPSEEK, "q_lora_rank": 8, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}, True),
    "bert": Tiny("BertForMaskedLM", "bert", ENCODER),
    "bert-classifier": Tiny("BertForSequenceClassification", "bert", ENCODER),
    "bert-tokens": Tiny("BertForTokenClassification", "bert", ENCODER),
    "bert-answers": Tiny("BertForQuestionAnswering", "bert", ENCODER),
    "bert-pretraining": Tiny("BertForPreTraining", "bert", ENCODER),
    "bert-base": Tiny("BertModel", "bert", ENCODER),
    "roberta": Tiny("RobertaForMaskedLM", "roberta", ENCODER),
    "roberta-classifier": Tiny("RobertaForSequenceClassification", "roberta", ENCODER),
    "roberta-tokens": Tiny("RobertaForTokenClassification", "roberta", ENCODER),
    "roberta-choice": Tiny("RobertaForMultipleChoice", "roberta", ENCODER),
    "camembert": Tiny("CamembertForMaskedLM", "camembert", ENCODER),
    "xlm-roberta": Tiny("XLMRobertaForMaskedLM", "xlm-roberta", ENCODER),
    "electra": Tiny("ElectraForMaskedLM", "electra", {**ENCODER, "embedding_size": 10}),
    "electra-discriminator": Tiny("ElectraForPreTraining", "electra", {**ENCODER, "embedding_size": 24}),
    "electra-classifier": Tiny("ElectraForSequenceClassification", "electra", {**ENCODER, "embedding_size": 10}),
    "distilbert": Tiny("DistilBertForMaskedLM", "distilbert", DISTILBERT),
    "distilbert-classifier": Tiny("DistilBertForSequenceClassification", "distilbert", DISTILBERT),
    "distilbert-tokens": Tiny("DistilBertForTokenClassification", "distilbert", DISTILBERT),
    "vit": Tiny("ViTForImageClassification", "vit", VISION),
    "vit-masked": Tiny("ViTForMaskedImageModeling", "vit", {**VISION, "encoder_stride": 4}),
    "vit-base": Tiny("ViTModel", "vit", VISION),
    "deit": Tiny("DeiTForImageClassificationWithTeacher", "deit", VISION),
    "clip": Tiny("CLIPModel", "clip", {"projection_dim": 12, "text_config": {**MHA, "eos_token_id": 47},
                 "vision_config": VISION}),
    "clip-classifier": Tiny("CLIPForImageClassification", "clip", {"text_config": MHA, "vision_config": VISION}),
    "clip-text": Tiny("CLIPTextModelWithProjection", "clip_text_model",
                      {**MHA, "projection_dim": 12, "eos_token_id": 47}),
    "clip-vision": Tiny("CLIPVisionModelWithProjection", "clip_vision_model", {**VISION, "projection_dim": 12}),
    "t5": Tiny("T5ForConditionalGeneration", "t5", T5, True),
    "t5-gated": Tiny("T5ForConditionalGeneration", "t5",
                     {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, True),
    "t5-encoder": Tiny("T5EncoderModel", "t5", T5, True),
    "mt5": Tiny("MT5ForConditionalGeneration", "mt5", T5, True),
    "umt5": Tiny("UMT5ForConditionalGeneration", "umt5", T5, True),
    "resnet-basic": Tiny("ResNetForImageClassification", "resnet",
                         {**RESNET, "hidden_sizes": [6, 8], "layer_type": "basic"}),
    "resnet-bottleneck": Tiny("ResNetForImageClassification", "resnet",
                              {**RESNET, "hidden_sizes": [16, 32], "layer_type": "bottleneck"}),
}  # fmt: skip


def build(tiny: Tiny) -> torch.nn.Module:
    """A random model in float64; every parameter and statistic is random, gains and biases too."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(tiny.model_type, **tiny.settings)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, tiny.kind)(config).double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                # Convolutions keep the scale of what they read, so that no ReLU is dead.
                scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim == 4 else 0.3
                spread = scale * torch.randn_like(tensor)
                # Norms stay near one, and variances positive.
                positive = tensor.ndim == 1 and not name.endswith(("bias", "mean"))
                tensor.copy_(spread.abs() + 0.5 if positive else spread)
    return model


def saved(model: torch.nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and the tensors as `save_pretrained` writes them."""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
