"""How the finetuned model's weights are pruned to zeros, and how it recovers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from slimfuse.recipe.matching import EMBEDDING, LANGUAGE, dig, items
from slimfuse.recipe.strict import (
    Count,
    Distinct,
    Finding,
    NonNegative,
    Positive,
    Several,
    Strict,
    Text,
)

WeightScorer = Literal["woodfisher", "woodtaylor", "diagonal-fisher", "magnitude", "random"]
BY_BLOCK = ("woodfisher", "woodtaylor")
"""Scorers that need the block Fisher, which an update of the other weights goes by."""
BY_GRADIENTS = (*BY_BLOCK, "diagonal-fisher")
ALONG_GRADIENT = "woodtaylor"
DAMPING = 0.1
PATTERN = r"^(unstructured|[1-9][0-9]*:[1-9][0-9]*|[1-9][0-9]*x[1-9][0-9]*)$"


def _pattern(text: str) -> str:
    found = re.fullmatch(PATTERN[1:-1], text)
    if not found or (":" in text and own_sparsity(text) is None):
        allowed = '"unstructured", "2:4" (2 of every 4 inputs stay), "4x1" (outputs x inputs)'
        raise Finding((), "unknown pattern of zeros", allowed=allowed).error()
    return text


class Damping(Strict):
    """What is added to the Fisher's diagonal, by one of two measures."""

    relative: Positive | None = Field(
        None,
        description="Share of each layer's mean diagonal; where layers share a threshold, of the "
        "geometric mean of that and the mean over all. Moves with the loss's scale.",
    )
    absolute: Positive | None = Field(
        None, description="In units of the squared gradient, as in the papers (1e-5, 1e-7)."
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand exactly one measure."""
        given = [key for key in ("relative", "absolute") if raw.get(key) is not None]
        if not given:
            return [Finding((), "missing key: needs 'relative' or 'absolute'")]
        return [
            Finding((key,), f"stands beside {given[0]!r}", allowed="one of the two")
            for key in given[1:]
        ]


def _relative(value: Any) -> Any:
    return {"relative": value} if type(value) in (int, float) else value


class _OrNumber:
    """In the schema a plain number, too."""

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, handler(core_schema)]}


Pattern = Annotated[str, AfterValidator(_pattern), Field(json_schema_extra={"pattern": PATTERN})]


class Sparsify(Strict):
    """Zeros among the weights of linear and convolution layers, and the training after them."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of zeros at the end, 0 to 1; null: as an N:M pattern says."
    )
    scorer: WeightScorer = Field(
        "woodfisher",
        description="What a weight counts: the least loss that its removal costs by the block "
        "Fisher (woodfisher), with the gradient's part (woodtaylor), by the Fisher's diagonal, its "
        "magnitude, or nothing (random).",
    )
    pattern: Pattern = Field(
        "unstructured",
        description="Which weights go together: each alone (unstructured), all but N of every M "
        "inputs (2:4), or blocks of outputs x inputs (4x1).",
    )
    layers: Several[Text] = Field(
        ("*",), description="Shell patterns of the parameters' names that may be pruned."
    )
    leave_out: Distinct[Text] = Field((), description="Shell patterns of those that may not.")
    joint: bool | None = Field(
        None,
        description="Whether all layers share one threshold, or each has the same sparsity; null: "
        "one for scores of gradients, which are in units of the loss, else each its own.",
    )
    update: Literal["none", "single", "joint"] | None = Field(
        None,
        description="How the other weights make up for the removed: each removal alone (single) or "
        "all of a block together (joint); null: joint where the scorer has the block Fisher.",
    )
    block: Count | None = Field(
        50, description="Weights in a block of the Fisher; null: one block a layer."
    )
    damping: Annotated[Damping, BeforeValidator(_relative), _OrNumber()] = Field(
        Damping(relative=DAMPING),
        description="What is added to the Fisher's diagonal: {relative: x} or {absolute: x}; a "
        "plain number is relative.",
    )
    fisher: Literal["labels", "own-answers"] | None = Field(
        None,
        description="What gradients are of: the loss against the data's labels, or against answers "
        "drawn from the model itself; null: labels of classes and numbers, else own answers.",
    )
    samples: Count = Field(
        512, description="Gradients that the Fisher is made of; fewer where the data has fewer."
    )
    micro_batch: Count = Field(1, description="Training samples per gradient, by their mean loss.")
    steps: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Steps of the cubic schedule; the Fisher is new in each."
    )
    initial: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of zeros that the schedule starts from, 0 to 1."
    )
    epochs: NonNegative | None = Field(
        None,
        description="Passes over the training set to recover, with finetune's settings and zeros "
        "held, in equal parts after every step; null: as finetune.epochs.",
    )
    controls: Distinct[WeightScorer] | None = Field(
        None,
        description="Scorers that the same is made with, to compare; null: magnitude, unless it is "
        "the scorer itself.",
    )

    @property
    def compared(self) -> tuple[WeightScorer, ...]:
        """The scorers of the controls."""
        if self.controls is not None:
            return self.controls
        return () if self.scorer == "magnitude" else ("magnitude",)

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand one sparsity, and refuse keys that nothing looks at."""
        scorer, pattern = raw.get("scorer", "woodfisher"), raw.get("pattern", "unstructured")
        findings = _sparsity_findings(raw, pattern)
        controls = raw.get("controls")
        controls = list(controls) if isinstance(controls, list | tuple) else []
        findings += [
            Finding(("controls", i), "is the scorer itself", allowed="another scorer")
            for i, control in enumerate(controls)
            if control == scorer
        ]
        used = {s for s in (scorer, *controls) if isinstance(s, str)}
        idle = dict.fromkeys(("damping", "fisher", "samples", "micro_batch"), BY_GRADIENTS) | {
            "block": BY_BLOCK
        }
        for key, users in idle.items():
            default = cls.model_fields[key].default
            given = raw.get(key, default)
            if key == "damping" and given in (DAMPING, Damping(relative=DAMPING).model_dump()):
                continue
            if not used & set(users) and given != default:
                allowed = f"with scorer: {', '.join(users)}"
                findings.append(Finding((key,), "has no effect here", allowed=allowed))
        if scorer not in BY_BLOCK and raw.get("update") in ("single", "joint"):
            what = f"goes by a block Fisher, which scorer {scorer!r} has none of"
            allowed = f"null or none, or scorer: {' or '.join(BY_BLOCK)}"
            findings.append(Finding(("update",), what, allowed=allowed))
        return findings


def own_sparsity(pattern: Any) -> float | None:
    """Return the share of zeros that an N:M pattern says itself, None for any other."""
    found = re.fullmatch("([1-9][0-9]*):([1-9][0-9]*)", pattern) if type(pattern) is str else None
    return 1 - int(found[1]) / int(found[2]) if found and int(found[1]) < int(found[2]) else None


def _sparsity_findings(raw: Mapping[str, Any], pattern: Any) -> list[Finding]:
    sparsity, initial, own = raw.get("sparsity"), raw.get("initial", 0.0), own_sparsity(pattern)
    findings = []
    if own is not None:
        if sparsity not in (None, own):
            what = f"pattern {pattern} has a sparsity of its own"
            findings.append(Finding(("sparsity",), what, allowed=f"null or {own:g}"))
        sparsity = own
        if raw.get("joint") is not None:
            what = f"has no effect: pattern {pattern} decides group by group"
            findings.append(Finding(("joint",), what, allowed="with another pattern"))
    elif sparsity is None and ":" not in str(pattern):  # else that is what is to be mended
        findings.append(
            Finding(("sparsity",), "missing key: only an N:M pattern says it",
                    allowed="a share of zeros, 0 to 1")
        )  # fmt: skip
    if not isinstance(initial, int | float) or not initial:
        return findings
    if raw.get("steps", 1) == 1:
        findings.append(Finding(("initial",), "has no effect here", allowed="with steps above 1"))
    elif isinstance(sparsity, int | float) and initial > sparsity:
        what = "is more than there are zeros at the end"
        findings.append(Finding(("initial",), what, allowed=f"at most {sparsity:g}"))
    return findings


def check_sparsify(raw: Mapping[str, Any]) -> list[Finding]:
    """Return what of `sparsify` doesn't go with the recipe's task."""
    task, fisher = raw.get("task"), dig(raw, "sparsify", "fisher")
    if task in EMBEDDING and fisher == "labels":
        what, allowed = f"task {task!r} has no labels", "null or own-answers"
        return [Finding(("sparsify", "fisher"), what, allowed=allowed)]
    own = fisher == "own-answers" or (fisher is None and task in (*EMBEDDING, *LANGUAGE))
    scorers = [dig(raw, "sparsify", "scorer"), *items(dig(raw, "sparsify", "controls"))]
    if own and ALONG_GRADIENT in scorers:
        what = f"{ALONG_GRADIENT} goes along a mean gradient, which own answers haven't"
        allowed = "another scorer" if task in EMBEDDING else "fisher: labels, or another scorer"
        return [Finding(("sparsify", "fisher"), what, allowed=allowed)]
    return []
