"""Holds mixtures of experts against those of mergekit-moe: the same recipes on the same tiny models.

    python scripts/compare_mergekit_moe.py /path/to/mergekit-moe [--write docs/compat.md]

mergekit is not a dependency: install it in an environment of its own and name its executable. Models are of three
layers; for hidden states they are stored in bfloat16, which mergekit reads them in, otherwise in float32. Both outputs
are read by transformers, so that names on disk do not matter, but for DeepSeek's, for which it has no code: there the
files are compared. The figure is the largest difference of an entry relative to the largest of its tensor. Gates and
noise that both draw at random are compared by their standard deviation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.calibrate.prompts import Means, PromptStates

HF: Any = transformers  # whose classes say more of their arguments than is true
WORDS = [
    "the",
    "a",
    "of",
    "proof",
    "number",
    "sum",
    "code",
    "loop",
    "call",
    "return",
    "poem",
    "moon",
    "sea",
    "star",
    "why",
    "how",
]
BEGIN, END = "<!-- table: scripts/compare_mergekit_moe.py -->", "<!-- end of the table of mixtures -->"
COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
KINDS: dict[str, Any] = {
    "llama": lambda: HF.LlamaConfig(**COMMON),
    "mistral": lambda: HF.MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: HF.Qwen2Config(**COMMON),
    "qwen3": lambda: HF.Qwen3Config(**COMMON, head_dim=10),
}
PROMPTS = [
    ["the proof of the number", "sum", "how"],
    ["loop call return", "the code"],
    ["poem of the moon", "sea star"],
]
AGAINST = ["why the poem", "moon"]
DRAWN = {"random": 1.0, "uniform_random": (1 / 24 / 3) ** 0.5}  # standard deviations of what is drawn


@dataclass(frozen=True)
class Case:
    """One recipe: `output` is mergekit's name of the architecture, given to it where `named`; the first expert has
    `first` beside its prompts, the shared one `shared`, None where there is none."""

    output: str
    kind: str
    gates: str
    first: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] | None = None
    named: bool = False


_GATED: dict[str, Any] = {"positive_prompts": ["the sum of a number", "star"], "residual_scale": 0.5}
CASES = [
    *(Case("Mixtral", kind, gates) for kind in ("llama", "mistral") for gates in ("cheap_embed", "hidden", *DRAWN)),
    Case("Mixtral", "llama", "cheap_embed", {"residual_scale": 0.7}),
    Case("Mixtral", "llama", "cheap_embed", {"noise_scale": 0.1}),
    *(Case("Qwen", kind, gates, shared=_GATED) for kind in ("llama", "qwen2") for gates in ("cheap_embed", "hidden")),
    Case("Qwen", "qwen2", "random", shared={}),
    Case("Qwen", "mistral", "uniform_random", shared=_GATED, named=True),
    *(Case("Qwen3", "qwen3", gates) for gates in ("cheap_embed", "hidden", "random")),
    Case("DeepSeek", "llama", "cheap_embed", named=True),
    Case("DeepSeek", "llama", "hidden", {"residual_scale": 0.7}, {"residual_scale": 0.3}),
    Case("DeepSeek", "mistral", "random", shared={}),
]


def write_models(folder: Path) -> None:
    """Four models of every kind, in float32 and in bfloat16, with a tokenizer of words that begins texts, or of bytes
    that does not, as Qwen's."""
    ids = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = {word: number for number, word in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    in_bytes = Tokenizer(models.BPE(letters, []))
    in_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for kind, config in KINDS.items():
        plain = kind.startswith("qwen")
        fast = HF.PreTrainedTokenizerFast(
            tokenizer_object=in_bytes if plain else words,
            eos_token="</s>",
            pad_token="</s>",
            **({} if plain else {"bos_token": "<s>", "unk_token": "<unk>"}),
        )
        for number, name in enumerate(("base", "a", "b", "c")):
            torch.manual_seed(number)
            model = HF.AutoModelForCausalLM.from_config(config())
            for dtype in (torch.float32, torch.bfloat16):
                at = folder / str(dtype).removeprefix("torch.") / kind / name
                model.to(dtype).save_pretrained(at)
                fast.save_pretrained(at)


def recipe(case: Case, folder: Path) -> dict[str, Any]:
    """The recipe of a case, as data."""
    at = folder / ("bfloat16" if case.gates == "hidden" else "float32") / case.kind
    experts = [{"source_model": str(at / name), "positive_prompts": p} for name, p in zip("abc", PROMPTS, strict=True)]
    experts[0] |= case.first
    experts[1]["negative_prompts"] = AGAINST
    made: dict[str, Any] = {"base_model": str(at / "base"), "gate_mode": case.gates, "experts": experts}
    if case.shared is not None:
        # mergekit reads its weights only where it is the base or an expert too.
        made["shared_experts"] = [{"source_model": str(at / "base"), **case.shared}]
    return made | ({"architecture": case.output} if case.named else {}) | {"dtype": "float32"}


def compare(case: Case, executable: Path, folder: Path, number: int) -> str:
    """The row of one case."""
    at = folder / str(number)
    at.mkdir()
    theirs, ours, file = at / "theirs", at / "ours", at / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe(case, folder)), encoding="utf-8")
    command = [str(executable), str(file), str(theirs), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=_clean(), check=False)
    what = ", ".join(f"`{key}`" for key in (*case.first, *(("`shared_experts`",) if case.shared is not None else ())))
    head = f"| {case.output} | {case.kind} | {case.gates} | {what.replace('``', '`')} |"
    if done.returncode:
        return f"{head} mergekit fails: {done.stderr.strip().splitlines()[-1][:80]} | |"
    if case.gates == "hidden":
        PromptStates(file, Means(), at / "recipe.states").run(lambda count: None)
    run(plan(load_recipe(file), out=ours), threads=1)
    expected, found = (tensors(place, case.output == "DeepSeek") for place in (theirs, ours))
    odd = expected.keys() ^ found.keys()
    if case.output == "Qwen" and case.kind != "qwen2":
        # mergekit writes biases of zeros for attention, here config.json says that there are none.
        odd = {name for name in odd if not name.endswith("_proj.bias") or bool(expected[name].any())}
    if odd:
        return f"{head} other tensors: {sorted(odd)[:3]} | |"
    parts: dict[str, list[float]] = {"weights": [], "gates": [], "drawn": []}
    for name, x in expected.items():
        if name in found:
            y, gate = found[name], "gate.weight" in name and "proj" not in name
            noisy = "noise_scale" in case.first and "experts" in name
            if (gate and case.gates in DRAWN) or noisy:
                parts["drawn"] += [] if noisy else [float(x.std()), float(y.std())]
            gap = float((y.double() - x.double()).abs().max() / x.double().abs().max().clamp(min=1e-30))
            if not (gate and case.gates in DRAWN) and not noisy:
                parts["gates" if gate else "weights"].append(gap)
    weights = "the same bits" if max(parts["weights"]) == 0 else f"{max(parts['weights']):.1e}"
    if "noise_scale" in case.first:
        weights += f"; noise of {_noise(expected, folder, case):.3f} there, {_noise(found, folder, case):.3f} here"
    if parts["drawn"]:
        there, here = (sum(parts["drawn"][start::2]) / len(parts["drawn"][start::2]) for start in (0, 1))
        return (
            f"{head} {weights} | drawn: deviation {there:.2g} there, {here:.2g} here, {DRAWN[case.gates]:.2g} meant |"
        )
    return f"{head} {weights} | {max(parts['gates']):.1e} |"


def _noise(found: dict[str, torch.Tensor], folder: Path, case: Case) -> float:
    """The standard deviation of what the first expert has beyond its model, in a layer's matrix out of the units."""
    fused = "model.layers.1.mlp.experts.down_proj"
    source = load_file(folder / "float32" / case.kind / "a" / "model.safetensors")
    return float((found[fused][0] - source["model.layers.1.mlp.down_proj.weight"]).std())


def tensors(folder: Path, raw: bool) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint as transformers has them in memory, or, `raw`, as they are in the files."""
    if raw:
        return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}
    model, told = HF.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told.values()), (folder, told)
    return dict(model.state_dict())


def _clean() -> dict[str, str]:
    """The environment without this program's import path, which is not that of the other one."""
    return {key: text for key, text in os.environ.items() if not key.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executable", type=Path, help="mergekit-moe of an environment that has mergekit")
    parser.add_argument("--write", type=Path, help="a Markdown file whose table is replaced")
    options = parser.parse_args()
    HF.utils.logging.disable_progress_bar()
    rows = ["| output | from | `gate_mode` | with | other weights | gates |", "| - | - | - | - | - | - |"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder)
        for number, case in enumerate(CASES):
            rows.append(compare(case, options.executable, folder, number))
            print(rows[-1], flush=True)
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
        options.write.write_text(text[:before] + "\n\n" + "\n".join(rows) + "\n\n" + text[after:], encoding="utf-8")


if __name__ == "__main__":
    main()
