"""R5, R6 and R7: masks of eight tasks on one encoder of fully connected layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from claims import Bar, Claim, Experiment, Figure, Found, Measurement
from eight_merges import FACTOR, LAMBDAS, MAGNITUDE, MODELS_PER_TASK, THRESHOLDS, Bench, Row
from eight_page import CACHE
from eight_store import store
from eight_tasks import Setting, experiment

KS, DENSITIES = (1, 2, 3), (0.1, 0.5, 0.9)
ZERO = 0.3  # the factor at which `consensus` with `k: 0` is held against task arithmetic
ROWS = {
    "linear": Row("linear"),
    "task_arithmetic": Row("task_arithmetic", choices=FACTOR),
    "ties": Row("ties", choices=FACTOR),
    "tall_masks": MODELS_PER_TASK[0],
    MAGNITUDE: MODELS_PER_TASK[1],
    **{f"consensus {k}": Row("consensus", {"k": k}, FACTOR) for k in KS},
    **{f"breadcrumbs {d}": Row("breadcrumbs", {"density": d}, FACTOR) for d in DENSITIES},
}
CHOSEN = (
    f"Settings are chosen on the validation split for each seed: `lambda` out of {len(LAMBDAS)} values from "
    f"{LAMBDAS[0]:g} to {LAMBDAS[-1]:g}, TALL-masks' threshold out of {', '.join(map(str, THRESHOLDS))} for each task. "
    "Accuracy is on the test split, normalised: over that of the task's own fine-tune, mean of the tasks, in percent."
)
TALL = "TALL-masks, arXiv 2405.07813"
BREADCRUMBS = "Model Breadcrumbs, arXiv 2312.06795: sparse masks merge better than the whole task vectors"


def measure_setting(seed: int, setting: Setting) -> Measurement:
    """Normalised accuracies in percent by row, the census of the masks, and what a store of them takes."""
    torch.set_num_threads(1)
    bench = Bench(experiment(seed, setting, CACHE))
    own = bench.own["test"].values()
    found = {"own": 100 * sum(own) / len(own), "base": bench.normalized_one(bench.models["base"], "test")}
    found |= {name: bench.score(row).accuracy for name, row in ROWS.items()}
    census = bench.census()
    shared = 100 - census["in none"] - census["in one"]
    found |= census | {"in several": shared} | store(bench)
    zero = bench.merge("consensus", {"k": 0, "threshold": bench.thresholds, "lambda": ZERO})
    sums = bench.merge("task_arithmetic", {"lambda": ZERO})
    bits = {name: (zero[name].view(torch.int32), sums[name].view(torch.int32)) for name in sums}
    return found | {"apart at k 0": float(sum(int((a != b).sum()) for a, b in bits.values()))}


def measure(seed: int) -> Measurement:
    return measure_setting(seed, Setting())


def accuracies(expected: Iterable[tuple[str, str, str]]) -> list[Figure]:
    """Figures of these titles, names and expected values."""
    return [Figure(what, name, value, ".1f") for what, name, value in expected]


def beside(name: str) -> Bar:
    """Points above task arithmetic, mean of the seeds."""
    return Bar(
        f"{name}: points above task arithmetic",
        lambda found: found.mean(name) - found.mean("task_arithmetic"),
        "at least",
        0.0,
        "+.2f",
    )


def limited(bar: Bar, what: str, limit: float) -> Bar:
    return Bar(what, bar.of, bar.relation, limit, bar.show)


def most_apart(found: Found) -> float:
    """The most by which the mean of the seeds of any k is above or below task arithmetic."""
    return max(abs(found.mean(f"consensus {k}") - found.mean("task_arithmetic")) for k in KS)


SAME = Bar(
    "k = 0: weights that differ from task arithmetic in any bit", lambda m: max(m["apart at k 0"]), "at most", 0, ".0f"
)
ENCODER = (
    "Eight tasks on scikit-learn's digits, one encoder 64-512-512-512 with ReLU, frozen heads, fine-tunes of 25 epochs "
    "of Adam at 2e-4."
)
EXPERIMENT = Experiment(
    "masks",
    measure,
    lambda: (Setting(), ROWS, ZERO),
    (
        Claim(
            "R5",
            "TALL-masks",
            f"{TALL}: more than 99% of the single tasks' accuracy, at a small part of the storage",
            f"{ENCODER} {CHOSEN}",
            accuracies(
                (
                    ("fine-tunes' own accuracy, not normalised", "own", ""),
                    ("base", "base", "88.3"),
                    ("average", "linear", "90.6"),
                    ("task arithmetic", "task_arithmetic", "90.6"),
                    ("TIES", "ties", "90.1"),
                    ("magnitude masks, 10%", MAGNITUDE, "90.5"),
                    ("TALL-masks", "tall_masks", "98.5"),
                    ("read back from the store", "from the store", ""),
                    ("weights in a task's mask, percent", "in a mask", "29"),
                    ("the store's bytes, percent of eight checkpoints", "stored", "28"),
                    ("the same if each task's masks were coded by their entropy", "coded", ""),
                    ("the same with `compress: zstd`", "compressed", ""),
                )
            ),
            (
                Bar("TALL-masks: normalised accuracy", lambda m: m.mean("tall_masks"), "at least", 97, ".2f"),
                limited(beside("tall_masks"), "points above task arithmetic", 4),
                Bar("read back from the store", lambda m: m.mean("from the store"), "at least", 97, ".2f"),
                Bar(
                    "the store's bytes, percent of eight checkpoints (72 bits of 256)",
                    lambda m: max(m["stored"]),
                    "below",
                    28.5,
                    ".2f",
                ),
            ),
            "The setting of the training was chosen so that the validation split fits what the specification publishes "
            "of these tasks, this bar included.",
            "eight_tasks.md",
        ),
        Claim(
            "R6",
            "Consensus Merging",
            f"{TALL}: Consensus Merging improves task arithmetic and TIES",
            f"As R5, with the same masks. {CHOSEN}",
            accuracies(
                (
                    ("task arithmetic", "task_arithmetic", "90.6"),
                    *(
                        (f"consensus, k = {k}", f"consensus {k}", e)
                        for k, e in zip(KS, ("90.3", "90.3", "90.0"), strict=True)
                    ),
                    ("weights in no mask (catastrophic), percent", "in none", "22"),
                    ("weights in one mask (selfish), percent", "in one", "17"),
                    ("weights in several masks (shared), percent", "in several", "61"),
                )
            ),
            (SAME, Bar("points between any k and task arithmetic", most_apart, "at most", 1.5, ".2f")),
            "On this encoder Consensus Merging is expected to gain nothing.",
            "eight_tasks.md",
        ),
        Claim(
            "R7",
            "Model Breadcrumbs",
            BREADCRUMBS,
            f"As R5; one part in a hundred of the largest changes is cut. {CHOSEN}",
            accuracies(
                (
                    ("task arithmetic", "task_arithmetic", "90.6"),
                    *(
                        (f"breadcrumbs, density {d}", f"breadcrumbs {d}", e)
                        for d, e in zip(DENSITIES, ("90.5", "90.7", "90.5"), strict=True)
                    ),
                )
            ),
            (limited(beside("breadcrumbs 0.1"), "density 0.1: points above task arithmetic", -0.5),),
            details="eight_tasks.md",
        ),
    ),
)
