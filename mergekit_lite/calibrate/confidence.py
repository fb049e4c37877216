"""How sure a model's head is, and the temperature that would make it right: what BANG balances before it averages."""

from __future__ import annotations

import math

from mergekit_lite.lazy import Tensor, torch

STEPS, WIDEST = 33, 8.0  # inverse temperatures that are tried, from 1/8 to 8


class Confidence:
    """The mean largest softmax probability over all predictions and, where their labels are known, accuracy, mean
    negative log-likelihood and the temperature T at which the latter is least.

    The mean derivative of the log-likelihood with respect to 1/T grows with 1/T; it is formed at 33 values between 1/8
    and 8 in one pass, and its root interpolated between them.
    """

    def __init__(self) -> None:
        self.predictions = 0
        self.known = 0
        self._sure = self._loss = 0.0
        self._right = 0
        self._slopes = [0.0] * STEPS
        self._inverse = [WIDEST ** (2 * i / (STEPS - 1) - 1) for i in range(STEPS)]

    def add(self, logits: Tensor, labels: Tensor | None) -> None:
        """Logits (n, classes) and labels (n)."""
        logits = logits.detach().double()
        scores = torch.log_softmax(logits, dim=-1)
        self._sure += float(scores.max(dim=-1).values.exp().sum())
        self.predictions += len(scores)
        if labels is None or not len(labels):
            return
        self.known += len(labels)
        own = logits.gather(1, labels[:, None].long()).sum()
        self._loss -= float(scores.gather(1, labels[:, None].long()).sum())
        self._right += int((logits.argmax(dim=-1) == labels).sum())
        for i, inverse in enumerate(self._inverse):
            expected = (torch.softmax(inverse * logits, dim=-1) * logits).sum()
            self._slopes[i] += float(expected - own)

    def result(self) -> dict[str, Tensor]:
        """`confidence` and, with labels, `accuracy`, `loss` (nats), `temperature`, each a float64 scalar; `predictions`
        is their number (int64). A temperature outside of [1/8, 8] is cut off there."""
        values = {"confidence": self._sure / max(self.predictions, 1)}
        if self.known:
            values |= {
                "accuracy": self._right / self.known,
                "loss": self._loss / self.known,
                "temperature": self._temperature(),
            }
        found = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        return found | {"predictions": torch.tensor(self.predictions)}

    def _temperature(self) -> float:
        slopes = self._slopes
        if slopes[0] >= 0:
            return float(1 / self._inverse[0])
        if slopes[-1] <= 0:
            return float(1 / self._inverse[-1])
        from scipy.interpolate import PchipInterpolator
        from scipy.optimize import brentq

        logs = [math.log(inverse) for inverse in self._inverse]
        right = next(i for i, slope in enumerate(slopes) if slope >= 0)
        curve = PchipInterpolator(logs, slopes)
        return math.exp(-brentq(lambda x: float(curve(x)), logs[right - 1], logs[right]))
