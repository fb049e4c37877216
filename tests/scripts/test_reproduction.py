"""The page of `make reproduce`: verdicts are computed, what is missing is said, and docs/ has what the writer gives."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "reproduce"))
import claims
import claims_page
import eight_merges
import eight_vit
import experiments
import expert_page
import measured
import r_experts
import r_masks
import r_masks_vit
import suite
import tucker_convs
from claims import Bar, Claim, Experiment, Figure, Found
from eight_tasks import Setting

from mergekit_lite.methods.tucker import decomposed

ROOT = measured.ROOT
STORED = measured.load(measured.STORE)


def claim(*bars: Bar, **changes: Any) -> Claim:
    figures = (Figure("a figure", "x", "0.3"),)
    return replace(Claim("R5", "a title", "a paper", "a setting.", figures, bars), **changes)


def experiment(*bars: Bar, **changes: Any) -> Experiment:
    made = Experiment("trial", lambda seed: {"x": float(seed)}, lambda: "a setting", (claim(*bars),))
    return replace(made, **changes)


def mean(relation: claims.Relation, limit: float, **changes: Any) -> Bar:
    return Bar("the mean of x", lambda found: found.mean("x"), relation, limit, **changes)


# Verdicts


@pytest.mark.parametrize(
    "relation, met",
    [("at least", (False, True, True)), ("above", (False, False, True)), ("at most", (True, True, False)),
     ("below", (True, False, False))],
)  # fmt: skip
def test_a_bar_is_met_on_its_side_alone(relation: claims.Relation, met: tuple[bool, ...]):
    found = [Found({0: {"x": value - 1}, 1: {"x": value + 1}}) for value in (1.0, 2.0, 3.0)]
    assert tuple(mean(relation, 2.0).met(one) for one in found) == met
    assert not mean(relation, 2.0).met(Found({0: {"x": float("nan")}}))


def test_one_bar_that_is_missed_is_enough():
    found = Found({seed: {"x": 1.0} for seed in range(3)})
    good, bad, shown = mean("at least", 1), mean("at least", 2), mean("at least", 2, claimed=False)
    assert claim(good, shown).verdict(found) == claims.MET
    assert claim(good, bad).verdict(found) == claims.MISSED
    assert claim(good, bad, shown).missed(found) == [bad]
    assert claim(shown).verdict(found) == claim().verdict(found) == claims.OPEN


def test_the_page_says_what_is_missed_and_by_how_much():
    found = Found({seed: {"x": 1.0 + seed} for seed in range(3)})
    met = claims_page.document({"R5": "a title"}, [(experiment(mean("at least", 2)), found)])
    assert "Nothing: all bars are met." in met and "| at least 2 | 2.000 | met |" in met and "**Met.**" in met
    missed = claims_page.document({"R5": "a title"}, [(experiment(mean("at least", 2.5)), found)])
    assert "- R5, a title: missed. the mean of x: 2.000, not at least 2.5." in missed
    assert "| missed | 0 of 1 |" in missed and "**Missed.**" in missed
    shown = claims_page.document({"R5": ""}, [(experiment(mean("at least", 2.5, claimed=False)), found)])
    assert "not claimed (would be missed)" in shown and "2.000; a bar of at least 2.5 would be missed." in shown
    assert "| a figure | 0.3 | 2.000 ± 1.000 | 1.000 2.000 3.000 |" in missed


def test_the_page_says_what_is_not_measured_and_on_how_many_seeds():
    none = claims_page.document(experiments.PLAN, [])
    assert all(f"- {number}, {title}: not measured." in none for number, title in experiments.PLAN.items())
    waiting = experiment(claims=(claim(title="another"),))
    part = claims_page.document({"R5": "", "R6": "six"}, [(experiment(), Found({0: {"x": 1.0}}))], [waiting])
    assert "- R5, another: not measured.\n- R6, six: not measured.\n" in part
    few = Found({0: {"x": 1.0}})
    said = claims_page.document({"R5": "a title"}, [(experiment(mean("at least", 1)), few)])
    assert "met, on fewer than 3 seeds" in said and "- R5, a title: measured on 1 of at least 3 seeds." in said
    assert "fewer" not in claims_page.document({"R5": ""}, [(experiment(mean("at least", 1), drawn=False), few)])


# What is stored


def everything() -> list[tuple[Experiment, Found]]:
    pairs = ((one, measured.found(STORED, one)) for one in experiments.EXPERIMENTS)
    return [(one, found) for one, found in pairs if found is not None]


def test_the_page_is_what_is_stored():
    waiting = [one for one in experiments.EXPERIMENTS if one.name not in STORED]
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert page == claims_page.document(experiments.PLAN, everything(), waiting)
    (experts,) = experiments.of("R11")
    found = measured.found(STORED, experts)
    assert found is not None
    assert (ROOT / "docs" / "experts.md").read_text(encoding="utf-8") == expert_page.document(found)


def test_what_is_stored_is_of_the_settings_that_there_are():
    names = {one.name: one for one in experiments.EXPERIMENTS}
    assert set(STORED) <= set(names)
    assert {name: stored["setting"] for name, stored in STORED.items()} == {n: names[n].digest for n in STORED}


def test_every_bar_of_what_is_stored_can_be_missed():
    """With numbers that are all NaN, no bar is met."""
    for one, found in everything():
        worse = Found({seed: dict.fromkeys(numbers, float("nan")) for seed, numbers in found.seeds.items()})
        for made in one.claims:
            assert made.missed(worse) == [bar for bar in made.bars if bar.claimed], made.title


def test_random_groups_are_read_as_the_page_says():
    """On the seeds that the specification has too, its figures are nearer to one reading at 8 to 4, to the other at 8
    to 2."""
    (experts,) = experiments.of("R11")
    found = measured.found(STORED, experts)
    assert found is not None

    def apart(name: str, into: int) -> float:
        stated = expert_page.VARIANTS[name][2][into]
        return sum(abs(a - b) for a, b in zip(found[f"{name} {into}"], stated, strict=False))

    assert apart(r_experts.PLAIN, 4) < apart(r_experts.RANDOM, 4)
    assert apart(r_experts.PLAIN, 2) > apart(r_experts.RANDOM, 2)


def test_seeds_are_measured_once_for_each_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measured, "CACHE", tmp_path / "cache")
    seen: list[int] = []

    def measure(seed: int) -> claims.Measurement:
        seen.append(seed)
        return {"x": 1 / 3, "y": float("inf")}

    one = experiment(measure=measure)
    for _ in range(2):
        assert measured.cached(one, 4) == {"x": 0.333333, "y": float("inf")}
    measured.cached(one, 5)
    assert seen == [4, 5]
    measured.cached(replace(one, setting=lambda: "another"), 4)
    measured.cached(one, 4, fresh=True)
    assert seen == [4, 5, 4, 4]
    store = tmp_path / "store.json"
    measured.update(store, one, {5: {"x": 1.0}, 4: {"x": 2.0}})
    measured.update(store, replace(one, name="another"), {0: {"x": 3.0}})
    found = measured.found(measured.load(store), one)
    assert found is not None and found["x"] == [2.0, 1.0]
    assert measured.found(measured.load(store), replace(one, name="none")) is None


def test_what_has_no_experiment_is_refused():
    words = [sys.executable, str(ROOT / "scripts" / "reproduce"), "--only", "R99"]
    done = subprocess.run(words, env=suite.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "R99" in done.stderr and "Traceback" not in done.stderr


# Experiments


def test_answers_that_tests_read_are_counted(tmp_path: Path):
    """One is held, one is missed by one of its tests, one is read by none."""
    cases = [{"id": f"m/{name}", "expected": {"out": 1}} for name in ("held", "missed", "unread")]
    (tmp_path / "oracles.json").write_text(json.dumps({"meta": {}, "cases": cases}))
    (tmp_path / "test_some.py").write_text(
        "import json, pathlib\n"
        "path = pathlib.Path(__file__).parent / 'oracles.json'\n"
        "ORACLES = {case['id']: case for case in json.loads(path.read_text())['cases']}\n"
        "def test_one(): assert ORACLES['m/held']['expected']['out'] == 1\n"
        "def test_two(): assert list(ORACLES['m/missed']['expected'].items()) == [('out', 1)]\n"
        "def test_three(): assert ORACLES['m/missed']['expected']['out'] == 2\n"
    )
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "oracle_watch", "--noted", "noted.json", "."]
    subprocess.run([sys.executable, *words], cwd=tmp_path, env=suite.environment(), capture_output=True, check=False)
    noted = json.loads((tmp_path / "noted.json").read_text())
    assert (noted["cases"], noted["read"], noted["held"], noted["unread"]) == (3, 2, 1, ["m/unread"])


def test_masks_of_a_tiny_transformer_give_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(r_masks, "CACHE", tmp_path)
    monkeypatch.setattr(eight_merges, "MODELS_PER_TASK", (replace(r_masks.ROWS["tall_masks"], choices=FEW),))
    monkeypatch.setattr(r_masks, "ROWS", {n: replace(r, choices=few(r.choices)) for n, r in r_masks.ROWS.items()})
    setting = Setting(kind="vit", width=8, train=60, validation=30, base_epochs=1, head_epochs=1, epochs=1)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = Found({0: r_masks.measure_setting(0, setting)})
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    assert found["apart at k 0"] == [0.0]
    parts = ("in none", "in one", "in several")
    assert sum(found.mean(part) for part in parts) == pytest.approx(100) and min(map(found.mean, parts)) >= 0
    for made in r_masks_vit.EXPERIMENT.claims:
        values = [value for figure in made.figures for value in figure.values(found)]
        assert np.isfinite([*values, *(bar.of(found) for bar in made.bars)]).all(), made.title


FEW = {"threshold": (0.4, 0.5)}


def few(choices: Any) -> Any:
    return {name: values[:2] for name, values in choices.items()}


def test_the_transformer_is_that_of_torch():
    torch.manual_seed(0)
    width, layers = 12, 2
    encoder = {name: w + 0.1 * torch.randn(w.shape) for name, w in eight_vit.initial(width, layers).items()}
    images = torch.randn(5, 64)
    patches = nn.functional.unfold(images.reshape(5, 1, 8, 8), eight_vit.PATCH, stride=eight_vit.PATCH).mT
    tokens = patches @ encoder["encoder.patches.weight"].T + encoder["encoder.patches.bias"]
    x = torch.cat([encoder["encoder.class"].expand(5, 1, width), tokens], 1) + encoder["encoder.positions"]
    names = {"qkv.": "self_attn.in_proj_", "out.": "self_attn.out_proj.", "up.": "linear1.", "down.": "linear2."}
    for index in range(layers):
        layer = nn.TransformerEncoderLayer(
            width, eight_vit.HEADS, eight_vit.GROWTH * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        own = {n.split(".", 3)[3]: w for n, w in encoder.items() if n.startswith(f"encoder.layers.{index}.")}
        for short, full in names.items():
            own = {n.replace(short, full) if n.startswith(short) else n: w for n, w in own.items()}
        layer.load_state_dict(own)
        x = layer(x)
    last = nn.functional.layer_norm(x[:, 0], (width,), encoder["encoder.norm.weight"], encoder["encoder.norm.bias"])
    torch.testing.assert_close(eight_vit.features(encoder, images), last, rtol=1e-4, atol=1e-5)


def test_convolutions_are_cut_as_numpy_cuts_them():
    generator = torch.Generator().manual_seed(0)
    shapes = dict(zip(tucker_convs.CONVS, ((6, 5, 3, 3), (7, 6, 3, 3)), strict=True))
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    whole = {name: w + torch.randn(w.shape, generator=generator) for name, w in base.items()}
    ranks = {name: tucker_convs.matrix_rank(torch.Size(shape), 2) for name, shape in shapes.items()}
    found = tucker_convs.as_matrices({"base": base, "whole": whole}, ranks)
    small = tucker_convs.tucker({"base": base, "whole": whole}, 2)
    for name, shape in shapes.items():
        change = (whole[name] - base[name]).double()
        u, s, v = np.linalg.svd(change.numpy().reshape(shape[0], -1), full_matrices=False)
        r = ranks[name]
        cut = ((u[:, :r] * s[:r]) @ v[:r]).reshape(shape)
        np.testing.assert_allclose((found[name] - base[name]).numpy(), cut, atol=1e-5)
        parts = decomposed(change, [2, 2, 3, 3])
        size = parts.core.numel() + sum(factor.numel() for factor in parts.factors)
        assert tucker_convs.numbers(change.shape, 2) == size
        assert (r - 1) * (shape[0] + change[0].numel()) < size <= r * (shape[0] + change[0].numel())
        error = float(((small[name] - base[name]).double() - change).square().sum())
        assert error == pytest.approx(float((parts.whole() - change).square().sum()), rel=1e-4)
        assert error <= tucker_convs.tails(change, 2) == pytest.approx(sum(parts.left))
