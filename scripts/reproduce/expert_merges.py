"""Train a tiny Mixtral on the standard library's source, merge its experts in every way, measure the loss.

    python scripts/reproduce/expert_merges.py --out demo/experts

makes the networks and the statistics of their routers alone; what is measured of them is on the page that
`python scripts/reproduce --only R11` writes.

Two layers, eight experts, the two best of which a token goes to, characters as tokens. Every merge is a recipe that is
run to a folder, which transformers loads. The statistics of the routers are those of other text than the loss is
measured on. A network that is there already is not trained anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from mergekit_lite import load_recipe, plan, run

STEPS = {0: 800, 1: 500, 2: 800}  # by seed
CONTEXT, BATCH, RATE = 64, 32, 3e-3
TEXT_BYTES = 2_000_000
MEASURED, COUNTED = 128, 256  # stretches of text that losses and statistics are taken of
RECOVERY = 150  # steps that merged experts are trained on, as far as that is asked for
EXPERTS = 8
INTO = (4, 2)
OUT = Path("demo/experts")
# What is merged how, and the rise of the loss that the specification measured with seeds 0 and 1, for 4 and 2 experts.
VARIANTS: dict[str, tuple[str, str, dict[int, tuple[float, float]]]] = {
    "M-SMoE": ("", "routers", {4: (0.18, 0.20), 2: (0.57, 0.54)}),
    "no permutation": ("align: false", "routers", {4: (0.24, 0.27), 2: (0.77, 0.83)}),
    "uniform weights": ("weights: uniform", "routers", {4: (0.33, 0.49), 2: (0.83, 0.76)}),
    "random groups": ("weights: uniform", "random", {4: (0.80, 0.79), 2: (1.12, 1.03)}),
    "random groups, no permutation": (
        "weights: uniform, align: false",
        "random",
        {4: (0.80, 0.79), 2: (1.12, 1.03)},
    ),
    "keep dominants": ("mode: prune, router: compact", "routers", {4: (0.12, 0.22), 2: (0.66, 0.50)}),
    "keep dominants, alias": ("mode: prune", "routers", {}),
    "M-SMoE, router-weight": ("similarity: router-weight", "routers", {}),
    "M-SMoE, weight": ("similarity: weight", "routers", {}),
    "M-SMoE, compact": ("router: compact", "routers", {}),
    "M-SMoE, compact, mean rows": ("router: compact, rows: mean", "routers", {}),
}
# Variants that store each expert once, whose stable rank is told.
RANKED = {"M-SMoE, compact": "merged", "keep dominants": "pruned"}

RECOVERED = {"M-SMoE": (0.013, -0.009), "random groups": (0.11, 0.05), "random groups, no permutation": (0.11, 0.05)}


def text() -> Tensor:
    """The standard library's source, file after file, as byte values below 128."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += bytes(byte for byte in path.read_bytes() if byte < 128)
        if len(found) >= TEXT_BYTES:
            break
    return torch.frombuffer(found, dtype=torch.uint8).long()


def stretches(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - CONTEXT, (count,), generator=generator)
    return torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])


def steps(model: Any, tokens: Tensor, count: int, rate: float, seed: int) -> Iterator[int]:
    """Train the model on random stretches; gives the number of each step that is done."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not count:
        return
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=count, pct_start=0.1)
    model.train()
    for number in range(1, count + 1):
        batch = stretches(tokens, BATCH, generator)
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        yield number


def trained(folder: Path, seed: int, tokens: Tensor, count: int) -> Any:
    """The network of this seed, from its folder or trained."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.01,
            output_router_logits=True,
            max_position_embeddings=CONTEXT,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        for _ in steps(model, tokens, count, RATE, seed):
            pass
        model.config.output_router_logits = False
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()  # type: ignore[no-untyped-call]


@torch.no_grad()
def loss(model: Any, batch: Tensor) -> float:
    """Nats a character."""
    model.eval()
    model.config.output_router_logits = False
    return sum(float(model(part, labels=part).loss) for part in batch.split(BATCH)) / len(batch.split(BATCH))


@torch.no_grad()
def stable_rank(model: Any) -> float:
    """|W|_F^2 / |W|_2^2, the mean over all experts' matrices, gate and up each by itself."""
    found: list[Tensor] = []
    for layer in model.model.layers:
        gate, up = layer.mlp.experts.gate_up_proj.double().chunk(2, dim=1)
        for weights in (gate, up, layer.mlp.experts.down_proj.double()):
            largest = torch.linalg.matrix_norm(weights, ord=2)
            found.append((torch.linalg.matrix_norm(weights) / largest) ** 2)
    return float(torch.cat(found).mean())


@torch.no_grad()
def write_statistics(model: Any, batch: Tensor, path: Path) -> None:
    """Products of router logits, use of experts and number of tokens, from one pass over `batch`."""
    stored: dict[str, Tensor] = {}
    logits = model(batch, output_router_logits=True).router_logits
    for i, found in enumerate(logits):
        found = found.double()
        chosen = found.topk(model.config.num_experts_per_tok).indices.flatten()
        router = f"model.layers.{i}.block_sparse_moe.gate"
        stored[f"{router}.logits_gram"] = found.T @ found
        stored[f"{router}.usage"] = torch.bincount(chosen, minlength=EXPERTS)
        stored[f"{router}.tokens"] = torch.tensor(len(found))
    save_file(stored, path, {"format": "mergekit_lite statistics 1"})


def write_random(layers: int, path: Path, seed: int) -> None:
    """Statistics that say nothing of the model, so that its groups are random."""
    generator = torch.Generator().manual_seed(100 + seed)
    stored: dict[str, Tensor] = {}
    for i in range(layers):
        drawn = torch.randn(EXPERTS, EXPERTS, generator=generator, dtype=torch.float64)
        router = f"model.layers.{i}.block_sparse_moe.gate"
        stored[f"{router}.logits_gram"] = drawn @ drawn.T
        stored[f"{router}.usage"] = torch.randint(1, 10**6, (EXPERTS,), generator=generator)
    save_file(stored, path, {"format": "mergekit_lite statistics 1"})


def merge(folder: Path, name: str, into: int, settings: str, statistics: str) -> Path:
    """The folder of the model with merged experts, written anew."""
    out = folder / f"{name.replace(' ', '_').replace(',', '')}_{into}"
    shutil.rmtree(out, ignore_errors=True)
    recipe = folder / f"{out.name}.yaml"
    models = f"{{trained: {folder / 'model'}, statistics: {folder / statistics}.safetensors}}"
    step = f"{{use: merge_experts, of: trained, with: {{into: {into}, statistics: statistics, {settings}}}}}"
    recipe.write_text(
        f"version: 1\nmodels: {models}\nsteps: {{merged: {step}}}\nsave: {{to: {out}}}\n", encoding="utf-8"
    )
    run(plan(load_recipe(recipe), threads=1), threads=1)
    return out


def groups(out: Path) -> list[list[list[int]]]:
    found = json.loads((out / "experts" / "merged.json").read_text(encoding="utf-8"))
    return [layer["groups"] for layer in found.values()]


def recovered(out: Path, tokens: Tensor, batch: Tensor, seed: int) -> float:
    """The loss after a little training in which the experts of a group stay one."""
    model = AutoModelForCausalLM.from_pretrained(out)
    for layer, found in zip(model.model.layers, groups(out), strict=True):
        for parameter in layer.mlp.experts.parameters():
            parameter.register_hook(tie(found))
    for _ in steps(model, tokens, RECOVERY, RATE, 1000 + seed):
        pass
    return loss(model, batch)


def tie(found: list[list[int]]) -> Any:
    """A hook that gives every expert of a group the sum of the group's gradients, so that they all move alike."""

    def hook(gradient: Tensor) -> Tensor:
        made = gradient.clone()
        for members in found:
            made[members] = gradient[members].sum(0)
        return made

    return hook


def prepared(folder: Path, seed: int, train: Tensor, count: int) -> Any:
    """The network of this seed, with the statistics of its routers beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = trained(folder / "model", seed, train, count)
    batch = stretches(train, COUNTED, torch.Generator().manual_seed(6))
    write_statistics(model, batch, folder / "routers.safetensors")
    return model


def measure(folder: Path, seed: int, count: int) -> dict[str, float]:
    """The losses of one seed, in nats a character: `before`, and by variant and number of experts by how much the merge
    raises it; the same of some after a little training."""
    train, held = halves()
    batch = stretches(held, MEASURED, torch.Generator().manual_seed(5))
    model = prepared(folder, seed, train, count)
    write_random(model.config.num_hidden_layers, folder / "random.safetensors", seed)
    before = loss(model, batch)
    found = {"before": before, "parameters": float(model.num_parameters())}
    for name, (settings, statistics, _) in VARIANTS.items():
        for into in INTO:
            out = merge(folder, name, into, settings, statistics)
            found[f"{name} {into}"] = loss(AutoModelForCausalLM.from_pretrained(out), batch) - before
    found["stable rank whole"] = stable_rank(model)
    for name, called in RANKED.items():
        for into in INTO:
            out = merge(folder, name, into, VARIANTS[name][0], VARIANTS[name][1])
            found[f"stable rank {called} {into}"] = stable_rank(AutoModelForCausalLM.from_pretrained(out))
    for name in RECOVERED:
        settings, statistics, _ = VARIANTS[name]
        out = merge(folder, name, max(INTO), settings, statistics)
        found[f"{name} recovered"] = recovered(out, train, batch, seed) - before
    return found


def halves() -> tuple[Tensor, Tensor]:
    """The text that is learnt, and the last tenth, on which losses are measured."""
    tokens = text()
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--steps", type=int, help="steps of training, in place of the seed's own number")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, _ = halves()
    for seed in options.seeds:
        prepared(options.out / f"seed{seed}", seed, train, STEPS[seed] if options.steps is None else options.steps)


if __name__ == "__main__":
    main()
