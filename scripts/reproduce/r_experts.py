"""R11: the experts of a tiny Mixtral merged in every way."""

from __future__ import annotations

from collections.abc import Callable

from claims import Bar, Claim, Experiment, Figure, Found, Measurement

RANDOM, PLAIN = "random groups", "random groups, no permutation"
CONTROL = "keep dominants"
WORSE = ("no permutation", "uniform weights", RANDOM, PLAIN)


def measure(seed: int) -> Measurement:
    # transformers takes seconds to import, and the page is written without it.
    import expert_merges
    import torch
    import transformers

    from mergekit_lite.report.quiet import quiet

    torch.set_num_threads(1)
    with quiet(transformers):
        return expert_merges.measure(expert_merges.OUT / f"seed{seed}", seed, expert_merges.STEPS[seed])


def setting() -> object:
    import expert_merges as tiny

    learnt = tiny.STEPS, tiny.CONTEXT, tiny.BATCH, tiny.RATE, tiny.TEXT_BYTES
    return *learnt, tiny.MEASURED, tiny.COUNTED, tiny.RECOVERY, tiny.EXPERTS, tiny.VARIANTS, tuple(tiny.RECOVERED)


def least(name: str, into: int) -> Callable[[Found], float]:
    """By how much M-SMoE's rise is below another's, on the seed where that is least."""
    return lambda found: min(found.each(lambda m: m[f"{name} {into}"] - m[f"M-SMoE {into}"]))


def most(name: str) -> Callable[[Found], float]:
    """M-SMoE's largest share of another's rise at four experts."""
    return lambda found: max(found.each(share(name)))


def mean_share(name: str) -> Callable[[Found], float]:
    """The same of the means of the rises."""
    return lambda found: found.mean("M-SMoE 4") / found.mean(f"{name} 4")


def share(name: str) -> Callable[[Measurement], float]:
    return lambda m: m["M-SMoE 4"] / m[f"{name} 4"]


EXPECTED = {  # by variant: the specification's rise of the loss with 4 and with 2 experts, on its two seeds
    "M-SMoE": ("0.18 / 0.20", "0.57 / 0.54"),
    "no permutation": ("0.24 / 0.27", "0.77 / 0.83"),
    "uniform weights": ("0.33 / 0.49", "0.83 / 0.76"),
    RANDOM: ("0.80 / 0.79", "1.12 / 1.03"),
    PLAIN: ("0.80 / 0.79", "1.12 / 1.03"),
    CONTROL: ("0.12 / 0.22", "0.66 / 0.50"),
}
EXPERIMENT = Experiment(
    "experts",
    measure,
    setting,
    (
        Claim(
            "R11",
            "M-SMoE",
            "Merge, then Compress, arXiv 2310.01334: up to 80% less memory with virtually no loss, after recovery "
            "training",
            "A Mixtral of two layers, width 64, eight experts a layer, the best two of which a token goes to, on the "
            "source text of Python's standard library, character by character; 800, 500 and 800 steps. "
            "`merge_experts`; the rise of the loss in nats a character, without training after the merge unless it "
            "says so.",
            (
                Figure("loss before", "before"),
                *(
                    Figure(f"8 to {into}, {name}", f"{name} {into}", EXPECTED[name][i], ".2f")
                    for i, into in enumerate((4, 2))
                    for name in EXPECTED
                ),
                Figure("M-SMoE's rise over that of random groups, 8 to 4", share(RANDOM), "", ".2f"),
                Figure("the same, random groups without permutation", share(PLAIN), "0.23 / 0.25", ".2f"),
                Figure("M-SMoE, 4 experts, 150 steps later", "M-SMoE recovered", "0.013 / -0.009", "+.3f"),
                Figure("random groups, 4 experts, 150 steps later", f"{RANDOM} recovered", "0.11 / 0.05", "+.3f"),
                Figure("the same, without permutation", f"{PLAIN} recovered", "0.11 / 0.05", "+.3f"),
            ),
            (
                *(
                    Bar(f"8 to {into}, M-SMoE's rise below that of {name}, worst seed", least(name, into), "above", 0.0)
                    for into in (4, 2)
                    for name in WORSE
                ),
                *(
                    Bar(f"8 to 4, share of the rise of {PLAIN}, {of}", value, "at most", 0.35, ".2f")
                    for of, value in (("mean of the seeds", mean_share(PLAIN)), ("worst seed", most(PLAIN)))
                ),
                Bar(
                    f"8 to 4, share of the rise of {RANDOM} (with permutation), mean of the seeds",
                    mean_share(RANDOM),
                    "at most",
                    0.35,
                    ".2f",
                    claimed=False,
                ),
                *(
                    Bar(
                        f"8 to {into}, M-SMoE's rise below that of the control, worst seed",
                        least(CONTROL, into),
                        "above",
                        0.0,
                        claimed=False,
                    )
                    for into in (4, 2)
                ),
                Bar(
                    "150 steps later, mean of the seeds",
                    lambda found: found.mean("M-SMoE recovered"),
                    "at most",
                    0.03,
                    "+.3f",
                ),
                Bar(
                    "150 steps later, worst seed", lambda found: max(found["M-SMoE recovered"]), "at most", 0.03, "+.3f"
                ),
            ),
            "The specification does not say whether a bar is one for every seed or for their mean, so both are held "
            "against it where they could differ. Nor does it say whether the units of its random groups are matched. "
            "On its own seeds, 0 and 1, and at 8 to 4, where the bar is, its figures for them are nearer to those of "
            "our random groups *without* permutation (at 8 to 2 to those with it). So the bar is held against the "
            "former, and the share of the latter is shown without a claim. The control, *keep dominants*, drops "
            "experts instead of merging them (`mode: prune, router: compact`); the specification claims nothing of "
            "it.",
            "experts.md",
        ),
    ),
)
