"""`share`: what its settings mean, how files are laid out, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergekit_lite import RecipeError, load_recipe, plan
from mergekit_lite.cli.app import execute
from mergekit_lite.plan import explain
from mergekit_lite.plan.model import Plan
from tests.conftest import CONFIG, NAMES

Make = Callable[..., Path]
LAYER = [f"model.layers.{i}.{rest}.weight" for i in (0, 1) for rest in ("mlp.up_proj", "self_attn.q_proj")]


@pytest.fixture
def planned(tmp_path: Path, tiny_checkpoint: Make) -> Callable[..., Plan]:
    """`planned(steps, save)`: a plan over tiny models `a`, `b` and `m`, made where there is none yet."""

    def make(steps: str, save: str = "{to: OUT/x}") -> Plan:
        for seed, name in enumerate("abm"):
            if not (tmp_path / name).exists():
                tiny_checkpoint(tmp_path / name, seed=seed)
        models = ", ".join(f"{name}: {tmp_path / name}" for name in "abm")
        text = f"version: 1\nmodels: {{{models}}}\nsteps:\n  {steps}\nsave: {save}\n"
        (tmp_path / "r.yaml").write_text(text.replace("OUT", str(tmp_path / "out")), encoding="utf-8")
        return plan(load_recipe(tmp_path / "r.yaml"), threads=1)

    return make


def apart(made: Plan, output: int = 0) -> list[str]:
    return [t.name for shard in made.outputs[output].shards if shard.apart for t in shard.tensors]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ("layers: 0", LAYER[:2]),
        ("layers: [1]", LAYER[2:]),
        ("layers: 0-1", LAYER),
        ("layers: [1, 0-1]", LAYER),
        ("layers: below", ["model.embed_tokens.weight"]),
        ("layers: [0, above]", [*LAYER[:2], "model.norm.weight", "lm_head.weight"]),
        ("tensors: lm_head.weight", ["lm_head.weight"]),
        ('tensors: ["*.mlp.*", "model.norm.*"]', [LAYER[0], LAYER[2], "model.norm.weight"]),
        ('layers: [1], tensors: ["*_head*"]', [*LAYER[2:], "lm_head.weight"]),
        ('tensors: "*"', list(NAMES)),
    ],
)
def test_what_the_settings_name(settings: str, expected: list[str], planned: Callable[..., Plan]) -> None:
    made = planned(f"s: {{use: share, of: [m, a], with: {{{settings}}}}}")
    assert sorted(apart(made)) == sorted(expected)
    models = {str(Path(c.shards[0].path)): name for name, c in made.checkpoints.items()}
    for tensor in made.outputs[0].tensors:
        assert tensor.node.load is not None
        assert models[tensor.node.load.file] == ("m" if tensor.name in expected else "a")


def test_files_are_divided_by_who_shares(planned: Callable[..., Plan]) -> None:
    """Tensors that different outputs share lie in different files; the last comes out of an earlier `share`."""
    steps = """sa: {use: share, of: [m, a], with: {layers: [0-1]}}
  sb: {use: share, of: [m, b], with: {layers: [0]}}
  sc: {use: share, of: [b, sa], with: {tensors: [lm_head.weight]}}"""
    made = planned(steps, "[{step: sa, to: OUT/a}, {step: sb, to: OUT/b}, {step: sc, to: OUT/c}]")
    found = [{tuple(sorted(t.name for t in s.tensors)): s.same for s in o.shards} for o in made.outputs]
    one, two = tuple(sorted(LAYER[:2])), tuple(sorted(LAYER[2:]))
    own = [name for name in NAMES if name not in LAYER]
    assert found[0] == {tuple(sorted(own)): None, one: None, two: None}
    assert found[1][one] == (0, 1) and len(found[1]) == 2
    assert found[2][one] == (0, 1) and found[2][two] == (0, 2) and found[2]["lm_head.weight",] is None
    assert made.bytes_written == sum(s.nbytes for o in made.outputs for s in o.shards if s.same is None)
    shared = sum(output.linked for output in made.outputs)
    assert shared > 0 and shared + made.bytes_written == sum(output.nbytes for output in made.outputs)
    written = [tensor for unit in made.units for _, tensor in unit.targets]
    assert (
        sum(tensor.nbytes for tensor in written)
        + sum(len(s.header) for o in made.outputs for s in o.shards if s.same is None)
        == made.bytes_written
    )


def test_the_plan_tells_what_is_shared(
    planned: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = """sa: {use: share, of: [m, a], with: {layers: [0-1]}}
  sb: {use: share, of: [m, b], with: {layers: [0-1]}}"""
    made = planned(steps, "[{step: sa, to: OUT/a}, {step: sb, to: OUT/b}]")
    first = f"{tmp_path}/out/a/model-00002-of-00002.safetensors"
    data = explain.as_json(made, 1)
    assert [shard["same_as"] for output in data["outputs"] for shard in output["shards"]] == [None, None, None, first]
    assert data["bytes_linked"] == data["outputs"][1]["bytes_linked"] == data["outputs"][0]["shards"][1]["bytes"]
    assert execute(["plan", str(tmp_path / "r.yaml")]) == 0
    out = capsys.readouterr().out
    assert "more are further names of these" in out and f"= {first}" in out


def test_several_saves_of_other_steps_have_files_of_their_own(planned: Callable[..., Plan]) -> None:
    made = planned("s: {use: linear, of: [a, b]}", "[{step: s, to: OUT/a}, {step: s, to: OUT/b}]")
    assert all(shard.same is None and not shard.apart for output in made.outputs for shard in output.shards)


@pytest.mark.parametrize("setting", ["dtype: float16", "shard: 1GB"])
def test_what_cannot_be_one_file_is_told(setting: str, planned: Callable[..., Plan]) -> None:
    steps = "sa: {use: share, of: [m, a], with: {layers: [0]}}\n  sb: {use: share, of: [m, b], with: {layers: [0]}}"
    made = planned(steps, f"[{{step: sa, to: OUT/a, {setting}}}, {{step: sb, to: OUT/b}}]")
    (warning,) = made.warnings
    assert "share of `m` is written for each of them" in warning.message and warning.mark is not None
    assert not any(output.linked for output in made.outputs)


def test_another_dtype_is_told(planned: Callable[..., Plan], tmp_path: Path, tiny_checkpoint: Make) -> None:
    tiny_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    steps = "s: {use: share, of: [m, a], with: {layers: [0]}}"
    (warning,) = planned(steps).warnings
    assert "stores what it shares in another dtype" in warning.message and LAYER[0] in warning.message
    assert planned(steps, "{to: OUT/x, dtype: float32}").warnings == ()


def wrong(planned: Callable[..., Plan], settings: str, of: str = "[m, a]", more: str = "") -> list[tuple[str, int]]:
    with pytest.raises(RecipeError) as found:
        planned(f"{more}s: {{use: share, of: {of}, with: {settings}}}", "{to: OUT/x, step: s}")
    assert all(problem.hint for problem in found.value.problems)
    return [(problem.message, problem.mark.line if problem.mark else 0) for problem in found.value.problems]


@pytest.mark.parametrize(
    "settings, said",
    [
        ("{tensors: [lm_head.weight, nothing.*]}", ["`nothing.*` matches no tensor"]),
        ("{layers: [0, 2, 1-7]}", ["`a` has layers 0 to 1, `layers` asks for 2", "asks for 1-7"]),
        ("{layers: [1-0]}", ["not '1-0'"]),
        ("{layers: [true]}", ["not True"]),
        ("{layers: [middle]}", ["numbers | ranges such as 0-3 | below | above, not 'middle'"]),
        ("{layers: []}", ["`layers` is an empty list"]),
        ("{tensors: []}", ["`tensors` is an empty list"]),
        ("{tensors: [7]}", ["`tensors` are names of tensors, not 7"]),
        ("{}", ["needs one of `layers` and `tensors`"]),
        ("{layers: {'*.mlp.*': 0, else: 1}}", ["one list for all tensors"]),
    ],
)
def test_wrong_settings(settings: str, said: list[str], planned: Callable[..., Plan]) -> None:
    found = wrong(planned, settings)
    assert len(found) == len(said)
    for (message, line), text in zip(found, said, strict=True):
        assert text in message and line == 4


def test_models_that_do_not_fit(planned: Callable[..., Plan], tmp_path: Path, tiny_checkpoint: Make) -> None:
    """Another shape, a tensor that one lacks, whichever it is, a delta, something else than numbers."""
    other = {name: shape for name, shape in NAMES.items() if name != "lm_head.weight"}
    tiny_checkpoint(tmp_path / "m", {**other, LAYER[0]: (16, 9), "extra.weight": (2,)})
    assert wrong(planned, "{layers: [0]}") == [(f"`m` and `a` have different shapes (16×9 and 16×8): `{LAYER[0]}`", 4)]
    assert wrong(planned, "{tensors: [lm_head.*]}") == [
        ("`m` lacks tensors of `a` that are to be shared: `lm_head.weight`", 4)
    ]
    assert wrong(planned, "{tensors: [extra.*]}") == [
        ("`a` lacks tensors of `m` that are to be shared: `extra.weight`", 4)
    ]
    assert wrong(planned, "{layers: [1]}", "[d, a]", "d: {use: delta, of: a, base: b}\n  ")[0] == (
        "`d` is a delta, `a` is a weight",
        5,
    )
    tiny_checkpoint(tmp_path / "m", dtype=torch.int8)
    ((message, _),) = wrong(planned, "{layers: [1]}")
    assert message.startswith("`m` stores as I8 what `a` stores as F32: ")


def test_numbers_mean_nothing_where_there_are_two_stacks(
    planned: Callable[..., Plan], tmp_path: Path, tiny_checkpoint: Make
) -> None:
    names = {f"{side}.block.{i}.w": (4, 4) for side in ("encoder", "decoder") for i in range(2)}
    for name in "abm":
        tiny_checkpoint(tmp_path / name, names, config=None)
    ((message, line),) = wrong(planned, "{layers: [0]}")
    assert message == "`a` has not one stack of layers that numbers could mean" and line == 4
    made = planned('s: {use: share, of: [m, a], with: {tensors: ["decoder.block.0.*"]}}')
    assert apart(made) == ["decoder.block.0.w"]


def test_a_tied_head_follows_its_embedding(planned: Callable[..., Plan], tmp_path: Path, tiny_checkpoint: Make) -> None:
    for name in "abm":
        tiny_checkpoint(tmp_path / name, config={**CONFIG, "tie_word_embeddings": True})
    assert apart(planned("s: {use: share, of: [m, a], with: {layers: [below]}}")) == ["model.embed_tokens.weight"]
    ((message, _),) = wrong(planned, "{tensors: [lm_head.*]}")
    assert message == "`lm_head.*` matches no tensor"
