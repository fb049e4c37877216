"""R1 to R4 and R12: networks that were trained apart, matched; and the order of one network's units."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean

import alignment_page as page
from alignment_measure import Way
from alignment_results import EXPECTED, EXPECTED_MANY, EXPECTED_OTHERS, EXPECTED_PATH, MLPS, SMOOTH
from claims import Bar, Claim, Experiment, Figure, Found, Measurement

WIDTHS = [net.width for net in MLPS]
WIDE, MOST = max(WIDTHS), max(page.COUNTS)
TRAIN = {WIDE: (0.819, 0.011)}  # what the specification states of the train loss


def measure(seed: int) -> Measurement:
    found: Measurement = {}

    def note(name: str, way: Way) -> None:
        found[f"{name} barrier"] = way.barrier("test")
        found[f"{name} train barrier"] = way.barrier("train")
        found[f"{name} middle"] = way.middle("test")
        found[f"{name} ends"] = way.ends("test")
        found[f"{name} distance"] = way.distance

    for net in MLPS:
        for one, how in ((page.NAIVE, "naive"), (page.MATCHED, "matched")):
            note(f"{net.width} {how}", page.line(net, seed, one))
    single = page.single(page.MANY, seed)
    found |= {"single loss": single.loss, "single accuracy": single.accuracy}
    for count in page.COUNTS:
        for how in ("naive", "star", "merge_many"):
            many = page.many(page.MANY, seed, count, how)
            found |= {f"{count} {how} loss": many.loss, f"{count} {how} accuracy": many.accuracy}
    for how in ("naive", *EXPECTED_OTHERS):
        note(f"others {how}", page.between_others(page.MANY, seed, how))
    smooth = page.smooth(SMOOTH, seed)
    return found | {"length before": smooth.before, "length after": smooth.after, "change": smooth.change}


def setting() -> object:
    return MLPS, SMOOTH, page.MANY, page.COUNTS, page.STE_BATCH, page.STE_STEPS


def falls(width: int, what: str) -> Bar:
    """By how many percent the mean of the seeds falls when the networks are matched."""
    limits = {"barrier": ("above", 90), "distance": ("below", 30)}
    relation, limit = limits[what]

    def fall(found: Found) -> float:
        return 100 * (1 - found.mean(f"{width} matched {what}") / found.mean(f"{width} naive {what}"))

    name = "barrier of the test loss" if what == "barrier" else "distance"
    return Bar(f"width {width}: the {name} falls by, in percent", fall, relation, limit, ".1f")  # type: ignore[arg-type]


def steps(found: Found) -> float:
    """The least by which the barrier falls from one width to the next."""
    barriers = [found.mean(f"{width} matched barrier") for width in WIDTHS]
    return min(a - b for a, b in pairwise(barriers))


def behind(found: Found) -> float:
    return 100 * fmean(found.each(lambda m: m[f"{WIDE} matched ends"] - m[f"{WIDE} matched middle"]))


def gap(count: int) -> Bar:
    return Bar(
        f"{count} networks: loss of `merge_many` less that of `star`",
        lambda found: found.mean(f"{count} merge_many loss") - found.mean(f"{count} star loss"),
        "at most",
        0.0,
    )


REBASIN = "Git Re-Basin, arXiv 2209.04836: no barrier between wide networks once their units are matched"
ANALYSIS = "Analysis of LMC via permutation-based weight matching, arXiv 2402.04051"
NETWORKS = (
    "Fully connected networks 64-w-w-w-10 with ReLU on scikit-learn's digits, Adam at 1e-3 on one cycle, 40 epochs"
)
EXPERIMENT = Experiment(
    "alignment",
    measure,
    setting,
    (
        Claim(
            "R1",
            "weight matching",
            REBASIN,
            f"{NETWORKS}; w = {WIDE}, a pair for each seed, 25 points of the way between the two; `permute`.",
            (
                Figure("barrier of the test loss, as they are", f"{WIDE} naive barrier", str(EXPECTED[WIDE][0])),
                Figure("barrier of the test loss, matched", f"{WIDE} matched barrier", str(EXPECTED[WIDE][1])),
                Figure("barrier of the train loss, as they are", f"{WIDE} naive train barrier", str(TRAIN[WIDE][0])),
                Figure("barrier of the train loss, matched", f"{WIDE} matched train barrier", str(TRAIN[WIDE][1])),
                Figure("accuracy half way, as they are", f"{WIDE} naive middle", "0.890"),
                Figure("accuracy half way, matched", f"{WIDE} matched middle", "0.973"),
                Figure("accuracy of the ends", f"{WIDE} matched ends", "0.980"),
            ),
            (
                Bar(
                    "the barrier of the test loss falls by, in percent",
                    falls(WIDE, "barrier").of,
                    "at least",
                    90,
                    ".1f",
                ),
                Bar("barrier of the test loss, matched", lambda m: m.mean(f"{WIDE} matched barrier"), "below", 0.05),
                Bar("points by which half way is behind the ends", behind, "at most", 1.5, ".2f"),
            ),
            details="alignment.md",
        ),
        Claim(
            "R2",
            "weight matching by width",
            f"{ANALYSIS}: matching removes the barrier though the distance of the networks falls little",
            f"{NETWORKS}; w = {', '.join(map(str, WIDTHS))}, a pair for each seed and width.",
            [
                figure
                for net in MLPS
                for figure in (
                    Figure(
                        f"width {net.width}: barrier as they are",
                        f"{net.width} naive barrier",
                        f"{EXPECTED[net.width][0]}",
                    ),
                    Figure(
                        f"width {net.width}: barrier matched",
                        f"{net.width} matched barrier",
                        f"{EXPECTED[net.width][1]}",
                    ),
                    Figure(
                        f"width {net.width}: the distance falls by, in percent",
                        lambda m, w=net.width: 100 * (1 - m[f"{w} matched distance"] / m[f"{w} naive distance"]),  # type: ignore[misc]
                        f"{EXPECTED[net.width][2]}",
                        ".1f",
                    ),
                )
            ],
            (
                Bar("from one width to the next the matched barrier falls by", steps, "above", 0.0),
                *(falls(width, "barrier") for width in WIDTHS),
                *(falls(width, "distance") for width in WIDTHS),
            ),
            details="alignment.md",
        ),
        Claim(
            "R3",
            "MergeMany",
            "Git Re-Basin, arXiv 2209.04836: several networks merge into one that is nearly as good",
            f"{NETWORKS}; w = {page.MANY.width}, {', '.join(map(str, page.COUNTS))} networks; `linear`, and "
            "`merge_many` with `way: star` and `way: merge_many`.",
            (
                Figure("accuracy of the networks themselves", "single accuracy", "0.976"),
                *(
                    Figure(
                        f"{count} networks, {how}: accuracy", f"{count} {key} accuracy", f"{EXPECTED_MANY[count][i]}"
                    )
                    for count in page.COUNTS
                    for i, (how, key) in enumerate(
                        (("as they are", "naive"), ("`star`", "star"), ("`merge_many`", "merge_many"))
                    )
                ),
                Figure(f"{MOST} networks, `star`: loss", f"{MOST} star loss", "0.230"),
                Figure(f"{MOST} networks, `merge_many`: loss", f"{MOST} merge_many loss", "0.192"),
            ),
            (
                Bar(
                    f"{MOST} networks, `merge_many`: accuracy",
                    lambda m: m.mean(f"{MOST} merge_many accuracy"),
                    "above",
                    0.92,
                ),
                Bar(f"{MOST} networks as they are: accuracy", lambda m: m.mean(f"{MOST} naive accuracy"), "below", 0.2),
                *(gap(count) for count in page.COUNTS if count >= 5),
            ),
            details="alignment.md",
        ),
        Claim(
            "R4",
            "weight matching and STE for three models",
            f"{ANALYSIS}: networks that are matched to a third one are connected with each other too",
            f"{NETWORKS}; w = {page.MANY.width}. The second and the third of three networks are matched with the "
            "first, and the barrier is that between these two.",
            [
                Figure(f"barrier of the test loss, {label}", f"others {how} barrier", expected)
                for how, label, expected in (
                    ("naive", "as they are", ""),
                    ("star", "`star`", "0.066"),
                    ("merge_many", "`merge_many`", "0.032"),
                    ("ste", "STE (20 epochs, rate 0.1)", "0.047"),
                )
            ],
            [
                Bar(f"barrier of the test loss, {how}", lambda m, h=how: m.mean(f"others {h} barrier"), "below", 0.1)  # type: ignore[misc]
                for how in EXPECTED_OTHERS
            ],
            "Which of them is the lowest is not claimed.",
            "alignment.md",
        ),
        Claim(
            "R12",
            "smooth order",
            "Neural Metamorphosis, arXiv 2410.11878: weights in an order that makes them smooth, the network's "
            "function unchanged",
            f"A network 64-{SMOOTH.width}-{SMOOTH.width}-{SMOOTH.width}-10, trained as those above; `reorder`.",
            (
                Figure(
                    "length of the path, share of before",
                    lambda m: m["length after"] / m["length before"],
                    f"{EXPECTED_PATH}",
                ),
                Figure("largest change of a score", "change", "1e-5", ".1e"),
            ),
            (
                Bar(
                    "total variation, share of before, worst seed",
                    lambda found: max(found.each(lambda m: m["length after"] / m["length before"])),
                    "at most",
                    0.85,
                ),
                Bar(
                    "largest change of a score, worst seed", lambda found: max(found["change"]), "at most", 1e-4, ".1e"
                ),
            ),
            "The sum of the L1 distances of neighbouring units is the total variation along all axes of units as well; "
            "the specification has 0.80 for its own reading of it.",
            "alignment.md",
        ),
    ),
)
