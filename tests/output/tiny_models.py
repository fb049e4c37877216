"""Tiny models of real architectures, written by transformers itself, and fine-tunes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

TEXT = ["the quick brown fox jumps over the lazy dog", "a merge is a query over checkpoints", "weights add up to one"]
TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
DECODER = {**COMMON, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]

# name -> (configuration, class, dtype, most bytes of a shard)
KINDS: dict[str, tuple[Callable[[], Any], Any, torch.dtype, str]] = {
    "llama": (
        lambda: LlamaConfig(**DECODER, num_hidden_layers=3, tie_word_embeddings=False),
        AutoModelForCausalLM,
        torch.float32,
        "5GB",
    ),
    "llama_tied": (
        lambda: LlamaConfig(**DECODER, num_hidden_layers=3, tie_word_embeddings=True),
        AutoModelForCausalLM,
        torch.bfloat16,
        "20KB",
    ),
    "bert": (lambda: BertConfig(**COMMON, num_hidden_layers=2), AutoModelForMaskedLM, torch.float32, "5GB"),
    "mixtral": (
        lambda: MixtralConfig(**DECODER, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2),
        AutoModelForCausalLM,
        torch.float32,
        "5GB",
    ),
    "qwen2": (
        lambda: Qwen2Config(**DECODER, num_hidden_layers=4, use_sliding_window=True, layer_types=LAYER_TYPES),
        AutoModelForCausalLM,
        torch.float32,
        "5GB",
    ),
}


def write_kind(folder: Path, kind: str) -> Path:
    """`base`, `a`, `b` of one kind below `folder`; the base with tokenizer, chat template and generation config."""
    config, auto, dtype, shard = KINDS[kind]
    torch.manual_seed(11)
    model = auto.from_config(config()).to(dtype)
    model.config.dtype = dtype
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder / "base", max_shard_size=shard)
    tokenizer().save_pretrained(folder / "base")
    start = {name: value.clone() for name, value in model.named_parameters()}
    for name in ("a", "b"):
        with torch.no_grad():
            for key, value in model.named_parameters():
                value.copy_(start[key] + 0.02 * torch.randn(value.shape))
        model.save_pretrained(folder / name, max_shard_size=shard)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on three sentences."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=64, special_tokens=special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    return fast
