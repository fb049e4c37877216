"""`merge stats THEIR.yml`: what a base makes of the prompts of a recipe of mergekit-moe's, a file for each list of
them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.calibrate.data import tokenizer_of
from mergekit_lite.calibrate.examples import forward
from mergekit_lite.calibrate.file import FORMAT, check_free, new_folder, write_statistics
from mergekit_lite.calibrate.measure import device_memory, limited_threads
from mergekit_lite.calibrate.memory import Need, free_memory, need
from mergekit_lite.calibrate.model import check_loadable, load, skeleton
from mergekit_lite.errors import InputError, Problem, RecipeError, UsageError
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.recipe.mergekit import Wanted, is_mergekit, wanted_states
from mergekit_lite.recipe.read import read_file
from mergekit_lite.recipe.source import load_all


@dataclass(frozen=True, slots=True)
class Means:
    """Where passes run and what they may take, as for other statistics."""

    device: str = "cpu"
    device_map: str | None = None
    memory: int | None = None
    threads: int = 1
    offline: bool = False


def read_wanted(path: Path) -> Wanted:
    """The hidden states that the recipe `path` needs. Raises InputError and RecipeError where it cannot be read, and
    UsageError where it needs none."""
    problems: list[Problem] = []
    nodes = load_all(read_file(path), str(path), problems, is_mergekit)
    wanted = wanted_states(nodes, str(path), problems)
    if problems:
        raise RecipeError(problems)
    if wanted is None:
        message = f"`{path}` needs no hidden states"
        hint = "name a model; of recipes only those of mergekit-moe's with `gate_mode: hidden` have prompts for a pass"
        raise UsageError(message, hint=hint)
    return wanted


class PromptStates:
    """A loaded base and the tokens of all texts. `steps` is how many texts there are, `need` the memory."""

    def __init__(self, path: Path, means: Means, out: Path):
        """Raises UsageError, InputError, RecipeError and StoppedError before anything is written."""
        from mergekit_lite.report.look import open_location
        from mergekit_lite.run.device import find_device

        self._wanted, self._means, self._out, self._recipe = read_wanted(path), means, out, path
        base = self._wanted.base
        if base.lora is not None:
            hint = "fold it in first (`merge run`), and name what comes out as `base_model`"
            raise InputError(f"the base `{base.path}` has an adapter", mark=base.mark, hint=hint)
        check_free(out)
        self._location = base.path + (f"@{base.revision}" if base.revision else "")
        self._checkpoint = open_location(self._location, means.offline)
        check_loadable(self._checkpoint, self._location)
        frame = skeleton(self._checkpoint, self._location)
        folder = self._checkpoint.folder
        assert folder is not None
        self._tokens = self._encoded(folder, frame.config, frame.get_input_embeddings().num_embeddings)
        longest = max(len(row) for rows in self._tokens.values() for row in rows)
        weights = sum(m.nbytes * (2 if m.dtype == "F16" else 1) for m in self._checkpoint.tensors.values())
        self.need: Need = need(
            frame,
            {},
            ("hidden",),
            weights=weights if means.device_map is None and means.device == "cpu" else 0,
            tokens=longest,
            examples=self.steps,
            free=free_memory(means.memory),
        )
        self._loaded = load(self._checkpoint, self._location, find_device(means.device), means.device_map)

    @property
    def steps(self) -> int:
        return sum(map(len, self._tokens.values()))

    @property
    def tokens(self) -> int:
        return sum(len(row) for rows in self._tokens.values() for row in rows)

    def run(self, advance: Callable[[int], object]) -> dict[str, int]:
        """Gather and write; how many texts each file is of. Nothing is left where this does not come to its end."""
        with new_folder(self._out) as folder, limited_threads(self._means.threads), device_memory():
            said = self._provenance()
            for name, rows in self._tokens.items():
                states = torch.stack([self._states(row, advance) for row in rows])
                mean = states.double().mean(dim=0).float()
                texts = json.dumps(self._wanted.files[name]).encode()
                about = {"data_digest": f"sha256:{hashlib.sha256(texts).hexdigest()}", "examples": str(len(rows))}
                write_statistics(folder / name, {"hidden_states": states, "mean": mean}, said | about)
        return {name: len(rows) for name, rows in self._tokens.items()}

    def _states(self, row: list[int], advance: Callable[[int], object]) -> Tensor:
        """(layers, width): what goes into each layer at the text's last token, or the mean over its tokens."""
        batch = {"input_ids": torch.tensor([row], device=self._loaded.device)}
        with torch.no_grad():
            output = forward(self._loaded.network, batch, output_hidden_states=True)
        found = getattr(output, "hidden_states", None)
        if not found or any(state.dim() != 3 for state in found):
            raise InputError(f"`{type(self._loaded.network).__name__}` gives no hidden states")
        advance(1)
        states = torch.stack([state[0].float().cpu() for state in found[:-1]])  # the last one has left the last layer
        return states[:, -1] if self._wanted.last else states.mean(dim=1)

    def _encoded(self, folder: Path, config: object, rows: int) -> dict[str, list[list[int]]]:
        tokenizer = tokenizer_of(folder, self._location)
        lead = tokenizer.bos_token or ""
        most = getattr(config, "max_position_embeddings", None)
        made = {
            name: [tokenizer(lead + text, add_special_tokens=False)["input_ids"] for text in texts]
            for name, texts in self._wanted.files.items()
        }
        mark = self._wanted.base.mark
        for row in (row for found in made.values() for row in found):
            if not row:
                raise InputError("a prompt has no tokens", mark=mark, hint="give a text of what the expert is for")
            if isinstance(most, int) and len(row) > most:
                message = f"a prompt has {len(row)} tokens, `{self._location}` takes {most}"
                raise InputError(message, mark=mark, hint="shorten it")
            if max(row) >= rows:
                hint = "are tokenizer and weights from one model?"
                raise InputError(f"the tokenizer gives tokens beyond the {rows} of the embedding", mark=mark, hint=hint)
        return made

    def _provenance(self) -> dict[str, str]:
        """What stands in the metadata of each file: no time and no path of this machine."""
        from mergekit_lite.plan.lock import version
        from mergekit_lite.run.digest import file_digests

        checkpoint = self._checkpoint
        shards = [Path(shard.path) for shard in checkpoint.shards]
        digests = file_digests(shards, self._means.threads)
        return {
            "format": FORMAT,
            "kind": "hidden",
            "collected": "hidden",
            "model": checkpoint.location if checkpoint.revision else Path(checkpoint.location).name,
            "revision": checkpoint.revision or "",
            "model_digests": json.dumps({path.name: f"blake3:{digests[str(path)]}" for path in shards}),
            "data": self._recipe.name,
            "position": "last" if self._wanted.last else "mean",
            "compute_dtype": str(self._loaded.network.dtype).removeprefix("torch."),
            "versions": json.dumps({name: version(name) for name in ("mergekit_lite", "torch", "transformers")}),
        }
