"""The recipe and what it does with its inputs: types, bounds, defaults, units, rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from slimfuse.recipe.diagnosing import Diagnose
from slimfuse.recipe.finetuning import Finetune, check_finetune
from slimfuse.recipe.fusing import Axis, Fuse, Method, Target
from slimfuse.recipe.inputs import Data, Parent
from slimfuse.recipe.matching import check_task, dig, items
from slimfuse.recipe.problems import Loc, nearest
from slimfuse.recipe.sparsifying import Sparsify, WeightScorer, check_sparsify
from slimfuse.recipe.strict import (
    Count,
    Distinct,
    ExactInt,
    Finding,
    Fraction,
    Listed,
    Positive,
    Seed,
    Several,
    Slug,
    Strict,
    as_tuple,
)

SPARSE_ROWS = ("sparse", *(f"sparse-{scorer}" for scorer in get_args(WeightScorer)))
RESERVED_NAMES = (
    "fused", "finetuned", "onnx", "onnx-int8", "random-start", "anchor",
    *(m for m in get_args(Method) if m != "random"), *SPARSE_ROWS,
)  # fmt: skip
"""Names of the report's other rows, so no parent may have them."""

QUALITY = ("accuracy", "micro_f1", "spearman", "perplexity")
GATE_LIMITS = dict.fromkeys(QUALITY, "max_drop") | {
    "latency_p50": "min_speedup",
    "params": "max_ratio",
}


class Quantize(Strict):
    """The INT8 copy of the ONNX model."""

    mode: Literal["auto", "dynamic", "static", "int4", "none"] = Field(
        "auto",
        description="auto, static, int4: INT8 with scales found as it runs (auto), from training "
        "samples (static), or 4-bit weights, where max_drop holds; dynamic: always; none: never.",
    )
    max_drop: Fraction = Field(
        0.01,
        description="Largest loss of the task's metric against the ONNX model, 0 to 1; where it is "
        "larger, the dearest matrix products stay float32, up to half of them.",
    )


class Export(Strict):
    """What is exported, and how close it must stay."""

    opset: int = Field(20, ge=18, le=24, description="ONNX operator set.")
    optimize: bool = Field(
        False, description="Try other graphs; keep one that is surely faster on this machine."
    )
    quantize: Quantize = Field(Quantize(), description="The INT8 copy.")
    parity_atol: Positive = Field(
        1e-4, description="Largest difference between torch's and ONNX's answers, absolute."
    )


class Bench(Strict):
    """How latency is measured, with onnxruntime on this machine's CPU."""

    threads: Several[Count] = Field((1,), description="Thread counts to measure.")
    batch: Several[Count] = Field((1, 8), description="Batch sizes to measure, in samples.")
    warmup: int = Field(10, ge=0, description="Calls before the measured ones.")
    min_seconds: Positive = Field(3.0, description="Shortest measured time per setting, seconds.")


class Gate(Strict):
    """A condition that the finished model has to meet; the run exits with 3 where it fails."""

    metric: Literal["accuracy", "micro_f1", "spearman", "perplexity", "latency_p50", "params"] = (
        Field(description="What is measured: the task's metric, latency_p50 or params.")
    )
    max_drop: Fraction | None = Field(
        None,
        description="For the task's metric: largest loss against the better parent, 0 to 1; "
        "absolute, of perplexity the share by which it is larger.",
    )
    min_speedup: Positive | None = Field(
        None, description="For latency_p50: smallest ratio of the parent's to the model's median."
    )
    max_ratio: Positive | None = Field(
        None, description="For params: largest ratio of the model's to the parent's parameters."
    )

    @property
    def limit(self) -> float:
        """The one number that goes with the metric."""
        value: float | None = getattr(self, GATE_LIMITS[self.metric])
        assert value is not None
        return value

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand the limit that fits the metric, and no other."""
        metric = raw.get("metric")
        wanted = GATE_LIMITS.get(metric) if isinstance(metric, str) else None
        if wanted is None:
            return []
        findings = [
            Finding((key,), f"does not fit metric {metric!r}", meant=wanted)
            for key in GATE_LIMITS.values()
            if key != wanted and raw.get(key) is not None
        ]
        if raw.get(wanted) is None:
            findings.append(Finding((wanted,), f"missing key: metric {metric!r} needs it"))
        return findings


class Runtime(Strict):
    """The machine's part; changes speed and, with precision, the last digits."""

    threads: Count | None = Field(None, description="CPU threads; null: the cores available.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Arithmetic of training; auto: bf16 where the processor computes it."
    )
    seed: Seed = Field(0, description="Seed of everything without a seed of its own.")
    tensorboard: bool = Field(
        False, description="Write the trainings' curves for TensorBoard, an extra."
    )


Parents = Annotated[
    tuple[Parent, ...], Field(min_length=1, max_length=8), BeforeValidator(as_tuple)
]


class Recipe(Strict):
    """One run of `slimfuse compress`: parents and data in, one narrower standard model out."""

    version: Annotated[Literal[1], ExactInt] = Field(description="Version of this format.")
    name: Slug = Field(description="Name of the run and of its folder.")
    family: Literal[
        "vit", "deit", "dinov2", "timm-vit", "bert", "roberta", "distilbert", "mpnet", "electra",
        "gpt2", "llama", "qwen2", "qwen3", "gemma3",
    ] = Field(description="Model family of the parents and the target.")  # fmt: skip
    task: Literal[
        "image-classification", "text-classification", "masked-lm", "causal-lm",
        "sentence-embedding", "feature-extraction",
    ] = Field(description="What the models do.")  # fmt: skip
    data: Data = Field(description="The data set.")
    parents: Parents = Field(description="The trained models to fuse, 1 to 8, of any widths.")
    target: Target = Field(description="The fused model's shape.")
    fuse: Fuse = Field(Fuse(), description="How parents become one narrower model.")
    finetune: Finetune = Field(Finetune(), description="Training of the fused model.")
    sparsify: Sparsify | None = Field(
        None, description="Zeros in the finetuned model before its export; null: none."
    )
    diagnose: Diagnose | None = Field(
        None, description="Tables that say why the child works; null: none."
    )
    baselines: Distinct[Method] = Field(
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
        """Demand parents' names that are free and distinct, teachers that exist, a task's data.

        And a target's size, but for method keep, which has its parent's.
        """
        places = (
            ("finetune", "distill", "teachers"), ("fuse", "parents"),
            ("finetune", "protect", "parents"),
        )  # fmt: skip
        findings = check_names(raw, RESERVED_NAMES, places) + check_task(raw)
        target = raw.get("target")
        sized = any(dig(target, key) is not None for key in Target.model_fields)
        if isinstance(target, Mapping) and not sized and dig(raw, "fuse", "method") != "keep":
            allowed = f"one of {', '.join(get_args(Axis))}, or budget"
            findings.append(Finding(("target",), "no size is given", allowed=allowed))
        return findings + check_sparsify(raw) + check_finetune(raw)


def check_names(
    raw: Mapping[str, Any], reserved: Sequence[str], places: Sequence[tuple[str, ...]]
) -> list[Finding]:
    """Return what is wrong with parents' names, and with the lists of them at `places`."""
    names = [dig(parent, "name") for parent in items(raw.get("parents"))]
    findings = []
    for i, name in enumerate(names):
        loc: Loc = ("parents", i, "name")
        if name in reserved:
            allowed = f"any but {', '.join(reserved)}"
            findings.append(Finding(loc, "is the name of a report row", allowed=allowed))
        elif name is not None and name in names[:i]:
            findings.append(Finding(loc, f"is the name of parents[{names.index(name)}] already"))
    for place in places:
        for i, one in enumerate(items(dig(raw, *place))):
            findings += check_reference((*place, i), one, names)
    return findings


def check_reference(loc: Loc, name: Any, names: Sequence[Any]) -> list[Finding]:
    """Return a finding where `name` is none of the parents' names."""
    known = list(dict.fromkeys(n for n in names if isinstance(n, str)))
    if not known or not all(isinstance(n, str) for n in names):
        return []  # it might mean the parent whose name is yet to be mended
    if not isinstance(name, str) or name in known:
        return []
    return [Finding(loc, "no such parent", nearest(name, known), ", ".join(known))]
