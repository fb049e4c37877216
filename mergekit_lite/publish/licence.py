"""The licence of a merge, worked out from what its parents' cards say. Pure; facts only, no advice.

A licence is put on the merge only where all parents have the same one. Whatever differs or is not known is told, with
who has which, and left to a person.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_UNKNOWN = frozenset({"unknown", "none", "null", "n-a", "na"})


@dataclass(frozen=True, slots=True)
class Licence:
    """What a card says: `id` is the Hub's identifier, such as `apache-2.0` or `other`; `name` and `link` stand beside
    `other`."""

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return self.id if self.name is None else f"{self.id} ({self.name})"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The licence that all parents have, None where there is no such one, and what is to be told in sentences."""

    licence: Licence | None
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trait:
    """What the texts of some licences, by the pattern of their names, say of changed works. `beside` is what there is
    to look at where a parent has a licence without this trait or, where each licence `demands` for itself, any
    other."""

    pattern: re.Pattern[str]
    says: str
    beside: str
    demands: bool = False

    def has(self, licence: Licence) -> bool:
        return self.pattern.fullmatch((licence.name or licence.id).lower()) is not None


TRAITS: Sequence[Trait] = (
    Trait(
        re.compile(r"cc-by-nc.*|.*non-?commercial.*|apple-amlr|h-research|intel-research"),
        "covers non-commercial use or research only",
        "does not say so",
    ),
    Trait(
        re.compile(r"cc-by(?:-nc)?-nd.*"),
        "does not allow changed versions to be shared, and a merge is a changed version",
        "does not forbid it",
    ),
    Trait(
        re.compile(r"[al]?gpl.*|gfdl|cc-by(?:-nc)?-sa.*|osl-3\.0|eupl-.*|mpl-.*|epl-.*|ms-pl|cdla-sharing.*|odbl"),
        "asks that changed versions are shared under the same licence",
        "is another one",
        demands=True,
    ),
    Trait(
        re.compile(r"llama.*|gemma.*|grok.*|deepfloyd.*|apple-ascl"),
        "is its maker's own licence, whose terms go along with changed versions",
        "does not have these terms",
        demands=True,
    ),
    Trait(
        re.compile(r".*openrail.*|.*-rail-.*"),
        "restricts some uses, and asks that changed versions restrict them too",
        "does not have these restrictions",
    ),
)


def read(card: Mapping[str, object]) -> Licence | None:
    """The licence in the metadata of a card; None where it says none that can be told.

    An identifier that is no word of letters, digits and `.+-` counts as none: it is a stranger's text.
    """
    given = card.get("license")
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if not isinstance(given, str):
        return None
    found = given.strip().lower()
    if _ID.fullmatch(found) is None or found in _UNKNOWN:
        return None
    if found != "other":
        return Licence(found)
    name, link = card.get("license_name"), card.get("license_link")
    return Licence(found, _name(name), link if isinstance(link, str) and _is_link(link) else None)


def combine(parents: Mapping[str, Licence | None]) -> Outcome:
    """The licence of a merge of `parents`, given by the names that they are shown under, and what to tell of it."""
    unknown = [name for name, licence in parents.items() if licence is None]
    groups: dict[Licence, list[str]] = {}
    for name, licence in parents.items():
        if licence is not None:
            groups.setdefault(licence, []).append(name)
    # `other` without a name may stand for two licences.
    vague = any(licence.id == "other" and licence.name is None and len(names) > 1 for licence, names in groups.items())
    same = next(iter(groups)) if len(groups) == 1 and not unknown and not vague else None
    listed = "; ".join(f"{licence}: {', '.join(names)}" for licence, names in groups.items())
    words: list[str] = []
    if same is not None:
        words.append(f"All parents have the licence {same}.")
    elif len(groups) > 1:
        words.append(f"The parents have different licences, so none is stated for the merge. {listed}.")
    elif groups:
        words.append(f"What the cards of parents say: {listed}.")
    if vague:
        words.append("Two parents with the licence other may have two licences, so none is stated for the merge.")
    if unknown:
        words.append(f"The licence of {', '.join(unknown)} is not known, so none is stated for the merge.")
    for licence, names in groups.items():
        words += _clashes(licence, names, list(groups))
    return Outcome(same, tuple(words))


def _clashes(licence: Licence, names: Sequence[str], everyone: Sequence[Licence]) -> Iterator[str]:
    """What the text of a licence says of changed works, and which of the others do not go along with it."""
    for trait in TRAITS:
        if not trait.has(licence):
            continue
        others = [o for o in everyone if o != licence and (trait.demands or not trait.has(o))]
        tail = f"; {', '.join(map(str, others))} {trait.beside}" if others else ""
        yield f"{licence} ({', '.join(names)}) {trait.says}{tail}."


def _name(given: object) -> str | None:
    """A name of letters, digits and a few marks: whatever else a stranger writes there is none."""
    return given if isinstance(given, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,79}", given) else None


def _is_link(text: str) -> bool:
    return re.fullmatch(r"https://[A-Za-z0-9.-]+/[A-Za-z0-9._~/%+-]{0,200}", text) is not None
