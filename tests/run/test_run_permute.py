"""Steps that put units in order, through the whole engine: planted permutations are found and undone, whatever the
threads, blocks and stops; what must move along does; what cannot be matched is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from mergekit_lite import InputError, RecipeError, load_recipe, merge_in_memory, plan, run
from mergekit_lite.align.apply import Order, moves, permuted
from mergekit_lite.family.axes import spaces_of
from mergekit_lite.family.spaces import Space

COMMON = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON, num_key_value_heads=4, tie_word_embeddings=False),
    "mixtral": lambda: MixtralConfig(**COMMON, num_key_value_heads=4, num_local_experts=6, num_experts_per_tok=2),
}
ALL = "[mlp, heads, vo, residual, experts]"


def random_member(
    spaces: Sequence[Space], generator: np.random.Generator, kinds: Sequence[str] = ()
) -> dict[str, Order]:
    """A random permutation of every space of `kinds`, or of all: groups anywhere, units within their groups."""
    found = {}
    for space in spaces:
        if not kinds or space.kind in kinds:
            groups = generator.permutation(space.groups)
            inner = [generator.permutation(space.group) for _ in range(space.groups)]
            found[space.name] = np.concatenate([g * space.group + i for g, i in zip(groups, inner, strict=True)])
    return found


def scrambled(tensors: Mapping[str, Tensor], spaces: Sequence[Space], orders: Mapping[str, Order]) -> dict[str, Tensor]:
    found = moves(spaces, orders, {name: tuple(t.shape) for name, t in tensors.items()})
    return {
        name: permuted(found[name], tensors[found[name].source]).contiguous() if name in found else tensor
        for name, tensor in tensors.items()
    }


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`, and as `b` to `d` the same network with all its units in other orders; in bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]()).to(torch.bfloat16)
    model.save_pretrained(folder / "a")
    tensors = load_file(folder / "a" / "model.safetensors")
    # Norms and biases start out as constants, which no order could change.
    generator = torch.Generator().manual_seed(5)
    tensors = {n: t + 0.3 * torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in tensors.items()}
    save_file(tensors, folder / "a" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "a" / "config.json").read_text(encoding="utf-8"))
    spaces = spaces_of(config, {name: tuple(t.shape) for name, t in tensors.items()})
    for seed, name in enumerate("bcd"):
        orders = random_member(spaces, np.random.default_rng(seed))
        write(folder / name, scrambled(tensors, spaces, orders), config)
    return folder


def merged(recipe: Path, **options: Any) -> dict[str, Tensor]:
    made = plan(load_recipe(recipe))
    run(made, **options)
    return load_file(Path(made.outputs[0].to) / "model.safetensors")


def write_recipe(path: Path, models: Path, steps: str, more: str = "") -> Path:
    names = ", ".join(f"{name}: {models / name}" for name in "abcd")
    out = path.with_suffix("")
    path.write_text(
        f"version: 1\n{more}models: {{{names}}}\nsteps:\n  {steps}\nsave: {{to: {out}}}\n", encoding="utf-8"
    )
    return path


def same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return list(got) == list(wanted) and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("threads", "block"), [(1, None), (2, None), (2, 1)])
def test_a_planted_order_is_undone_bit_for_bit(threads: int, block: int | None, planted: Path, tmp_path: Path) -> None:
    step = f"m: {{use: permute, of: b, like: a, with: {{spaces: {ALL}}}}}"
    got = merged(write_recipe(tmp_path / "r.yaml", planted, step), threads=threads, block=block)
    assert not same(load_file(planted / "b" / "model.safetensors"), got)
    assert same(got, load_file(planted / "a" / "model.safetensors"))


def test_the_saved_order_can_be_used_again_and_inverted(planted: Path, tmp_path: Path) -> None:
    step = f"there: {{use: permute, of: b, like: a, with: {{spaces: {ALL}}}}}"
    merged(write_recipe(tmp_path / "r.yaml", planted, step))
    file = tmp_path / "r" / "permutations" / "there.safetensors"
    step = f"m: {{use: permute, of: b, with: {{from: {file}, spaces: {ALL}}}}}"
    again = merged(write_recipe(tmp_path / "again.yaml", planted, step))
    assert same(again, load_file(planted / "a" / "model.safetensors"))
    step = f"m: {{use: permute, of: a, with: {{from: {file}, spaces: {ALL}, invert: true}}}}"
    back = merged(write_recipe(tmp_path / "back.yaml", planted, step))
    assert same(back, load_file(planted / "b" / "model.safetensors"))


def test_a_base_moves_along_with_its_model(planted: Path, tmp_path: Path) -> None:
    """The change from c to d in d's own order is the change between the two in a's order, put in d's order."""
    steps = f"""d_like_a: {{use: permute, of: d, like: a, with: {{spaces: {ALL}}}}}
  c_along: {{use: permute, of: c, with: {{from: d_like_a}}}}
  change: {{use: delta, of: d_like_a, base: c_along}}
  back: {{use: permute, of: change, with: {{from: d_like_a, invert: true}}}}
  m: {{use: add, of: back, base: c}}"""
    got = merged(write_recipe(tmp_path / "r.yaml", planted, steps, "compute: float64\n"))
    assert same(got, load_file(planted / "d" / "model.safetensors"))


def test_an_order_is_passed_on_from_step_to_step(planted: Path, tmp_path: Path) -> None:
    """What a step takes over may be taken over from it; undone twice it is done again."""
    steps = f"""there: {{use: permute, of: b, like: a, with: {{spaces: {ALL}}}}}
  back: {{use: permute, of: there, with: {{from: there, invert: true}}}}
  m: {{use: permute, of: back, with: {{from: back, invert: true}}}}"""
    got = merged(write_recipe(tmp_path / "r.yaml", planted, steps))
    assert same(got, load_file(planted / "a" / "model.safetensors"))


@pytest.mark.parametrize("way", ["merge_many", "star", "cycle"])
def test_the_mean_of_one_network_in_four_orders_is_that_network(way: str, planted: Path, tmp_path: Path) -> None:
    step = f"m: {{use: merge_many, of: [a, b, c, d], with: {{way: {way}, spaces: {ALL}}}}}"
    got = merged(write_recipe(tmp_path / "r.yaml", planted, step), threads=2)
    assert same(got, load_file(planted / "a" / "model.safetensors"))
    assert {f.name for f in (tmp_path / "r" / "permutations").iterdir()} == {f"m.{i}.safetensors" for i in range(1, 5)}


def test_reordered_units_leave_the_logits_alone(planted: Path, tmp_path: Path) -> None:
    step = "m: {use: reorder, of: b, with: {spaces: [mlp]}}"
    got = merged(write_recipe(tmp_path / "r.yaml", planted, step))
    assert not same(got, load_file(planted / "b" / "model.safetensors"))
    tokens = torch.arange(20).reshape(2, 10)
    logits = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(tokens).logits
        for f in (planted / "b", tmp_path / "r")
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_statistics_over_permuted_models_see_the_new_order(planted: Path, tmp_path: Path) -> None:
    """TIES ranks equal magnitudes by place and its global statistic is formed after the match: the whole merge on
    permuted copies is the merge on copies in order."""
    with_order = f"""b2: {{use: permute, of: b, like: a, with: {{spaces: {ALL}}}}}
  c2: {{use: permute, of: c, like: a, with: {{spaces: {ALL}}}}}
  half: {{use: interpolate, of: [a, b2], with: {{t: 0.25}}}}
  m: {{use: ties, base: half, of: [a, c2], with: {{density: 0.3}}}}"""
    without = """half: {use: interpolate, of: [a, a], with: {t: 0.25}}
  m: {use: ties, base: half, of: [a, a], with: {density: 0.3}}"""
    got = merged(write_recipe(tmp_path / "r.yaml", planted, with_order), threads=2)
    wanted = merged(write_recipe(tmp_path / "w.yaml", planted, without))
    assert same(got, wanted)


def test_a_resumed_run_takes_over_what_was_found(planted: Path, tmp_path: Path) -> None:
    step = f"m: {{use: permute, of: b, like: a, with: {{spaces: {ALL}}}}}"
    recipe = write_recipe(tmp_path / "r.yaml", planted, step)
    made = plan(load_recipe(recipe))

    class Enough(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.phase == "merge":
            raise Enough

    with pytest.raises(Enough):
        run(made, progress=stop)
    phases = []
    result = run(made, resume=True, progress=lambda progress: phases.append(progress.phase))
    assert "align" not in phases
    assert same(load_file(tmp_path / "r" / "model.safetensors"), load_file(planted / "a" / "model.safetensors"))
    assert 1000 * result.alignments["m"]["distance_after"] < result.alignments["m"]["distance_before"]


def test_memory_gives_what_the_disk_gives(planted: Path, tmp_path: Path) -> None:
    step = f"m: {{use: permute, of: b, like: a, with: {{spaces: {ALL}}}}}"
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", planted, step))
    config = json.loads((planted / "a" / "config.json").read_text(encoding="utf-8"))
    models = {name: load_file(planted / name / "model.safetensors") for name in "ab"}
    assert same(merge_in_memory(recipe, models, config=config), models["a"])


def test_activations_decide_where_they_are_given(planted: Path, tmp_path: Path) -> None:
    """The units of b are those of a in another order; so are their activations, here random ones."""
    config = json.loads((planted / "a" / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(planted / "a" / "model.safetensors")
    spaces = [s for s in spaces_of(config, {n: tuple(t.shape) for n, t in tensors.items()}) if s.kind == "mlp"]
    orders = random_member(spaces, np.random.default_rng(9))
    write(tmp_path / "b", scrambled(tensors, spaces, orders), config)
    activations = {s.name: torch.randn(30, s.size, generator=torch.Generator().manual_seed(1)) for s in spaces}
    write(tmp_path / "xa", activations, {})
    write(tmp_path / "xb", {name: x[:, orders[name]].contiguous() for name, x in activations.items()}, {})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""version: 1
models: {{a: {planted / "a"}, b: {tmp_path / "b"}, xa: {tmp_path / "xa"}, xb: {tmp_path / "xb"}}}
steps:
  m: {{use: permute, of: b, like: a, with: {{spaces: mlp, cost: activation, activations: xb, like_activations: xa}}}}
save: {{to: {tmp_path / "out"}}}
""",
        encoding="utf-8",
    )
    assert same(merged(recipe), tensors)


def test_what_cannot_be_matched_is_refused_before_anything_is_written(planted: Path, tmp_path: Path) -> None:
    tensors = load_file(planted / "a" / "model.safetensors")
    config = json.loads((planted / "a" / "config.json").read_text(encoding="utf-8"))
    write(tmp_path / "strange", tensors, {**config, "model_type": "strange"})
    name = next(n for n in tensors if n.endswith("k_proj.weight"))
    write(tmp_path / "short", {n: t for n, t in tensors.items() if not n.endswith("v_proj.weight")}, config)
    wide = {n: torch.cat([t, t]) if n == name else t for n, t in tensors.items()}
    write(tmp_path / "wide", wide, config)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    wrong = {
        "{use: permute, of: PLACE/strange, like: a}": "strange",
        "{use: permute, of: b, like: PLACE/short}": "v_proj",
        "{use: permute, of: b, like: PLACE/wide}": name,
        "{use: permute, of: b}": "`like`",
        "{use: permute, of: b, like: a, with: {family: PLACE/none.yaml}}": "^" * len(f"{tmp_path}/none.yaml"),
        "{use: permute, of: b, like: a, with: {spaces: [mlp, hedas]}}": "'hedas'",
        "{use: permute, of: b, with: {from: PLACE/no.safetensors}}": "no file of permutations",
        "{use: permute, of: b, with: {from: PLACE/none.safetensors}}": "No such file",
        "{use: permute, of: b, like: a, with: {cost: activation}}": "activations",
        "{use: permute, of: b, like: a, with: {spaces: [channels]}}": "none of these spaces",
    }
    for step, words in wrong.items():
        recipe = write_recipe(tmp_path / "r.yaml", planted, "m: " + step.replace("PLACE", str(tmp_path)))
        with pytest.raises(RecipeError) as caught:
            plan(load_recipe(recipe))
        text = "\n".join(problem.render() for problem in caught.value.problems)
        assert words in text and "hint:" in text, text
        assert all(problem.mark is not None for problem in caught.value.problems), text
    steps = "all: {use: merge_many, of: [a, b]}\n  m: {use: permute, of: c, with: {from: all}}"
    recipe = write_recipe(tmp_path / "r.yaml", planted, steps)
    with pytest.raises(RecipeError, match="for each of its 2 models"):
        plan(load_recipe(recipe))
    assert not (tmp_path / "r").exists()


def test_nan_in_a_model_to_be_matched_is_named(planted: Path, tmp_path: Path) -> None:
    tensors = load_file(planted / "b" / "model.safetensors")
    name = next(n for n in tensors if n.endswith("o_proj.weight"))
    tensors[name][1, 2] = float("nan")
    write(tmp_path / "bad", tensors, json.loads((planted / "a" / "config.json").read_text(encoding="utf-8")))
    recipe = write_recipe(tmp_path / "r.yaml", planted, f"m: {{use: permute, of: {tmp_path}/bad, like: a}}")
    with pytest.raises(InputError, match=name):
        run(plan(load_recipe(recipe)))
    assert not (tmp_path / "r").exists()


def test_what_one_run_has_found_the_next_one_takes_over(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKIT_LITE_CACHE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def aligned(name: str, of: str, kinds: str = ALL) -> bool:
        """Whether the run had to search."""
        step = f"m: {{use: permute, of: {of}, like: a, with: {{spaces: {kinds}}}}}"
        phases = []
        recipe = write_recipe(tmp_path / f"{name}.yaml", planted, step)
        run(plan(load_recipe(recipe)), progress=lambda progress: phases.append(progress.phase))
        assert (tmp_path / name / "permutations" / "m.safetensors").is_file()
        return "align" in phases

    assert aligned("first", "b")
    assert not aligned("again", "b")
    saved = [tmp_path / name / "permutations" / "m.safetensors" for name in ("first", "again")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert same(load_file(tmp_path / "again" / "model.safetensors"), load_file(planted / "a" / "model.safetensors"))
    assert aligned("other_model", "c") and aligned("other_spaces", "b", "[mlp]")
    entries = sorted((tmp_path / "cache" / "mergekit_lite" / "permutations").iterdir())
    assert len(entries) == 3
    twice = json.loads(entries[2].read_text())
    for order in twice["permutations"][0].values():
        order[0] = order[1]
    for entry, damage in zip(entries, ("", "{}", json.dumps(twice)), strict=True):
        entry.write_text(damage)
    assert aligned("damaged", "b") and aligned("damaged_too", "c") and aligned("damaged_as_well", "b", "[mlp]")
