"""The scripts behind docs/alignment.md, on small networks: held against NumPy and against all orders there are."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "reproduce"))
import alignment_measure
import alignment_models
import alignment_page
import alignment_results
import alignment_text
from alignment_merges import Merger

WIDTH = 6
MLP = alignment_models.Net("mlp", WIDTH, 1, epochs=2, batch=32, rate=1e-2, train=200)
CNN = alignment_models.Net("cnn", 4, 3, epochs=1, batch=32, rate=1e-2, train=300)
FIRST, HEAD = "encoder.layers.0", "head"
ORDERS = [list(order) for order in itertools.permutations(range(WIDTH))]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the script trains: with other numbers of threads, sums are others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = torch.get_rng_state()
    yield tmp_path_factory.mktemp("cache")
    torch.set_rng_state(before)


@pytest.fixture(scope="module")
def models(cache: Path) -> list[alignment_models.Weights]:
    return [alignment_models.trained(MLP, seed, 0, cache) for seed in range(3)]


@pytest.fixture(scope="module")
def judge() -> alignment_models.Judge:
    return alignment_models.Judge(MLP, 0)


@pytest.fixture(scope="module")
def merger(judge: alignment_models.Judge) -> Merger:
    return Merger(MLP, MLP.config(judge.module))


def units(weights: alignment_models.Weights) -> np.ndarray:
    """All weights of each hidden unit, one row for each."""
    parts = (weights[f"{FIRST}.weight"], weights[f"{FIRST}.bias"][:, None], weights[f"{HEAD}.weight"].T)
    return np.concatenate([part.double().numpy() for part in parts], axis=1)


def ordered(weights: alignment_models.Weights, order: list[int]) -> alignment_models.Weights:
    taken = {name: weights[name][order] for name in (f"{FIRST}.weight", f"{FIRST}.bias")}
    return {**weights, **taken, f"{HEAD}.weight": weights[f"{HEAD}.weight"][:, order]}


def nearest(like: alignment_models.Weights, of: alignment_models.Weights) -> alignment_models.Weights:
    """`of` in the order, of all there are, that comes closest to `like`."""
    target, own = units(like), units(of)
    return ordered(of, min(ORDERS, key=lambda order: float(np.square(target - own[order]).sum())))


def assert_same(found: alignment_models.Weights, expected: alignment_models.Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def measured_in_numpy(weights: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    hidden = np.maximum(images @ weights[f"{FIRST}.weight"].T + weights[f"{FIRST}.bias"], 0)
    scores = hidden @ weights[f"{HEAD}.weight"].T + weights[f"{HEAD}.bias"]
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    loss = -np.log(chances[np.arange(len(labels)), labels]).mean()
    return float(loss), float((scores.argmax(1) == labels).mean())


def test_a_way_is_what_numpy_finds(judge: alignment_models.Judge, models: list[alignment_models.Weights]):
    found = alignment_measure.way(judge, models[0], models[1], points=5)
    a, b = ({name: w.double().numpy() for name, w in model.items()} for model in models[:2])
    assert found.distance == pytest.approx(np.sqrt(sum(np.square(a[name] - b[name]).sum() for name in a)), rel=1e-6)
    for split in ("train", "test"):
        images = judge.data.inputs[split].double().numpy().reshape(-1, 64)
        labels = judge.data.labels[split].numpy()
        shares = np.linspace(0, 1, 5)
        losses, accuracies = np.transpose(
            [measured_in_numpy({name: a[name] + t * (b[name] - a[name]) for name in a}, images, labels) for t in shares]
        )
        np.testing.assert_allclose(found.losses[split], losses, rtol=1e-4)
        barrier = max(losses - np.interp(shares, [0, 1], [losses[0], losses[-1]]))
        assert found.barrier(split) == pytest.approx(barrier, abs=1e-4)
        assert found.middle(split) == pytest.approx(accuracies[2], abs=2.5 / len(labels))
        assert found.ends(split) == pytest.approx((accuracies[0] + accuracies[4]) / 2, abs=2.5 / len(labels))


def test_matching_finds_the_nearest_of_all_orders(merger: Merger, models: list[alignment_models.Weights]):
    expected = nearest(models[0], models[1])
    assert_same(merger.permuted(models[0], models[1]), expected)
    assert not torch.equal(expected[f"{FIRST}.bias"], models[1][f"{FIRST}.bias"])


def test_means_of_many(merger: Merger, models: list[alignment_models.Weights]):
    """Plain, and with all matched with the first; weights of 1 and 0 take one of the matched out."""
    matched = [models[0], *(nearest(models[0], model) for model in models[1:])]
    for found, parts in ((merger.mean(models), models), (merger.many(models, way="star"), matched)):
        assert_same(found, {name: torch.stack([part[name] for part in parts]).mean(0) for name in models[0]})
    assert_same(merger.many(models, [0.0, 0.0, 1.0], way="star"), matched[2])


def test_reordering_finds_the_shortest_of_all_paths(merger: Merger, models: list[alignment_models.Weights]):
    own = units(models[0])
    lengths = [np.abs(np.diff(own[order], axis=0)).sum() for order in ORDERS]
    found = merger.reordered(models[0])
    assert alignment_measure.path_length(models[0]) == pytest.approx(lengths[0])
    assert alignment_measure.path_length(found) == pytest.approx(min(lengths))
    np.testing.assert_array_equal(np.sort(units(found), axis=0), np.sort(own, axis=0))


def test_activations_are_what_the_next_layer_reads(
    judge: alignment_models.Judge, merger: Merger, models: list[alignment_models.Weights]
):
    seen = [alignment_measure.activations(judge, model, 50) for model in models[:2]]
    images = judge.data.inputs["train"][:50].double().numpy().reshape(-1, 64)
    hidden = []
    for model, found in zip(models, seen, strict=False):
        weight, bias = (model[f"{FIRST}.{part}"].double().numpy() for part in ("weight", "bias"))
        hidden.append(np.maximum(images @ weight.T + bias, 0))
        assert list(found) == ["hidden.0"]
        np.testing.assert_allclose(found["hidden.0"], hidden[-1], atol=1e-5)
    like, of = ((h - h.mean(0)) / np.maximum(h.std(0), 1e-12) for h in hidden)
    best = max(ORDERS, key=lambda order: float((like * of[:, order]).sum()))
    found = merger.permuted(models[0], models[1], (seen[0], seen[1]))
    chosen = [next(i for i in range(WIDTH) if np.allclose(units(models[1])[i], row)) for row in units(found)]
    assert (like * of[:, chosen]).sum() == pytest.approx((like * of[:, best]).sum())


def test_learnt_orders_are_no_worse_than_matched_ones(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """On the training images, by the loss of the mean with the first network."""
    monkeypatch.setattr(alignment_page, "CACHE", cache)
    monkeypatch.setattr(alignment_page, "STE_STEPS", 5)
    first, other = (alignment_page.model(MLP, 0, number) for number in (0, 1))
    found = alignment_page.learnt(MLP, 0, 1)
    np.testing.assert_array_equal(np.sort(units(found), axis=0), np.sort(units(other), axis=0))
    losses = [
        alignment_page.judge(MLP, 0).measure(alignment_measure.mixed(first, one, 0.5), "train")[0]
        for one in (found, nearest(first, other))
    ]
    assert losses[0] <= losses[1] + 1e-6


def test_statistics_of_batchnorm_are_those_of_the_data(cache: Path):
    judge = alignment_models.Judge(CNN, 0)
    weights = alignment_models.trained(CNN, 0, 0, cache)
    found = alignment_measure.with_statistics(judge, weights)
    images = judge.data.inputs["train"][:, 0].double().numpy()
    around = np.lib.stride_tricks.sliding_window_view(np.pad(images, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
    kernels = weights["layers.0.conv.weight"].double().numpy()[:, 0]
    maps = np.einsum("nyxij,cij->cnyx", around, kernels).reshape(len(kernels), -1)
    np.testing.assert_allclose(found["layers.0.norm.running_mean"], maps.mean(1), atol=1e-5)
    np.testing.assert_allclose(found["layers.0.norm.running_var"], maps.var(1, ddof=1), rtol=1e-4)
    for name, tensor in weights.items():
        assert ".norm." in name or torch.equal(found[name], tensor)


def test_models_come_from_the_cache(cache: Path, models: list[alignment_models.Weights], tmp_path: Path):
    """What is trained anew is the same, bit for bit; what is there is read."""
    again = alignment_models.trained(MLP, 0, 0, tmp_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in models[0].items())
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(next(cache.glob("mlp-*-0-1-*")).read_bytes())
    read = alignment_models.trained(MLP, 0, 0, tmp_path)
    assert torch.equal(read["head.weight"], models[1]["head.weight"])


def results() -> alignment_results.Results:
    """Figures that reach every bar."""

    def way(barrier: float, distance: float = 1.0) -> alignment_measure.Way:
        losses = [0.1, 0.1 + barrier, 0.1]
        return alignment_measure.Way(dict.fromkeys(("train", "test"), losses), {"test": [0.98, 0.97, 0.98]}, distance)

    r = alignment_results
    naive, matched = r.Line("as they are"), r.Line("matched", {})
    lines = {
        **{(net, naive): [way(1.0)] * 3 for net in r.MLPS},
        **{(net, matched): [way(2.5 / net.width, 0.8)] * 3 for net in r.MLPS},
        **{(net, naive): [way(1.0)] for net in (r.CNN, r.VIT, r.LLAMA)},
    }
    many = {
        (n, how): [r.Many(0.2, 0.95 if how != "naive" else 0.1)] * 3
        for n in (2, 3, 5, 8)
        for how in ("naive", "star", "merge_many", "cycle")
    }
    others = {how: [way(0.05)] * 3 for how in ("naive", "star", "merge_many", "cycle", "ste")}
    return r.Results((0, 1, 2), lines, many, [r.Many(0.1, 0.98)] * 3, others, [r.Smooth(10.0, 8.0, 1e-6)] * 3)


def test_bars_are_held_against_what_was_measured():
    good = results()
    assert [row[3] for row in alignment_results.bars(good)] == ["met"] * 14
    assert alignment_text.bars_text(good) == "All bars are reached."
    assert "missed" not in alignment_text.document(good)
    worse = replace(good, smooth=[*good.smooth[:2], alignment_results.Smooth(10.0, 9.0, 1e-6)])
    assert (
        alignment_text.bars_text(worse)
        == "Bars missed: smooth order: length: 0.900 at most, not at most 0.85 of before."
    )
    many = {**good.many, (5, "star"): [alignment_results.Many(0.19, 0.95)] * 3}
    assert [row[3] for row in alignment_results.bars(replace(good, many=many))].count("missed") == 1
