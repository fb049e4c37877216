"""From Hub ids to a Hub id: three Llamas and a LoRA adapter on a Hub on loopback are planned, streamed, merged,
verified, pushed and loaded again by transformers, every step a command of its own.

    python scripts/hub_ids.py [--faults] [--xet] [--pr]

It prints what was fetched beside what was needed, and how far the logits are from those of the same merge computed
whole in torch. `--faults` has a fifth of all requests fail or break off while the merge streams.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "hub")]

TOKEN = "hf_loopbackTOKEN0123456789"
WEIGHTS = {"math": 0.7, "code": 0.5}
RECIPE = f"""\
version: 1
models:
  base: org/base
  math: org/math
  code: {{path: org/base, adapter: org/code-lora}}
steps:
  merged:
    use: task_arithmetic
    base: base
    of: {{math: {{weight: {WEIGHTS["math"]}}}, code: {{weight: {WEIGHTS["code"]}}}}}
    with: {{lambda: 1.0}}
save: {{to: out/merged, dtype: float32, shard: 300KB}}
"""
LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[2])
with torch.no_grad():
    json.dump(model(torch.tensor([json.loads(sys.argv[3])])).logits[0].tolist(), open(sys.argv[4], "w"))
"""
TOKENS = [1, 17, 42, 99, 5, 64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--faults", "--xet", "--pr"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = whole_way(Path(folder), faults=options.faults, xet=options.xet, pr=options.pr)
    width = max(map(len, found))
    for name, figure in found.items():
        print(f"{name:<{width}}  {figure:,}" if isinstance(figure, int) else f"{name:<{width}}  {figure}")


def whole_way(folder: Path, *, faults: bool = False, xet: bool = False, pr: bool = False) -> dict[str, Any]:
    """The figures. All models are private, and `org/merged` is as well; with `pr` the merge is a pull request there,
    with `xet` large files lie in Xet. Raises RuntimeError where a command fails, with what it said."""
    Hub = importlib.import_module("server").Hub
    with Hub(seed=3) as hub:
        hub.xet = xet
        hub.users[TOKEN], hub.orgs["me"] = "me", ["org"]
        parents = make_parents(folder / "parents")
        for name in ("base", "math", "code-lora"):
            hub.add(f"org/{name}", folder / "parents" / name, private=True, readers={"me"})
        (folder / "r.yaml").write_text(RECIPE)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
        environment |= hub.environment(folder / "home", TOKEN) | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}

        def command(*words: str) -> str:
            done = subprocess.run(
                [sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
            )
            said = done.stdout + done.stderr
            if done.returncode:
                raise RuntimeError(f"{words[:3]} left with {done.returncode}:\n{said}")
            if TOKEN in said or hub.signature in said:
                raise RuntimeError(f"{words[:3]} shows a token or a signed address")
            return done.stdout

        def merge(*words: str) -> Any:
            return json.loads(command("-m", "mergekit_lite", *words, "--json"))

        planned = merge("plan", "r.yaml")
        plan_bytes, hub.log = hub.sent(), []
        if faults:
            hub.faults[:] = _faults()
        ran = merge("run", "r.yaml", "--fetch", "stream")
        struck, hub.faults[:] = sum(fault.hit for fault in hub.faults), []
        headers = sum(r.sent for r in hub.log if r.range == "bytes=0-65535")
        requests, fetched, hub.log = len(hub.log), hub.sent("/objects/|/xet-bridge-us/") - headers, []
        kept = sum(path.stat().st_size for path in (folder / "home").rglob("*.safetensors"))
        merge("verify", "out/merged")
        pushed = merge("push", "out/merged", "org/merged", *(["--pr"] if pr else []))
        if not hub.repos["org/merged"].private:
            raise RuntimeError("the new repository is not private")
        command(
            "-c", LOAD, "org/merged", "refs/pr/1" if pr else "main", json.dumps(TOKENS), str(folder / "logits.json")
        )
        logits = json.loads((folder / "logits.json").read_text())
    wanted = logits_of(parents, WEIGHTS)
    return {
        "bytes that the plan fetched": plan_bytes,
        "bytes of the parents' weights": sum(
            path.stat().st_size for path in (folder / "parents").rglob("*.safetensors")
        ),
        "bytes to fetch by the plan": planned["bytes_fetched"],
        "bytes of headers fetched by the run": headers,
        "bytes of weights fetched by the run": fetched,
        "bytes of weights left in the cache": kept,
        "requests of the run": requests,
        "requests that failed": struck,
        "bytes pushed": pushed["bytes"],
        "largest difference of logits": max(
            abs(a - b) for one, other in zip(logits, wanted, strict=True) for a, b in zip(one, other, strict=True)
        ),
        "largest logit": max(abs(a) for row in wanted for a in row),
        "digests": " ".join(shard["blake3"][:12] for shard in ran["outputs"][0]["shards"]),
    }


def _faults() -> list[Any]:
    """A fifth of all requests."""
    Fault = importlib.import_module("server").Fault
    soon = {"Retry-After": "0"}
    return [
        *(Fault(share=0.05, status=status, headers=soon) for status in (429, 500, 503)),
        Fault(share=0.06, cut=lambda draw, length: draw.randrange(length)),
    ]


def make_parents(folder: Path) -> dict[str, Any]:
    """`base` and `math`, each a Llama of two layers in several shards, and `code-lora`, an adapter of `base`, as
    transformers and peft save them; gives the first two as state dicts, and as `code` the base with the adapter folded
    in by peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    made = {}
    for seed, name in enumerate(("base", "math")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
        model.save_pretrained(folder / name, max_shard_size="200KB")
        made[name] = model
    torch.manual_seed(2)
    targets = ["q_proj", "v_proj", "down_proj"]
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    adapted: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(folder / "code-lora")
    config = json.loads((folder / "code-lora" / "adapter_config.json").read_text())
    # peft writes the modules in the order of a set, which is another one in every process.
    config |= {"base_model_name_or_path": "org/base", "target_modules": sorted(config["target_modules"])}
    (folder / "code-lora" / "adapter_config.json").write_text(json.dumps(config))
    made["code"] = adapted.merge_and_unload()
    # A card of peft's names the base by its folder; nothing else of it matters here.
    for path in folder.rglob("README.md"):
        path.write_text(re.sub(r"base_model:.*", "base_model: org/base", path.read_text()))
    return made


def logits_of(parents: dict[str, Any], weights: dict[str, float]) -> list[list[float]]:
    """The logits of the same merge, computed whole in double precision."""
    import torch

    base = {name: tensor.double() for name, tensor in parents["base"].state_dict().items()}
    states = {name: parents[name].state_dict() for name in weights}
    merged = {
        name: tensor + sum(weight * (states[model][name].double() - tensor) for model, weight in weights.items())
        for name, tensor in base.items()
    }
    model = parents["base"]
    model.load_state_dict({name: tensor.float() for name, tensor in merged.items()})
    with torch.no_grad():
        return [list(row) for row in model(torch.tensor([TOKENS])).logits[0].tolist()]


if __name__ == "__main__":
    main()
