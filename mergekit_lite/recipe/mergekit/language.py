"""mergekit's methods as data: their parameters and defaults, and what each is called in the native language.

As of mergekit 0.1.5. `TABLE` names every method; whether this program has it is checked with all other steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mergekit_lite.recipe.value import Scalar

NO_EFFECT = "it changed how much memory mergekit takes, never the result"
Kind = Literal["number", "integer", "flag"]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


def _same(value: float | bool) -> Scalar:
    return value


@dataclass(frozen=True, slots=True)
class Setting:
    """One parameter of mergekit's. `to` is the native setting, None where it has none; `value` turns a value into the
    native one. `implied` is what the native method takes by itself, so that it need not be written. `unused` says why
    a parameter without a native setting changes nothing. A `share` lies above 0 and up to 1; a setting `of_step` is
    one of an input there and of the step here."""

    name: str
    kind: Kind
    default: float | bool | _Required | None
    per_input: bool = False
    to: str | None = None
    value: Callable[[float | bool], Scalar] = _same
    implied: Scalar = None
    unused: str | None = None
    share: bool = False
    of_step: bool = False


@dataclass(frozen=True, slots=True)
class TheirMethod:
    """One method. `base` says what mergekit does with `base_model`: `delta` takes it out of the inputs, `first` makes
    it the first input, `input` leaves it one input among others. `low` and `high` bound the number of inputs, the base
    included where it is `needed`. A `lone` method copies the only input there is. The native method of one with
    `compat` has that flag. `fixed` are native settings that mergekit's habits ask for. `joined` makes one native
    setting of several parameters."""

    use: str
    base: Literal["delta", "first", "input"]
    settings: tuple[Setting, ...]
    needed: bool = False
    low: int = 1
    high: int | None = None
    lone: bool = False
    compat: bool = False
    fixed: Mapping[str, Scalar] = field(default_factory=dict)
    joined: tuple[tuple[str, ...], str, Callable[..., Scalar]] | None = None


def _aggregate(normalize: float | bool) -> Scalar:
    return "mean" if normalize else "sum"


def _rows(filter_wise: float | bool) -> Scalar:
    return "row" if filter_wise else "tensor"


def _drop_rate(density: float | bool) -> Scalar:
    return 1.0 - density


def _nuslerp_mode(flatten: bool, row_wise: bool) -> Scalar:
    return "tensor" if flatten else "column" if row_wise else "row"


def _weight(implied: Scalar = None) -> Setting:
    return Setting("weight", "number", REQUIRED, per_input=True, to="weight", implied=implied)


def _density(to: str = "density", value: Callable[[float | bool], Scalar] = _same) -> Setting:
    return Setting("density", "number", 1.0, per_input=True, to=to, value=value, share=True)


def _lambda(implied: Scalar = None) -> Setting:
    return Setting("lambda", "number", 1.0, to="lambda", implied=implied)


def _flag(name: str, default: bool, to: str, implied: bool | None = None) -> Setting:
    return Setting(name, "flag", default, to=to, implied=implied)


def _vote(default: bool, implied: str) -> Setting:
    return Setting("normalize", "flag", default, to="aggregate", value=_aggregate, implied=implied)


_MASK = Setting("int8_mask", "flag", False, unused=NO_EFFECT)
_GAMMA = Setting("gamma", "number", 0.01, per_input=True, to="gamma", implied=0.01)
_EPSILON = Setting("epsilon", "number", 0.15, per_input=True, to="epsilon", implied=0.15)
_MEAN = _flag("normalize", False, "normalize", implied=False)
_L1 = _flag("rescale", False, "match_norm", implied=False)
_L1_DARE = _flag("rescale", True, "match_norm", implied=False)
_DARE = {"rescale": False}  # in place of it, `match_norm`


TABLE: Mapping[str, TheirMethod] = {
    "linear": TheirMethod("linear", "input", (_weight(), _flag("normalize", True, "normalize", implied=True))),
    "slerp": TheirMethod(
        "slerp",
        "first",
        (Setting("t", "number", REQUIRED, to="t"),),
        needed=True,
        compat=True,
        low=2,
        high=2,
        lone=True,
    ),
    "passthrough": TheirMethod(
        "passthrough",
        "input",
        (Setting("scale", "number", None, per_input=True, to="scale", implied=1.0, of_step=True),),
        high=1,
    ),
    "task_arithmetic": TheirMethod(
        "task_arithmetic",
        "delta",
        (
            _weight(),
            Setting("density", "number", 1.0, per_input=True, unused="`task_arithmetic` drops nothing"),
            _lambda(),
            _MEAN,
            Setting("rescale", "flag", False, unused="`task_arithmetic` drops nothing, so there is nothing to rescale"),
            _MASK,
        ),
        needed=True,
        compat=True,
    ),
    "ties": TheirMethod(
        "ties",
        "delta",
        (
            _weight(),
            _density(),
            _lambda(1.0),
            _vote(True, "mean"),
            _L1,
            _MASK,
        ),
        needed=True,
        compat=True,
        fixed={"scope": "tensor"},
    ),
    "dare_linear": TheirMethod(
        "dare_linear",
        "delta",
        (_weight(), _density("drop_rate", _drop_rate), _lambda(1.0), _MEAN, _L1_DARE, _MASK),
        needed=True,
        compat=True,
        fixed=_DARE,
    ),
    "dare_ties": TheirMethod(
        "dare_ties",
        "delta",
        (
            _weight(),
            _density("drop_rate", _drop_rate),
            _lambda(1.0),
            _vote(False, "mean"),
            _L1_DARE,
            _MASK,
        ),
        needed=True,
        compat=True,
        fixed=_DARE,
    ),
    "breadcrumbs": TheirMethod(
        "breadcrumbs", "delta", (_weight(), _density(), _GAMMA, _lambda(), _MEAN, _L1, _MASK), needed=True, compat=True
    ),
    "breadcrumbs_ties": TheirMethod(
        "breadcrumbs_ties",
        "delta",
        (
            _weight(),
            _density(),
            _GAMMA,
            _lambda(),
            _vote(False, "sum"),
            _L1,
            _MASK,
        ),
        needed=True,
        compat=True,
    ),
    "della_linear": TheirMethod(
        "della_linear",
        "delta",
        (
            _weight(),
            _density(),
            _EPSILON,
            _lambda(1.0),
            _MEAN,
            _L1_DARE,
            _MASK,
        ),
        needed=True,
        compat=True,
        fixed=_DARE,
    ),
    "della": TheirMethod(
        "della",
        "delta",
        (
            _weight(),
            _density(),
            _EPSILON,
            _lambda(1.0),
            _vote(True, "mean"),
            _L1_DARE,
            _MASK,
        ),
        needed=True,
        compat=True,
        fixed=_DARE,
    ),
    "nuslerp": TheirMethod(
        "nuslerp",
        "delta",
        (_weight(), Setting("nuslerp_flatten", "flag", True), Setting("nuslerp_row_wise", "flag", False)),
        low=2,
        high=2,
        lone=True,
        compat=True,
        joined=(("nuslerp_flatten", "nuslerp_row_wise"), "mode", _nuslerp_mode),
    ),
    "multislerp": TheirMethod(
        "multislerp",
        "delta",
        (
            _weight(),
            _flag("normalize_weights", True, "normalize_weights", implied=True),
            Setting("eps", "number", 1e-8, to="eps", implied=1e-8),
        ),
        lone=True,
        fixed={"log_map": False},
    ),
    "karcher": TheirMethod(
        "karcher",
        "input",
        (
            Setting("max_iter", "integer", 10, to="max_iter", implied=10),
            Setting("tol", "number", 1e-5, to="tol", implied=1e-5),
        ),
        lone=True,
    ),
    "sce": TheirMethod(
        "sce",
        "delta",
        (Setting("select_topk", "number", 1.0, to="select_topk", implied=1.0, share=True), _MASK),
        needed=True,
        compat=True,
    ),
    "ram": TheirMethod("ram", "delta", (Setting("epsilon", "number", 1e-5, to="epsilon", implied=1e-5),), needed=True),
    "ramplus_tl": TheirMethod(
        "ramplus_tl",
        "delta",
        (
            Setting("r", "number", 0.1, to="r", implied=0.1),
            Setting("alpha", "number", 0.2, to="alpha", implied=0.2),
            Setting("epsilon", "number", 1e-5, to="epsilon", implied=1e-5),
        ),
        needed=True,
    ),
    "model_stock": TheirMethod(
        "model_stock",
        "delta",
        (Setting("filter_wise", "flag", False, to="granularity", value=_rows, implied="tensor"),),
        needed=True,
        low=3,
        fixed={"clamp": False},
    ),
    "nearswap": TheirMethod(
        "nearswap", "delta", (Setting("t", "number", REQUIRED, to="t"),), needed=True, low=2, high=2
    ),
    "arcee_fusion": TheirMethod("arcee_fusion", "first", (), needed=True, low=2, high=2, lone=True),
}
