"""The recipe of `family: auto`: plain nets, whose units are found by tracing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from slimfuse.recipe.finetuning import Finetune, check_net_finetune
from slimfuse.recipe.fusing import Plans
from slimfuse.recipe.inputs import Data, Training
from slimfuse.recipe.matching import dig, items, word
from slimfuse.recipe.models import (
    SPARSE_ROWS,
    Bench,
    Export,
    Gate,
    Runtime,
    check_names,
    check_reference,
)
from slimfuse.recipe.sparsifying import Sparsify
from slimfuse.recipe.strict import (
    BY_SCHEMA,
    Count,
    Distinct,
    ExactInt,
    Finding,
    Listed,
    Location,
    NonNegative,
    Positive,
    Several,
    Slug,
    Strict,
    as_tuple,
)

NetMethod = Literal["ot", "vanilla", "unfused", "random"]
RESERVED_NAMES = (
    "fused", "finetuned", "onnx", "onnx-int8", "random-start", "anchor", "ot", "vanilla",
    "unfused", *SPARSE_ROWS,
)  # fmt: skip
KEYS = {
    "mlp": {"hidden"},
    "vgg": {"features", "hidden", "batch_norm"},
    "resnet": {"stages", "blocks", "inner"},
}
OPTIONS = ("hidden", "features", "batch_norm", "stages", "blocks", "inner")
NEEDED = {"mlp": ("hidden",), "vgg": ("features",), "resnet": ("stages", "blocks")}


def _feature(value: Any) -> Any:
    if value == "M" or (type(value) is int and value >= 1):
        return value
    raise Finding((), "neither channels nor a pooling", allowed=BY_SCHEMA).error()


def _widths(value: Any) -> Any:
    if type(value) is float and 0 < value <= 1:
        return value
    if isinstance(value, list | tuple) and value and all(type(v) is int and v > 0 for v in value):
        return tuple(value)
    raise Finding((), "neither a ratio nor a list of widths", allowed=BY_SCHEMA).error()


Feature = Annotated[
    int | Literal["M"],
    PlainValidator(_feature),
    WithJsonSchema({"anyOf": [{"const": "M"}, {"type": "integer", "minimum": 1}]}),
]
Widths = Annotated[
    float | tuple[int, ...],
    PlainValidator(_widths),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
            ]
        }
    ),
]


class NetConfig(Strict):
    """The shape of a net that the run trains itself; classes and image size are the data's."""

    architecture: Literal["mlp", "vgg", "resnet"] = Field(
        description="mlp: layers on flattened pixels; vgg: 3 × 3 convolutions and poolings; "
        "resnet: basic residual blocks with BatchNorm."
    )
    hidden: Listed[Count] | None = Field(
        None, description="Units of every hidden layer (mlp), or of the classifier's (vgg)."
    )
    features: Listed[Feature] | None = Field(
        None, description="Channels of every convolution, M for a 2 × 2 pooling (vgg)."
    )
    batch_norm: bool | None = Field(
        None, description="Whether BatchNorm follows every convolution; null: no (vgg)."
    )
    stages: Listed[Count] | None = Field(
        None, description="Channels of every stage's stream (resnet)."
    )
    blocks: Listed[Count] | None = Field(None, description="Blocks of every stage (resnet).")
    inner: Listed[Count] | None = Field(
        None,
        description="Channels between the two convolutions of every block; null: its stage's "
        "(resnet).",
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand the keys of the architecture, and no other's."""
        kind = word(raw.get("architecture"))
        if kind not in KEYS:
            return []
        findings = [
            Finding((key,), f"has no effect: architecture is {kind!r}", allowed="null")
            for key in OPTIONS
            if key not in KEYS[kind] and raw.get(key) is not None
        ]
        findings += [
            Finding((key,), f"missing key: architecture {kind!r} needs it")
            for key in NEEDED[kind]
            if not raw.get(key)
        ]
        stages, blocks = items(raw.get("stages")), items(raw.get("blocks"))
        if kind == "resnet" and stages and blocks and len(stages) != len(blocks):
            allowed = f"{len(stages)} numbers, one a stage"
            findings.append(Finding(("blocks",), "does not fit stages", allowed=allowed))
        inner = items(raw.get("inner"))
        wanted = sum(n for n in blocks if type(n) is int)
        if kind == "resnet" and inner and blocks and len(inner) != wanted:
            allowed = f"{wanted} numbers, one a block"
            findings.append(Finding(("inner",), "does not fit blocks", allowed=allowed))
        return findings


class NetTrain(Training):
    """How the run makes a parent of its own (AdamW, cosine schedule)."""

    config: NetConfig = Field(description="The net's shape.")


class Pruned(Strict):
    """A parent that is another one without its weakest units (torch-pruning, L1 norm)."""

    of: Slug = Field(description="Name of the dense parent, which stands before this one.")
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of every layer's units that goes, 0 to 1."
    )
    train: Training | None = Field(
        None, description="Training after the pruning; null: none, as the pruning leaves it."
    )


class NetParent(Strict):
    """A trained net to fuse: saved, trained by the run, or pruned from another parent."""

    name: Slug = Field(description="Its name in the report and in distill.teachers.")
    from_: Location | None = Field(
        None,
        alias="from",
        description="Folder of a saved net, as in a run's model/; exactly one of from, train and "
        "pruned.",
    )
    train: NetTrain | None = Field(None, description="Train it in this run.")
    pruned: Pruned | None = Field(None, description="Prune it from another parent.")
    weight: Positive = Field(
        1.0, description="Its share in the fused model, relative to the other parents'."
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand exactly one origin."""
        return _one_of(raw, ("from", "train", "pruned"))


class NetAnchor(Strict):
    """The net whose units the others are moved to; the target has its widths."""

    parent: Slug | None = Field(
        None, description="Name of a fused parent; exactly one of parent, from and train."
    )
    from_: Location | None = Field(None, alias="from", description="Folder of a saved net.")
    train: NetTrain | None = Field(None, description="Train it in this run.")
    weight: NonNegative = Field(
        1.0,
        description="Share of an anchor that is no parent, relative to the parents'; 0: it only "
        "says where their units go.",
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand exactly one origin, and a weight only where there is none yet."""
        findings = _one_of(raw, ("parent", "from", "train"))
        if raw.get("parent") is not None and raw.get("weight", 1.0) != 1.0:
            what = "has no effect: a parent's weight stands with the parent"
            findings.append(Finding(("weight",), what, allowed="with from or train"))
        return findings


class NetTarget(Strict):
    """Which widths the fused net gets."""

    widths: Widths | None = Field(
        None,
        description="A ratio to the first fused parent's widths, or the width of every space in "
        "execution order; null: the anchor's, without one the first fused parent's.",
    )


class NetOt(Plans):
    """Optimal transport between the units of two nets."""

    cost: Literal["activations", "weights"] = Field(
        "activations", description="What makes two units alike."
    )


class NetFuse(Strict):
    """The one-shot fusion, before any training of the result."""

    method: NetMethod = Field(
        "ot",
        description="ot: parents moved to the anchor's units and averaged (arXiv 1910.05653). "
        "vanilla: plain average of equal shapes. unfused: the anchor as it is. random: none of "
        "the parents.",
    )
    parents: Several[Slug] | None = Field(
        None, description="Names of the parents that are fused; null: all. Others may still teach."
    )
    anchor: NetAnchor | None = Field(
        None, description="Whose units the others are moved to; null: the first fused parent."
    )
    ot: NetOt = Field(NetOt(), description="The transport of method ot, a baseline's too.")
    recalibrate: bool = Field(
        True,
        description="Whether BatchNorm's statistics are measured anew on the calibration samples.",
    )
    batch_size: Count = Field(128, description="Calibration samples per forward pass.")


NetParents = Annotated[
    tuple[NetParent, ...], Field(min_length=1, max_length=8), BeforeValidator(as_tuple)
]


class NetRecipe(Strict):
    """One run of `slimfuse compress` with plain nets: parents and data in, one net out."""

    version: Annotated[Literal[1], ExactInt] = Field(description="Version of this format.")
    name: Slug = Field(description="Name of the run and of its folder.")
    family: Literal["auto"] = Field(description="Nets whose units are found by tracing them.")
    task: Literal["image-classification"] = Field(description="What the nets do.")
    data: Data = Field(description="The data set.")
    parents: NetParents = Field(description="The trained nets to fuse, 1 to 8, of any widths.")
    target: NetTarget = Field(NetTarget(), description="The fused net's shape.")
    fuse: NetFuse = Field(NetFuse(), description="How parents become one net.")
    finetune: Finetune = Field(Finetune(), description="Training of the fused net.")
    sparsify: Sparsify | None = Field(
        None, description="Zeros in the finetuned net before its export; null: none."
    )
    baselines: Distinct[NetMethod] = Field(
        ("random",), description="Other starts (methods), finetuned in the same way to compare."
    )
    export: Export = Field(Export(), description="The ONNX files.")
    bench: Bench = Field(Bench(), description="How latency is measured.")
    gates: Listed[Gate] = Field((), description="Conditions that the finished model has to meet.")
    runtime: Runtime = Field(Runtime(), description="Threads, precision and seed.")

    def to_lock(self) -> dict[str, Any]:
        """Return plain data under the YAML's key names, every default filled in."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand free, distinct names, and references to parents that exist."""
        places = (("finetune", "distill", "teachers"), ("fuse", "parents"))
        findings = check_names(raw, RESERVED_NAMES, places)
        names = [dig(parent, "name") for parent in items(raw.get("parents"))]
        for i, parent in enumerate(items(raw.get("parents"))):
            of, loc = dig(parent, "pruned", "of"), ("parents", i, "pruned", "of")
            missing = check_reference(loc, of, names)
            findings += missing
            if of is not None and not missing and of not in names[:i] and of in names:
                findings.append(Finding(loc, "must stand before the net that is pruned from it"))
        anchor, loc_of_anchor = dig(raw, "fuse", "anchor", "parent"), ("fuse", "anchor", "parent")
        fused = items(dig(raw, "fuse", "parents"))
        missing = check_reference(loc_of_anchor, anchor, names)
        if anchor is not None and not missing and fused and anchor not in fused:
            allowed = ", ".join(map(str, fused))
            missing = [Finding(loc_of_anchor, "is not fused: not in fuse.parents", None, allowed)]
        return findings + missing + check_net_finetune(raw)


def _one_of(raw: Mapping[str, Any], keys: tuple[str, ...]) -> list[Finding]:
    given = [key for key in keys if raw.get(key) is not None]
    if not given:
        return [Finding((), f"missing key: needs one of {', '.join(map(repr, keys))}")]
    return [
        Finding((key,), f"stands beside {given[0]!r}", allowed="one of the two")
        for key in given[1:]
    ]
