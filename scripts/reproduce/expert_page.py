"""The text of docs/experts.md: every variant of merging experts, by seed."""

from __future__ import annotations

from claims import Found
from expert_merges import INTO, RANKED, RECOVERED, RECOVERY, STEPS, VARIANTS
from work import page

TEXT = """\
# Merging the experts of a tiny Mixtral

Written by `python scripts/reproduce --only R11`. A Mixtral of two layers with eight experts, {parameters:,.0f}
parameters, trained on the standard library's source, character by character; the rise of its loss, in nats a character,
once its experts are merged with `merge_experts`, without any further training. *Expected* are figures of the
specification that the method follows, measured with another implementation on networks of its own. Figures are those of
the seeds {seeds}, trained {steps} steps, whose networks have losses of {before}.

{table}

Random groups are those of statistics that say nothing of the network, with uniform weights; whether their units are
matched the specification does not say. *Keep dominants* is `mode: prune`, with the router's rows of the experts that
are kept, or, under `alias`, with every row.

MC-SMoE decomposes merged experts because their stable rank |W|_F^2 / |W|_2^2 is said to fall. Its mean over the
matrices of all experts that are left; *pruned* are the dominant experts as they were, so that the step from there to
*merged* is what merging itself does:

{ranks}

After {recovery} steps of training in which the experts of a group stay one, at {most} experts:

{recovered}
"""


def document(found: Found) -> str:
    rows = [["", *(cell for into in INTO for cell in (f"8 to {into}", "expected"))], ["-"] * (1 + 2 * len(INTO))]
    for name, (_, _, expected) in VARIANTS.items():
        cells = [name]
        for into in INTO:
            cells.append(" / ".join(f"{rise:.2f}" for rise in found[f"{name} {into}"]))
            cells.append(" / ".join(f"{one:.2f}" for one in expected.get(into, ())))
        rows.append(cells)
    lines = [
        f"- {name}: {' / '.join(f'{rise:+.3f}' for rise in found[f'{name} recovered'])} "
        f"(expected {' / '.join(f'{one:+.3f}' for one in expected)})"
        for name, expected in RECOVERED.items()
    ]
    whole = " / ".join(f"{rank:.2f}" for rank in found["stable rank whole"])
    ranks = [["", "8 experts", *(f"{into} experts" for into in INTO)], ["-"] * (2 + len(INTO))]
    for called in RANKED.values():
        left = (" / ".join(f"{rank:.2f}" for rank in found[f"stable rank {called} {into}"]) for into in INTO)
        ranks.append([called, whole, *left])
    text = TEXT.format(
        parameters=found["parameters"][0],
        seeds=listed([str(seed) for seed in found.seeds]),
        steps=listed([str(STEPS[seed]) for seed in found.seeds]),
        before=listed([f"{loss:.3f}" for loss in found["before"]]),
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        ranks="\n".join(f"| {' | '.join(row)} |" for row in ranks),
        recovery=RECOVERY,
        most=max(INTO),
        recovered="\n".join(lines),
    )
    return page(text)


def listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
