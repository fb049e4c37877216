"""Tiny models in folders, as transformers writes them, and a text that their tokenizer knows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "output"))
from tiny_models import COMMON, DECODER, TEXT, tokenizer

TEXT_FILE = "".join(f"{TEXT[i % 3]} {TEXT[(i * i) % 3]}\n" for i in range(40))
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**DECODER, num_hidden_layers=2, tie_word_embeddings=False),
    "tied": lambda: transformers.LlamaConfig(**DECODER, num_hidden_layers=1, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(
        **DECODER, num_hidden_layers=2, num_local_experts=16, num_experts_per_tok=2
    ),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, eos_token_id=2),
}


def write(folder: Path, kind: str, seed: int = 0) -> Path:
    """A random model of one kind with its tokenizer."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_classifier(folder: Path) -> Path:
    torch.manual_seed(1)
    config = transformers.BertConfig(**COMMON, num_hidden_layers=1, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_inputs(path: Path) -> Path:
    """Six texts as token ids, two of them padded, one on each side."""
    draw = torch.Generator().manual_seed(4)
    mask = torch.ones(6, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    ids = torch.randint(3, 64, (6, 9), generator=draw)
    save_file({"input_ids": ids, "attention_mask": mask, "labels": torch.arange(6) % 3}, path)
    return path
