"""What is added up while data pass through a network: Gram matrices, routers' scores, means and variances."""

from __future__ import annotations

from collections.abc import Collection

from mergekit_lite.calibrate.layers import Key, as_rows
from mergekit_lite.lazy import Tensor, torch


class Grams:
    """X^T X over all inputs x of each weight. Products are formed in the inputs' dtype, float32 or better, on their
    device, and summed in float64 on the CPU. `wanted` limits what is gathered."""

    def __init__(self, wanted: Collection[Key] | None = None):
        self._wanted = wanted
        self._sums: dict[Key, Tensor] = {}
        self.rows: dict[Key, int] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None

    def add(self, key: Key, x: Tensor) -> None:
        if (self._wanted is not None and key not in self._wanted) or not x.numel():
            return
        # Query, key and value are given the same tensor: its product is formed once.
        last = self._last
        if last is not None and last[0] is x and last[1] == x._version:
            product = last[2]
        else:
            rows = as_rows(x)
            product = (rows.T @ rows).double().cpu()
            self._last = (x, x._version, product)
        if key in self._sums:
            self._sums[key] += product
        else:
            self._sums[key] = product.clone()
        self.rows[key] = self.rows.get(key, 0) + x.numel() // x.shape[-1]

    def take(self, key: Key, inner: int) -> Tensor:
        """X^T X / n, (inner, inner) in float32, and gives its memory back; zeros where nothing came by."""
        total = self._sums.pop(key, None)
        if total is None:
            return torch.zeros(inner, inner)
        return (total / self.rows[key]).float()

    def clear(self) -> None:
        """Give all memory back."""
        self._sums.clear()
        self._last = None

    def rest(self) -> None:
        """Forget the last inputs, between batches."""
        self._last = None


class Scores:
    """Of one router: H^T H of its scores H (tokens, experts) before the softmax, how often each expert was chosen and
    how many tokens there were."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.usage: Tensor | None = None
        self.tokens = 0

    def scored(self, scores: Tensor) -> None:
        rows = as_rows(scores).double().cpu()
        product = rows.T @ rows
        self.gram = product if self.gram is None else self.gram + product
        self.tokens += len(rows)

    def chosen(self, experts: Tensor, count: int | None = None) -> None:
        number = count or (0 if self.gram is None else len(self.gram))
        found = torch.bincount(experts.detach().reshape(-1).cpu(), minlength=number)
        # Numbers beyond the last expert stand for tokens that go to none.
        found = found[:number] if number else found
        self.usage = found if self.usage is None else self.usage + found


class Moments:
    """Mean and population variance of each channel of a layer's outputs, in float64."""

    def __init__(self, axis: int):
        self._axis = axis
        self.count = 0
        self.mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, output: Tensor) -> None:
        channels = output.detach().double().movedim(self._axis, 0).flatten(1).cpu()
        mean, fresh = channels.mean(dim=1), channels.shape[1]
        squares = ((channels - mean[:, None]) ** 2).sum(dim=1)
        if self.mean is not None and self._squares is not None:
            # Chan, Golub and LeVeque's sum of two sets' squares, without cancellation.
            total, gap = self.count + fresh, mean - self.mean
            squares = self._squares + squares + gap**2 * (self.count * fresh / total)
            mean = self.mean + gap * (fresh / total)
        self.mean, self._squares = mean, squares
        self.count += fresh

    @property
    def variance(self) -> Tensor | None:
        return None if self._squares is None else self._squares / self.count
