"""The scripts behind `make reproduce`: their recipes hold for every method, their statistics are what they claim."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "reproduce"))
import eight_merges
import eight_tasks

TINY = eight_tasks.Setting(width=16, train=100, validation=50, base_epochs=1, head_epochs=1, epochs=1)
ROWS = eight_merges.all_rows()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[eight_merges.Bench]:
    before = torch.get_rng_state()
    yield eight_merges.Bench(eight_tasks.experiment(0, TINY, tmp_path_factory.mktemp("cache")))
    torch.set_rng_state(before)


def test_rows_have_names_of_their_own():
    assert len({row.label for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_row_merges(row: eight_merges.Row, bench: eight_merges.Bench):
    """The first of its settings gives an encoder that is neither the base nor a fine-tune."""
    settings = {**row.fixed, **{name: values[0] for name, values in row.choices.items()}}
    merged = bench.merge(row.method, settings, "flip" if row.per_task else None)
    base = bench.models["base"]
    assert {name: w.shape for name, w in merged.items()} == {name: w.shape for name, w in base.items()}
    assert all(bool(w.isfinite().all()) for w in merged.values())
    for name in ("base", *bench.tasks):
        assert any(not torch.equal(w, bench.models[name][key]) for key, w in merged.items()), name


@pytest.mark.parametrize("method", ["cart", "iso_c", "consensus", "wudi", "svc"])
def test_merges_lie_on_a_straight_line_of_lambda(method: str, bench: eight_merges.Bench):
    """As the search for `lambda` takes for granted."""
    fixed = {"consensus": {"k": 2}, "wudi": {"solver": "closed"}}.get(method, {})
    row = eight_merges.Row(method, choices={"lambda": (0.3, 2.0)})
    found = list(bench.candidates(row, fixed))
    assert [settings["lambda"] for settings, _ in found] == [0.3, 2.0]
    for settings, weights in found:
        direct = bench.merge(method, {**fixed, **settings})
        for name, w in direct.items():
            torch.testing.assert_close(weights[name], w, atol=2e-6, rtol=1e-5)


def test_fisher_is_the_mean_squared_gradient(bench: eight_merges.Bench):
    task = "column_mod3"
    head, images = bench.data[task].head, bench.data[task].images["train"][:5]
    leaves = {name: w.clone().requires_grad_() for name, w in bench.models[task].items()}
    expected = {name: torch.zeros_like(w) for name, w in leaves.items()}
    for image in images:
        for score in torch.log_softmax(eight_tasks.scores(leaves, head, image[None]), dim=1)[0]:
            slopes = torch.autograd.grad(score, list(leaves.values()), retain_graph=True)
            for name, slope in zip(leaves, slopes, strict=True):
                expected[name] += score.exp().detach() * slope.square() / len(images)
    found = eight_tasks.fisher(bench.models[task], head, images)
    for name, w in expected.items():
        torch.testing.assert_close(found[name], w, rtol=1e-4, atol=1e-7 * float(w.max()))


def test_regmean_in_turn_reads_the_inputs_behind_the_merged_layers(bench: eight_merges.Bench):
    alpha = 0.8
    found, plain = (bench.merge(method, {"alpha": alpha}) for method in ("regmean++", "regmean"))
    first = "encoder.layers.0.weight"
    assert torch.equal(found[first], plain[first])  # nothing is before it
    inputs = {t: bench.data[t].images["train"][: eight_merges.EXAMPLES].double().numpy() for t in bench.tasks}
    for index in range(eight_tasks.LAYERS):
        name = f"encoder.layers.{index}"
        weights = [bench.models[t][f"{name}.weight"].double().numpy() for t in bench.tasks]
        matrices = [inputs[t].T @ inputs[t] / len(inputs[t]) for t in bench.tasks]
        matrices = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in matrices]
        mean, total = sum(weights) / len(weights), sum(matrices)
        right = sum(w @ g for w, g in zip(weights, matrices, strict=True))
        merged = mean + (right - mean @ total) @ np.linalg.pinv(total, hermitian=True)
        torch.testing.assert_close(found[f"{name}.weight"].double(), torch.from_numpy(merged), rtol=1e-4, atol=1e-5)
        bias = np.mean([bench.models[t][f"{name}.bias"].double().numpy() for t in bench.tasks], axis=0)
        inputs = {t: np.maximum(x @ merged.T + bias, 0) for t, x in inputs.items()}
    assert not torch.allclose(found["encoder.layers.2.weight"], plain["encoder.layers.2.weight"], atol=1e-4)


def test_magnitude_masks_take_the_sum_where_a_task_changes_most(bench: eight_merges.Bench):
    found = bench.merge(eight_merges.MAGNITUDE, {"density": 0.1}, "flip")
    base = bench.models["base"]
    deltas = {t: torch.cat([(bench.models[t][n] - base[n]).flatten() for n in base]) for t in bench.tasks}
    most = deltas["flip"].abs().argsort(descending=True)[: len(deltas["flip"]) // 10]
    expected = torch.cat([w.flatten() for w in base.values()])
    expected[most] += sum(deltas.values())[most]
    torch.testing.assert_close(torch.cat([found[n].flatten() for n in base]), expected, rtol=1e-5, atol=1e-6)


def test_settings_are_chosen_without_the_test_split(bench: eight_merges.Bench):
    """Labels of the test split that are all wrong change what is measured, not what is chosen."""
    row = eight_merges.Row("task_arithmetic", choices=eight_merges.FACTOR)
    before = bench.score(row)
    labels = {task: data.labels["test"].clone() for task, data in bench.data.items()}
    for data in bench.data.values():
        data.labels["test"].fill_(-1)
    after = bench.score(row)
    for task, data in bench.data.items():
        data.labels["test"].copy_(labels[task])
    assert after.chosen == before.chosen and after.accuracy == 0 < before.accuracy
