"""MC-SMoE on a tiny Mixtral: merge its experts, decompose them, and train what is left, as published; a few minutes.

    python scripts/reproduce/decompose_experts.py --out demo/experts

The model, its merge to four experts a layer and its text are those of expert_merges.py. `use: decompose` makes
the one-shot form, a model that transformers loads. The training starts from the same U V with all of W - U V as S;
while it goes on, the rows of S with the smallest mean of |weight x gradient|, averaged over steps, are cut until the
share is left. Routers stay as they are; the model before the merge teaches, with temperature 2 and weight 0.2. The
experts of a group stay one. The result is written twice: whole, for transformers, and as U, V, rows of S and their
numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import expert_merges as tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from mergekit_lite import load_recipe, plan, run

TEMPERATURE, TEACHING = 2.0, 0.2
RATE, AVERAGE = 1e-3, 0.85  # of training; how much of the older importance every step keeps
CUT = 0.6  # share of the steps over which rows are cut
INTO = 4


class LowRankRows(nn.Module):
    """The weights of a layer's experts, (experts, rows, columns), as U V and rows of S, one for each group.

    A weight that is two matrices one below the other, as gate and up projection are, has `halves` 2.
    """

    home: Tensor  # the group of every expert
    kept: Tensor  # 1 for rows of S that are kept, 0 for the others
    importance: Tensor  # of every row

    def __init__(self, weight: Tensor, groups: list[list[int]], rank: int, halves: int) -> None:
        super().__init__()
        self.shape = weight.shape
        self.halves = halves
        home = {member: g for g, members in enumerate(groups) for member in members}
        self.register_buffer("home", torch.tensor([home[e] for e in range(len(weight))]))
        firsts = weight[[members[0] for members in groups]]
        matrices = firsts.reshape(len(groups) * halves, -1, weight.shape[-1]).double()
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        root = s[:, None, :rank].sqrt()
        self.u = nn.Parameter((u[:, :, :rank] * root).float())
        self.v = nn.Parameter((root.mT * v[:, :rank]).float())
        self.s = nn.Parameter((matrices - self.u.double() @ self.v.double()).float())
        self.register_buffer("kept", torch.ones(*self.s.shape[:2], 1))
        self.register_buffer("importance", torch.zeros(self.s.shape[:2]))

    def forward(self, ignored: Tensor) -> Tensor:
        made = (self.u @ self.v + self.s * self.kept).reshape(-1, *self.shape[1:])
        return made[self.home]

    @torch.no_grad()
    def watch(self) -> None:
        """Take the importance of every row from the gradients of one step."""
        assert self.s.grad is not None
        now = (self.s * self.s.grad).abs().mean(dim=2)
        self.importance.mul_(AVERAGE).add_(now, alpha=1 - AVERAGE)

    @torch.no_grad()
    def cut(self, share: float) -> None:
        """Keep the most important share of the rows of every matrix."""
        count = max(1, int(share * self.s.shape[1] + 1e-9))
        scores = torch.where(self.kept[..., 0] > 0, self.importance, -1.0)
        chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        self.kept.zero_().scatter_(1, chosen[..., None], 1.0)

    @torch.no_grad()
    def parts(self) -> dict[str, Tensor]:
        """What is stored: U, V, the rows of S that are kept and their numbers."""
        rows = self.kept[..., 0].nonzero()
        return {"u": self.u, "v": self.v, "s": self.s[rows[:, 0], rows[:, 1]], "rows": rows.int()}


def one_shot(folder: Path, merged: Path, rank: int, share: float) -> tuple[Path, Any]:
    """The merged model decomposed by a recipe, and what the run tells of it."""
    out = folder / "decomposed"
    recipe = folder / "decomposed.yaml"
    settings = f'{{rank: {rank}, share: {{"*.experts.*": {share}, else: 1}}}}'
    recipe.write_text(
        f"version: 1\nmodels: {{merged: {merged}}}\nsave: {{to: {out}}}\n"
        f"steps: {{small: {{use: decompose, of: merged, with: {settings}}}}}\n",
        encoding="utf-8",
    )
    result = run(plan(load_recipe(recipe), threads=1), threads=1)
    (told,) = result.decomposed.values()
    return out, told


def parametrized(model: Any, groups: list[list[list[int]]], rank: int) -> list[LowRankRows]:
    """The experts of every layer as U V and S; all else of the model trains but the routers."""
    made = []
    for layer, found in zip(model.model.layers, groups, strict=True):
        layer.mlp.gate.requires_grad_(False)
        experts = layer.mlp.experts
        for name, halves in (("gate_up_proj", 2), ("down_proj", 1)):
            weight = getattr(experts, name)
            weight.requires_grad_(False)
            made.append(LowRankRows(weight.detach(), found, rank, halves))
            parametrize.register_parametrization(experts, name, made[-1], unsafe=True)
    return made


def train(model: Any, teacher: Any, parts: list[LowRankRows], tokens: Tensor, count: int, share: float) -> None:
    """Train with the text and the teacher, and cut rows on the way: their share falls as a cubic does."""
    generator = torch.Generator().manual_seed(1000)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    ends = max(1, int(CUT * count))
    model.train()
    for number in range(1, count + 1):
        batch = tiny.stretches(tokens, tiny.BATCH, generator)
        optimizer.zero_grad()
        answer = model(batch, labels=batch)
        with torch.no_grad():
            taught = teacher(batch).logits
        one, other = (torch.log_softmax(x.flatten(0, 1) / TEMPERATURE, -1) for x in (answer.logits, taught))
        apart = nn.functional.kl_div(one, other, log_target=True, reduction="batchmean") * TEMPERATURE**2
        (answer.loss + TEACHING * apart).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for part in parts:
            part.watch()
        optimizer.step()
        for part in parts:
            part.cut(share + (1 - share) * max(0.0, 1 - number / ends) ** 3)


def write(model: Any, parts: list[LowRankRows], folder: Path) -> int:
    """The model whole, and the experts' parts in a file; the bytes of this file."""
    names = [f"layers.{i // 2}.{('gate_up_proj', 'down_proj')[i % 2]}" for i in range(len(parts))]
    stored = {f"{n}.{k}": t.contiguous() for n, part in zip(names, parts, strict=True) for k, t in part.parts().items()}
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.remove_parametrizations(layer.mlp.experts, name, leave_parametrized=True)
    model.save_pretrained(folder)
    save_file(stored, folder / "parts.safetensors")
    return (folder / "parts.safetensors").stat().st_size


def measure(folder: Path, seed: int, steps: int, recovery: int, rank: int, share: float) -> dict[str, Any]:
    """Losses, in nats a character, and bytes of the experts of one network."""
    learnt, held = tiny.halves()
    batch = tiny.stretches(held, tiny.MEASURED, torch.Generator().manual_seed(5))
    teacher = tiny.prepared(folder, seed, learnt, steps)
    merged = tiny.merge(folder, "M-SMoE", INTO, "", "routers")
    found: dict[str, Any] = {"before": tiny.loss(teacher, batch)}
    model = AutoModelForCausalLM.from_pretrained(merged)
    found["merged"] = tiny.loss(model, batch)
    groups = tiny.groups(merged)
    small, told = one_shot(folder, merged, rank, share)
    found["decomposed"] = tiny.loss(AutoModelForCausalLM.from_pretrained(small), batch)
    ranks = [module["stable_rank"] for module in told["modules"].values()]
    found["stable_rank"] = [sum(pair[i] for pair in ranks) / len(ranks) for i in (0, 1)]
    parts = parametrized(model, groups, rank)
    train(model, teacher, parts, learnt, recovery, share)
    found["recovered"] = tiny.loss(model, batch)
    found["bytes"] = {
        "experts": sum(p.numel() * 4 for layer in teacher.model.layers for p in layer.mlp.experts.parameters()),
        "parts": write(model, parts, folder / "recovered"),
    }
    again = AutoModelForCausalLM.from_pretrained(folder / "recovered")
    found["loaded"] = tiny.loss(again, batch)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("demo/experts"))
    parser.add_argument("--seed", type=int, default=0, choices=list(tiny.STEPS))
    parser.add_argument("--steps", type=int, help="steps of the first training, in place of the seed's own number")
    parser.add_argument("--recovery", type=int, default=tiny.RECOVERY, help="steps of training after the decomposition")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.1, help="of the rows of S that are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = tiny.STEPS[options.seed] if options.steps is None else options.steps
    folder = options.out / f"seed{options.seed}"
    found = measure(folder, options.seed, count, options.recovery, options.rank, options.share)
    (folder / "decomposed.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
