"""A checkpoint as a network of transformers, ready for a forward pass. No code of the checkpoint's is run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mergekit_lite import sandbox
from mergekit_lite.calibrate.examples import no_head
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import InputError, StoppedError, UsageError
from mergekit_lite.lazy import torch
from mergekit_lite.plan.words import few
from mergekit_lite.report.quiet import quiet

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_EXTRA = "pip install 'mergekit_lite[calibrate]'"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network in evaluation mode and where its inputs belong. `causal`, `masked`: what it predicts of text."""

    network: Any
    device: Any
    causal: bool
    masked: bool


def transformers() -> Any:
    """The library. Raises InputError where it is missing or too old."""
    try:
        import transformers.core_model_loading  # since 5.0
    except ImportError as fault:
        message = "statistics need transformers 5 or newer, which is not installed"
        raise InputError(message, hint=_EXTRA) from fault
    return transformers


def check_loadable(checkpoint: Checkpoint, location: str) -> None:
    """Raises InputError for what no forward pass can be made of."""
    config = checkpoint.config
    if checkpoint.folder is None or location.endswith(".safetensors"):
        raise InputError(f"`{location}` is one file", hint="give the folder, with config.json beside the weights")
    if not isinstance(config.get("model_type"), str):
        hint = "in Python, `mergekit_lite.collect(network, batches)` takes any torch network"
        raise InputError(f"config.json of `{location}` names no model type, so transformers cannot build it", hint=hint)
    if config.get("quantization_config"):
        hint = "take the model that it was made from, in bfloat16: its statistics serve both"
        raise InputError(f"`{location}` is quantised", hint=hint)
    box = sandbox.current()
    if box is not None:
        # The tokenizer's files are opened by code that no audit hook hears.
        found = [box.refusal(path) for path in sorted(checkpoint.folder.rglob("*"))]
        problems = [problem for problem in found if problem is not None]
        if problems:
            raise InputError(problems)


def load(checkpoint: Checkpoint, location: str, device: Any, device_map: str | None) -> Loaded:
    """The network of a checkpoint in its stored dtype (float16 as float32, whose range the squares need) on `device`,
    or spread over devices by accelerate as `device_map` says.

    Raises InputError where transformers cannot build it, or would make up weights that the checkpoint lacks, and
    StoppedError where a device has too little memory.
    """
    library = transformers()
    half = [meta.numel for meta in checkpoint.tensors.values() if meta.dtype == "F16"]
    dtype = torch.float32 if 2 * sum(half) > sum(m.numel for m in checkpoint.tensors.values()) else "auto"
    if device_map is not None and device_map not in MAPS:
        raise UsageError(f"there is no device map `{device_map}`", hint=", ".join(f"`{name}`" for name in MAPS))
    with quiet(transformers()), _refusals(location):
        config = library.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        made, said = _class(library, config).from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            experts_implementation="eager",  # the other forms hide the inputs of each expert
            device_map=device_map,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        missing = sorted(said["missing_keys"])
        if missing:
            message = f"`{location}` lacks weights that `{type(made).__name__}` needs: {few(missing)}"
            hint = "`architectures` in config.json names the class; with random weights the statistics mean nothing"
            raise InputError(message, hint=hint)
        network = made.eval() if device_map is not None else made.to(device).eval()
    network.config.use_cache = False
    at = device if device_map is None else next(p.device for p in network.parameters() if not p.is_meta)
    kinds = library.models.auto.modeling_auto
    name = type(network).__name__
    causal = name in kinds.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not config.is_encoder_decoder
    masked = name in kinds.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and not config.is_encoder_decoder
    return Loaded(network, at, causal, masked and not causal)


def skeleton(checkpoint: Checkpoint, location: str) -> Any:
    """The network of a checkpoint without its weights, whose tensors have shapes alone. Raises as `load`."""
    library = transformers()
    with quiet(transformers()), _refusals(location), torch.device("meta"):
        config = library.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        named = _class(library, config)
        return named.from_config(config) if named is library.AutoModelForCausalLM else named(config)


def _class(library: Any, config: Any) -> Any:
    """The class that config.json names, of transformers' own, else a causal language model."""
    for name in config.architectures or ():
        named = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(named, type) and issubclass(named, library.PreTrainedModel):
            return named
    if config.architectures:
        message = f"transformers has no class {few(config.architectures)}, which config.json names"
        raise InputError(message, hint="no code of a checkpoint is run; a newer transformers may have it")
    return library.AutoModelForCausalLM


def check_predicts(network: Any) -> None:
    """Raises InputError where a network has no head, or one that does not choose one class of several."""
    name = type(network).__name__
    problem = getattr(network.config, "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        hint = "Fisher information and confidence are those of one class out of several"
        raise InputError(f"config.json says `problem_type: {problem}`, which is no choice of one class", hint=hint)
    bare = transformers().models.auto.modeling_auto.MODEL_MAPPING_NAMES.values()
    if any(name == one or (isinstance(one, tuple | list) and name in one) for one in bare):
        raise no_head(name)


@contextlib.contextmanager
def _refusals(location: str) -> Iterator[None]:
    from mergekit_lite.errors import MergeError
    from mergekit_lite.limits import refusal

    try:
        yield
    except (MergeError, KeyboardInterrupt):
        raise
    except torch.OutOfMemoryError as fault:
        hint = "take `--device cpu`, or `--device-map auto`"
        raise StoppedError("the device has too little memory for this model", hint=hint) from fault
    except Exception as fault:  # transformers raises whatever it raises
        if refusal(fault) is not None and not isinstance(fault, OSError):
            raise
        lines = str(fault).strip().splitlines()
        said = lines[0][:300] if lines else type(fault).__name__
        raise InputError(f"transformers cannot load `{location}`: {said}") from fault
