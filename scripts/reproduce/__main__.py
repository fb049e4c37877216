"""Measure what the papers claim, as far as it can be done on one small machine, and write docs/reproduction.md.

    python scripts/reproduce                   all of it, in minutes to an hour on two cores
    python scripts/reproduce --only R5 R11     a part; the rest of the page stays as it is stored

What has been measured with the same setting is read from demo/reproduction.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import claims_page
import measured
from experiments import EXPERIMENTS, PLAN, measure, of
from rich.console import Console
from rich.table import Table
from work import processes

from mergekit_lite.merge import default_threads

PAGE = measured.ROOT / "docs" / "reproduction.md"
EXPERTS = measured.ROOT / "docs" / "experts.md"


def write(store: Path = measured.STORE) -> None:
    """Write the pages from what is stored, and show the verdicts."""
    stored = measured.load(store)
    everything = [(e, found) for e in EXPERIMENTS if (found := measured.found(stored, e)) is not None]
    PAGE.write_text(
        claims_page.document(PLAN, everything, [e for e in EXPERIMENTS if e.name not in stored]), encoding="utf-8"
    )
    shown = Table("", "claim", "verdict", "bars met", "seeds", box=None)
    for experiment, found in everything:
        for claim in experiment.claims:
            number, _, *cells = claims_page.line(claim, experiment, found)
            shown.add_row(number, claim.title, *cells)
    Console().print(shown)


def write_experts(store: Path = measured.STORE) -> None:
    """docs/experts.md, from the measurements of R11."""
    import expert_page  # it takes transformers, which takes seconds

    (experiment,) = of("R11")
    found = measured.found(measured.load(store), experiment)
    if found is not None:
        EXPERTS.write_text(expert_page.document(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PLAN, metavar="R", help="measure these, e.g. R5 R11")
    parser.add_argument("--fresh", action="store_true", help="measure what is in the cache, too")
    parser.add_argument("--workers", type=int, default=default_threads(), help="processes")
    args = parser.parse_args()

    wanted = [e for e in EXPERIMENTS if not args.only or any(claim.number in args.only for claim in e.claims)]
    for number in args.only or ():
        if not of(number):
            parser.error(
                f"there is no experiment for {number} ({PLAN[number]}) yet; experiments.py lists those that there are"
            )
    with processes(args.workers, Console(stderr=True)) as (pool, wait):
        started = {
            experiment.name: {
                seed: pool.submit(measure, experiment.name, seed, args.fresh) for seed in experiment.seeds
            }
            for experiment in wanted
        }
        for experiment in wanted:
            futures = started[experiment.name]
            wait(f"{', '.join(dict.fromkeys(claim.number for claim in experiment.claims))}", list(futures.values()))
            measured.update(measured.STORE, experiment, {seed: future.result() for seed, future in futures.items()})
    write()
    if any(experiment in of("R11") for experiment in wanted):
        write_experts()


if __name__ == "__main__":
    main()
