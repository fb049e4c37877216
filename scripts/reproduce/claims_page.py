"""The text of docs/reproduction.md, out of claims and measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import stdev

from claims import MISSED, OPEN, SEEDS, Bar, Claim, Experiment, Found
from work import page

TEXT = """\
# What is reproduced of the papers

Written by `make reproduce` from docs/reproduction.json, which holds the measurements; every figure, every verdict and
every list here is computed from them. Everything is small, on scikit-learn's digits or the source text of Python's
standard library, on a CPU: it shows that the methods do here what they do in the specification's own trials, and proves
no claim about large models.

- *Paper*: what the paper claims, at its own scale.
- *Expected*: what the specification that the methods follow measured in the same setting, with another implementation
  on networks of its own; of several of its seeds `a / b`.
- *Ours*: the mean over the seeds, their standard deviation, and the seeds one by one.
- *Bar*: what was to be reached, and whether it is: *met* or *missed*; *not claimed* where it does not count.

{summary}

## What is not reproduced

{open}
{sections}
## How to run it

`make reproduce` measures all of it and writes this page; `python scripts/reproduce --only R5 R11` measures a part, and
the others stay as they are stored. What has been measured with the same setting is not measured again
(demo/reproduction), unless `--fresh` is given. A new experiment is a module beside those that
scripts/reproduce/experiments.py lists.
"""
Stored = Sequence[tuple[Experiment, Found]]


def document(plan: Mapping[str, str], measured: Stored, waiting: Sequence[Experiment] = ()) -> str:
    """The page: `plan` are the titles of all that should be reproduced, by number, `waiting` are experiments that have
    not been run."""
    claims = sorted(
        ((claim, experiment, found) for experiment, found in measured for claim in experiment.claims),
        key=lambda one: list(plan).index(one[0].number),
    )
    unrun = [(claim.number, claim.title) for one in waiting for claim in one.claims]
    there = {claim.number for claim, _, _ in claims} | {number for number, _ in unrun}
    missing = sorted(
        [*unrun, *((number, title) for number, title in plan.items() if number not in there)],
        key=lambda one: list(plan).index(one[0]),
    )
    text = TEXT.format(
        summary=table(("", "claim", "verdict", "bars met", "seeds"), [line(*one) for one in claims], ":- :- :- -: -:"),
        open="\n".join(gaps(missing, claims)) or "Nothing: all bars are met.",
        sections="".join(f"\n{section(*one)}\n" for one in claims),
    )
    return page(text)


def line(claim: Claim, experiment: Experiment, found: Found) -> list[str]:
    counted = [bar for bar in claim.bars if bar.claimed]
    reached = f"{len(counted) - len(claim.missed(found))} of {len(counted)}" if counted else ""
    anchor = f"{claim.number} {claim.title}".lower().replace(" ", "-").replace("'", "")
    return [
        claim.number,
        f"[{claim.title}](#{anchor})",
        judged(claim, experiment, found),
        reached,
        seeds(experiment, found),
    ]


def judged(claim: Claim, experiment: Experiment, found: Found) -> str:
    """The verdict, with a word on too few seeds."""
    few = "" if experiment.enough(found) else f", on fewer than {SEEDS} seeds"
    return claim.verdict(found) + few


def seeds(experiment: Experiment, found: Found) -> str:
    return f"{len(found.seeds)}" if experiment.drawn else "nothing is drawn"


def gaps(missing: Sequence[tuple[str, str]], claims: Sequence[tuple[Claim, Experiment, Found]]) -> Iterator[str]:
    """Items of a list: what is missing, missed and not claimed."""
    for number, title in missing:
        yield f"- {number}, {title}: not measured."
    for claim, experiment, found in claims:
        name = f"{claim.number}, {claim.title}"
        for bar in claim.missed(found):
            yield f"- {name}: missed. {bar.what}: {bar.of(found):{bar.show}}, not {limit(bar)}."
        for bar in claim.bars:
            if not bar.claimed and not bar.met(found):
                value = f"{bar.of(found):{bar.show}}"
                yield f"- {name}: not claimed. {bar.what}: {value}; a bar of {limit(bar)} would be missed."
        if claim.verdict(found) == OPEN:
            yield f"- {name}: nothing is claimed. {claim.notes}"
        if not experiment.enough(found):
            yield f"- {name}: measured on {len(found.seeds)} of at least {SEEDS} seeds."


def section(claim: Claim, experiment: Experiment, found: Found) -> str:
    figures = [[figure.what, figure.expected, *spread(figure.values(found), figure.show)] for figure in claim.figures]
    parts = [
        f"## {claim.number} {claim.title}",
        f"Paper: {claim.source}.",
        f"Setting: {claim.setting}",
        table(("figure", "expected", "ours", "of the seeds"), figures, ":- -: -: -:"),
    ]
    if claim.bars:
        rows = [[bar.what, limit(bar), f"{bar.of(found):{bar.show}}", verdict(bar, found)] for bar in claim.bars]
        parts.append(table(("bar", "", "measured", ""), rows, ":- -: -: :-"))
    said = (f"**{judged(claim, experiment, found).capitalize()}.**", claim.notes, claim.remark(found))
    parts.append(" ".join(filter(None, said)))
    if claim.details:
        parts.append(f"More: [{claim.details}]({claim.details}).")
    return "\n\n".join(parts)


def verdict(bar: Bar, found: Found) -> str:
    said = "met" if bar.met(found) else MISSED
    return said if bar.claimed else f"{OPEN} (would be {said})"


def limit(bar: Bar) -> str:
    return f"{bar.relation} {bar.limit:g}"


def spread(values: Sequence[float], show: str) -> tuple[str, str]:
    """Mean with standard deviation, and the values; a value that all seeds share once."""
    mean = f"{sum(values) / len(values):{show}}"
    if len(set(values)) == 1:
        return mean, ""
    return f"{mean} ± {stdev(values):{show.removeprefix('+')}}", " ".join(f"{value:{show}}" for value in values)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], rule: str) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rule.split(), *rows))
