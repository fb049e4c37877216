"""The recipe as data: what `read` makes of a text and `plan` works from. No torch, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.errors import Mark, Problem
from mergekit_lite.recipe.value import Value


@dataclass(frozen=True, slots=True)
class Ref:
    """A mention of a model or a step by name. Inline paths and Hub ids become models whose name is the text itself."""

    name: str
    mark: Mark


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint to load: `location` is a path or a Hub id, `revision` what stood after `@`. `adapter` and its
    revision are those of an adapter that is folded in; without a location it is a delta by itself. `absent` is the
    finding where there is nothing yet."""

    name: str
    location: str
    revision: str | None
    mark: Mark
    adapter: str | None = None
    adapter_revision: str | None = None
    absent: Problem | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a step with its own settings (`of: {math: {weight: 0.5}}`)."""

    ref: Ref
    params: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One use of a method. `params` are the settings under `with`; `mark` points at the step's name, `use_mark` at the
    method's. `missing` says what to do with tensors that only some inputs have; `rest` is the model that gives `stack`
    the tensors outside the layers, save the embeddings where `below` is named and the others where `above` is."""

    name: str
    use: str
    of: tuple[Input, ...]
    base: Ref | None
    params: Mapping[str, Value]
    mark: Mark
    use_mark: Mark
    missing: str = "error"
    rest: Ref | None = None
    below: Ref | None = None
    above: Ref | None = None


@dataclass(frozen=True, slots=True)
class AsLora:
    """A save as an adapter of `base`, of the kind `form` (`lora`, `lokr`): factors of `rank`, or of the least rank, up
    to that, which keeps the share `energy` of the squared norm of every change. `targets` are globs of the tensors that
    may change, none: all."""

    base: Ref
    rank: int | None
    energy: float | None
    svd: str
    targets: tuple[str, ...]
    mark: Mark
    form: str = "lora"


@dataclass(frozen=True, slots=True)
class AsMasks:
    """A save as a mask store: `base`, the multi-task vector that the save's step is, and for each of `tasks`, models or
    steps by name, one bit for every entry of the vector: whether the task uses it, which `thresholds` decides. With
    `compress`, `zstd`, the bits are coded."""

    base: Ref
    tasks: Mapping[str, Ref]
    thresholds: Mapping[str, float]
    mark: Mark
    compress: str | None = None


@dataclass(frozen=True, slots=True)
class Push:
    """Where an output is published once the run is done: the repository `repo` of the Hub, as a commit on `branch`
    (None: main) or as a pull request. `private` None means: private where the repository is made. `message` is the
    commit's."""

    repo: str
    mark: Mark
    private: bool | None = None
    branch: str | None = None
    pr: bool = False
    message: str | None = None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Where the embedding row of one token comes from: `kind` is `default` (the usual fallbacks), `model` (that model's
    row of the same token), `model_token` (another token of that model, by `token` or `token_id`) or `zero`. `force`
    takes it even for models that have the token."""

    kind: str
    mark: Mark
    model: Ref | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What the output's tokenizer shall be. `source` is `base`, `union`, the model whose tokenizer is taken, or None:
    the files of the model that gives the configuration, and no tensor changes. `chat_template` is `auto`, the model
    whose template is taken, a template's name or its text, None: the one in these files. `base` is the model whose rows
    are taken for tokens that another lacks, None: that of the saved step."""

    source: str | Ref | None
    mark: Mark
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    chat_template: str | Ref | None = None
    base: Ref | None = None


@dataclass(frozen=True, slots=True)
class Save:
    """One output folder. `step` None means: the only step that no other uses. `to` None means: `--out` gives it.
    `dtype` None keeps the stored dtypes. `shard` is the most bytes of tensors in one file. With `lora` an adapter is
    saved, with `masks` a mask store, not a model. `push` None publishes nothing, `tokenizer` None leaves the
    vocabulary as it is. With `quantize`, `fp8`, weights of linear layers are stored in FP8 with scales."""

    step: Ref | None
    to: str | None
    dtype: str | None
    shard: int
    mark: Mark
    lora: AsLora | None = None
    push: Push | None = None
    tokenizer: Tokenizer | None = None
    masks: AsMasks | None = None
    quantize: str | None = None

    @property
    def beside(self) -> tuple[Ref, ...]:
        """The models and steps that are read beside the saved one."""
        lora = (self.lora.base,) if self.lora is not None else ()
        return (*lora, *((self.masks.base, *self.masks.tasks.values()) if self.masks is not None else ()))


@dataclass(frozen=True, slots=True)
class Scoring:
    """How good a merge is: `command` is given its folder and prints a number, or JSON that holds it at `metric`. `goal`
    is `max` or `min`, `timeout` in seconds. `screen` is a cheaper score that a search looks at first."""

    name: str
    command: str
    metric: str | None
    goal: str
    timeout: float | None
    mark: Mark
    screen: Scoring | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe. Mappings keep the order of the text; `text` is the source, kept beside the output. `compute` is
    the dtype of the arithmetic. `overrides` are the settings that the command line changed (`--set`). `lock` is what an
    earlier run noted of its inputs and outputs, where the recipe is a lock file. `scores` say how good its result is;
    they change nothing of it."""

    models: Mapping[str, Model]
    steps: Mapping[str, Step]
    saves: tuple[Save, ...]
    seed: int
    file: str
    text: str
    version: int = 1
    compute: str = "float32"
    overrides: tuple[str, ...] = ()
    lock: Mapping[str, Any] | None = None
    notes: tuple[Problem, ...] = ()
    scores: tuple[Scoring, ...] = ()
