"""`mix_widths`: leading slices with zeros around them, added up by hand and by the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from mergekit_lite import RecipeError, load_recipe, plan, run
from mergekit_lite.methods import Slot, get
from mergekit_lite.methods.whole import evaluate
from tests.family.family_models import MODELS
from tests.methods.method_cases import ORACLES, close, tensor


def write_models(folder: Path, name: str, count: int) -> None:
    tiny = MODELS[name]
    torch.manual_seed(1)
    for letter in "abc"[:count]:
        model = getattr(transformers, tiny.kind)(AutoConfig.for_model(tiny.model_type, **tiny.settings)).float()
        model.save_pretrained(folder / letter)


def mixed(folder: Path, of: str, settings: str = "", block: int | None = None) -> dict[str, Tensor]:
    models = ", ".join(f"{p.name}: {p}" for p in sorted(folder.iterdir()) if p.is_dir() and len(p.name) == 1)
    step = f"{{use: mix_widths, of: [{of}], with: {{{settings}}}}}"
    to = folder / f"out{block}"
    text = f"version: 1\nmodels: {{{models}}}\nsteps:\n  m: {step}\nsave: {{to: {to}}}\n"
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    run(plan(load_recipe(folder / "r.yaml"), block=block), block=block)
    return load_file(to / "model.safetensors")


def corner(value: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The leading slice of these sizes in a tensor of zeros."""
    out = torch.zeros_like(value)
    index = tuple(slice(0, size) for size in sizes)
    out[index] = value[index]
    return out


def test_slices_of_several_sizes_are_added_up(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", 2)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    of = "{model: a, width: 16, d_ff: 12, weight: 0.5}, {model: a, width: 20, heads: 2, weight: 1.5}"
    of += ", {model: b, weight: 2}"
    got = mixed(tmp_path, of)
    assert got.keys() == a.keys()
    # width, heads, hidden units
    sizes = {"embed": ((48, 16), (48, 20)), "lm_head": ((48, 16), (48, 20)), "norm": ((16,), (20,)),
             "q_proj": ((32, 16), (16, 20)), "k_proj": ((16, 16), (8, 20)), "v_proj": ((16, 16), (8, 20)),
             "o_proj": ((16, 32), (20, 16)), "gate": ((12, 16), (20, 20)), "up_proj": ((12, 16), (20, 20)),
             "down": ((16, 12), (20, 20))}  # fmt: skip
    for name, value in got.items():
        first, second = next(size for part, size in sizes.items() if part in name)
        expected = 0.125 * corner(a[name], first) + 0.375 * corner(a[name], second) + 0.5 * b[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    small = mixed(tmp_path, of, block=97)
    assert all(torch.equal(got[n], small[n]) for n in got)


def test_coordinates_of_heads_are_cut_where_width_decides_their_number(tmp_path: Path) -> None:
    """BERT: half the width leaves half of each head's coordinates."""
    write_models(tmp_path, "bert", 1)
    a = load_file(tmp_path / "a" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    got = mixed(tmp_path, "{model: a, width: 12}")[name]
    expected = torch.zeros(24, 24)
    for row in (*range(0, 4), *range(8, 12), *range(16, 20)):
        expected[row, :12] = a[name][row, :12]
    assert torch.equal(got, expected)


def test_all_units_alone_are_the_model_bit_for_bit(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", 2)
    a = load_file(tmp_path / "a" / "model.safetensors")
    got = mixed(tmp_path, "{model: a, width: 24, heads: 4, d_ff: 20}, {model: b, width: 16, weight: 0}")
    assert all(got[n].numpy().tobytes() == a[n].numpy().tobytes() for n in a)


def test_against_the_oracle() -> None:
    case = "subnet/entangled_mixture"
    given = ORACLES[case]["inputs"]
    w = tensor(given["w"])
    slices = [
        get("padded")(Slot(0), kept=((0, ((0, rows),)), (1, ((0, columns),))), shape=tuple(w.shape))
        for rows, columns in ORACLES[case]["params"]["sizes"]
    ]
    call = get("linear")(*slices, weight=tuple(given["beta"]["data"]), normalize=False)
    close(evaluate(call, [[w]], compute=torch.float64, grain=3)[0], case, "w", torch.float64)


@pytest.mark.parametrize(
    "of, settings, message",
    [
        ("{model: a, width: 32}", "", "32 is more than the 24 units of `residual`"),
        ("{model: a, heads: 3}", "", "which 3 would divide"),
        ("a, {model: c, d_ff: 4}", "", "do not have, in one shape"),
        ("{model: a, weight: 0}", "", "the weights add up to 0"),
        ("{model: a, width: {'*': 3}}", "", "one value for all tensors"),
        ("{model: a, d_ff: 3}", "family: nowhere", "cannot read the family file nowhere"),
    ],
)
def test_what_cannot_be_mixed_is_refused_where_it_stands(of: str, settings: str, message: str, tmp_path: Path) -> None:
    write_models(tmp_path, "llama", 1)
    write_models(tmp_path / "other", "llama-mqa", 1)
    (tmp_path / "other" / "a").rename(tmp_path / "c")
    (tmp_path / "other").rmdir()
    with pytest.raises(RecipeError) as caught:
        mixed(tmp_path, of, settings)
    problem = caught.value.problems[0]
    assert message in problem.message and problem.mark is not None and problem.mark.line == 4
