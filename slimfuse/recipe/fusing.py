"""The fused model's shape, and how parents become it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from slimfuse.recipe.inputs import Train
from slimfuse.recipe.strict import (
    BY_SCHEMA,
    Count,
    Distinct,
    Finding,
    Fraction,
    Location,
    Positive,
    Several,
    Size,
    Slug,
    Strict,
    as_tuple,
)

Axis = Literal["hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"]
Method = Literal[
    "refit", "gauge", "ot", "intra", "vanilla", "select", "subclone", "keep", "random",
    "random-refit",
]  # fmt: skip
Saliency = Literal[
    "energy", "uniform", "magnitude", "l1", "taylor", "diagonal-fisher", "mask-fisher", "ziplm",
    "random",
]  # fmt: skip


class Budget(Strict):
    """What the target may cost; the largest legal shape that keeps it is taken."""

    params: Size | None = Field(
        None, description="Most parameters: number, or ratio to the largest parent's."
    )
    flops: Size | None = Field(
        None, description="Most FLOPs a sample: number, or ratio to the largest parent's."
    )
    latency_ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Most time a sample against the largest parent's, measured here with "
        "onnxruntime, 0 to 1.",
    )
    free: Distinct[Axis] = Field(
        ("hidden_size", "intermediate_size"), description="The sizes that may shrink to keep it."
    )
    allocation: Literal["proportional", "saliency"] = Field(
        "proportional",
        description="How the free sizes share the cut: all by one share of the largest parent's, "
        "or each where least is lost by it, by that parent's mask Fisher on data.calibration, "
        "without labels; it must be saved (from).",
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand exactly one kind of budget, and sizes among which it can be allocated."""
        kinds = ("params", "flops", "latency_ratio")
        given = [key for key in kinds if raw.get(key) is not None]
        findings = [
            Finding((key,), f"stands beside {given[0]!r}", allowed="one of them")
            for key in given[1:]
        ]
        if not given:
            findings.append(Finding((), f"missing key: needs one of {', '.join(kinds)}"))
        free = raw.get("free", ("hidden_size", "intermediate_size"))
        if raw.get("allocation") != "saliency" or not isinstance(free, list | tuple):
            return findings
        if len(free) < 2 or set(map(str, free)) == {"hidden_size", "num_attention_heads"}:
            allowed = "with two free sizes or more; heads fall with a free hidden_size"
            findings.append(Finding(("allocation",), "has nothing to share out", allowed=allowed))
        return findings


class Target(Strict):
    """The fused model's shape: an integer is absolute, a float is a ratio to the parents."""

    hidden_size: Size | None = Field(
        None,
        description="Width of the residual stream: units, or ratio to the widest parent's; null: "
        "the widest parent's, or by budget.",
    )
    num_attention_heads: Size | None = Field(
        None,
        description="Heads per block: number or ratio; null: as the parents, in smaller heads.",
    )
    intermediate_size: Size | None = Field(
        None, description="Width of each MLP: units or ratio; null: by hidden_size's ratio."
    )
    num_hidden_layers: Size | None = Field(
        None, description="Number of blocks: number or ratio; null: as the parents."
    )
    budget: Budget | None = Field(
        None, description="Find the shape: the largest that costs no more than this."
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand that a budget is free to change what isn't given."""
        keys = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
        given = [key for key in keys if raw.get(key) is not None]
        budget = raw.get("budget")
        if not isinstance(budget, Mapping):
            return []
        free = budget.get("free", ("hidden_size", "intermediate_size"))
        if not isinstance(free, list | tuple):
            return []
        return [
            Finding((key,), "is fixed here and free in budget", allowed="one of the two")
            for key in given
            if key in free
        ]


class Anchor(Strict):
    """The trained narrow model that `method: ot` moves the parents to; of the target's shape."""

    from_: Location | None = Field(
        None, alias="from", description="Local folder or hub id; exactly one of from and train."
    )
    train: Train | None = Field(
        None,
        description="Train it in this run; its config's sizes must be the target's.",
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand one origin."""
        origin, train = raw.get("from") is not None, raw.get("train") is not None
        if origin and train:
            return [Finding(("train",), "stands beside 'from'", allowed="one of the two")]
        if not origin and not train:
            return [Finding((), "missing key: needs 'from' or 'train'")]
        return []


class Plans(Strict):
    """How transport plans are solved."""

    solver: Literal["emd", "sinkhorn", "unbalanced", "partial"] = Field(
        "emd", description="Exact (emd), entropic (sinkhorn), unbalanced or partial transport."
    )
    reg: Positive | None = Field(
        None,
        description="Entropic regularisation, in units of the mean cost; null: 0.05 for sinkhorn "
        "and unbalanced, unless effective_units is given.",
    )
    effective_units: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Softness: units of a parent mixed into a target unit; instead of reg."
    )
    marginal_reg: Positive = Field(
        1.0, description="Weight of the marginals of unbalanced plans, in units of the mean cost."
    )
    mass: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Share of the mass that a partial plan moves, 0 to 1."
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Refuse settings of another solver; defaults may stand there."""
        solver = raw.get("solver", "emd")
        reg, units = raw.get("reg"), raw.get("effective_units")
        findings = []
        if reg is not None and units is not None:
            findings.append(
                Finding(("effective_units",), "stands beside 'reg'", allowed="one of the two")
            )
        if solver == "emd":
            findings += [
                Finding((key,), "has no effect: solver is 'emd'", allowed="with another solver")
                for key, value in (("reg", reg), ("effective_units", units))
                if value is not None
            ]
        for key, kind, default in (("marginal_reg", "unbalanced", 1.0), ("mass", "partial", 1.0)):
            if solver != kind and raw.get(key, default) != default:
                findings.append(
                    Finding((key,), f"has no effect: solver is {solver!r}", allowed=f"with {kind}")
                )
        return findings


class Ot(Plans):
    """Optimal transport: of the published method (`method: ot`) and of units in a refit."""

    cost: Literal["activations", "weights", "combined"] = Field(
        "activations", description="What makes two units alike (method ot)."
    )
    masses: Literal["uniform", "norm", "saliency"] = Field(
        "uniform", description="What a unit weighs in a plan (method ot)."
    )
    residual: Literal["none", "residual-only", "mean", "weighted-scalar", "weighted-matrix"] = (
        Field(
            "mean",
            description="Which map goes on after a residual addition: the branch's, the skip's, or "
            "their mean, plain or weighted (method ot).",
        )
    )
    qk: Literal["separate", "joint", "equal"] = Field(
        "equal", description="Maps of queries and keys: each its own, one of both, the queries'."
    )
    heads: Literal["kept", "crossed"] = Field(
        "kept", description="Whether units stay with their heads (method ot)."
    )
    tokens: Literal["all", "class", "window"] = Field(
        "all", description="Tokens whose activations count (method ot)."
    )
    window: Annotated[int, Field(ge=0)] = Field(
        1, description="Reach of tokens: window, in patches about the image's centre."
    )
    anchor: Anchor | None = Field(None, description="The trained narrow model; method ot needs it.")
    anchor_weight: Fraction | None = Field(
        None, description="The anchor's share of the average, 0 to 1; null: as a parent's."
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Refuse settings of another solver or of other tokens; defaults may stand there."""
        findings = super().cross_check(raw)
        if raw.get("tokens", "all") != "window" and raw.get("window", 1) != 1:
            findings.append(Finding(("window",), "has no effect", allowed="with tokens: window"))
        return findings


def _ridge(value: Any) -> Any:
    if value == "auto" or (type(value) in (int, float) and 0 < value < float("inf")):
        return value if value == "auto" else float(value)
    raise Finding((), "not a ridge", allowed=BY_SCHEMA).error()


Ridge = Annotated[
    float | Literal["auto"],
    PlainValidator(_ridge),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "number", "exclusiveMinimum": 0}]}),
]
Layers = Annotated[
    tuple[Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)], ...],
    BeforeValidator(as_tuple),
]

ONLY_OT = ("cost", "masses", "residual", "qk", "heads", "tokens", "window")
FOR_INTRA = ("cost", *Plans.model_fields)
ANCHOR = ("anchor", "anchor_weight")  # may stand there for a baseline


class Fuse(Strict):
    """The one-shot fusion, before any training of the result."""

    method: Method = Field(
        "refit",
        description="refit: least squares on the parents' activations, block by block. gauge: "
        "average in common coordinates, then refit. ot: the published transport to a trained "
        "anchor. intra: the first parent's units merged onto its most salient ones. vanilla: plain "
        "average of equal shapes. select: the first parent pruned. "
        "subclone: its largest units copied. keep: the first parent as it is, which must have the "
        "target's shape (its own, where target is empty). random: none of the parents. "
        "random-refit: a random model whose writers and head are refitted, the control of every "
        "refit.",
    )
    parents: Several[Slug] | None = Field(
        None, description="Names of the parents that are fused; null: all. Others may still teach."
    )
    stream: Literal["pca", "gradient-pca", "select", "ot", "cluster"] = Field(
        "pca", description="How the residual stream is narrowed (refit)."
    )
    units: Literal["cholesky", "ziplm", "magnitude", "saliency", "ot", "cluster"] = Field(
        "cholesky",
        description="How MLP units and heads are chosen: one after the other by what they explain, "
        "or by what is lost with the one that goes, by norm, by saliency; ot and cluster merge MLP "
        "units (refit).",
    )
    saliency: Saliency | None = Field(
        None,
        description="What a unit counts in a choice by saliency (units) and as mass in plans "
        "(units, ot.masses, method intra): the energy that it writes, nothing (uniform), or a "
        "score of slimfuse.saliency. Gradients are of the parents' own answers, no labels are "
        "needed. null: mask-fisher with method intra, else energy.",
    )
    parent_weights: Literal["equal", "fisher"] = Field(
        "equal",
        description="Whether every tensor's average goes by the parents' weights alone, or by "
        "its Fisher information in each of them, too (ot).",
    )
    heads: Literal["drop", "merge"] = Field(
        "drop", description="What becomes of heads that aren't kept (refit)."
    )
    ridge: Ridge = Field(
        "auto",
        description="Damping of the least squares, relative to the mean diagonal; auto: by "
        "leave-one-sequence-out, layer by layer (refit, gauge).",
    )
    layers: Layers | None = Field(
        None,
        description="The deepest parent's blocks that each target block stands for, as in "
        "[[0, 1], [2]]; null: by the similarity of its streams (refit).",
    )
    alignment: Literal["gauge", "permutation", "soft", "none"] = Field(
        "gauge", description="How parents of one shape are aligned before averaging (gauge)."
    )
    refit: bool = Field(True, description="Whether the average is refitted (gauge).")
    ot: Ot = Field(Ot(), description="Optimal transport, where method, stream or units ask for it.")
    batch_size: Count = Field(128, description="Calibration samples per forward pass.")

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Refuse settings of another method or of a transport that does not take place."""
        method, findings = raw.get("method", "refit"), []
        refits = ("refit", "gauge")
        owners = {
            "stream": (*refits, "random-refit"),
            "units": refits,
            "parent_weights": ("ot",),
            "heads": refits,
            "ridge": (*refits, "random-refit"),
            "layers": ("refit",),
            "alignment": ("gauge",),
            "refit": ("gauge",),
        }
        if method == "gauge" and raw.get("refit") is False:
            owners |= dict.fromkeys(("stream", "units", "heads"), ("refit",))
        for key, methods in owners.items():
            default = cls.model_fields[key].default
            if method not in methods and raw.get(key, default) != default:
                allowed = f"with method: {' or '.join(methods)}"
                findings.append(
                    Finding((key,), f"has no effect: method is {method!r}", allowed=allowed)
                )
        ot = raw.get("ot")
        ot = ot if isinstance(ot, Mapping) else {}
        if method == "ot" and ot.get("anchor") is None:
            findings.append(Finding(("ot", "anchor"), "missing key: method 'ot' needs it"))
        published = method == "ot" or ot.get("anchor") is not None  # then for the baseline ot
        solves = published or "ot" in (raw.get("stream"), raw.get("units"))
        solves = solves or raw.get("alignment") == "soft" or method == "intra"
        findings += _saliency_findings(raw, ot)
        for key, default in Ot().model_dump(by_alias=True).items():
            if key in ANCHOR:
                continue
            idle = not published if key in ONLY_OT else not solves
            idle = idle and not (key == "cost" and method == "intra")
            if idle and ot.get(key, default) != default:
                allowed = "with method: ot or intra" if key in FOR_INTRA else "with method: ot"
                if key not in ONLY_OT:
                    allowed += ", stream: ot, units: ot or alignment: soft"
                findings.append(Finding(("ot", key), "has no effect here", allowed=allowed))
        return findings


def _saliency_findings(raw: Mapping[str, Any], ot: Mapping[str, Any]) -> list[Finding]:
    """Refuse a saliency that no one asks for, and a choice by none."""
    asked = raw.get("saliency")
    if asked is None:
        return []
    method, units = raw.get("method", "refit"), raw.get("units", "cholesky")
    used = method == "intra" or ot.get("masses") == "saliency"
    if method in ("refit", "gauge") and units in ("saliency", "ot", "cluster"):
        used = True
        if units == "saliency" and asked == "uniform":
            return [Finding(("saliency",), "chooses none before another", allowed="a score")]
    if used:
        return []
    allowed = "with units: saliency, ot or cluster, ot.masses: saliency or method: intra"
    return [Finding(("saliency",), "has no effect here", allowed=allowed)]
