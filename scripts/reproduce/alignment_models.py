"""Networks that are trained apart, from initial weights of their own: what permutations are measured on
(`make reproduce`).

Fully connected networks, a convolutional one with BatchNorm and a Vision Transformer learn scikit-learn's digits, a
Llama learns the source text of Python's standard library byte by byte. All numbers are those of `Net`.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

Weights = dict[str, Tensor]
FAMILIES = Path(__file__).parents[2] / "recipes" / "families"
CONTEXT = 128  # bytes of source text in one example
HEADS = 4
TEXT_BYTES = 3_000_000


@dataclass(frozen=True)
class Net:
    """A network and how it is trained. `kind`: mlp, cnn, vit or llama. `train` is the number of examples seen in each
    epoch; an example of `llama` is 128 bytes long."""

    kind: str
    width: int
    layers: int
    epochs: int
    batch: int
    rate: float
    train: int = 1200
    decay: float = 0.0

    @property
    def family(self) -> str | None:
        """The file that says which units may change places, where the program does not know it."""
        return str(FAMILIES / f"digits_{self.kind}.yaml") if self.kind in ("mlp", "cnn") else None

    def module(self) -> nn.Module:
        """A new network, its initial weights drawn from torch's generator."""
        if self.kind == "mlp":
            return Mlp(self.width, self.layers)
        if self.kind == "cnn":
            return Cnn(self.width, self.layers)
        # Kept out of the demo and the tests, which need no transformers.
        import transformers

        common: dict[str, Any] = {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS,
            "attn_implementation": "eager",
        }
        if self.kind == "vit":
            common |= {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
            vit = transformers.ViTConfig(**common, intermediate_size=2 * self.width)
            return cast(nn.Module, transformers.ViTForImageClassification(vit))
        llama = transformers.LlamaConfig(
            **common,
            intermediate_size=3 * self.width,
            num_key_value_heads=HEADS // 2,
            vocab_size=256,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
        return cast(nn.Module, transformers.LlamaForCausalLM(llama))

    def config(self, module: nn.Module) -> dict[str, Any]:
        """What stands in config.json."""
        stated = getattr(module, "config", None)
        if stated is not None:
            return dict(stated.to_dict())
        sizes = {"num_hidden_layers": self.layers, "hidden_size": self.width}
        return {"model_type": f"digits_{self.kind}", **sizes}


class Mlp(nn.Module):
    """64 pixels, `layers` layers of `width` units with ReLU, 10 scores. Tensors are named as the demo's."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        units = [nn.Linear(width if index else 64, width) for index in range(layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(units)})
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = pixels.flatten(1)
        for layer in cast(nn.ModuleList, self.encoder["layers"]):
            hidden = torch.relu(layer(hidden))
        return cast(Tensor, self.head(hidden))


class Cnn(nn.Module):
    """Convolutions of 3x3 with BatchNorm and ReLU, the second with stride 2, the mean over the pixels, 10 scores."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv": nn.Conv2d(
                        width if index else 1, width, 3, padding=1, stride=2 if index == 1 else 1, bias=False
                    ),
                    "norm": nn.BatchNorm2d(width),
                }
            )
            for index in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = pixels
        for layer in self.layers:
            parts = cast(nn.ModuleDict, layer)
            hidden = torch.relu(parts["norm"](parts["conv"](hidden)))
        return cast(Tensor, self.head(hidden.mean((2, 3))))


@dataclass(frozen=True)
class Data:
    """Inputs and labels by split: images (n, 1, 8, 8) and labels (n,), or bytes (n, 128) and the bytes that follow."""

    inputs: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]


def data(net: Net, seed: int) -> Data:
    """The digits in an order drawn from `seed`, the first `train` of them for training and the rest for the test; or
    windows of source text, those of the test from its last tenth."""
    if net.kind == "llama":
        return _text(net.train, seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[order][:, None]
    labels = torch.tensor(digits.target)[order]
    cuts = {"train": slice(0, net.train), "test": slice(net.train, None)}
    return Data({s: images[cut] for s, cut in cuts.items()}, {s: labels[cut] for s, cut in cuts.items()})


def _text(train: int, seed: int) -> Data:
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)[:TEXT_BYTES]), dtype=torch.uint8)
    held = len(text) * 9 // 10
    generator = torch.Generator().manual_seed(seed)
    starts = {
        "train": torch.randint(held - CONTEXT - 1, (train,), generator=generator),
        "test": torch.randint(held, len(text) - CONTEXT - 1, (64,), generator=generator),
    }
    windows = {split: text[at[:, None] + torch.arange(CONTEXT + 1)].long() for split, at in starts.items()}
    return Data({s: w[:, :-1] for s, w in windows.items()}, {s: w[:, 1:] for s, w in windows.items()})


def scores(module: nn.Module, weights: Mapping[str, Tensor] | None, inputs: Tensor) -> Tensor:
    """Scores (n, classes) of the network, with these weights in place of its own if there are any."""
    found = module(inputs) if weights is None else functional_call(module, dict(weights), (inputs,))
    found = getattr(found, "logits", found)
    return cast(Tensor, found.flatten(0, -2))


@dataclass(frozen=True)
class Judge:
    """Measures the loss and the accuracy of weights, named as in a checkpoint. Of large splits it looks at the first
    examples."""

    net: Net
    seed: int
    most: int = 2000

    @cached_property
    def module(self) -> nn.Module:
        return self.net.module().eval()

    @cached_property
    def names(self) -> dict[str, str]:
        return stored_names(self.module)

    @cached_property
    def data(self) -> Data:
        return data(self.net, self.seed)

    def measure(self, weights: Mapping[str, Tensor], split: str) -> tuple[float, float]:
        """Mean cross-entropy and accuracy."""
        inputs, labels = self.data.inputs[split][: self.most], self.data.labels[split][: self.most].flatten()
        own = {self.names[name]: tensor for name, tensor in weights.items()}
        with torch.no_grad():
            found = torch.cat([scores(self.module, own, part) for part in inputs.split(256)])
            right = (found.argmax(1) == labels).double().mean()
            return float(cross_entropy(found, labels)), float(right)


def trained(net: Net, seed: int, split: int, cache: Path) -> Weights:
    """The network of initial weights and batches drawn from `seed`, trained on the training data of `split` or read
    from the folder `cache`."""
    file = cache / f"{net.kind}-{net.width}-{split}-{seed}-{_digest(net)}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file(_train(net, seed, data(net, split)), partial)
        partial.rename(file)
    return load_file(file)


def _train(net: Net, seed: int, given: Data) -> Weights:
    """Adam over shuffled batches, its rate rising and falling in one cycle."""
    torch.manual_seed(1000 + seed)
    module = net.module().train()
    inputs, labels = given.inputs["train"], given.labels["train"]
    optimizer = torch.optim.AdamW(module.parameters(), lr=net.rate, weight_decay=net.decay)
    steps = net.epochs * -(-len(inputs) // net.batch)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, net.rate, total_steps=steps)
    for _ in range(net.epochs):
        for seen in torch.randperm(len(inputs)).split(net.batch):
            optimizer.zero_grad()
            cross_entropy(scores(module, None, inputs[seen]), labels[seen].flatten()).backward()
            optimizer.step()
            cycle.step()
    state = module.state_dict()
    return {stored: state[own].detach().clone() for stored, own in stored_names(module).items()}


def stored_names(module: nn.Module) -> dict[str, str]:
    """The names of the tensors in a checkpoint, each with the module's own name, which transformers may change."""
    if not hasattr(module, "save_pretrained"):
        return {name: name for name in module.state_dict()}
    import transformers

    cast(Any, transformers.utils.logging).disable_progress_bar()
    marked = copy.deepcopy(module)
    names = list(marked.state_dict())
    for number, tensor in enumerate(marked.state_dict().values()):
        tensor.fill_(number)
    with tempfile.TemporaryDirectory() as folder:
        cast(Any, marked).save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
    return {name: names[int(tensor.flatten()[0])] for name, tensor in stored.items()}


def _digest(net: Net) -> str:
    """Changes with everything that the models depend on, this file included."""
    text = f"{Path(__file__).read_text(encoding='utf-8')}{asdict(net)}{torch.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]
