"""Experts merged through the whole engine: what transformers makes of every written checkpoint equals a model that was
merged whole in memory by another code, whatever the family, the form of the router, the threads, blocks and stops."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import (
    COUNT_KEYS,
    EXPERTS,
    KINDS,
    MIXTRAL,
    TOP,
    Tiny,
    changed,
    fill,
    gate_of,
    groups_of,
    logits_of,
    mean_of,
    merged,
    routers,
    tensors,
    tiny,
    write_recipe,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mergekit_lite import InterruptedRun, load_recipe, merge_in_memory, plan, run
from mergekit_lite.run.progress import Progress

__all__ = ["tiny"]  # a fixture
BOTH = [(kind, fused) for kind in KINDS for fused in (False, True)]


def whole(
    tiny: Tiny,
    into: int,
    *,
    similarity: str = "router-logits",
    align: bool = True,
    even: bool = False,
    prune: bool = False,
) -> Any:
    """The model with its experts merged in memory: every slot has its group's weights, the router is as it was."""
    model = copy.deepcopy(tiny.model)
    for i, part in routers(model).items():
        for members in groups_of(tiny, i, into, similarity).values():
            made = mean_of(tiny, i, members[:1] if prune else members, align=align, even=even)
            for e in members:
                fill(part, e, *made)
    return model


def smaller(tiny: Tiny, into: int, *, mean_rows: bool = False) -> Any:
    """The model with `into` experts a layer and as many rows of the router, of another configuration."""
    config = copy.deepcopy(tiny.model.config)
    routing = getattr(config, "n_group", None) or 1
    for key in COUNT_KEYS:
        if hasattr(config, key):
            setattr(config, key, into)
    config.num_experts_per_tok = min(TOP, into // routing * (getattr(config, "topk_group", None) or 1))
    model = AutoModelForCausalLM.from_config(config)
    old = tiny.model.state_dict()
    model.load_state_dict({n: t for n, t in old.items() if t.shape == model.state_dict()[n].shape}, strict=False)
    for i, part in routers(model).items():
        before = gate_of(routers(tiny.model)[i])
        for slot, members in enumerate(groups_of(tiny, i, into, "router-logits", routing).values()):
            fill(part, slot, *mean_of(tiny, i, members, align=True, even=False))
            weights = tiny.usage[i][members].double() + (1e-300 if mean_rows else 0)
            for name in ("weight", "e_score_correction_bias"):
                if hasattr(before, name):
                    rows = getattr(before, name).detach()[members].double()
                    mean = (weights.view(-1, *[1] * (rows.dim() - 1)) * rows).sum(0) / weights.sum()
                    getattr(gate_of(part), name).data[slot] = mean if mean_rows else rows[0]
    return model


def close(got: Any, wanted: Any) -> None:
    expected = logits_of(wanted)
    assert float(expected.std()) > 0.3  # else nothing could be seen
    torch.testing.assert_close(logits_of(got), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("tiny", BOTH, indirect=True, ids=lambda one: f"{one[0]}{'-fused' * one[1]}")
def test_every_form_loads_and_computes_what_a_whole_merge_does(tiny: Tiny, tmp_path: Path) -> None:
    before = logits_of(tiny.model)
    alias = merged(write_recipe(tmp_path / "alias.yaml", tiny, "into: 4, statistics: routers"))
    model = AutoModelForCausalLM.from_pretrained(alias)
    close(model, whole(tiny, 4))
    assert float((logits_of(model) - before).abs().max()) > 0.01
    compact = merged(write_recipe(tmp_path / "c.yaml", tiny, "into: 4, statistics: routers, router: compact"))
    close(AutoModelForCausalLM.from_pretrained(compact), smaller(tiny, 4))
    settings = "into: 4, statistics: routers, router: compact, rows: mean"
    compact = merged(write_recipe(tmp_path / "r.yaml", tiny, settings))
    close(AutoModelForCausalLM.from_pretrained(compact), smaller(tiny, 4, mean_rows=True))
    config = AutoConfig.from_pretrained(compact)
    assert {getattr(config, key) for key in COUNT_KEYS if hasattr(config, key)} == {4}
    # A mapped checkpoint is the alias one without its copies.
    mapped = merged(write_recipe(tmp_path / "m.yaml", tiny, "into: 4, statistics: routers, router: mapped"))
    places = json.loads((mapped / "config.json").read_text(encoding="utf-8"))["expert_map"]
    stored, full = tensors(mapped), tensors(alias)
    assert expanded(stored, places, full) and set(stored) <= set(full)
    size = {name: sum(t.numel() for t in load.values()) for name, load in (("mapped", stored), ("alias", full))}
    assert size["mapped"] < size["alias"]


def expanded(stored: Mapping[str, Tensor], places: Mapping[str, list[int]], full: Mapping[str, Tensor]) -> bool:
    """Whether the map finds for every tensor of `full` the one that is stored."""
    for name, tensor in full.items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if layer in places and ".experts." in name:
            if "_proj" in name and not rest.endswith(".weight"):
                if not torch.equal(tensor, stored[name][places[layer]]):
                    return False
                continue
            head, _, tail = name.partition(".experts.")
            number, _, weight = tail.partition(".")
            name = f"{head}.experts.{places[layer][int(number)]}.{weight}"
        if not torch.equal(tensor, stored[name]):
            return False
    return True


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "router_weight": ("similarity: router-weight, statistics: routers", {"similarity": "router-weight"}),
    "weight": ("similarity: weight, statistics: routers", {"similarity": "weight"}),
    "unaligned": ("align: false, statistics: routers", {"align": False}),
    "even": ("weights: uniform, statistics: routers", {"even": True}),
    "pruned": ("mode: prune, statistics: routers", {"prune": True}),
}


@MIXTRAL
@pytest.mark.parametrize("into", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_what_its_formula_says(variant: str, into: int, tiny: Tiny, tmp_path: Path) -> None:
    settings, asked = VARIANTS[variant]
    out = merged(write_recipe(tmp_path / "v.yaml", tiny, f"into: {into}, {settings}"))
    close(AutoModelForCausalLM.from_pretrained(out), whole(tiny, into, **asked))


@pytest.mark.parametrize("tiny", [("mixtral", False), ("deepseek_v3", True)], indirect=True, ids=["apart", "fused"])
def test_threads_blocks_and_stops_change_no_byte(tiny: Tiny, tmp_path: Path) -> None:
    settings = "into: 3, similarity: weight, statistics: routers, router: mapped"
    first = merged(write_recipe(tmp_path / "a.yaml", tiny, settings), threads=1)
    wanted = (first / "model.safetensors").read_bytes()
    groups = (first / "experts" / "m.json").read_bytes()
    for name, options in {"b": {"threads": 4}, "c": {"threads": 2, "block": 1}}.items():
        out = merged(write_recipe(tmp_path / f"{name}.yaml", tiny, settings), **options)
        assert (out / "model.safetensors").read_bytes() == wanted
        assert (out / "experts" / "m.json").read_bytes() == groups
    made = plan(load_recipe(write_recipe(tmp_path / "d.yaml", tiny, settings)))

    def stop(progress: Progress) -> None:
        if progress.phase == "merge" and progress.done > progress.total // 3:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        run(made, threads=1, progress=stop)
    run(made, resume=True)
    assert (Path(made.outputs[0].to) / "model.safetensors").read_bytes() == wanted
    assert (Path(made.outputs[0].to) / "experts" / "m.json").read_bytes() == groups


@MIXTRAL
def test_adaptive_layers_and_protected_ones(tiny: Tiny, tmp_path: Path) -> None:
    """Places go to the most used of both layers; the smaller share has to fit the file of groups."""
    out = merged(
        write_recipe(tmp_path / "a.yaml", tiny, "into: 3, adaptive: true, statistics: routers, router: mapped")
    )
    used = [(usage / usage.sum()).tolist() for usage in tiny.usage.values()]
    for one in used:
        one[one.index(max(one))] = 1.0
    best = sorted((-share, layer, e) for layer, one in enumerate(used) for e, share in enumerate(one))[:6]
    wanted = [sum(layer == i for _, layer, _ in best) for i in (0, 1)]
    names = tensors(out)
    found = [
        sum(f"layers.{i}.block_sparse_moe.experts." in n and n.endswith("w1.weight") for n in names) for i in (0, 1)
    ]
    assert found == wanted and sum(found) == 6
    kept = merged(write_recipe(tmp_path / "p.yaml", tiny, "into: 2, protect: [0, 1], statistics: routers"))
    old, new = tensors(tiny.folder), tensors(kept)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(name.startswith("model.layers.1.block_sparse_moe.experts.") for name in changed)


@MIXTRAL
def test_as_many_experts_as_before_change_nothing_and_equal_ones_merge_exactly(tiny: Tiny, tmp_path: Path) -> None:
    same = merged(write_recipe(tmp_path / "a.yaml", tiny, f"into: {EXPERTS}, statistics: routers"))
    assert (same / "model.safetensors").stat().st_size
    old, new = tensors(tiny.folder), tensors(same)
    assert all(torch.equal(old[name], new[name]) for name in old)
    # Every expert is expert 0 with its hidden units in another order: the merge finds it again, bit for bit.
    generator = torch.Generator().manual_seed(1)
    for i in (0, 1):
        lead = f"model.layers.{i}.block_sparse_moe.experts."
        for e in range(1, EXPERTS):
            p = torch.randperm(old[f"{lead}0.w1.weight"].shape[0], generator=generator)
            old[f"{lead}{e}.w1.weight"] = old[f"{lead}0.w1.weight"][p].contiguous()
            old[f"{lead}{e}.w3.weight"] = old[f"{lead}0.w3.weight"][p].contiguous()
            old[f"{lead}{e}.w2.weight"] = old[f"{lead}0.w2.weight"][:, p].contiguous()
    changed(tiny, tmp_path / "copies", lambda held: held.update(old))
    planted = Tiny(tiny.model, tmp_path / "copies", tiny.statistics)
    one = tensors(merged(write_recipe(tmp_path / "b.yaml", planted, "into: 1, statistics: routers, router: mapped")))
    for i, usage in tiny.usage.items():
        for weight in ("w1", "w2", "w3"):
            lead = f"model.layers.{i}.block_sparse_moe.experts."
            dominant = int(usage.argmax())
            assert torch.equal(one[f"{lead}0.{weight}.weight"], old[f"{lead}{dominant}.{weight}.weight"])


def test_the_oracle_of_a_merged_layer(tmp_path: Path) -> None:
    cases = json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
    case = next(case for case in cases if case["id"] == "m_smoe/merge_layer")

    def tensor(stored: Mapping[str, Any]) -> Tensor:
        return torch.tensor(stored["data"], dtype=torch.float64).reshape(stored["shape"])

    lead = "model.layers.0.block_sparse_moe."
    model = {f"{lead}gate.weight": torch.zeros(4, 2, dtype=torch.float64)}
    for e, weights in case["inputs"]["experts"].items():
        model |= {f"{lead}experts.{e}.{name}.weight": tensor(stored) for name, stored in weights.items()}
    logits = tensor(case["inputs"]["router_logits"])
    usage = torch.tensor(case["expected"]["usage_count"]["data"])
    statistics = {f"{lead}gate.logits_gram": logits.T @ logits, f"{lead}gate.usage": usage}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\ncompute: float64\nmodels: {a: none, routers: none}\nsteps:\n"
        "  m: {use: merge_experts, of: a, with: {into: 2, statistics: routers, router: compact}}\nsave: {to: none}\n",
        encoding="utf-8",
    )
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_hidden_layers": 1}
    got = merge_in_memory(load_recipe(recipe), {"a": model, "routers": statistics}, config=config)
    # Slots come in the order of their dominant experts.
    for slot, dominant in enumerate(sorted(case["expected"]["dominant"])):
        group = case["expected"]["merged"][str(case["expected"]["dominant"].index(dominant))]
        for name, stored in group.items():
            found = got[f"{lead}experts.{slot}.{name}.weight"]
            torch.testing.assert_close(found, tensor(stored), rtol=0, atol=case["atol"])
    assert got[f"{lead}gate.weight"].shape == (2, 2)


@MIXTRAL
def test_what_other_steps_compute_is_merged_as_a_file_would_be(tiny: Tiny, tmp_path: Path) -> None:
    other, between = tmp_path / "other", tmp_path / "between"
    changed(tiny, other, lambda held: held.update({n: t + 0.1 * torch.randn_like(t) for n, t in held.items()}))
    models = f"{{a: {tiny.folder}, b: {other}, routers: {tiny.statistics}"
    ties = "{use: ties, base: a, of: [b], with: {density: 0.4}}"

    def made(name: str, more: str, steps: str) -> dict[str, Tensor]:
        path = tmp_path / f"{name}.yaml"
        text = f"version: 1\nmodels: {models}{more}}}\nsteps:\n{steps}\nsave: {{to: {tmp_path / name}}}\n"
        path.write_text(text, encoding="utf-8")
        return tensors(merged(path, block=1))

    made(between.name, "", f"  t: {ties}")
    for similarity in ("weight", "router-weight"):
        settings = f"into: 3, similarity: {similarity}, statistics: routers, router: compact"
        step = f"  m: {{use: merge_experts, of: t, with: {{{settings}}}}}"
        apart = made(f"apart-{similarity}", f", t: {between}", step)
        at_once = made(f"at_once-{similarity}", "", f"  t: {ties}\n{step}")
        assert list(apart) == list(at_once) and all(torch.equal(apart[name], at_once[name]) for name in apart)


@MIXTRAL
def test_a_token_goes_to_no_more_experts_than_there_are(tiny: Tiny, tmp_path: Path) -> None:
    made = plan(load_recipe(write_recipe(tmp_path / "r.yaml", tiny, "into: 1, statistics: routers, router: compact")))
    assert any("falls from 2 to 1" in warning.message for warning in made.warnings)
    run(made)
    close(AutoModelForCausalLM.from_pretrained(made.outputs[0].to), smaller(tiny, 1))
