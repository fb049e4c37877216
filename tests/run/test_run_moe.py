"""`moe`: mixtures built from dense models are loaded by stock transformers, and compute what the dense models' parts
compute when they are put together in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from dense_models import LAYERS, WIDTH, Routed, loaded, logits_of, mixture, tensors, write_dense, write_states
from numpy.typing import NDArray
from torch import Tensor

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.cli.app import execute
from mergekit_lite.family.mixtures import STYLES
from mergekit_lite.methods.moe import STYLES as NAMED
from mergekit_lite.methods.random import derive_key, normal_numbers, uniform_words

ROOT = Path(__file__).parents[2]
# By style and dense family: what a layer's gate is called, what becomes of scores, the shared expert and its gate.
GATE, SHARED_GATE = "model.layers.{i}.mlp.gate.weight", "model.layers.{i}.mlp.shared_expert_gate.weight"
CASES = {
    ("mixtral", "llama"): ("model.layers.{i}.block_sparse_moe.gate.weight", "softmax", False),
    ("mixtral", "mistral"): ("model.layers.{i}.block_sparse_moe.gate.weight", "softmax", False),
    ("qwen2_moe", "qwen2"): (GATE, "softmax", True),
    ("qwen2_moe", "llama"): (GATE, "softmax", True),
    ("qwen3_moe", "qwen3"): (GATE, "softmax", False),
    ("deepseek", "deepseek_v2"): (GATE, "unnormalised", True),
    ("deepseek", "deepseek_v3"): (GATE, "sigmoid", True),
    ("glm4_moe", "llama"): (GATE, "sigmoid", True),
    ("glm4_moe", "qwen2"): (GATE, "sigmoid", True),
    ("glm4_moe", "qwen3"): (GATE, "sigmoid", True),
}
Dense = tuple[dict[str, Any], dict[str, Path]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three models of a kind, in memory and on disk, made once."""
    known: dict[str, Dense] = {}

    def make(kind: str) -> Dense:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            models = {name: write_dense(folder / name, kind, seed) for seed, name in enumerate("abc")}
            known[kind] = models, {name: folder / name for name in models}
        return known[kind]

    return make


def direction(positive: NDArray[Any], negative: NDArray[Any] | None = None) -> NDArray[Any]:
    found = positive.astype(np.float64) - (0 if negative is None else negative.astype(np.float64))
    unit: NDArray[Any] = found / np.sqrt((found**2).sum(axis=-1, keepdims=True))
    return unit


def routed(models: dict[str, Any], gates: NDArray[Any], law: str, factor: float, shared: Any, top: int = 2) -> Tensor:
    """The logits of the base `a` with parts that choose among those of a, b and c; `gates` are (layers, experts,
    width). `shared` gives the shared expert of a layer, its factor and its gate. The base is as before afterwards."""
    base = models["a"]
    before = [layer.mlp for layer in base.model.layers]
    own = {name: [layer.mlp for layer in model.model.layers] for name, model in models.items()}
    try:
        for i, layer in enumerate(base.model.layers):
            gate = torch.from_numpy(gates[i]).float()
            experts = [(own[name][i], factor) for name in "abc"]
            expert, shared_gate = (None, None) if shared is None else shared(own, i)
            layer.mlp = Routed(experts, gate, top, law, expert, shared_gate)
        return logits_of(base)
    finally:
        for layer, part in zip(base.model.layers, before, strict=True):
            layer.mlp = part


@pytest.mark.parametrize(("style", "kind"), CASES)
def test_a_mixture_computes_what_its_parts_do(style: str, kind: str, dense: Any, tmp_path: Path) -> None:
    models, folders = dense(kind)
    _, law, shares = CASES[style, kind]
    means = {f"h{n}": write_states(tmp_path / f"h{n}.safetensors", n) for n in range(4)}
    files = {name: tmp_path / f"{name}.safetensors" for name in means}
    settings, shared = f"style: {style}, gates: hidden", None
    gated = style == "qwen2_moe"
    if shares:
        settings += ", shared: b, shared_scale: 0.7" + (", shared_hidden: h3, shared_negative: h0" if gated else "")
        over = direction(means["h3"], means["h0"])

        def shared(own: Any, i: int) -> Any:
            return (own["b"][i], 0.7), torch.from_numpy(over[i : i + 1]).float() if gated else None

    of = "[{model: a, hidden: h0}, {model: b, hidden: h1, negative: h2}, {model: c, hidden: h2}]"
    out = mixture(tmp_path / "r.yaml", folders | files, f"base: a, of: {of}, with: {{{settings}, scale: 0.8}}")
    rows = (direction(means["h0"]), direction(means["h1"], means["h2"]), direction(means["h2"]))
    expected = routed(models, np.stack(rows, axis=1), law, 0.8, shared)
    found = logits_of(loaded(out))
    assert torch.allclose(found, expected, atol=2e-5), float((found - expected).abs().max())
    # The test could not fail if routing did not matter.
    assert (expected - routed(models, np.stack(rows[::-1], axis=1), law, 0.8, shared)).abs().max() > 0.1


@pytest.mark.parametrize(("style", "kind"), [("deepseek", "llama"), *CASES])
def test_gates_from_hidden_states_are_those_of_numpy(style: str, kind: str, dense: Any, tmp_path: Path) -> None:
    _, folders = dense(kind)
    gate, _, shares = CASES.get((style, kind), (GATE, "", False))
    means = [write_states(tmp_path / f"h{n}.safetensors", n) for n in range(3)]
    files = {f"h{n}": tmp_path / f"h{n}.safetensors" for n in range(3)}
    of = "[{model: a, hidden: h0, negative: h1}, {model: b, hidden: h1}, {model: b, hidden: h2}]"
    shared = ", shared: a" * shares + ", shared_hidden: h1" * (style == "qwen2_moe")
    for gates in ("hidden", "embedding"):
        step = f"base: a, of: {of}, with: {{style: {style}, gates: {gates}{shared}}}"
        held = tensors(mixture(tmp_path / f"{gates}.yaml", folders | files, step))
        for i in range(LAYERS):
            row = i if gates == "hidden" else 0
            first = (means[0][row], means[1][row])
            first = first if gates == "hidden" else (direction(first[0]), direction(first[1]))
            wanted = [direction(*first), direction(means[1][row]), direction(means[2][row])]
            np.testing.assert_allclose(held[gate.format(i=i)].numpy(), np.stack(wanted), rtol=1e-6, atol=1e-7)
            if style == "qwen2_moe":
                over = held[SHARED_GATE.format(i=i)].numpy()
                np.testing.assert_allclose(over, direction(means[1][row])[None], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("style", "kind"), CASES)
def test_equal_experts_are_the_dense_model(style: str, kind: str, dense: Any, tmp_path: Path) -> None:
    models, folders = dense(kind)
    _, law, shares = CASES[style, kind]
    # Where the code does not make weights add up to 1, those of all experts do.
    count = 2 if law == "unnormalised" else 4
    settings = f"style: {style}, gate_std: 1.0"
    if shares:
        settings += ", scale: 0.5, shared: a, shared_scale: " + ("1.0" if style == "qwen2_moe" else "0.5")
    step = f"base: a, of: {{a: {{copies: {count}}}}}, with: {{{settings}}}"
    out = mixture(tmp_path / "r.yaml", folders, step)
    assert torch.allclose(logits_of(loaded(out)), logits_of(models["a"]), atol=2e-5)


def test_the_first_deepseek_moe_holds_the_parts_under_its_names(dense: Any, tmp_path: Path) -> None:
    """transformers has no class for it, so names, bytes and configuration are compared with what its code reads."""
    _, folders = dense("llama")
    out = mixture(tmp_path / "r.yaml", folders, "base: a, of: [b, c], with: {style: deepseek, shared: a, dense: 1}")
    stored = {name: tensors(folder) for name, folder in folders.items()}
    wanted = {name: tensor for name, tensor in stored["a"].items() if ".mlp." not in name or "layers.0." in name}
    for i in range(1, LAYERS):
        for part, model in (("experts.0", "b"), ("experts.1", "c"), ("shared_experts", "a")):
            for name in ("gate_proj", "up_proj", "down_proj"):
                lead = f"model.layers.{i}.mlp."
                wanted[f"{lead}{part}.{name}.weight"] = stored[model][f"{lead}{name}.weight"]
    found = tensors(out)
    gates = [GATE.format(i=i) for i in range(1, LAYERS)]
    assert found.keys() == {*wanted, *gates}
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert all(found[name].shape == (2, WIDTH) for name in gates)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    told = {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    told |= {"moe_intermediate_size": 20, "intermediate_size": 20, "norm_topk_prob": True, "model_type": "deepseek"}
    assert {key: config[key] for key in told} == told and config["architectures"] == ["DeepseekForCausalLM"]


@pytest.mark.parametrize(("style", "kind"), [case for case in CASES if case[0] != "mixtral"])
def test_first_layers_can_stay_dense(style: str, kind: str, dense: Any, tmp_path: Path) -> None:
    """Layers without experts are those of the base, whatever the experts are."""
    models, folders = dense(kind)
    shares = CASES[style, kind][2]
    step = f"base: a, of: {{b: {{copies: 2, scale: 0}}}}, with: {{style: {style}, dense: 1"
    step += ", shared: c, shared_scale: 0}" if shares else "}"
    model = loaded(mixture(tmp_path / "r.yaml", folders, step))
    base = models["a"]
    before = [layer.mlp for layer in base.model.layers]
    for layer in base.model.layers[1:]:
        layer.mlp = torch.nn.Module()
        layer.mlp.forward = torch.zeros_like  # experts that give nothing
    expected = logits_of(base)
    for layer, part in zip(base.model.layers, before, strict=True):
        layer.mlp = part
    assert torch.allclose(logits_of(model), expected, atol=2e-5)


@pytest.mark.parametrize("style", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_experts_may_have_other_units_than_the_base(style: str, dense: Any, tmp_path: Path) -> None:
    models, folders = dense("llama")
    wide = write_dense(tmp_path / "wide", "llama", 9, intermediate_size=28)
    share = {"mixtral": "", "qwen2_moe": ", shared: a, shared_scale: 0", "glm4_moe": ", shared: w, shared_scale: 0"}
    step = f"base: a, of: {{w: {{copies: 2}}}}, with: {{style: {style}{share[style]}}}"
    model = loaded(mixture(tmp_path / "r.yaml", folders | {"w": tmp_path / "wide"}, step))
    base = models["a"]
    before = [layer.mlp for layer in base.model.layers]
    for layer, other in zip(base.model.layers, wide.model.layers, strict=True):
        layer.mlp = other.mlp
    expected = logits_of(base)
    for layer, part in zip(base.model.layers, before, strict=True):
        layer.mlp = part
    assert torch.allclose(logits_of(model), expected, atol=2e-5)


def test_what_an_old_configuration_leaves_out_is_said(dense: Any, tmp_path: Path) -> None:
    """Mixtral's class would take other numbers for granted than Llama's."""
    models, folders = dense("llama")
    old = tmp_path / "old"
    old.mkdir()
    (old / "model.safetensors").write_bytes((folders["a"] / "model.safetensors").read_bytes())
    config = json.loads((folders["a"] / "config.json").read_text(encoding="utf-8"))
    for key in ("rope_parameters", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "head_dim"):
        config.pop(key)
    (old / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for style, more in (("mixtral", ""), ("glm4_moe", ", scale: 0.5, shared: a, shared_scale: 0.5")):
        step = f"base: a, of: [a, a], with: {{style: {style}{more}}}"
        model = loaded(mixture(tmp_path / f"{style}.yaml", {"a": old}, step))
        assert torch.allclose(logits_of(model), logits_of(models["a"]), atol=2e-5)


# Random numbers


def test_normal_numbers_are_the_quantiles_of_the_words() -> None:
    words = uniform_words(11, 5, 400)
    wanted = [NormalDist().inv_cdf((int(word) + 0.5) / 2**32) for word in words]
    np.testing.assert_allclose(normal_numbers(11, 5, 400), wanted, rtol=1e-12, atol=1e-14)
    apart = np.concatenate([normal_numbers(11, start, n) for start, n in ((5, 1), (6, 130), (136, 269))])
    assert (apart == normal_numbers(11, 5, 400)).all()


def test_upcycled_experts_differ_by_noise_of_the_asked_size(dense: Any, tmp_path: Path) -> None:
    _, folders = dense("llama")
    step = "base: a, of: {b: {copies: 2, noise: 0.05, scale: 2.0}}, with: {style: mixtral}"
    found, own = tensors(mixture(tmp_path / "r.yaml", folders, step)), tensors(folders["b"])
    rest = []
    for new, old, factor in (("w1", "gate_proj", 1.0), ("w3", "up_proj", 1.0), ("w2", "down_proj", 2.0)):
        weight = own[f"model.layers.1.mlp.{old}.weight"]
        names = [f"model.layers.1.block_sparse_moe.experts.{e}.{new}.weight" for e in range(2)]
        for name in names:
            words = uniform_words(derive_key(0, "m", "upcycled", "b", name), 0, weight.numel())
            noise = torch.tensor([NormalDist().inv_cdf((int(word) + 0.5) / 2**32) for word in words]).view_as(weight)
            assert torch.allclose(found[name], factor * (weight + 0.05 * noise), atol=1e-6)
            rest.append((found[name] / factor - weight) / 0.05)
        assert not torch.equal(*(found[name] for name in names))
    together = torch.cat([part.flatten() for part in rest])
    assert abs(float(together.mean())) < 4 / math.sqrt(len(together)) and 0.9 < float(together.std()) < 1.1


@pytest.mark.parametrize("gates", ["random", "uniform"])
def test_random_gates_are_drawn_as_said(gates: str, dense: Any, tmp_path: Path) -> None:
    _, folders = dense("llama")
    step = f"base: a, of: {{a: {{copies: 40}}}}, with: {{style: mixtral, gates: {gates}}}"
    held = tensors(mixture(tmp_path / "r.yaml", folders, step))
    drawn = torch.stack([held[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(LAYERS)])
    assert drawn.shape == (LAYERS, 40, WIDTH) and len(drawn.unique()) > 0.99 * drawn.numel()
    bound = 1 / math.sqrt(WIDTH)
    std = 0.02 if gates == "random" else bound / math.sqrt(3)
    assert abs(float(drawn.std()) / std - 1) < 0.06 and abs(float(drawn.mean())) < 4 * std / math.sqrt(drawn.numel())
    assert (float(drawn.abs().max()) > 3 * std) == (gates == "random")
    if gates == "uniform":
        assert 0.98 * bound < float(drawn.abs().max()) < bound


def test_the_bytes_are_the_same_for_any_threads_and_blocks(dense: Any, tmp_path: Path) -> None:
    _, folders = dense("qwen2")
    write_states(tmp_path / "h.safetensors", 1)
    files = {"h": tmp_path / "h.safetensors"}
    step = (
        "base: a, of: {b: {copies: 3, noise: 0.1, scale: 0.5}}, "
        "with: {style: qwen2_moe, shared: c, shared_hidden: h, gates: hidden, hidden: h}"
    )
    found = set()
    for threads, block in ((1, 97), (2, 1 << 10), (2, 1 << 18)):
        out = mixture(tmp_path / "r.yaml", folders | files, step, threads=threads, block=block)
        found.add((out / "model.safetensors").read_bytes())
        out.rename(tmp_path / f"kept{threads}{block}")
    assert len(found) == 1


# From the command line


def test_the_projects_recipe_runs(dense: Any, tmp_path: Path) -> None:
    _, folders = dense("llama")
    named = [f"models.{name}={at}" for name, at in zip(("base", "math", "code"), folders.values(), strict=True)]
    for n, name in enumerate(("math", "code")):
        write_states(tmp_path / f"{name}.safetensors", n)
        named.append(f"models.{name}_prompts={tmp_path / name}.safetensors")
    run(plan(load_recipe(ROOT / "recipes/methods/moe.yaml", named), out=tmp_path / "out"))
    assert bool(torch.isfinite(logits_of(loaded(tmp_path / "out"))).all())


def test_merge_stats_makes_the_hidden_states_of_gates(dense: Any, tmp_path: Path) -> None:
    """Two prompts through the base by the program, and by hand."""
    models, folders = dense("llama")
    ids = torch.arange(2 * 7).view(2, 7) % 48
    from safetensors.torch import save_file

    save_file({"input_ids": ids}, tmp_path / "prompts.safetensors")
    to = tmp_path / "stats"
    words = ["stats", str(folders["a"]), "--data", str(tmp_path / "prompts.safetensors"), "--collect", "hidden"]
    assert execute([*words, "--out", str(to)]) == 0
    step = "base: a, of: {b: {copies: 2}}, with: {style: mixtral, gates: hidden, hidden: h}"
    held = tensors(mixture(tmp_path / "r.yaml", folders | {"h": to / "hidden.safetensors"}, step))
    with torch.no_grad():
        states = models["a"](ids, output_hidden_states=True).hidden_states[:LAYERS]
    for i, state in enumerate(states):
        wanted = direction(state.double().mean(dim=(0, 1)).numpy())
        found = held[f"model.layers.{i}.block_sparse_moe.gate.weight"].numpy()
        np.testing.assert_allclose(found, [wanted] * 2, rtol=1e-4, atol=1e-5)


def test_every_style_that_can_be_named_is_known() -> None:
    assert ("auto", *STYLES) == NAMED
