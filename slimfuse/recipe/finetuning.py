"""How the fused model is trained: budget, rates, teachers, held-out choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from slimfuse.recipe.inputs import Data
from slimfuse.recipe.matching import EMBEDDING, dig
from slimfuse.recipe.strict import (
    Augment,
    Count,
    Finding,
    Fraction,
    NonNegative,
    Positive,
    Seed,
    Several,
    Strict,
)

PICKED = ("image-classification", "text-classification", "masked-lm", "causal-lm")
"""Tasks whose answers are chances of classes, so that a teacher can be sure or not."""
CLASSED = ("image-classification", "text-classification")
"""Tasks whose samples are of one class each."""
MOST_HELD_OUT = 0.5


class Distill(Strict):
    """Which parents teach, how much they count, and what of them is taught."""

    teachers: Several[str] | None = Field(
        None, description="Names of the parents that teach; null: all."
    )
    combine: Literal["mean", "confident"] = Field(
        "mean",
        description="Of several teachers: their weighted mean, or for every sample the one whose "
        "answer is the surest. Teachers of different classes are united anyway.",
    )
    temperature: Positive = Field(2.0, description="Divisor of teachers' and student's logits.")
    hardness: Fraction = Field(
        0.9, description="Weight of the teachers' soft targets, 0 to 1; the rest is the labels'."
    )
    hidden: NonNegative = Field(
        0.0,
        description="Weight of the distance between the child's hidden states and the fused "
        "parents', brought to its width by the fusion's maps; 0: only answers are taught.",
    )


class Validation(Strict):
    """Training samples that are held out to choose the best weights, never the test split."""

    share: Annotated[float, Field(gt=0, le=MOST_HELD_OUT)] = Field(
        0.1, description="Part of the training samples that is held out, 0 to 0.5."
    )
    every: Count = Field(100, description="Steps between two measurements; the last is one, too.")
    patience: Count | None = Field(
        None,
        description="End the training after so many measurements in a row that are no better; "
        "null: never.",
    )


class Lora(Strict):
    """Low-rank adapters that are trained in place of the blocks' weights, and merged into them."""

    rank: Count = Field(8, description="Rank of every adapter, in units.")
    alpha: Positive = Field(16.0, description="Its scale, times the rank.")


class Protect(Strict):
    """Samples on which finetuning leaves the fused child's answers as they are."""

    parents: Several[str] | None = Field(
        None,
        description="Names of parents: training samples of the classes that they know are "
        "protected; null: what `data` gives.",
    )
    data: Data | None = Field(
        None, description="Another source, all of whose training samples may be drawn; null: none."
    )
    samples: Annotated[int, Field(ge=1, le=100_000)] = Field(
        256, description="How many samples are drawn, with the seed of data.calibration."
    )
    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9999,
        description="Share of what the layers read of them that is protected, 0 to 1; at 1 their "
        "answers don't move at all, below it is a dial between the old and the new.",
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand one of parents and data."""
        given = [key for key in ("parents", "data") if raw.get(key) is not None]
        if len(given) == 1:
            return []
        what = "says what is protected twice" if given else "doesn't say what is protected"
        return [Finding((), what, allowed="one of parents and data")]


class Finetune(Strict):
    """Training of the fused model (AdamW, a schedule with warm-up, distillation)."""

    epochs: NonNegative = Field(
        1.0, description="Passes over the training set; may be fractional; 0: none."
    )
    lr: Positive = Field(5e-4, description="Peak learning rate, per step.")
    schedule: Literal["cosine", "linear", "constant", "polynomial"] = Field(
        "cosine", description="How the rate falls behind the warm-up; transformers' schedules."
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Factor between the rates of a layer and of the one above, 0 to 1; null: one "
        "rate for all.",
    )
    batch_size: Count = Field(128, description="Samples per step.")
    accumulate: Count = Field(
        1,
        description="Parts of a step's samples that are seen one by one, to save memory; means "
        "over tokens are then taken in each part.",
    )
    clip: Positive = Field(1.0, description="Largest norm of a step's gradient.")
    weight_decay: NonNegative = Field(0.05, description="Decoupled weight decay, times lr.")
    warmup: Fraction = Field(0.1, description="Part of the steps with a rising rate, 0 to 1.")
    augment: Augment = Field((), description="Random changes to the training pictures.")
    mixup: NonNegative = Field(
        0.0, description="Alpha of mixup, which blends two pictures and their labels; 0: none."
    )
    cutmix: NonNegative = Field(
        0.0, description="Alpha of cutmix, which pastes a part of another picture; 0: none."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Probability spread over all classes, 0 to 1."
    )
    dropout: bool = Field(
        False, description="Whether the model's own dropout is active; its config keeps it."
    )
    group_by_length: bool = Field(
        True, description="Put texts of like length into one batch, which then pads less."
    )
    freeze_embeddings: bool = Field(
        False,
        description="Leave the tables of tokens and positions as they were fused, so that tokens "
        "which the training never sees stay in place among the others; a tied head stays, too.",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Decay per step of the averaged weights, 0 to 1; null: no average."
    )
    seed: Seed = Field(0, description="Seed of the order and the augmentation.")
    validation: Validation | None = Field(
        None, description="Held-out training samples that choose the best weights; null: the last."
    )
    lora: Lora | None = Field(
        None, description="Train adapters and the head alone (peft, an extra); null: all weights."
    )
    compile: bool = Field(
        False, description="Let torch compile the model for training, which needs a C++ compiler."
    )
    protect: Protect | None = Field(
        None, description="What the child must not forget in this training; null: nothing."
    )
    distill: Distill = Field(Distill(), description="The parents as teachers.")


def check_finetune(raw: Mapping[str, Any]) -> list[Finding]:
    """Return what in `finetune` doesn't go with the task, or with the method of the fusion."""
    spec, task, findings = dig(raw, "finetune"), raw.get("task"), list[Finding]()
    labels = dig(raw, "data", "label_kind")
    if task in EMBEDDING and dig(spec, "accumulate") not in (None, 1):
        what = f"task {task!r} compares all samples of a step with each other"
        findings.append(Finding(("finetune", "accumulate"), what, allowed="1"))
    if dig(spec, "lora") is not None and raw.get("sparsify") is not None:
        what = "would fill the zeros when its adapters are merged"
        findings.append(Finding(("finetune", "lora"), what, allowed="null beside sparsify"))
    findings += _check_protect(raw)
    if task != "image-classification":
        findings += [
            Finding(("finetune", key), "blends pictures and their labels", allowed="0")
            for key in ("mixup", "cutmix")
            if dig(spec, key)
        ]
    if dig(spec, "distill", "combine") == "confident":
        place = ("finetune", "distill", "combine")
        if task not in PICKED or labels in ("multi", "regression"):
            findings.append(Finding(place, "needs answers that are classes", allowed="mean"))
    return findings


def _check_protect(raw: Mapping[str, Any]) -> list[Finding]:
    """Return what doesn't go with protected answers."""
    spec, place = dig(raw, "finetune"), ("finetune", "protect")
    protect, findings = dig(spec, "protect"), list[Finding]()
    if protect is None:
        return []
    if dig(spec, "lora") is not None:
        findings.append(Finding(place, "projects all weights, not adapters", allowed="no lora"))
    if raw.get("sparsify") is not None:
        what = "doesn't hold where weights become zero"
        findings.append(Finding(place, what, allowed="null beside sparsify"))
    several = dig(raw, "data", "label_kind") in ("multi", "regression")
    sourced = dig(raw, "data", "source") == "vader" and raw.get("task") == "text-classification"
    if dig(protect, "parents") and (raw.get("task") not in CLASSED or several or sourced):
        what = "only classes say which samples a parent knows"
        findings.append(Finding((*place, "parents"), what, allowed="null: give protect.data"))
    return findings


def check_net_finetune(raw: Mapping[str, Any]) -> list[Finding]:
    """Return what in `finetune` plain nets don't know."""
    spec, findings = dig(raw, "finetune"), list[Finding]()
    if dig(spec, "distill", "hidden"):
        what = "is of transformers' streams"
        findings.append(Finding(("finetune", "distill", "hidden"), what, allowed="0"))
    if dig(spec, "lora") is not None:
        findings.append(Finding(("finetune", "lora"), "is of transformers' blocks", allowed="null"))
    if dig(spec, "protect") is not None:
        what = "is of transformers: normalisation by batches would move all answers"
        findings.append(Finding(("finetune", "protect"), what, allowed="null"))
    if dig(spec, "layer_decay") is not None:
        what = "counts transformers' blocks"
        findings.append(Finding(("finetune", "layer_decay"), what, allowed="null"))
    return findings
