"""Write synthetic Llama checkpoints for benchmarks: a base and fine-tunes of it, bfloat16, 1.1B parameters each.

    python benchmarks/make_models.py --out bench --models 3 --layers 22

The base is drawn from N(0, 0.02); a fine-tune moves every weight by N(0, 0.002), rounded to bfloat16, so that deltas
are as sparse and as full of ties as those of real fine-tunes are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def shapes(hidden: int, inner: int, layers: int, vocabulary: int, kv: int) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama checkpoint; `kv` is the size of the key and value projections."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(layers):
        layer = f"model.layers.{index}"
        found |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write(folder: Path, names: dict[str, tuple[int, ...]], config: dict[str, object], seed: int | None) -> None:
    """One checkpoint in two shards; `seed` None is the base, any other seed a fine-tune of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    halves = [dict(list(names.items())[: len(names) // 2]), dict(list(names.items())[len(names) // 2 :])]
    weight_map: dict[str, str] = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05d}-of-{len(halves):05d}.safetensors"
        save_file({name: draw(name, shape, seed) for name, shape in half.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def draw(name: str, shape: tuple[int, ...], seed: int | None) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    values = torch.empty(shape).normal_(0.0, 0.02, generator=generator).bfloat16()
    if seed is None:
        return values
    generator.manual_seed(seed * 1_000_003 + sum(name.encode()))
    return (values + torch.empty(shape).normal_(0.0, 0.002, generator=generator)).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--models", type=int, default=3, help="fine-tunes beside the base")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--kv", type=int, default=256)
    args = parser.parse_args()
    names = shapes(args.hidden, args.inner, args.layers, args.vocabulary, args.kv)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.inner,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.kv // 64,
        "vocab_size": args.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    write(args.out / "base", names, config, None)
    for number in range(1, args.models + 1):
        write(args.out / f"tune{number}", names, config, number)


if __name__ == "__main__":
    main()
