"""Write synthetic Llama checkpoints for benchmarks: a base and fine-tunes of it, bfloat16, in several files.

    python benchmarks/make_models.py --size 1.1B --out bench/1.1B --models 3

The same arguments give the same bytes. Weights of the base are normal. A fine-tune adds changes with the tails of
Student's t with 3 degrees of freedom, whose scale differs from tensor to tensor and is eight times larger in two rows
of a hundred; rounded to bfloat16, a good part of the weights stay exactly what they were and the changes are full of
ties, as those of real fine-tunes are. 13B and 70B are sparse files, a header and a hole of zeros, which take no disk:
for memory and plans, not for times.

Numbers come from two pools of some millions, read from random places, since a fresh draw of billions of heavy-tailed
numbers would take longer than all the merges.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sparse import Shape, shards_of, shell, write_files, write_sparse
from torch import Tensor

POOL = 1 << 22
CHUNK = 1 << 20  # numbers that are made at a time
DEVIATION = 0.02  # of the weights of the base
SCALES = (3e-5, 3e-4)  # of the changes, from tensor to tensor
LARGE_ROWS, LARGER = 0.02, 8.0


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a Llama; `kv` is the size of its key and value projections, `shard` the largest file in bytes."""

    hidden: int
    inner: int
    layers: int
    kv: int
    vocabulary: int
    shard: int
    sparse: bool = False
    statistics: bool = False

    def shapes(self) -> dict[str, Shape]:
        """Tensor names and shapes."""
        found: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            found |= {
                f"{layer}.input_layernorm.weight": (self.hidden,),
                f"{layer}.mlp.down_proj.weight": (self.hidden, self.inner),
                f"{layer}.mlp.gate_proj.weight": (self.inner, self.hidden),
                f"{layer}.mlp.up_proj.weight": (self.inner, self.hidden),
                f"{layer}.post_attention_layernorm.weight": (self.hidden,),
                f"{layer}.self_attn.k_proj.weight": (self.kv, self.hidden),
                f"{layer}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{layer}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{layer}.self_attn.v_proj.weight": (self.kv, self.hidden),
            }
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes().values())

    def config(self) -> dict[str, Any]:
        """What stands in config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.kv // 64,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


SIZES = {
    "tiny": Size(64, 176, 4, 64, 256, 200_000, statistics=True),
    "60M": Size(512, 1376, 10, 128, 32000, 50_000_000, statistics=True),
    "300M": Size(1024, 2816, 20, 256, 32000, 250_000_000),
    "1.1B": Size(2048, 5632, 22, 256, 32000, 1_000_000_000),
    "13B": Size(5120, 13824, 40, 5120, 32000, 5_000_000_000, sparse=True),
    "70B": Size(8192, 28672, 80, 1024, 32000, 5_000_000_000, sparse=True),
}


def make(size: str, out: Path, models: int = 3) -> None:
    """Write `base`, `tune1` ... under `out`, and `fisher1`, `gram1` ... of three where the size has statistics.

    Models that are there already are left alone; all are made anew where one is missing.
    """
    names = ["base", *(f"tune{number}" for number in range(1, models + 1))]
    kind = SIZES[size]
    if all((out / name / "config.json").exists() for name in names):
        return
    if kind.sparse:
        for name in names:
            write_sparse(out / name, kind.shapes(), kind.shard, kind.config())
        return
    pools = _Pools()
    folders = [shell(out / name, kind.shapes(), kind.shard, {}) for name in names]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        # A file of all models at a time: the base's numbers are drawn once.
        jobs = [
            pool.submit(_write_shard, pools, shard, [folder / file for folder in folders])
            for file, shard in shards_of(kind.shapes(), kind.shard).items()
        ]
        for job in jobs:
            job.result()
    torch.set_num_threads(threads)
    if kind.statistics:
        for number in range(1, min(models, 3) + 1):
            _write_statistics(out, kind, number, pools)
    # Last, so that a folder with a configuration is a whole one.
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(kind.config(), indent=2) + "\n", encoding="utf-8")


class _Pools:
    """Normal numbers, and such with the tails of Student's t with 3 degrees of freedom."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.normal = torch.empty(POOL).normal_(generator=generator)
        squares = sum(torch.empty(POOL).normal_(generator=generator).square_() for _ in range(3))
        assert isinstance(squares, Tensor)
        self.heavy = torch.empty(POOL).normal_(generator=generator) / (squares / 3).sqrt_()


class _Draw:
    """The numbers of one tensor of one model, row by row; model 0 is the base."""

    def __init__(self, pools: _Pools, name: str, shape: Shape, model: int):
        self._generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) * 1009 + model)
        self._model, self._shape = model, shape
        self._pool = pools.heavy if model else pools.normal
        low, high = SCALES
        uniform = float(torch.rand((), generator=self._generator))
        self._scale = low * (high / low) ** uniform if model else DEVIATION
        self._large = torch.rand(shape[0], generator=self._generator) < LARGE_ROWS

    def rows(self, start: int, stop: int) -> Tensor:
        """The next rows, (rows, width) float32: values of the base, changes of a fine-tune."""
        width = self._shape[1] if len(self._shape) == 2 else 1
        count = (stop - start) * width
        place = int(torch.randint(POOL - count + 1, (), generator=self._generator))
        values = self._pool[place : place + count].view(stop - start, width) * self._scale
        if self._model:
            return values.mul_(torch.where(self._large[start:stop], LARGER, 1.0)[:, None])
        return values if len(self._shape) == 2 else values.add_(1)  # norms are about 1


def _chunks(shape: Shape) -> Iterator[tuple[int, int]]:
    """Rows of a tensor, some at a time."""
    width = shape[1] if len(shape) == 2 else 1
    step = max(1, CHUNK // width)
    for start in range(0, shape[0], step):
        yield start, min(shape[0], start + step)


def _write_shard(pools: _Pools, tensors: Mapping[str, Shape], paths: list[Path]) -> None:
    """The file of these tensors of the base and of every fine-tune, whose headers stand in `paths` already."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("ab")) for path in paths]
        for name, shape in tensors.items():
            draws = [_Draw(pools, name, shape, model) for model in range(len(paths))]
            for start, stop in _chunks(shape):
                base = draws[0].rows(start, stop).bfloat16()
                files[0].write(_bytes(base))
                for draw, file in zip(draws[1:], files[1:], strict=True):
                    file.write(_bytes(draw.rows(start, stop).add_(base).bfloat16()))


def _write_statistics(out: Path, kind: Size, number: int, pools: _Pools) -> None:
    """`fisher`: a positive number for every weight. `gram`: a positive definite matrix for every linear layer."""
    shapes = kind.shapes()
    fisher = {
        name: torch.cat([_Draw(pools, name, s, 100 + number).rows(*rows) for rows in _chunks(s)]).square_().view(s)
        for name, s in shapes.items()
    }
    write_files(out / f"fisher{number}", {name: x.bfloat16() for name, x in fisher.items()}, kind.config())
    generator = torch.Generator().manual_seed(number)
    grams = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            activations = torch.empty(max(1, shape[1] // 8), shape[1]).normal_(generator=generator)
            grams[name] = (activations.T @ activations).div_(len(activations))
            grams[name].diagonal().add_(0.1)
    write_files(out / f"gram{number}", grams, kind.config())


def _bytes(values: Tensor) -> memoryview:
    data: memoryview = values.contiguous().view(torch.uint8).numpy().data
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="1.1B")
    parser.add_argument("--out", type=Path, help="folder of the models (default: bench/SIZE)")
    parser.add_argument("--models", type=int, default=3, help="fine-tunes beside the base")
    args = parser.parse_args()
    make(args.size, args.out or Path("bench") / args.size, args.models)


if __name__ == "__main__":
    main()
