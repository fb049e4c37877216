"""All that the specification plans to reproduce, and the experiments that there are for it.

A new experiment is a module `r*.py` with an `EXPERIMENT`, listed here. A number of `PLAN` that no experiment claims, or
whose experiment has not been run, is listed as missing on the page.
"""

from __future__ import annotations

import r_alignment
import r_experts
import r_invariance
import r_masks
import r_masks_vit
import r_oracles
import r_robust
import r_soups
import r_tucker
from claims import Experiment, Measurement
from measured import cached

PLAN = {
    "R1": "weight matching",
    "R2": "weight matching by width",
    "R3": "MergeMany",
    "R4": "weight matching and STE for three models",
    "R5": "TALL-masks",
    "R6": "Consensus Merging",
    "R7": "Model Breadcrumbs",
    "R8": "WiSE-FT",
    "R9": "BANG",
    "R10": "model soups",
    "R11": "M-SMoE",
    "R12": "smooth order",
    "R13": "Tucker",
    "R14": "oracles",
    "R15": "invariance",
    "R16": "SALSA's reference",
    "R17": "straggler layers",
}
EXPERIMENTS: tuple[Experiment, ...] = (
    r_alignment.EXPERIMENT,
    r_masks.EXPERIMENT,
    r_masks_vit.EXPERIMENT,
    r_experts.EXPERIMENT,
    r_robust.EXPERIMENT,
    r_soups.EXPERIMENT,
    r_tucker.EXPERIMENT,
    r_oracles.EXPERIMENT,
    r_invariance.EXPERIMENT,
)


def of(number: str) -> list[Experiment]:
    """The experiments that claim something under this number."""
    return [one for one in EXPERIMENTS if any(claim.number == number for claim in one.claims)]


def measure(name: str, seed: int, fresh: bool) -> Measurement:
    """The numbers of one seed of an experiment, in a process that is given names alone."""
    (experiment,) = (one for one in EXPERIMENTS if one.name == name)
    return cached(experiment, seed, fresh)
