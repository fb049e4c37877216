"""The configuration of restacked models, judged by transformers and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from mergekit_lite.errors import RecipeError
from mergekit_lite.family.family import family_of, restacked_config

FULL, SLIDING = "full_attention", "sliding_attention"
QWEN2: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "use_sliding_window": True,
    "sliding_window": 4,
    "tie_word_embeddings": True,
}


def saved(folder: Path, model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def restacked(folder: Path, stack: str, base: int, models: list, order: list[tuple[int, int]]) -> Any:
    """Save a model whose `stack` holds layer `old` of model `m` per (m, old) in `order`; the rest is the base's."""
    families = [family_of(config, weights) for config, weights in models]
    weights = {}
    for name, tensor in models[base][1].items():
        layer = families[base].layer(name)
        if layer is None or layer.stack != stack:
            weights[name] = tensor
    for new, (m, old) in enumerate(order):
        for name, tensor in models[m][1].items():
            layer = families[m].layer(name)
            if layer is not None and (layer.stack, layer.index) == (stack, old):
                weights[families[m].renumbered(name, new)] = tensor.clone()
    stacked = next(s for s in families[base].stacks if s.name == stack)
    config = restacked_config(models[base][0], stacked, [(models[m][0], old) for m, old in order])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return config


def load(folder: Path, model_class: Any) -> Any:
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def test_a_taller_qwen2_keeps_each_layers_weights_and_attention(tmp_path: Path):
    torch.manual_seed(0)
    types = [[FULL, SLIDING, FULL], [SLIDING, SLIDING, FULL, SLIDING]]
    configs = [hf.Qwen2Config(**QWEN2, num_hidden_layers=len(t), layer_types=t) for t in types]
    sources = [hf.Qwen2ForCausalLM(c) for c in configs]
    models = [saved(tmp_path / f"m{k}", model) for k, model in enumerate(sources)]
    before = json.dumps([config for config, _ in models])
    order = [(0, 0), (1, 3), (1, 2), (0, 1), (0, 1), (1, 0)]
    config = restacked(tmp_path / "tall", "layers", 0, models, order)

    assert config["layer_types"] == [types[m][old] for m, old in order]
    assert json.dumps([config for config, _ in models]) == before
    tall = load(tmp_path / "tall", hf.Qwen2ForCausalLM).eval()
    assert tall.lm_head.weight.data_ptr() == tall.model.embed_tokens.weight.data_ptr()
    for layer, (m, old) in zip(tall.model.layers, order, strict=True):
        for name, tensor in sources[m].model.layers[old].state_dict().items():
            assert torch.equal(layer.state_dict()[name], tensor)
    # The same stack put together from modules. Beyond the window of 4 tokens a wrong layer type changes the output.
    tokens = torch.arange(12)[None]
    by_hand = hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**QWEN2, num_hidden_layers=len(order), layer_types=[types[m][old] for m, old in order])
    ).eval()
    by_hand.model.embed_tokens, by_hand.model.norm = sources[0].model.embed_tokens, sources[0].model.norm
    by_hand.lm_head = sources[0].lm_head
    for layer, (m, old) in zip(by_hand.model.layers, order, strict=True):
        layer.load_state_dict(sources[m].model.layers[old].state_dict())
    with torch.no_grad():
        assert torch.equal(tall(tokens).logits, by_hand(tokens).logits)


def test_a_lower_gpt2_and_a_taller_one(tmp_path: Path):
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=16, n_layer=3, n_head=4, vocab_size=40, n_positions=16)
    models = [saved(tmp_path / "m", hf.GPT2LMHeadModel(config))]
    for name, order in {"low": [(0, 2)], "tall": [(0, 0), (0, 1), (0, 1), (0, 2)]}.items():
        assert restacked(tmp_path / name, "h", 0, models, order)["n_layer"] == len(order)
        assert len(load(tmp_path / name, hf.GPT2LMHeadModel).transformer.h) == len(order)


@pytest.mark.parametrize(("stack", "layers"), [("encoder", (3, 2)), ("decoder", (2, 3))])
def test_one_stack_of_a_t5_leaves_the_other(tmp_path: Path, stack: str, layers: tuple[int, int]):
    torch.manual_seed(0)
    small = hf.T5Config(d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4, vocab_size=40)
    model = saved(tmp_path / "m", hf.T5ForConditionalGeneration(small))
    # A decoder of unstated depth is as deep as the encoder, and must stay so when the encoder grows.
    del model[0]["num_decoder_layers"]
    config = restacked(tmp_path / "tall", stack, 0, [model], [(0, 0), (0, 1), (0, 1)])
    tall = load(tmp_path / "tall", hf.T5ForConditionalGeneration)
    assert (len(tall.encoder.block), len(tall.decoder.block)) == layers
    assert (config["num_layers"], config["num_decoder_layers"]) == layers


def test_one_tower_of_a_clip_leaves_the_other(tmp_path: Path):
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = text | {"image_size": 16, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text | {"vocab_size": 40}, vision_config=vision, projection_dim=8))
    config = restacked(tmp_path / "tall", "vision", 0, [saved(tmp_path / "m", model)], [(0, 0), (0, 1), (0, 0)])
    assert (config["text_config"]["num_hidden_layers"], config["vision_config"]["num_hidden_layers"]) == (2, 3)
    load(tmp_path / "tall", hf.CLIPModel)


def stack_of(config: dict[str, Any], count: int, lead: str = "model.layers.") -> Any:
    return family_of(config, [f"{lead}{i}.w" for i in range(count)]).stacks[0]


def test_lists_of_layer_numbers_are_renumbered_and_other_lists_stay():
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "mlp_only_layers": [0, 2],
        "eos_token_id": [1, 2, 3],
        "architectures": ["A", "B", "C"],
        "max_window_layers": 3,
        "decoder_sparse_step": 1,
        "per_layer": [{"a": 1}, {"a": 2}, {"a": 3}],
    }
    dense = config | {"mlp_only_layers": [1], "per_layer": [{"a": 4}, {"a": 5}, {"a": 6}]}
    result = restacked_config(config, stack_of(config, 3), [(config, 2), (dense, 0), (dense, 1), (config, 1)])
    changed = {"num_hidden_layers": 4, "mlp_only_layers": [0, 2], "per_layer": [{"a": 3}, {"a": 4}, {"a": 5}, {"a": 2}]}
    assert result == config | changed
    assert result["per_layer"][0] is not config["per_layer"][2]
    none = restacked_config(config, stack_of(config, 3), [(config, 1)])
    assert none["mlp_only_layers"] == []


def test_a_text_model_and_the_same_model_inside_another_may_be_stacked_together():
    flat = {"model_type": "gemma2", "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    nested = {"model_type": "vlm", "layer_types": "of nothing", "text_config": flat | {"layer_types": [FULL, FULL]}}
    sources = [(flat, 0), (nested, 0), (flat, 1)]
    assert restacked_config(flat, stack_of(flat, 2), sources)["layer_types"] == [SLIDING, FULL, FULL]
    result = restacked_config(nested, stack_of(nested, 2, "language_model.model.layers."), sources)
    assert result["text_config"] == flat | {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL]}
    assert {k: v for k, v in result.items() if k != "text_config"} == {"model_type": "vlm", "layer_types": "of nothing"}


def test_a_source_without_the_list_takes_what_all_others_share_or_is_refused():
    base = {"model_type": "qwen2", "num_hidden_layers": 2, "layer_types": [FULL, FULL]}
    old = {"model_type": "qwen2", "num_hidden_layers": 4}
    result = restacked_config(base, stack_of(base, 2), [(base, 0), (old, 3)])
    assert result["layer_types"] == [FULL, FULL]
    mixed = base | {"layer_types": [FULL, SLIDING]}
    with pytest.raises(RecipeError, match="`layer_types` of its layer 3"):
        restacked_config(mixed, stack_of(mixed, 2), [(mixed, 0), (old, 3)])


def test_an_unknown_count_key_is_refused_where_the_count_changes():
    config = {"model_type": "odd", "kinds": ["a", "b", "c"]}
    stack = stack_of(config, 3, "blocks.")
    same = restacked_config(config, stack, [(config, 2), (config, 0), (config, 0)])
    assert same == config | {"kinds": ["c", "a", "a"]}
    with pytest.raises(RecipeError, match="3 layers of `blocks`"):
        restacked_config(config, stack, [(config, 2)])
    assert restacked_config({}, stack, [({}, 2)]) == {}
