"""Hooks that hand what passes through a network to the sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from mergekit_lite.calibrate.layers import Experts, Layers, Router
from mergekit_lite.calibrate.sums import Grams, Moments, Scores
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module


@contextmanager
def watched(
    network: Module,
    layers: Layers,
    grams: Grams | None = None,
    scores: Mapping[str, Scores] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> Iterator[None]:
    """While this lasts every forward pass adds to the sums that are given; `scores` are by the router's name, `moments`
    by the layer's."""
    modules = dict(network.named_modules())
    with ExitStack() as stack:

        def before(name: str, hook: Callable[..., None]) -> None:
            stack.callback(modules[name].register_forward_pre_hook(hook, with_kwargs=True).remove)

        def after(name: str, hook: Callable[..., None]) -> None:
            stack.callback(modules[name].register_forward_hook(hook, with_kwargs=True).remove)

        if grams is not None:
            for layer in layers.linear:
                before(layer.module, _inputs_to(grams, layer.weight))
            if layers.experts:
                inside = _Inside(grams)
                for group in layers.experts:
                    before(group.module, inside.entering(group))
                    after(group.module, inside.leaving)
                stack.enter_context(_intercepting(inside))
        for router in layers.routers if scores is not None else ():
            assert scores is not None
            after(router.module, _scores_of(router, scores[router.module]))
            if router.experts is not None:
                count = _experts_of(modules[router.experts])
                before(router.experts, _choices_to(scores[router.module], count))
        for name, one in (moments or {}).items():
            after(name, _outputs_to(one))
        yield


def _inputs_to(grams: Grams, weight: str) -> Callable[..., None]:
    def hook(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grams.add((weight, -1), args[0] if args else next(iter(kwargs.values())))

    return hook


def _outputs_to(moments: Moments) -> Callable[..., None]:
    def hook(module: Module, args: Any, kwargs: Any, output: Tensor) -> None:
        moments.add(output)

    return hook


def _scores_of(router: Router, scores: Scores) -> Callable[..., None]:
    def hook(module: Module, args: Any, kwargs: Any, output: Any) -> None:
        many = None if isinstance(output, torch.Tensor) else list(output)
        logits = output if many is None else many[router.index]
        scores.scored(logits)
        if router.experts is not None:
            return  # the experts are told which of them are chosen
        number = logits.shape[-1]
        told = next((one for one in many or () if _is_choice(one)), None)
        if told is not None:
            scores.chosen(told, number)
        elif router.top_k is not None:
            scores.chosen(logits.reshape(-1, number).topk(router.top_k, dim=-1).indices, number)

    return hook


def _choices_to(scores: Scores, count: int | None) -> Callable[..., None]:
    def hook(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told = next((one for one in (*args, *kwargs.values()) if _is_choice(one)), None)
        if told is not None:
            scores.chosen(told, count)

    return hook


def _is_choice(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _experts_of(module: Module) -> int | None:
    return next((value.shape[0] for value in module._parameters.values() if value is not None), None)


class _Inside:
    """Knows which group of experts is at work, and whose weight a matrix is."""

    def __init__(self, grams: Grams):
        self._grams = grams
        self._at: list[tuple[Module, Experts]] = []

    def entering(self, group: Experts) -> Callable[..., None]:
        def hook(module: Module, args: Any, kwargs: Any) -> None:
            self._at.append((module, group))

        return hook

    def leaving(self, module: Module, args: Any, kwargs: Any, output: Any) -> None:
        self._at.pop()

    def product(self, x: Tensor, weight: Tensor) -> None:
        """A product x W^T is formed: where W is a slice of the experts at work, x are its inputs."""
        if not self._at or weight.dim() != 2:
            return
        module, group = self._at[-1]
        for name in group.weights:
            whole = module._parameters[name.rpartition(".")[2]]
            if whole is None or whole.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                continue
            expert, rest = divmod(int(weight.storage_offset() - whole.storage_offset()), int(whole.stride(0)))
            if not rest and weight.shape == whole.shape[1:] and weight.stride() == whole.stride()[1:]:
                self._grams.add((name, expert), x)


@contextmanager
def _intercepting(inside: _Inside) -> Iterator[None]:
    from torch.overrides import TorchFunctionMode

    linear = torch.nn.functional.linear

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if func is linear:
                x = args[0] if args else given["input"]
                inside.product(x, args[1] if len(args) > 1 else given["weight"])
            return func(*args, **given)

    with Mode():
        yield
