"""Licences of the parents: what their files say, and what of it the fused model inherits.

A fused model is made of its parents' weights, so it is treated as derived from each of them. This
reads names and knows a few rules about them; it is no legal advice.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from slimfuse.data.packages import PACKAGE

UNKNOWN = "unknown"
HEAD = 4000  # characters of a licence's text that say which it is
OWN_TERMS = (
    r"llama\d(\.\d)?", "gemma", r".*openrail.*", r"deepfloyd-if-license", "apple-amlr",
    r"bigscience-bloom-rail-.*",
)  # fmt: skip
COPYLEFT = (r"(a|l)?gpl-\d\.\d.*", r"mpl-.*", r"eupl-.*", r"cc-by-(nc-)?sa-.*", "osl-3.0")
PERMISSIVE = (
    "apache-2.0", "mit", "mit-0", r"bsd(-\d-clause.*)?", "isc", "zlib", "unlicense", "0bsd",
    "cc0-1.0", r"cc-by-\d\.\d", "pddl", "afl-3.0", "bsl-1.0", "ncsa", "postgresql",
    "artistic-2.0", "public-domain",
)  # fmt: skip
COMPATIBLE = {
    frozenset(pair)
    for pair in (
        ("cc-by-sa-4.0", "gpl-3.0"), ("lgpl-3.0", "gpl-3.0"), ("lgpl-2.1", "gpl-2.0"),
        ("lgpl-2.1", "gpl-3.0"), ("gpl-3.0", "agpl-3.0"), ("lgpl-3.0", "agpl-3.0"),
        ("mpl-2.0", "gpl-2.0"), ("mpl-2.0", "gpl-3.0"), ("mpl-2.0", "lgpl-3.0"),
        ("mpl-2.0", "agpl-3.0"),
    )
}  # fmt: skip
"""Licences that ask for themselves, of which the second one may cover both."""

TEXTS = (
    (r"llama (\d(?:\.\d)?) community license", r"llama\1"),
    (r"gemma terms of use", "gemma"),
    (r"gnu affero general public license\s+version (\d)", r"agpl-\1.0"),
    (r"gnu lesser general public license\s+version (\d(?:\.\d)?)", r"lgpl-\1"),
    (r"gnu general public license\s+version (\d)", r"gpl-\1.0"),
    (r"mozilla public license,? version 2\.0", "mpl-2.0"),
    (r"attribution-noncommercial-sharealike (\d\.\d)", r"cc-by-nc-sa-\1"),
    (r"attribution-noncommercial-noderiv\w* (\d\.\d)", r"cc-by-nc-nd-\1"),
    (r"attribution-noncommercial (\d\.\d)", r"cc-by-nc-\1"),
    (r"attribution-noderiv\w* (\d\.\d)", r"cc-by-nd-\1"),
    (r"attribution-sharealike (\d\.\d)", r"cc-by-sa-\1"),
    (r"attribution (\d\.\d) international", r"cc-by-\1"),
    (r"cc0 1\.0 universal", "cc0-1.0"),
    (r"apache license,?\s+version 2\.0", "apache-2.0"),
    (r"redistribution and use in source and binary forms.*neither the name", "bsd-3-clause"),
    (r"redistribution and use in source and binary forms", "bsd-2-clause"),
    (r"permission is hereby granted, free of charge", "mit"),
)
"""Words by which a licence's text is known, the surest first."""


@dataclass(frozen=True)
class Licence:
    """A parent's licence: its name as hubs write it, and the file that says so."""

    name: str
    source: str = ""

    def _is(self, *patterns: str) -> bool:
        return any(re.fullmatch(pattern, self.name) for pattern in patterns)

    @property
    def non_commercial(self) -> bool:
        """Whether it forbids commercial use."""
        return self._is(r"cc-by-nc.*", r".*non-?commercial.*", "apple-amlr")

    @property
    def no_derivatives(self) -> bool:
        """Whether it forbids to pass on what is derived."""
        return self._is(r"cc-by-(nc-)?nd-.*")

    @property
    def copyleft(self) -> bool:
        """Whether it demands that what is derived has the same licence."""
        return self._is(*COPYLEFT)

    @property
    def own_terms(self) -> bool:
        """Whether it is a maker's own, with rules of use that are passed on."""
        return self._is(*OWN_TERMS)

    @property
    def known(self) -> bool:
        """Whether its rules are known here."""
        rules = self.non_commercial or self.no_derivatives or self.copyleft or self.own_terms
        return rules or self._is(*PERMISSIVE)


@dataclass(frozen=True)
class Licences:
    """What the parents' licences mean for the fused model.

    found: by parent; inherited: what the fused model's users must keep to; conflicts: what can't
    be kept to at once; unknown: what isn't known. Each a sentence.
    """

    found: Mapping[str, Licence]
    inherited: tuple[str, ...] = field(default=())
    conflicts: tuple[str, ...] = field(default=())
    unknown: tuple[str, ...] = field(default=())

    @property
    def sentences(self) -> tuple[str, ...]:
        """All that is told of them."""
        return (*self.conflicts, *self.inherited, *self.unknown)


def licences(parents: Mapping[str, tuple[Path, str | None]]) -> Licences:
    """Return the parents' licences, what the fused model inherits of them, and their conflicts.

    parents: by name the folder of a model and where the recipe takes it from, such as
    `package:NAME`, whose own metadata is asked where the folder says nothing.
    """
    found = {name: licence_of(folder, origin) for name, (folder, origin) in parents.items()}
    return Licences(found, _inherited(found), _conflicts(found), _unknown(found))


def licence_of(folder: Path, origin: str | None = None) -> Licence:
    """Return the licence that a model's card, its LICENSE file or its package names."""
    return (
        _of_card(folder)
        or _of_text(folder)
        or (_of_package(origin) if origin and origin.startswith(PACKAGE) else None)
        or Licence(UNKNOWN)
    )


def _of_card(folder: Path) -> Licence | None:
    """Return what the front matter of README.md says; None where it says nothing that is one."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff")
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if front is None:
        return None
    try:
        told: Any = YAML(typ="safe", pure=True).load(front[1])
    except YAMLError:
        return None
    value = told.get("license") if isinstance(told, dict) else None
    if isinstance(value, list):
        value = " and ".join(map(str, value))
    if str(value).strip().lower() == "other":
        value = told.get("license_name")
    name = None if value is None else _name(str(value))
    return None if name is None else Licence(name, "README.md")


def _of_text(folder: Path) -> Licence | None:
    """Return what a file called LICENSE (or LICENCE, COPYING) is by its words."""
    names = re.compile(r"(licen[sc]e|copying)(\.(md|txt|rst))?", re.IGNORECASE)
    for file in sorted(f for f in folder.iterdir() if names.fullmatch(f.name)):
        text = " ".join(file.read_text(encoding="utf-8", errors="replace")[:HEAD].lower().split())
        for words, name in TEXTS:
            match = re.search(words, text)
            if match is not None:
                return Licence(_whole(match.expand(name)), file.name)
    return None


def _of_package(origin: str) -> Licence | None:
    """Return what the metadata of `package:NAME` says: its expression, its field, its class."""
    name = origin.removeprefix(PACKAGE).partition("/")[0]
    try:
        told = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    classes = [
        c.rpartition(" :: ")[2] for c in told.get_all("Classifier") or () if c.startswith("License")
    ]
    fields = [v for key in ("License-Expression", "License") for v in told.get_all(key) or ()]
    for value in (*fields, *classes):
        # the field may hold the whole text
        if "\n" not in value.strip() and (found := _name(value)) is not None:
            return Licence(found, f"metadata of {name}")
    return None


def _name(value: str) -> str | None:
    """Return a licence's name as hubs write it, from one as people write it."""
    text = " ".join(value.lower().replace("_", "-").split())
    if text in ("", "none", "unknown", "other", "proprietary or other"):
        return None
    plain = re.sub(r"\b(the|software|licen[sc]e[ds]?|version|v(?=\d)|osi approved)\b", " ", text)
    plain = "-".join(plain.replace(",", " ").replace("(", " ").replace(")", " ").split())
    if not plain:
        return None
    aliases = {
        "apache": "apache-2.0", "apache-2": "apache-2.0", "apache2": "apache-2.0",
        "apache2.0": "apache-2.0", "bsd-3": "bsd-3-clause", "cc0": "cc0-1.0",
    }  # fmt: skip
    plain = aliases.get(plain, plain).removesuffix("-only")
    return _whole(plain) if Licence(_whole(plain)).known else text


def _whole(name: str) -> str:
    """Return a GNU licence's name with both parts of its version, a Llama's without a dash."""
    match = re.fullmatch(r"((?:a|l)?gpl)-?v?(\d)(\.\d)?(\+|-or-later|-or-newer)?", name)
    if match is not None:
        later = "-or-later" if match[4] else ""
        return f"{match[1]}-{match[2]}{match[3] or '.0'}{later}"
    return re.sub(r"^llama-?(\d)", r"llama\1", name)


def _inherited(found: Mapping[str, Licence]) -> tuple[str, ...]:
    """Return what the fused model's users must keep to, one sentence for each rule."""
    rules = {
        "non_commercial": "the fused model is for non-commercial use only",
        "copyleft": "the fused model must be passed on under the same licence",
        "own_terms": "the maker's terms of use hold for the fused model and go with it",
    }
    told = []
    for rule, words in rules.items():
        names = [f"{n}: {found[n].name}" for n in found if getattr(found[n], rule)]
        if names:
            told.append(f"{words} ({', '.join(names)})")
    return tuple(told)


def _unknown(found: Mapping[str, Licence]) -> tuple[str, ...]:
    """Return what isn't known, one sentence each."""
    told = []
    for name, licence in found.items():
        if licence.name == UNKNOWN:
            told.append(f"the licence of {name} is unknown: neither its card nor a file says it")
        elif not licence.known:
            told.append(f"the rules of {name}'s licence, {licence.name}, are not known here")
    return tuple(told)


def _conflicts(found: Mapping[str, Licence]) -> tuple[str, ...]:
    """Return what can't be kept to at once, one sentence each."""
    told = []
    for name, licence in found.items():
        if licence.no_derivatives:
            words = "doesn't allow to pass on a model derived from it"
            told.append(f"{name}'s licence, {licence.name}, {words}")
    for (one, a), (two, b) in combinations(found.items(), 2):
        if _exclude(a, b):
            told.append(
                f"{one}'s licence, {a.name}, and {two}'s, {b.name}, can't both hold for one model"
            )
    return tuple(told)


def _exclude(a: Licence, b: Licence) -> bool:
    """Return whether what one licence demands of a derived model the other forbids."""
    if a.copyleft and b.copyleft:
        pairs = {frozenset((x, y)) for x in _versions(a.name) for y in _versions(b.name)}
        return not any(len(pair) == 1 or pair in COMPATIBLE for pair in pairs)
    for one, other in ((a, b), (b, a)):
        if not one.copyleft:
            continue
        if other.own_terms or (other.non_commercial and not one.non_commercial):
            return True  # the same licence, without rules beside it
        if _versions(one.name) == ("gpl-2.0",) and other.name == "apache-2.0":
            return True  # by the Free Software Foundation's list: patents
    return False


def _versions(name: str) -> tuple[str, ...]:
    """Return the licences of which a user may choose: a GNU licence's later ones, too."""
    plain = name.removesuffix("-or-later")
    kind = plain.partition("-")[0]
    return (plain,) if plain == name else tuple(dict.fromkeys((plain, f"{kind}-3.0")))
