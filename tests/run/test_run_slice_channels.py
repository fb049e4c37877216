"""`slice` of the channels of convolutions, and of layers that have sizes of their own: networks that were cut by name
in torch are the measure, and transformers loads what is written."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_lite import RecipeError, load_recipe, plan, run
from tests.family.family_models import MODELS, RESNET, Tiny, build, saved
from tests.run.test_run_slice import first_of, loaded, sliced, text

Tensors = dict[str, Tensor]
Index = Sequence[int]
RESNETS = {
    # The first stage adds onto the stem.
    "basic": MODELS["resnet-basic"],
    "bottleneck": MODELS["resnet-bottleneck"],
    "bottleneck-joined": Tiny("ResNetForImageClassification", "resnet",
                              {**RESNET, "embedding_size": 16, "hidden_sizes": [16, 32], "layer_type": "bottleneck"}),
}  # fmt: skip


def write_resnet(folder: Path, name: str) -> tuple[Any, Tensors]:
    """A random network, running statistics included, and its tensors."""
    model = build(RESNETS[name]).float()
    return model, saved(model, folder)[1]


def cut_resnet(tensors: Tensors, stem: Index, stages: Sequence[Index], inner: Mapping[str, Index]) -> Tensors:
    """What is left: `inner` are the channels inside of a block, by `STAGE.BLOCK.CONVOLUTION`."""
    made = {}
    for name, value in tensors.items():
        block = re.fullmatch(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.(?:layer\.(\d)|shortcut)\.(.*)", name)
        if name.endswith("num_batches_tracked") or name == "classifier.1.bias":
            made[name] = value
            continue
        if name == "classifier.1.weight":
            made[name] = value[:, stages[-1]]
            continue
        if block is None:
            made[name] = value[stem]
            continue
        stage, number, place = int(block[1]), int(block[2]), block[3]
        before = stages[stage] if number else stages[stage - 1] if stage else stem
        last = max(int(n.split(".layer.")[1][0]) for n in tensors if ".layer." in n)
        if place is None or int(place) == last:
            outputs = stages[stage]
        else:
            outputs = inner[f"{stage}.{number}.{place}"]
        inputs = before if place in (None, "0") else inner[f"{stage}.{number}.{int(place) - 1}"]
        made[name] = value[outputs][:, inputs] if value.ndim == 4 else value[outputs]
    return made


def reference(folder: Path, name: str, tensors: Tensors, states: Mapping[str, Any]) -> Any:
    """A network that is configured with its new sizes from the start, with these tensors."""
    tiny = RESNETS[name]
    model = build(Tiny(tiny.kind, tiny.model_type, {**tiny.settings, **states})).float()
    model.save_pretrained(folder)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return loaded(tiny.kind, folder)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Blocks of two convolutions: what lies within them follows.
    "basic": ("stages.0: 4, stages.1: 7", {"embedding_size": 4, "hidden_sizes": [4, 7]}),
    "bottleneck": ("stem: 3, stages.0: 8, stages.1: 12", {"embedding_size": 3, "hidden_sizes": [8, 12]}),
    "bottleneck-joined": ("stages.0: 12", {"embedding_size": 12, "hidden_sizes": [12, 32]}),
}


@pytest.mark.parametrize("name", CASES)
def test_leading_channels_are_those_of_a_network_that_was_cut_by_hand(name: str, tmp_path: Path) -> None:
    channels, states = CASES[name]
    big, tensors = write_resnet(tmp_path / "big", name)
    out = sliced(tmp_path / "big", f"channels: {{{channels}}}")
    stages = [range(size) for size in states["hidden_sizes"]]
    narrow = 1 if name == "basic" else 4
    inner = {f"{s}.{b}.{c}": range(len(stages[s]) // narrow) for s in (0, 1) for b in (0, 1) for c in (0, 1)}
    kept = cut_resnet(tensors, range(states["embedding_size"]), stages, inner)
    written = load_file(out / "model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in kept.items()}
    assert all(torch.equal(written[n], kept[n]) for n in kept)
    small = loaded("ResNetForImageClassification", out)
    assert {key: getattr(small.config, key) for key in states} == states
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    expected = reference(tmp_path / "cut", name, kept, states)(pixels).logits
    assert torch.equal(small(pixels).logits, expected)
    assert not torch.allclose(big(pixels).logits, expected, atol=1e-3)


def test_one_number_stands_for_all_channels_where_all_can_have_it(tmp_path: Path) -> None:
    write_resnet(tmp_path / "big", "basic")
    small = loaded("ResNetForImageClassification", sliced(tmp_path / "big", "channels: 5"))
    assert (small.config.embedding_size, small.config.hidden_sizes) == (5, [5, 5])


def test_importance_counts_what_convolutions_and_gains_hold_of_a_channel(tmp_path: Path) -> None:
    """Running statistics go along, but say nothing of which channels matter."""
    _, tensors = write_resnet(tmp_path / "big", "bottleneck")
    # A channel with nothing but a large mean and variance is the first to go.
    lead = "resnet.encoder.stages.0.layers.1.layer."
    for name in (f"{lead}0.convolution.weight", f"{lead}0.normalization.weight", f"{lead}0.normalization.bias"):
        tensors[name][2] = 0
    tensors[f"{lead}1.convolution.weight"][:, 2] = 0
    tensors[f"{lead}0.normalization.running_mean"][2] = 1e4
    tensors[f"{lead}0.normalization.running_var"][2] = 1e4
    save_file(tensors, tmp_path / "big/model.safetensors", {"format": "pt"})
    out = sliced(tmp_path / "big", "channels: {stem: 4, stages.0: 12, stages.1: 20}, order: importance")

    # Which tensors hold which channels, as their shapes and names tell: outputs along axis 0, inputs along axis 1.
    def held(outputs: Sequence[str], inputs: Sequence[str], units: int, keep: int) -> list[int]:
        total = torch.zeros(units, dtype=torch.float64)
        for name, value in tensors.items():
            if any(re.search(part, name) for part in outputs) and "running" not in name and "tracked" not in name:
                total += value.double().abs().reshape(units, -1).sum(dim=1)
            if any(re.search(part, name) for part in inputs) and value.ndim > 1:
                total += value.double().abs().movedim(1, 0).reshape(units, -1).sum(dim=1)
        return first_of(total.numpy(), keep)

    first = r"stages\.0\.layers\.0\.(layer\.0|shortcut)\.conv"
    stem = held([r"embedder\."], [first], 6, 4)
    adds = r"stages\.{}\.layers\.\d\.(layer\.2|shortcut)\."
    into = r"stages\.1\.layers\.0\.(layer\.0|shortcut)\.conv"
    stages = [held([adds.format(0)], [r"stages\.0\.layers\.1\.layer\.0\.conv", into], 16, 12)]
    stages += [held([adds.format(1)], [r"stages\.1\.layers\.1\.layer\.0\.conv", r"classifier\.1\.weight"], 32, 20)]
    inner = {}
    for stage, units, keep in ((0, 4, 3), (1, 8, 5)):
        for block in (0, 1):
            for place in (0, 1):
                mine = rf"stages\.{stage}\.layers\.{block}\.layer\."
                inner[f"{stage}.{block}.{place}"] = held(
                    [rf"{mine}{place}\."], [rf"{mine}{place + 1}\.conv"], units, keep
                )
    assert inner["0.1.0"] == [0, 1, 3]
    kept = cut_resnet(tensors, stem, stages, inner)
    written = load_file(out / "model.safetensors")
    assert written.keys() == kept.keys() and all(torch.equal(written[n], kept[n]) for n in kept)
    states = {"embedding_size": 4, "hidden_sizes": [12, 20]}
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    expected = reference(tmp_path / "cut", "bottleneck", kept, states)(pixels).logits
    assert torch.equal(loaded("ResNetForImageClassification", out)(pixels).logits, expected)


@pytest.mark.parametrize("order", ["leading", "importance"])
def test_all_channels_are_the_network_itself_bit_for_bit(order: str, tmp_path: Path) -> None:
    write_resnet(tmp_path / "big", "bottleneck")
    out = sliced(tmp_path / "big", f"channels: {{stem: 6, stages.0: 16, stages.1: 32}}, order: {order}")
    old, new = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (tmp_path / "big", out))
    assert old == new
    before, after = load_file(tmp_path / "big/model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[n].numpy().tobytes() == after[n].numpy().tobytes() for n in before)


def cnn(first: int, second: int, hidden: int) -> nn.Sequential:
    front = (nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, second, 3))
    return nn.Sequential(
        *front, nn.ReLU(), nn.Flatten(), nn.Linear(16 * second, hidden), nn.Tanh(), nn.Linear(hidden, 2)
    )


def mlp(*sizes: int) -> nn.Sequential:
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def write_net(folder: Path, net: nn.Sequential) -> Tensors:
    torch.manual_seed(1)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 0.1)
    folder.mkdir()
    save_file(net.eval().state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return dict(net.state_dict())


def test_a_plain_network_of_convolutions_by_a_file_of_its_own(tmp_path: Path) -> None:
    """The family file of the document: a batch norm, and channels that are flattened into a linear layer."""
    document = Path(__file__).parents[2] / "docs/families.md"
    (family, *_) = re.findall(r"^```yaml\n(name:.*?)^```$", document.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "cnn.yaml").write_text(family, encoding="utf-8")
    old = write_net(tmp_path / "big", cnn(6, 5, 7))
    settings = f"channels: {{first: 4, second: 3}}, d_ff: 5, order: importance, family: {tmp_path}/cnn.yaml"
    out = sliced(tmp_path / "big", settings)

    def weight(*parts: tuple[str, int]) -> Any:
        return sum(old[n].double().abs().movedim(axis, 0).flatten(1).sum(dim=1) for n, axis in parts if old[n].ndim > 1)

    def gains(*names: str) -> Any:
        return sum(old[n].double().abs() for n in names)

    flat = old["6.weight"].reshape(7, 5, 16)
    first = first_of((weight(("0.weight", 0), ("3.weight", 1)) + gains("0.bias", "1.weight", "1.bias")).numpy(), 4)
    second = weight(("3.weight", 0)) + gains("3.bias") + flat.double().abs().sum(dim=(0, 2))
    kept = first_of(second.numpy(), 3)
    hidden = first_of((weight(("6.weight", 0), ("8.weight", 1)) + gains("6.bias")).numpy(), 5)
    small = cnn(4, 3, 5).eval()
    small.load_state_dict(
        {
            **{
                n: old[n][first]
                for n in ("0.weight", "0.bias", *(n for n in old if n.startswith("1.") and old[n].ndim))
            },
            "1.num_batches_tracked": old["1.num_batches_tracked"],
            "3.weight": old["3.weight"][kept][:, first],
            "3.bias": old["3.bias"][kept],
            "6.weight": flat[hidden][:, kept].reshape(5, -1),
            "6.bias": old["6.bias"][hidden],
            "8.weight": old["8.weight"][:, hidden],
            "8.bias": old["8.bias"],
        }
    )
    written = cnn(4, 3, 5).eval()
    written.load_state_dict(load_file(out / "model.safetensors"))
    pixels = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    assert torch.equal(written(pixels), small(pixels))


def test_feed_forward_layers_of_several_sizes_have_a_number_each(tmp_path: Path) -> None:
    old = write_net(tmp_path / "big", mlp(8, 12, 10, 6, 3))
    out = sliced(tmp_path / "big", "d_ff: {hidden.0: 7, hidden.2: 4}, family: mlp")
    small = mlp(8, 7, 4, 6, 3)
    small.load_state_dict(
        {
            "0.weight": old["0.weight"][:7], "0.bias": old["0.bias"][:7],
            "2.weight": old["2.weight"][:4, :7], "2.bias": old["2.bias"][:4],
            "4.weight": old["4.weight"][:, :4], "4.bias": old["4.bias"],
            "6.weight": old["6.weight"], "6.bias": old["6.bias"],
        }
    )  # fmt: skip
    written = mlp(8, 7, 4, 6, 3)
    written.load_state_dict(load_file(out / "model.safetensors"))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(written(x), small(x))
    # `else` is for those that are not named, and full sizes give the network back.
    shutil.rmtree(out)
    whole = sliced(tmp_path / "big", "d_ff: {hidden.0: 12, hidden.2: 10, else: 6}, family: mlp")
    assert all(torch.equal(t, old[n]) for n, t in load_file(whole / "model.safetensors").items())


def test_slices_of_channels_are_mixed(tmp_path: Path) -> None:
    _, tensors = write_resnet(tmp_path / "big", "bottleneck")
    recipe = tmp_path / "mix.yaml"
    of = "[{model: big, channels: {stages.0: 8, else: 6}, weight: 0.25}, {model: big, weight: 0.75}]"
    of = of.replace("else: 6", "stem: 2")
    recipe.write_text(
        f"version: 1\nmodels: {{big: {tmp_path}/big}}\nsteps: {{m: {{use: mix_widths, of: {of}}}}}\n"
        f"save: {{to: {tmp_path}/out}}\n",
        encoding="utf-8",
    )
    run(plan(load_recipe(recipe)))
    written = load_file(tmp_path / "out/model.safetensors")
    value = tensors["resnet.encoder.stages.0.layers.0.shortcut.convolution.weight"]
    corner = torch.zeros_like(value)
    corner[:8, :2] = value[:8, :2]
    mixed = written["resnet.encoder.stages.0.layers.0.shortcut.convolution.weight"]
    assert torch.allclose(mixed, 0.25 * corner + 0.75 * value, rtol=1e-6, atol=0)
    narrow = "resnet.encoder.stages.0.layers.0.layer.0.normalization.running_var"
    assert torch.allclose(written[narrow][2:], 0.75 * tensors[narrow][2:]) and len(tensors[narrow]) == 4


WRONG = {
    "channels: 4": ("these have several sizes: 6 in `stem`", "4"),
    "channels: {stages.0: 6}": ("a first stage of 6 channels, as many as the stem has", "{"),
    "channels: {stages.0: 20}": ("20 is more than the 16 units of `stages.0`", "{"),
    "channels: {stages.0: 3}": ("nothing would be left of `stages.0.0.first`", "{"),
    "channels: {stages.0.0.first: 2}": ("config.json cannot state the size of `stages.0.0.first`", "{"),
    "channels: {stages.2: 2}": ("`stages.2` is no space of `big`", "stages.2: 2"),
    "channels: {stem: 0}": ("`channels` must lie in [1, inf)", "stem: 0"),
    "width: 4": ("the model has no spaces of the kind `residual`", "4"),
}


@pytest.mark.parametrize("settings", WRONG)
def test_channels_that_cannot_be_cut_are_refused_where_they_stand(settings: str, tmp_path: Path) -> None:
    write_resnet(tmp_path / "big", "bottleneck")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text(tmp_path / "big", settings), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(recipe))
    message, at = WRONG[settings]
    problem = caught.value.problems[0]
    assert message in problem.message
    assert problem.mark is not None
    assert recipe.read_text(encoding="utf-8").splitlines()[2][problem.mark.column - 1 :].startswith(at)
