"""R8, R9, R16, R17: a zero-shot model and its fine-tune on the way from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import robust
import torch
from claims import Bar, Claim, Experiment, Figure, Found, Measurement
from robust import Setting, Trained, Weights
from tucker_convs import merged

from mergekit_lite.align.diagnose import barrier

SETTING = Setting()
ALPHAS = [i / 10 for i in range(11)]
LAYERS = {"first": "0", "second": "2", "head": "4"}


def between(trained: Trained, t: Any, to: Weights | None = None) -> Weights:
    """The interpolation from the base (0) to the fine-tune (1), or to another."""
    models = {"base": trained.base, "tuned": trained.tuned if to is None else to}
    return merged(models, {"m": {"use": "interpolate", "of": ["base", "tuned"], "with": {"t": t}}})


def gap(name: str) -> Callable[[Found], float]:
    return lambda found: abs(found.mean(f"confidence {name}") - found.mean("confidence zero-shot"))


def measure(seed: int) -> Measurement:
    torch.set_num_threads(1)
    trained = robust.trained(seed, SETTING)
    path = [between(trained, alpha) for alpha in ALPHAS]
    found: Measurement = {}
    line = [trained.accuracy(weights, trained.other) for weights in path]
    found |= {"zero-shot": line[0], "fine-tuned": line[-1], "middle": line[5], "best": max(line)}
    for name, i in (("zero-shot", 0), ("fine-tuned", -1), ("middle", 5)):
        found[f"own {name}"] = trained.accuracy(path[i], trained.own)
    inputs, labels = trained.other
    right = [trained.scores(path[i], inputs).argmax(1) == labels for i in (0, -1, 5)]
    found["fft"] = 100 * float((~right[0] & ~right[1] & right[2]).double().mean())
    found["ttf"] = 100 * float((right[0] & right[1] & ~right[2]).double().mean())
    return found | balance(trained) | reference(trained) | stragglers(trained)


def balance(trained: Trained) -> Measurement:
    """BANG: label smoothing in the fine-tune, and as an operation of weights: temperatures of the head."""

    def confidence(weights: Mapping[str, torch.Tensor], shown: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float(trained.scores(weights, shown[0]).softmax(1).amax(1).mean())

    found = {
        f"confidence {name}": confidence(weights, trained.other)
        for name, weights in (("zero-shot", trained.base), ("fine-tuned", trained.tuned), ("smooth", trained.smooth))
    }
    found["smooth"] = trained.accuracy(trained.smooth, trained.other)
    found["bang"] = trained.accuracy(between(trained, 0.5, trained.smooth), trained.other)
    # The fine-tune's head, cooled until it is as sure as the zero-shot model on inputs of its own kind.
    low, high, wanted = 1.0, 100.0, confidence(trained.base, trained.own)
    for _ in range(40):
        middle = (low * high) ** 0.5
        cooled = {n: w / middle if n.startswith("4.") else w for n, w in trained.tuned.items()}
        low, high = (middle, high) if confidence(cooled, trained.own) > wanted else (low, middle)
    models = {"base": trained.base, "tuned": trained.tuned}
    inputs = [{"model": "base"}, {"model": "tuned", "temperature": low}]
    settings = {"head": {"4.*": "linear", "else": "none"}}
    found["temperature"] = low
    found["bang by temperature"] = trained.accuracy(
        merged(models, {"m": {"use": "bang", "of": inputs, "with": settings}}), trained.other
    )
    return found


def reference(trained: Trained) -> Measurement:
    """SALSA's reference: the mean of two fine-tunes, by its recipe and as a linear merge; the barrier half way."""
    models = {"first": trained.tuned, "second": trained.smooth}
    soup = merged(models, {"m": {"use": "interpolate", "of": ["first", "second"], "with": {"t": 0.5}}})
    mean = merged(models, {"m": {"use": "linear", "of": ["first", "second"]}})
    losses = [trained.loss(weights, trained.own) for weights in (trained.tuned, soup, trained.smooth)]
    return {
        "salsa differs": sum(int((soup[n] != mean[n]).sum()) for n in soup),
        "salsa barrier": losses[1] - (losses[0] + losses[2]) / 2,
    }


def stragglers(trained: Trained) -> Measurement:
    """The barrier of each layer, all others being the fine-tune's, and interpolation with no change left out."""
    found: Measurement = {}
    for name, layer in LAYERS.items():
        losses = [trained.loss(between(trained, {f"{layer}.*": alpha, "else": 1.0}), trained.other) for alpha in ALPHAS]
        found[f"barrier {name}"] = barrier(losses, ALPHAS)
        own = [trained.loss(between(trained, {f"{layer}.*": alpha, "else": 1.0}), trained.own) for alpha in ALPHAS]
        found[f"own barrier {name}"] = barrier(own, ALPHAS)
        mine = [n for n in trained.base if n.startswith(layer)]
        change = sum(float((trained.tuned[n] - trained.base[n]).square().sum()) for n in mine)
        found[f"change {name}"] = (change / sum(float(trained.base[n].square().sum()) for n in mine)) ** 0.5
    whole = merged(
        {"base": trained.base, "tuned": trained.tuned},
        {
            "between": {"use": "interpolate", "of": ["base", "tuned"], "with": {"t": 0.5}},
            "m": {"use": "sparsify", "base": "base", "of": "between", "with": {"density": {"2.*": 1.0, "else": 1.0}}},
        },
    )
    middle = between(trained, 0.5)
    found["straggler differs"] = sum(int((whole[n] != middle[n]).sum()) for n in middle)
    return found


NETWORKS = (
    "Fully connected networks of two hidden layers of 128 units on scikit-learn's digits with noise of 0.5 on the "
    "pixels and 16 features beside them, each of which says a class: 8 of group A, 8 of group B. The base sees 900 "
    "images, 8 draws of each, for which A is right in 40% of the cases beyond chance and B never, 8 epochs with label "
    "smoothing 0.1; its fine-tune sees 250 others, 4 draws, A never right and B in 40%, 20 epochs of Adam at 3e-3. Out "
    "of distribution (OOD) both are right in 15%. The base's rate (1e-3) and batches of 64 are ours."
)
EXPERIMENT = Experiment(
    "robust",
    measure,
    lambda: (SETTING, ALPHAS, LAYERS),
    (
        Claim(
            "R8",
            "WiSE-FT",
            "arXiv 2109.01903: 4 to 6 points over prior work on five shifts of ImageNet, and 1.6 on ImageNet itself; "
            "right on samples where both ends are wrong",
            f"{NETWORKS} The best alpha is chosen on the OOD images themselves, of 0, 0.1, ..., 1, as in the "
            "specification. FFT is the share of images where both ends are wrong and the middle is right, TTF the "
            "opposite.",
            (
                Figure("OOD accuracy, zero-shot", "zero-shot", "0.724"),
                Figure("OOD accuracy, fine-tuned", "fine-tuned", "0.801"),
                Figure("OOD accuracy at 0.5", "middle", "0.811"),
                Figure("OOD accuracy at the best alpha", "best", "0.820"),
                Figure("its own distribution, zero-shot", "own zero-shot"),
                Figure("its own distribution, fine-tuned", "own fine-tuned"),
                Figure("its own distribution at 0.5", "own middle"),
                Figure("FFT, percent", "fft", "0.42", ".2f"),
                Figure("TTF, percent", "ttf", "0.03", ".2f"),
            ),
            (
                Bar(
                    "points of the best alpha above the better end",
                    lambda m: 100 * (m.mean("best") - max(m.mean("zero-shot"), m.mean("fine-tuned"))),
                    "at least",
                    1.0,
                    ".2f",
                ),
                Bar("FFT less three times TTF, percent", lambda m: m.mean("fft") - 3 * m.mean("ttf"), "at least", 0.0),
            ),
        ),
        Claim(
            "R9",
            "BANG",
            "arXiv 2309.17230: a fine-tune that is not overconfident balances the average; OOD accuracy of CLIP from "
            "63.0 to 64.9",
            "The networks of R8; BANG's fine-tune is trained with label smoothing 0.1. The last row is the method "
            "`bang` on the fine-tune without smoothing, whose head is cooled until it is as sure as the base on inputs "
            "of its own distribution.",
            (
                Figure("OOD confidence, zero-shot", "confidence zero-shot", "0.618"),
                Figure("OOD confidence, fine-tuned", "confidence fine-tuned", "0.889"),
                Figure("OOD confidence, fine-tuned with smoothing", "confidence smooth", "0.648"),
                Figure("OOD accuracy, fine-tuned with smoothing", "smooth"),
                Figure("OOD accuracy of BANG at 0.5", "bang", "0.807"),
                Figure("OOD accuracy of WiSE-FT at 0.5", "middle", "0.811"),
                Figure("temperature of the head", "temperature", "", ".2f"),
                Figure("OOD accuracy of `bang` by that temperature", "bang by temperature"),
            ),
            (
                Bar(
                    "percent of the gap in confidence that are gone",
                    lambda m: 100 * (1 - gap("smooth")(m) / gap("fine-tuned")(m)),
                    "at least",
                    70.0,
                    ".0f",
                ),
            ),
            "No accuracy is claimed: the end with label smoothing is worse by itself at this scale.",
        ),
        Claim(
            "R16",
            "SALSA's reference",
            "arXiv 2411.01798: the mean of two fine-tunes as the reference of RLHF is above PPO's with a single one",
            "Half way between the two fine-tunes of R8 and R9; the loss on the fine-tunes' own distribution.",
            (
                Figure("weights that differ from the linear merge of the two", "salsa differs", "0", ".0f"),
                Figure("barrier at 0.5", "salsa barrier", "near 0"),
            ),
            (Bar("weights that differ from the mean", lambda m: max(m["salsa differs"]), "at most", 0, ".0f"),),
            "Only the step of weights is there: no language model is trained by reinforcement.",
        ),
        Claim(
            "R17",
            "straggler layers",
            "arXiv 2410.16476: few layers' sharpness tells whether interpolation succeeds, and sparsity there mends it",
            "The networks of R8. A layer is moved from the base to the fine-tune while all others are the fine-tune's; "
            "the barrier is of the loss over 11 points; beside it what the layer has changed, relative to its size.",
            (
                *(
                    Figure(f"OOD barrier, {name}" if kind == "barrier" else f"{words}, {name}", f"{kind} {name}")
                    for kind, words in (("barrier", ""), ("own barrier", "own barrier"), ("change", "relative change"))
                    for name in LAYERS
                ),
                Figure("weights that differ from WiSE-FT at sparsity 0", "straggler differs", "0", ".0f"),
            ),
            (Bar("weights that differ at sparsity 0", lambda m: max(m["straggler differs"]), "at most", 0, ".0f"),),
            "No layer of these networks has a barrier, so there is nothing for sparsity to mend; the failure that the "
            "paper repairs does not occur here.",
        ),
    ),
)
