"""The candidates of a sweep: a recipe with every combination of some keys' values.

What can be known to fail fails here, for all of them in one error.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from slimfuse.errors import UserError
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.contenders import split_option
from slimfuse.pipeline.making import stages_of
from slimfuse.recipe import InvalidRecipe, Recipe
from slimfuse.store import Store

EXAMPLE = "target.hidden_size=0.75,0.5,0.25"
FOLDER = "candidates"
ALONE = "recipe"  # the one candidate where nothing varies
SWEPT = ("data", "parents", "target", "fuse", "finetune", "sparsify", "export", "runtime")
ALIKE = {"runtime.threads": "all candidates are made and timed with the same threads"}
NAME_LENGTH = 80  # of a candidate's folder
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """One candidate: its name, what it changes in the recipe, and its folder's name."""

    name: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The name as a folder has it on any disk."""
        plain = re.sub(r"[^A-Za-z0-9._=+-]+", "_", self.name.replace(", ", "+"))
        kept = plain == self.name.replace(", ", "+") and plain[-1:] != "."  # which Windows drops
        if kept and len(plain) <= NAME_LENGTH:
            return plain
        mark = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        return f"{plain[:NAME_LENGTH]}-{mark}"


def candidates(vary: Sequence[str], overrides: Sequence[str] = ()) -> list[Candidate]:
    """Return the product of options `KEY=V1,V2,…`; one with a single value holds for all.

    overrides: of all of them, before the options. Raises UserError for another form, for a key
    that is given twice and for keys that can't differ between candidates; whether keys and values
    are right is the recipe's matter.
    """
    split = [split_option(option, "--set", EXAMPLE) for option in vary]
    axes = {key: list(dict.fromkeys(values)) for key, values in split if len(values) > 1}
    for key in axes:
        _check_key(key, [k for k, _ in split])
    short = {key: key.rpartition(".")[2] for key in axes}
    if len(set(short.values())) < len(short):
        short = {key: key for key in axes}
    choices = [
        [(key, value) for value in axes[key]] if key in axes else [(None, option)]
        for (key, _), option in zip(split, vary, strict=True)
    ]
    found = []
    for combination in product(*choices):
        changes = [value if key is None else f"{key}={value}" for key, value in combination]
        told = [f"{short[key]}={value}" for key, value in combination if key is not None]
        found.append(Candidate(", ".join(told) or ALONE, (*overrides, *changes)))
    return found


def _check_key(key: str, keys: Sequence[str]) -> None:
    if list(keys).count(key) > 1:
        raise UserError(
            "a key that varies is given twice",
            where="--set",
            got=key,
            hint="list all of its values in one option",
        )
    top = key.partition(".")[0]
    if key in ALIKE or (top in Recipe.model_fields and top not in SWEPT):
        raise UserError(
            "candidates can't differ by this key",
            where="--set",
            got=key,
            allowed=f"a key of {', '.join(SWEPT)}",
            hint=ALIKE.get(key, "give it one value, for all candidates"),
        )


def every(found: Sequence[Candidate], make: Callable[[Candidate], T]) -> dict[str, T]:
    """Return what `make` makes of each candidate, by its name.

    Raises UserError for all that can't be made at once.
    """
    made: dict[str, T] = {}
    wrong: dict[str, UserError] = {}
    for one in found:
        try:
            made[one.name] = make(one)
        except UserError as fault:
            wrong[one.name] = fault
    if not wrong:
        return made
    first = next(iter(wrong.values()))
    if len(found) == 1 or (not made and len({str(error) for error in wrong.values()}) == 1):
        raise first  # the recipe's own fault
    if all(isinstance(error, InvalidRecipe) for error in wrong.values()):
        problems = [p for e in wrong.values() if isinstance(e, InvalidRecipe) for p in e.problems]
        raise InvalidRecipe(dict.fromkeys(problems))
    lines = [f"{len(wrong)} of {len(found)} candidates can't be made"]
    for name, error in wrong.items():
        lines += [f"  {name}:", *(f"    {line}" for line in str(error).splitlines())]
    lines.append(f"  {'next:':9}leave these values out; nothing was done yet")
    raise UserError("\n".join(lines))


def same_test(first: BaseJob, other: BaseJob) -> bool:
    """Whether two jobs are measured on the same samples."""
    one, two = ((job.data.fingerprint, job.data.test.labels.tobytes()) for job in (first, other))
    return one == two


def sharing(jobs: Mapping[str, BaseJob], store: Store) -> dict[str, BaseJob]:
    """Return the jobs with one copy of what is the same for several: data and prepared samples.

    Raises UserError where they would be measured on different samples.
    """
    first = next(iter(jobs.values()))
    odd = [name for name, job in jobs.items() if not same_test(first, job)]
    if odd:
        raise UserError(
            "candidates would be measured on different samples",
            where="--set",
            got="; ".join(odd),
            allowed="one test set for all candidates",
        )
    kept: list[tuple[object, BaseJob]] = []
    found = {}
    for name, job in jobs.items():
        base = stages_of(job, store).base
        like = next((other for known, other in kept if known == base), None)
        if like is None:
            kept.append((base, job))
            found[name] = job
        else:
            found[name] = replace(
                job, data=like.data, processor=like.processor, opened=like.opened, made=like.made
            )
    return found
