"""Random members of every family's symmetry group leave the outputs of a tiny random model as they are."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_models import MODELS, Tiny, build, saved
from safetensors.torch import save_file

from mergekit_lite.align.apply import fault, is_identity, moves, permuted
from mergekit_lite.family.axes import spaces_of
from mergekit_lite.family.data import families
from mergekit_lite.family.spaces import Space

# Norms and the softmax of decoders and T5 compute in single precision even where the model is in double.
TOLERANCE = {True: 1e-4, False: 1e-9}
Record = Callable[[str, object], None]  # pytest's `record_property`; `make reproduce` reads what it is given
INNER = ("past_key_values", "encoder_last_hidden_state", "router_logits")
HIDDEN, INTERMEDIATE = 24, 20  # lengths that no fixed axis has


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass
class Case:
    tiny: Tiny
    model: torch.nn.Module
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    spaces: Sequence[Space]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def permuted(self, spaces: Sequence[Space], permutations: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        changed = moves(spaces, permutations, self.shapes)
        return dict(self.tensors) | {n: permuted(move, self.tensors[move.source]) for n, move in changed.items()}

    def outputs(self, tensors: Mapping[str, torch.Tensor] | None = None, seed: int = 1) -> torch.Tensor:
        """What the model gives with these tensors, in one vector; inner states only where it gives nothing else."""
        model = self.model if tensors is None else self.loaded(tensors)
        with torch.no_grad():
            found = model(**inputs(self.tiny, seed), return_dict=True)
        given = {key: value for key, value in found.items() if isinstance(value, torch.Tensor) and key not in INNER}
        if self.tiny.kind == "CLIPModel" or not self.tiny.kind.endswith("Model"):
            given.pop("last_hidden_state", None)
        assert given
        return torch.cat([value.flatten() for value in given.values()])

    def loaded(self, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """A model with these tensors, read by transformers where names on disk and in memory differ."""
        if tensors.keys() <= self.model.state_dict().keys():
            model = fresh(self.tiny)
            model.load_state_dict(tensors, strict=False)
            return model
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(self.config))
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(whole, Path(folder, "model.safetensors"), {"format": "pt"})
            kind = getattr(transformers, self.tiny.kind)
            model, report = kind.from_pretrained(folder, dtype=torch.float64, output_loading_info=True, **eager)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()


@functools.lru_cache(maxsize=1)
def fresh(tiny: Tiny) -> torch.nn.Module:
    return build(tiny)


@functools.lru_cache(maxsize=1)
def case(name: str) -> Case:
    model = build(MODELS[name])
    with tempfile.TemporaryDirectory() as folder:
        config, tensors = saved(model, Path(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Case(MODELS[name], model, config, tensors, spaces_of(config, shapes))


def inputs(tiny: Tiny, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 47, (2, 9), generator=generator)
    ids[:, -1] = 47
    side = 32 if "ResNet" in tiny.kind else 8
    pixels = torch.randn(2, 3, side, side, generator=generator).double()
    if tiny.kind == "CLIPModel":
        return {"input_ids": ids, "pixel_values": pixels}
    if getattr(transformers, tiny.kind).main_input_name == "pixel_values":
        return {"pixel_values": pixels}
    if tiny.model_type in ("t5", "mt5", "umt5") and "Encoder" not in tiny.kind:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    return {"input_ids": ids[None] if "MultipleChoice" in tiny.kind else ids}


def member(spaces: Sequence[Space], seed: int = 0) -> dict[str, np.ndarray]:
    """A random permutation of every space: of units within their groups, and of the groups where there are several."""
    rng, found = np.random.default_rng(seed), {}
    for space in spaces:
        rows = np.arange(space.size).reshape(space.groups, space.group)
        p = rows.flatten()
        while (
            (p[:: space.group] // space.group == np.arange(space.groups)).all() if space.groups > 1 else is_identity(p)
        ):
            p = np.concatenate([rng.permutation(row) for row in rows[rng.permutation(space.groups)]])
        assert fault(space, p) is None
        found[space.name] = p
    return found


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest difference, relative to the spread of the outputs."""
    return float((before - after).abs().max() / before.std())


@pytest.mark.parametrize("name", MODELS)
def test_permutations_of_every_space_leave_the_outputs_as_they_are(name: str, record_property: Record):
    it = case(name)
    assert len({space.name for space in it.spaces}) == len(it.spaces) and all(space.size > 1 for space in it.spaces)
    permutations = member(it.spaces)
    for space in it.spaces:
        alone = it.permuted([space], permutations)
        assert any(not torch.equal(alone[tensor], it.tensors[tensor]) for tensor in alone), space.name
    before = it.outputs()
    assert change(before, it.outputs(seed=2)) > 0.01, "a network that does not look at its inputs proves nothing"
    found = change(before, it.outputs(it.permuted(it.spaces, permutations)))
    record_property("change", found)
    assert found < TOLERANCE[it.tiny.decoder]


@pytest.mark.parametrize("name", MODELS)
def test_no_unit_of_a_layer_is_left_out(name: str):
    """Every axis of the residual stream and of the feed-forward parts lies in a space, whatever the rules say."""
    it = case(name)
    used = {(use.tensor, use.axis) for space in it.spaces for use in space.uses}
    if not any(space.kind in ("residual", "channels") for space in it.spaces):
        # Without a head the residual stream is the output.
        assert it.tiny.kind in ("BertModel", "ViTModel", "T5EncoderModel")
        return
    free = {(tensor, axis) for tensor, shape in it.shapes.items() for axis, length in enumerate(shape)
            if length in (HIDDEN, INTERMEDIATE) and (tensor, axis) not in used}  # fmt: skip
    assert not {(tensor, axis) for tensor, axis in free if "vision_tower" not in tensor or it.tiny.kind == "CLIPModel"}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "gpt2", "bert-classifier", "clip", "resnet-bottleneck"])
def test_a_space_that_forgets_a_tensor_changes_the_outputs(name: str):
    it = case(name)
    permutations, before = member(it.spaces), it.outputs()
    # A bias of all keys shifts every score of a query alike, which the softmax takes no notice of.
    idle = r".*(key|k_proj)\.bias"
    for space in [s for s in it.spaces if not re.search(r"\.1\.", s.name)]:
        for tensor in {use.tensor for use in space.uses}:
            uses = tuple(use for use in space.uses if use.tensor != tensor)
            after = it.outputs(it.permuted([dataclasses.replace(space, uses=uses)], permutations))
            moved = change(before, after)
            assert moved < 1e-6 if re.fullmatch(idle, tensor) else moved > (1e-4 if it.tiny.decoder else 1e-7), (
                space.name,
                tensor,
                moved,
            )


ROTARY = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "mixtral", "qwen2_moe"]


@pytest.mark.parametrize("name", ROTARY)
def test_a_swapped_rotary_pair_changes_the_outputs(name: str, record_property: Record):
    it = case(name)
    swapped = dict(it.tensors)
    width = it.shapes["model.layers.0.self_attn.k_proj.weight"][0] // it.config["num_key_value_heads"]
    half = width // 2
    order = np.arange(width)
    order[[0, 1, half, half + 1]] = [1, 0, half + 1, half]
    for tensor, values in it.tensors.items():
        if re.search(r"\.(q|k)_(proj|norm)\.", tensor):
            shape = values.shape
            swapped[tensor] = values.reshape(-1, width, *shape[1:])[:, order].reshape(shape)
    found = change(it.outputs(), it.outputs(swapped))
    record_property("change", found)
    assert found > 0.1


def test_every_model_type_with_spaces_has_a_model_here():
    here = {tiny.model_type.removesuffix("3") + "3_text" if tiny.model_type == "gemma3" else tiny.model_type
            for tiny in MODELS.values()}  # fmt: skip
    stated = {model_type for model_type, family in families().items() if family.layout is not None}
    assert stated - here == {"mlp", "resnet_torchvision"}
