"""Tiny random pipelines and sentence-transformers models, saved by their own libraries."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def pipeline(to: Path, seed: int) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    tokens = to.parent / "tokens"
    tokens.mkdir(exist_ok=True)
    (tokens / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tokens / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=16,
        vocab_size=len(words), bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=CLIPTextModel(config),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        tokenizer=CLIPTokenizer.from_pretrained(tokens, model_max_length=16),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(to)  # fmt: skip
    return to


def sentences(to: Path, seed: int) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    body = to.parent / "body"
    body.mkdir(exist_ok=True)
    (body / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##a"]) + "\n")
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=16,
        vocab_size=8,
    )  # fmt: skip
    BertModel(config).save_pretrained(body)
    BertTokenizerFast(vocab=str(body / "vocab.txt")).save_pretrained(body)
    modules = [Transformer(str(body), max_seq_length=16), Pooling(16), Dense(16, 8)]
    SentenceTransformer(modules=modules, device="cpu", prompts={"query": "a "}).save_pretrained(str(to))
    return to
