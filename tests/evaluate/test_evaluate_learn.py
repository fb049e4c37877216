"""Learned weights by losses of state dicts: gradients against autograd, what learning reaches, wrong use, memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from learn_models import FACTORS, SOUP, STEPS, Models, Write, X, Y, entropy, labelled, scores
from torch import Tensor
from torch.nn.functional import cross_entropy

import mergekit_lite
from mergekit_lite import choose
from mergekit_lite.errors import UsageError
from mergekit_lite.evaluate.loss import FunctionLoss
from mergekit_lite.evaluate.template import Template
from mergekit_lite.evaluate.weights import Weights, of_value, open_step
from mergekit_lite.family.family import family_of

CASES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
ORACLES = {case["id"]: case for case in CASES}


def by_autograd(raw: Tensor, groups: Mapping[str, list[str]], models: Models, loss: Any, soup: bool) -> Tensor:
    """The gradient through the mix of all models, by torch alone."""
    leaf = raw.clone().requires_grad_()
    mixed: dict[str, Tensor] = {"seen": torch.tensor([7])}
    for row, names in zip(leaf, groups.values(), strict=True):
        for name in names:
            if soup:
                mixed[name] = sum(w * models[m][name] for w, m in zip(row.softmax(0), "abc", strict=True))  # type: ignore[assignment]
            else:
                base = models["base"][name]
                mixed[name] = base + sum(w * (models[m][name] - base) for w, m in zip(row, "abc", strict=True))
    (found,) = torch.autograd.grad(loss(mixed), [leaf])
    return found


@pytest.mark.parametrize("by", ["model", "layer", "tensor"])
@pytest.mark.parametrize(("kind", "loss"), [("soup", labelled), ("factors", entropy)])
def test_the_gradient_is_that_of_autograd_through_the_mix(
    models: Models, write: Write, kind: str, loss: Any, by: str
) -> None:
    template = Template(write(STEPS[kind], f", by: {by}"))
    opened = open_step(template)
    with choose._ingredients(template.first, opened, choose.planner(models=models), models, 2) as ingredients:
        weights = Weights(opened, list(ingredients.shapes), family_of({}, ingredients.shapes))
        assert len(weights.groups) == {"model": 1, "layer": 3, "tensor": 6}[by]
        objective = FunctionLoss(loss, None, ingredients.empty(), ingredients.others(), ())
        torch.manual_seed(5)
        weights.raw += torch.randn_like(weights.raw)
        ingredients.mix(weights.factors(), objective.tensors)
        value, slopes = objective.slopes([0])
        found = weights.gradient(ingredients.products(slopes))
    wanted = by_autograd(weights.raw, weights.groups, models, loss, kind == "soup")
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert wanted.abs().min() > 1e-6 and value == pytest.approx(
        float(loss({**objective.tensors, "seen": models["a"]["seen"]}))
    )


def test_a_tied_tensor_has_the_gradient_of_both_its_uses(write: Write, tmp_path: Path) -> None:
    """Both names are stored; the merge has one of them."""
    draw = torch.Generator().manual_seed(4)
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    models: Models = {
        m: {n: torch.randn(5, 5, generator=draw, dtype=torch.float64) for n in names} for m in ("a", "b", "c", "base")
    }
    for tensors in models.values():
        tensors["lm_head.weight"] = tensors[names[0]].clone()

    def loss(tensors: Mapping[str, Tensor]) -> Tensor:
        embed = tensors[names[0]]
        return ((embed @ tensors[names[1]]).tanh() @ embed.T).square().mean()

    config = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 1}
    template = Template(write(SOUP, ", by: layer"))
    opened = open_step(template)
    make = choose.planner(models=models, config=config)
    with choose._ingredients(template.first, opened, make, models, 1) as ingredients:
        assert list(ingredients.shapes) == names
        weights = Weights(opened, names, family_of(config, names))
        objective = FunctionLoss(loss, None, ingredients.empty(), ingredients.others(), ())
        ingredients.mix(weights.factors(), objective.tensors)
        found = weights.gradient(ingredients.products(objective.slopes([0])[1]))
    torch.testing.assert_close(found, by_autograd(weights.raw, weights.groups, models, loss, True), rtol=1e-9, atol=0)
    learned = mergekit_lite.learn(template, loss, models=models, config=config)
    assert set(mergekit_lite.merge_in_memory(learned.recipe, models, config=config)) == set(names)


@pytest.mark.parametrize("by", ["model", "layer"])
@pytest.mark.parametrize("seed", range(3))
def test_a_learned_soup_is_never_worse_than_the_uniform_one(models: Models, write: Write, by: str, seed: int) -> None:
    uniform = {n: (models["a"][n] + models["b"][n] + models["c"][n]) / 3 for n in models["a"] if n != "seen"}
    uniform["seen"] = models["a"]["seen"]
    batches = [slice(0, 15), slice(15, 30), slice(30, 40)]
    found = mergekit_lite.learn(write(SOUP, f", by: {by}", f"seed: {seed}\n"), labelled, batches=batches, models=models)
    parts = [float(labelled(uniform, rows)) for rows in batches]
    assert found.before == pytest.approx(sum(parts) / 3, rel=1e-12)
    assert found.after <= found.before and found.better and len(found.epochs) == 5
    assert all(sum(values) == pytest.approx(1) for values in found.weights.values())
    # The recipe makes the merge that was measured.
    made = mergekit_lite.merge_in_memory(found.recipe, models)
    assert sum(float(labelled(made, rows)) for rows in batches) / 3 == pytest.approx(found.after, rel=1e-12)


def test_weights_stay_where_they_were_if_learning_raises_the_loss(models: Models, write: Write) -> None:
    goal = {n: 0.34 * models["a"][n] + 0.33 * (models["b"][n] + models["c"][n]) for n in models["a"]}

    def far(tensors: Mapping[str, Tensor]) -> Tensor:
        return (tensors["layers.0.weight"] - goal["layers.0.weight"]).square().sum()

    found = mergekit_lite.learn(write(SOUP, ", rate: 500, epochs: 1"), far, models=models)
    assert not found.better and found.after == found.before
    assert found.weights == {"": pytest.approx((1 / 3,) * 3)}


@pytest.mark.parametrize("kind", ["soup", "factors"])
def test_a_run_gives_the_same_weights_again_with_any_threads(models: Models, write: Write, kind: str) -> None:
    path = write(STEPS[kind], ", by: layer, epochs: 3")
    batches = [slice(i, i + 8) for i in range(0, 40, 8)]
    first, again = (
        mergekit_lite.learn(path, labelled, batches=batches, models=models, threads=threads) for threads in (1, 2)
    )
    assert first == again
    other = mergekit_lite.learn(
        write(STEPS[kind], ", by: layer, epochs: 3", "seed: 8\n"), labelled, batches=batches, models=models
    )
    assert other.weights != first.weights  # another order of the batches


def test_weights_by_layer_reach_what_one_for_all_cannot(models: Models, write: Write) -> None:
    wanted = {"layers.0.*": (0.7, 0.2, 0.1), "layers.1.*": (0.1, 0.1, 0.8), "layers.2.*": (0.3, 0.6, 0.1)}

    def far(tensors: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for glob, weights in wanted.items():
            for name in (f"{glob[:-1]}weight", f"{glob[:-1]}bias"):
                goal = sum(w * models[m][name] for w, m in zip(weights, "abc", strict=True))
                total = total + (tensors[name] - goal).square().sum()
        return total

    layered = mergekit_lite.learn(write(SOUP, ", by: layer, epochs: 80, rate: 0.2"), far, models=models)
    assert layered.weights == {glob: pytest.approx(weights, abs=0.01) for glob, weights in wanted.items()}
    common = mergekit_lite.learn(write(SOUP, ", epochs: 80, rate: 0.2"), far, models=models)
    assert layered.after < 0.01 * common.after < common.before


def test_adamerging_lowers_the_entropy_and_begins_at_lambda(models: Models, write: Write) -> None:
    start = write(FACTORS.replace("{learned: [a, b, c]BESIDE}", "[a, b, c]"))
    plain = mergekit_lite.merge_in_memory(mergekit_lite.load_recipe(start), models)
    found = mergekit_lite.learn(write(FACTORS, ", by: layer, epochs: 40"), entropy, models=models)
    assert found.before == pytest.approx(float(entropy(plain)), rel=1e-12)
    assert found.after < found.before
    assert list(found.epochs) == sorted(found.epochs, reverse=True)
    made = mergekit_lite.merge_in_memory(found.recipe, models)
    assert float(entropy(made)) == pytest.approx(found.after, rel=1e-12)
    # 40 steps of Adam at its rate of 0.001 move a factor by about 0.04 at most.
    assert all(abs(0.3 * w - 0.3) < 0.05 for values in found.weights.values() for w in values)
    assert open_step(Template(write(FACTORS))).epochs(2) == 250  # 500 steps, as published


def test_a_loss_may_bring_its_gradients_and_numbers_of_its_own(models: Models, write: Write) -> None:
    def brings(tensors: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items() if n != "seen"}
        with torch.enable_grad():
            value = labelled({**leaves, "seen": tensors["seen"]})
        return value.item(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

    path = write(SOUP, ", epochs: 10")
    assert mergekit_lite.learn(path, brings, models=models) == mergekit_lite.learn(path, labelled, models=models)
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)

    def heated(tensors: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(beta * scores(tensors, X), Y)

    found = mergekit_lite.learn(path, heated, also=[beta], models=models)
    cold = mergekit_lite.learn(path, labelled, models=models)
    assert float(beta.detach()) != 1 and found.after < cold.after and found.weights != cold.weights
    with pytest.raises(UsageError, match="must take gradients"):
        mergekit_lite.learn(path, heated, also=[beta.detach()], models=models)


def test_inputs_may_be_steps(models: Models, write: Write) -> None:
    steps = "  t: {use: ties, base: base, of: [a, b], with: {density: 0.5}}\n"
    step = "{use: linear, of: {learned: [t, c], by: tensor}}"
    found = mergekit_lite.learn(write(step, steps=steps), labelled, models=models)
    assert found.after < found.before
    assert float(labelled(mergekit_lite.merge_in_memory(found.recipe, models))) == pytest.approx(found.after, rel=1e-12)


def test_a_softmax_of_weights_is_the_oracles_mix(tmp_path: Path) -> None:
    """From the free numbers of the weights to the recipe that comes out, and its merge."""
    case = ORACLES["learned_soup/softmax_mix"]
    given, expected = case["inputs"], case["expected"]
    models = {f"m{i}": {"w": torch.tensor(m["data"], dtype=torch.float64)} for i, m in enumerate(given["models"])}
    path = tmp_path / "soup.yaml"
    places = ", ".join(f"{name}: ./{name}" for name in models)
    text = f"version: 1\ncompute: float64\nmodels: {{{places}}}\nsteps: {{s: {{use: linear, of: OF}}}}\n"
    path.write_text(text.replace("OF", f"{{learned: [{', '.join(models)}]}}"), encoding="utf-8")
    weights = Weights(open_step(Template(path)), ["w"], family_of({}, ["w"], {}))
    weights.raw = torch.tensor([given["alpha_raw"]["data"]], dtype=torch.float64)
    (shares,) = weights.written().values()
    assert shares == pytest.approx(expected["weights"]["data"], rel=0, abs=case["atol"])
    of = json.dumps(of_value(list(models), weights.written(), 1 / len(models)))
    path.write_text(text.replace("OF", of), encoding="utf-8")
    mixed = mergekit_lite.merge_in_memory(mergekit_lite.load_recipe(path), models)["w"]
    assert torch.allclose(
        mixed, torch.tensor(expected["theta"]["data"], dtype=torch.float64), rtol=0, atol=case["atol"]
    )
