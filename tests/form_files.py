"""Checkpoints in the layouts of diffusers, sentence-transformers and timm, as the files that they are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

Files = dict[str, bytes]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files below `folder`."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def text(data: object) -> bytes:
    return json.dumps(data).encode()


def tensors(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tensors; `_` in a keyword stands for `.` in the name."""
    generator = torch.Generator().manual_seed(seed)
    return {name.replace("_", "."): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def index(**components: list[str | None]) -> bytes:
    return text({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", **components})


COMPONENTS: dict[str, list[str | None]] = {
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def pipeline(seed: int) -> Files:
    """Two components have tensors of one name."""
    return {
        "model_index.json": index(**COMPONENTS),
        "scheduler/scheduler_config.json": text({"_class_name": "DDIMScheduler", "seed": seed}),
        "tokenizer/tokenizer.json": text({"seed": seed}),
        "text_encoder/config.json": text({"model_type": "clip_text_model", "dtype": "float32"}),
        "text_encoder/model.safetensors": save(tensors(seed, layers_0_w=(4, 4), layers_1_w=(4, 4), conv_in=(3,))),
        "unet/config.json": text({"_class_name": "UNet2DConditionModel", "sample_size": 8}),
        f"unet/{WEIGHTS}": save(tensors(seed + 100, conv_in=(8, 4), mid_a=(16, 16), mid_b=(16, 16), mid_c=(16, 16))),
        "vae/config.json": text({"_class_name": "AutoencoderKL"}),
        f"vae/{WEIGHTS}": save(tensors(seed + 200, conv_in=(5, 4))),
    }


def sentences(seed: int) -> Files:
    library = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    return {
        "modules.json": text(
            [{"idx": i, "name": str(i), "path": p, "type": f"{library}.{t}"} for i, (p, t) in enumerate(modules)]
        ),
        "config.json": text({"model_type": "bert", "num_hidden_layers": 2}),
        "config_sentence_transformers.json": text({"prompts": {"query": "q: "}}),
        "sentence_bert_config.json": text({"max_seq_length": 16}),
        "tokenizer.json": text({"seed": seed}),
        "model.safetensors": save(tensors(seed, encoder_layer_0_w=(4, 4), encoder_layer_1_w=(4, 4))),
        "1_Pooling/config.json": text({"pooling_mode_mean_tokens": True}),
        "2_Dense/config.json": text({"in_features": 4, "out_features": 2}),
        "2_Dense/model.safetensors": save(tensors(seed + 100, linear_weight=(2, 4), linear_bias=(2,))),
    }


def timm(seed: int) -> Files:
    return {
        "config.json": text({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"num_classes": 3}}),
        "model.safetensors": save(tensors(seed, blocks_0_w=(8, 8), blocks_1_w=(8, 8), head_w=(3, 8))),
    }


def stored(files: Mapping[str, bytes]) -> dict[str, dict[str, Tensor]]:
    """The tensors of all weight files, by the folder that they lie in."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            found.setdefault(name.rpartition("/")[0], {}).update(load(data))
    return found


def files_of(folder: Path) -> Files:
    """What lies below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
