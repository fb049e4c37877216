"""One merge by sd-mecha, for the Python of an environment that has it. bench.py calls this.

    python sd_mecha_merge.py METHOD OUT.safetensors THREADS TUNE.safetensors ... [--base BASE.safetensors]

sd-mecha reads and writes single files. Numbers are those of SETTINGS in cases.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import sd_mecha
import torch

# Its public wrapper fails on differences that are not resolved yet (1.1.8).
from sd_mecha.extensions.builtin.merge_methods import linear


def recipe(method: str, base: Any, tuned: list[Any]) -> Any:
    """The graph of one merge."""
    if method == "linear":
        return sd_mecha.n_average(*tuned)
    if method == "slerp":
        return sd_mecha.slerp(tuned[0], tuned[1], alpha=0.4)
    if method == "geometric_median":
        return sd_mecha.geometric_median(*tuned)
    if method == "model_stock":
        return sd_mecha.n_model_stock(base, *tuned)
    if method == "ties_tensor":
        deltas = [sd_mecha.subtract(model, base) for model in tuned]
        return linear.add_difference(base, sd_mecha.ties_sum(*deltas, k=0.2), alpha=1.0)
    if method == "task_arithmetic":
        merged = base
        for model in tuned:
            merged = linear.add_difference(merged, sd_mecha.subtract(model, base), alpha=0.4)
        return merged
    raise ValueError(method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("out", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("tuned", type=Path, nargs="+")
    parser.add_argument("--base", type=Path)
    args = parser.parse_args()
    base = sd_mecha.model(args.base) if args.base else None
    graph = recipe(args.method, base, [sd_mecha.model(path) for path in args.tuned])
    sd_mecha.merge(
        graph,
        output=args.out.resolve(),
        merge_dtype=torch.float32,
        output_dtype=torch.bfloat16,
        threads=args.threads,
    )


if __name__ == "__main__":
    main()
