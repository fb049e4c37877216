"""The sharpness of a checkpoint's layers: names as on disk, the loss that transformers computes, wrong use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrate_models import TEXT_FILE, write, write_classifier, write_inputs
from safetensors.torch import load_file

from mergekit_lite.calibrate.layer_sharpness import Examples, layer_sharpness
from mergekit_lite.calibrate.sharpness import sharpness
from mergekit_lite.cli.app import execute
from mergekit_lite.errors import InputError
from mergekit_lite.report.look import open_location


def own_loss(network: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss as transformers' models compute it from labels."""
    found: torch.Tensor = network(**batch).loss
    return found


def test_of_a_language_model_by_a_text_through_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`merge path --layers --text` measures the model half way, whose weights are averaged here by hand."""
    import json

    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write(tmp_path / f"m{seed}", "llama", seed)
    (tmp_path / "text.txt").write_text(TEXT_FILE)
    capsys.readouterr()
    words = ("--score", "sh -c 'echo 1' {model}", "--points", "2", "--layers", "--text", "text.txt", "--examples", "1")
    code = execute(["path", "m0", "m1", *words, "--rho", "0.03", "--threads", "1", "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    found = json.loads(shown.out)

    network = transformers.AutoModelForCausalLM.from_pretrained("m0")
    ends = [load_file(f"m{seed}/model.safetensors") for seed in (0, 1)]
    network.load_state_dict({name: (ends[0][name] + ends[1][name]) / 2 for name in ends[0]}, strict=True)
    ids = transformers.AutoTokenizer.from_pretrained("m0")(TEXT_FILE, add_special_tokens=False)["input_ids"]
    length = min(512, network.config.max_position_embeddings)
    blocks = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    drawn = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[:1]]
    groups = {layer["name"]: [n for n in ends[0] if n.startswith(layer["name"] + ".")] for layer in found["layers"]}
    wanted = sharpness(network, [{"input_ids": drawn, "labels": drawn}], own_loss, groups, rho=0.03)
    assert len(wanted) == 5 and {layer["name"]: layer["sharpness"] for layer in found["layers"]} == pytest.approx(
        wanted, rel=1e-3
    )
    ranked = sorted((name for name in wanted if name != "model.norm"), key=lambda name: -wanted[name])
    assert found["stragglers"]["layers"] == ranked[:2] and found["stragglers"]["by"] == "sharpness"


def test_of_a_classifier_by_a_file_of_inputs(tmp_path: Path) -> None:
    write_classifier(tmp_path / "m")
    inputs = write_inputs(tmp_path / "inputs.safetensors")
    checkpoint = open_location(str(tmp_path / "m"))
    layers = {"head": ["classifier.weight", "classifier.bias"], "none": ["classifier.nothing"]}
    examples = Examples(data=inputs)
    examples.check(checkpoint, "m")
    found = layer_sharpness(checkpoint, layers, examples, steps=3)
    network = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "m")
    data = load_file(inputs)
    seen = [data["attention_mask"][i] == 1 for i in range(6)]
    batches = [
        {name: data[name][i : i + 1, seen[i]] for name in ("input_ids", "attention_mask")}
        | {"labels": data["labels"][i : i + 1]}
        for i in range(6)
    ]
    wanted = sharpness(network, batches, own_loss, {"head": layers["head"]}, steps=3)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_experts_that_transformers_keeps_in_one_tensor_are_found_by_their_names_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "m", "mixtral")
    inputs = tmp_path / "inputs.npz"
    import numpy as np

    ids = np.arange(3, 8)[None]
    np.savez(inputs, input_ids=ids, labels=ids)
    checkpoint = open_location(str(tmp_path / "m"))
    experts = [name for name in checkpoint.tensors if ".layers.1." in name and "experts" in name]
    layers = {"experts": experts, "unknown": ["x"]}
    found = layer_sharpness(checkpoint, layers, Examples(data=inputs), rho=0.1, steps=1)
    assert len(experts) == 48 and set(found) == {"experts"} and found["experts"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("labels"), "holds no `labels`"),
        (lambda data: data["labels"].add_(7), "are no classes of the network"),
    ],
)
def test_labels_that_are_none(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    from safetensors.torch import save_file

    write_classifier(tmp_path / "m")
    inputs = write_inputs(tmp_path / "inputs.safetensors")
    data = load_file(inputs)
    change(data)
    save_file(data, inputs)
    checkpoint, examples = open_location(str(tmp_path / "m")), Examples(data=inputs)

    def measure() -> None:
        examples.check(checkpoint, "m")
        layer_sharpness(checkpoint, {"head": ["classifier.weight"]}, examples)

    with pytest.raises(InputError, match=message):
        measure()
