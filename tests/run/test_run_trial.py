"""Trials: whatever was merged into a place before, it holds the bytes of a run of its own, and only what differs was
computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergekit_lite import choose, merge
from mergekit_lite.run.progress import Options
from mergekit_lite.run.trial import Made, TrialFolder, TrialTensors

RECIPES = {
    "linear": "{use: linear, of: {a: {weight: W}, b: {weight: 0.5}}}",
    "curve": '{use: interpolate, of: [a, b], with: {t: {"*.layers.0.*": W, "*.layers.1.*": 0.25, else: 0}}}',
    "ties": "{use: ties, base: base, of: [a, b], with: {density: 0.5, lambda: W}}",
    "dare": "{use: dare_ties, base: base, of: [a, b], with: {drop_rate: W}}",
    "permute": "{use: permute, of: b, with: {like: a, spaces: [mlp]}}",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Three small Llamas."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=40,
    )  # fmt: skip
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
    return folder


def recipe(models: Path, folder: Path, kind: str, weight: float, dtype: str) -> Path:
    used = {"linear": "ab", "curve": "ab", "permute": "ab"}.get(kind, ("base", "a", "b"))
    text = (
        f"version: 1\nmodels: {json.dumps({name: str(models / name) for name in used})}\n"
        f"steps: {{m: {RECIPES[kind].replace('W', str(weight))}}}\n"
        f"save: {{to: {folder / 'out'}, dtype: {dtype}}}\n"
    )
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def alone(path: Path, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The tensors and the configuration of a run of its own."""
    merge.run(merge.plan(merge.load_recipe(path), out=folder, threads=1), threads=1)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return load_file(folder / "model.safetensors"), config


STEPS = st.lists(
    st.tuples(
        st.sampled_from(sorted(RECIPES)), st.sampled_from([0.25, 0.5, 0.75]), st.sampled_from(["float32", "bfloat16"])
    ),
    min_size=2,
    max_size=6,
)  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, threads=st.sampled_from([1, 2]))
def test_one_trial_after_the_other_gives_the_bytes_of_runs(
    models: Path, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, float, str]], threads: int
) -> None:
    folder = tmp_path_factory.mktemp("trials")
    place = TrialFolder(folder / "model")
    memory = TrialTensors()
    make = choose.planner(threads=threads)
    for number, (kind, weight, dtype) in enumerate(steps):
        path = recipe(models, folder, kind, weight, dtype)
        wanted, config = alone(path, folder / f"run-{number}")
        place.write(make(merge.load_recipe(path), place.path), Options(threads))
        found = load_file(place.path / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert json.loads((place.path / "config.json").read_text(encoding="utf-8")) == config
        from mergekit_lite.run.inputs import inputs_of

        plan = make(merge.load_recipe(path), Path("memory"))
        with inputs_of(plan, threads) as source:
            tensors, _ = memory.make(plan, source, Options(threads))
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.fixture
def write(models: Path, tmp_path: Path) -> Callable[..., Made]:
    place = TrialFolder(tmp_path / "model")
    make = choose.planner(threads=1)

    def one(kind: str, weight: float, dtype: str = "float32") -> Made:
        path = recipe(models, tmp_path, kind, weight, dtype)
        return place.write(make(merge.load_recipe(path), place.path), Options(1))

    return one


def test_only_tensors_that_differ_are_computed(write: Callable[..., Made]) -> None:
    first, second, same = write("curve", 0.5), write("curve", 0.75), write("curve", 0.75)
    layer = 9  # tensors in a layer
    assert (first.tensors, second.tensors, same.tensors) == (first.all_tensors, layer, 0)
    assert 0 < second.bytes_read < first.bytes_read / 2
    assert (same.bytes_read, same.bytes_written) == (0, 0)


def test_a_statistic_over_all_tensors_is_taken_once_where_only_what_follows_changes(write: Callable[..., Made]) -> None:
    first, second = write("ties", 0.5), write("ties", 0.75)
    assert second.tensors == second.all_tensors
    assert second.bytes_read < first.bytes_read


def test_an_order_of_units_is_searched_once(write: Callable[..., Made], models: Path, tmp_path: Path) -> None:
    place, make = TrialFolder(tmp_path / "t"), choose.planner(threads=1)
    read = []
    for t in (0.25, 0.5):
        text = (
            f"version: 1\nmodels: {{a: {models / 'a'}, b: {models / 'b'}}}\nsteps:\n"
            "  p: {use: permute, of: b, with: {like: a, spaces: [mlp]}}\n"
            f"  m: {{use: interpolate, of: [a, p], with: {{t: {t}}}}}\nsave: {{to: {tmp_path / 'x'}}}\n"
        )
        path = tmp_path / "p.yaml"
        path.write_text(text, encoding="utf-8")
        read.append(place.write(make(merge.load_recipe(path), place.path), Options(1)).bytes_read)
    assert read[1] < read[0]


def test_a_model_that_changes_between_two_trials_is_read_again(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """The plan that is made anew sees another time of the file."""
    for name in ("a", "b", "base"):
        tiny_checkpoint(tmp_path / name, seed=ord(name[0]))
    place = TrialFolder(tmp_path / "model")
    path = recipe(tmp_path, tmp_path, "linear", 0.5, "float32")
    made = place.write(choose.planner(threads=1)(merge.load_recipe(path), place.path), Options(1))
    tiny_checkpoint(tmp_path / "a", seed=99)
    again = place.write(choose.planner(threads=1)(merge.load_recipe(path), place.path), Options(1))
    wanted, _ = alone(path, tmp_path / "alone")
    assert again.tensors == made.all_tensors
    assert all(torch.equal(t, wanted[name]) for name, t in load_file(place.path / "model.safetensors").items())


def test_what_a_failed_trial_left_is_not_taken_for_whole(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, make = TrialFolder(tmp_path / "model"), choose.planner(threads=1)
    path = recipe(models, tmp_path, "linear", 0.5, "float32")
    place.write(make(merge.load_recipe(path), place.path), Options(1))

    def stop() -> None:
        raise RuntimeError("stopped in the middle")

    other = recipe(models, tmp_path, "linear", 0.25, "float32")
    with pytest.raises(RuntimeError, match="middle"):
        place.write(make(merge.load_recipe(other), place.path), Options(1, check=stop))
    assert not place.path.exists()
    path = recipe(models, tmp_path, "linear", 0.5, "float32")
    place.write(make(merge.load_recipe(path), place.path), Options(1))
    wanted, _ = alone(path, tmp_path / "alone")
    assert all(torch.equal(t, wanted[name]) for name, t in load_file(place.path / "model.safetensors").items())
