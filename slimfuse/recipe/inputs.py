"""What goes in: the data set and the parents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from slimfuse.recipe.strict import (
    Augment,
    Count,
    Distinct,
    Finding,
    Fraction,
    Location,
    NonNegative,
    Positive,
    Seed,
    Shard,
    Slug,
    Strict,
    Text,
)


class Limit(Strict):
    """Caps on the number of samples, for a quick try; of texts that are joined the first ones."""

    train: Count | None = Field(None, description="Most training samples to use; null: all.")
    test: Count | None = Field(None, description="Most test samples to use; null: all.")


class Calibration(Strict):
    """The training samples on which activations are observed."""

    samples: int = Field(
        512, ge=1, le=100_000, description="Number of samples; of texts that are joined, blocks."
    )
    seed: Seed = Field(0, description="Seed of their choice.")


class MeasuredPart(Strict):
    """A part of the training set, held out to be measured in place of the test set."""

    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Its share of the training samples, 0 to 1."
    )
    seed: Seed = Field(0, description="Seed of its draw; of texts that are joined the last ones.")


COLUMNS = (
    "train_split", "test_split", "image_column", "text_column", "label_column", "label_columns",
    "label_separator",
)  # fmt: skip
IMAGES = ("digits", "fashion-mnist", "imagefolder")
TEXTS = ("wordnet", "vader", "anarchism", "textfolder")
SOURCES = (*IMAGES, *TEXTS, "datasets")
READY = ("digits", "fashion-mnist", "wordnet", "vader", "anarchism")
"""Sources whose splits, columns and labels are what they are."""

UNLABELLED = ("anarchism",)
LabelKind = Literal["single", "multi", "regression"]


class Data(Strict):
    """The data set that trains, calibrates and tests every model of the run."""

    source: Literal[
        "digits", "fashion-mnist", "imagefolder", "wordnet", "vader", "anarchism", "textfolder",
        "datasets",
    ] = Field(
        description="Kind of data set: digits comes with scikit-learn, datasets is the library, "
        "wordnet are glosses of nouns, vader sentences with ratings, anarchism is English prose "
        "without labels, a textfolder holds train and test as .csv, .jsonl or, without labels, "
        ".txt."
    )  # fmt: skip
    path: Location | None = Field(
        None,
        description="Folder of an imagefolder or textfolder; name or local folder for datasets; "
        "optionally the folder with the files of fashion-mnist, wordnet, vader or anarchism.",
    )
    config: Text | None = Field(None, description="Configuration name, for datasets only.")
    train_split: Text = Field("train", description="Name of the training split.")
    test_split: Text = Field("test", description="Name of the split that is measured.")
    image_column: Text = Field("image", description="Column with the picture.")
    text_column: Text = Field("text", description="Column with the text.")
    text_unit: Literal["line", "paragraph"] = Field(
        "line",
        description="What one text of a .txt file is: a line, or the lines up to an empty one.",
    )
    label_kind: LabelKind | None = Field(
        None,
        description="What a text's label is: one class, any number of classes, or a number; null: "
        "a number for vader, else one class. Tasks without labels ignore it and the columns.",
    )
    label_column: Text = Field(
        "label", description="Column with the class, the list of classes or the number."
    )
    label_columns: Distinct[Text] = Field(
        (), description="For multi, in place of label_column: columns of 0 and 1, one a class."
    )
    label_separator: Text | None = Field(
        None, description="For multi: what stands between the classes in one cell; null: a list."
    )
    image_size: Count | None = Field(
        None, description="Side of the square input in pixels; null: the parents' or native size."
    )
    max_length: Count | None = Field(
        None,
        description="Most tokens of a text in this run, or those of a block; null: what the "
        "tokenizer and the parents take, of a block at most 512. The finished model takes what its "
        "parents take.",
    )
    tokenizer: Location | None = Field(
        None,
        description="Saved tokenizer of all models: folder, hub id or package:NAME; null: that of "
        "the saved parents.",
    )
    vocabulary: Annotated[int, Field(ge=300, le=1_000_000)] | None = Field(
        None,
        description="Train a tokenizer of at most so many tokens on the training texts, where no "
        "saved model brings one.",
    )
    packing: bool = Field(
        True,
        description="For language models: join the texts and cut them into blocks of max_length "
        "tokens; false: one text a sample.",
    )
    limit: Limit = Field(Limit(), description="Caps on the number of samples.")
    calibration: Calibration = Field(
        Calibration(), description="Training samples on which activations are observed."
    )
    validation: MeasuredPart | None = Field(
        None,
        description="Measure on a part of the training set that nothing in the run is trained on; "
        "null: on the test split. A search (`slimfuse sweep --search`) sets it.",
    )

    @property
    def kind(self) -> LabelKind:
        """What a label is, where the task has any."""
        return self.label_kind or ("regression" if self.source == "vader" else "single")

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Say which sources need a path, and which keys don't go with a source or a label."""
        source, path, config = raw.get("source"), raw.get("path"), raw.get("config")
        findings = []
        if source in ("imagefolder", "textfolder", "datasets") and path is None:
            findings.append(Finding(("path",), f"missing key: source {source!r} needs it"))
        if source == "digits" and path is not None:
            findings.append(Finding(("path",), "source 'digits' takes no path", allowed="null"))
        if source != "datasets" and source in SOURCES and config is not None:
            what = f"source {source!r} takes no config"
            findings.append(Finding(("config",), what, allowed="null"))
        foreign = [*COLUMNS] if source in READY else []
        foreign += ["text_unit"] if source in SOURCES and source != "textfolder" else []
        for key in foreign:
            if not _default(cls, raw, key):
                what = f"source {source!r} takes no {key}"
                findings.append(Finding((key,), what, allowed="no such key"))
        if raw.get("tokenizer") is not None and raw.get("vocabulary") is not None:
            what = "stands beside 'tokenizer'"
            findings.append(Finding(("vocabulary",), what, allowed="one of the two"))
        return findings + _check_labels(cls, raw)


def _check_labels(model: type[Strict], raw: Mapping[str, Any]) -> list[Finding]:
    """Return what doesn't go with the kind of label."""
    source, kind = raw.get("source"), raw.get("label_kind")
    findings = []
    fixed = {"vader": "regression"}.get(source, "single") if source in (*READY, *IMAGES) else None
    if fixed is not None and kind not in (None, fixed):
        what = f"source {source!r} has no such labels"
        findings.append(Finding(("label_kind",), what, allowed=f"null or {fixed}"))
    if kind != "multi" and fixed is None:
        findings += [
            Finding((key,), "goes only with label_kind 'multi'", allowed="no such key")
            for key in ("label_columns", "label_separator")
            if not _default(model, raw, key)
        ]
    elif raw.get("label_columns"):
        findings += [
            Finding((key,), "stands beside label_columns", allowed="one of the two")
            for key in ("label_column", "label_separator")
            if not _default(model, raw, key)
        ]
    return findings


def _default(model: type[Strict], raw: Mapping[str, Any], key: str) -> bool:
    """Return whether a key has its default."""
    default = model.model_fields[key].default
    value = raw.get(key, default)
    return bool(value == default or (default == () and value in ([], ())))


class TrainConfig(Strict):
    """The shape of a parent that the run trains itself."""

    hidden_size: Count = Field(description="Width of the residual stream, in units.")
    num_hidden_layers: Count = Field(description="Number of blocks.")
    num_attention_heads: Count = Field(description="Heads per block; must divide hidden_size.")
    intermediate_size: Count = Field(description="Width of each MLP, in units.")
    patch_size: Count | None = Field(
        None, description="Side of a square patch in pixels; images need it, texts have none."
    )
    num_key_value_heads: Count | None = Field(
        None,
        description="Key heads of a decoder with grouped queries; null: as many as heads.",
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand heads of equal width."""
        hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
        if type(hidden) is int and type(heads) is int and heads >= 1 and hidden % heads:
            what = f"does not divide hidden_size {hidden}"
            return [Finding(("num_attention_heads",), what)]
        return []


class Training(Strict):
    """How the run trains a model of its own (AdamW, cosine schedule)."""

    shard: Shard = Field(
        "1/1",
        description="'i/n': train on the i-th of n disjoint parts of the training set, a seeded "
        "shuffle; texts that are joined keep their order.",
    )
    samples: Count | None = Field(
        None,
        description="Train on at most so many samples, a seeded draw; of texts that are joined "
        "the first ones; null: all.",
    )
    epochs: Count = Field(description="Passes over the shard.")
    batch_size: Count = Field(128, description="Samples per step.")
    lr: Positive = Field(1e-3, description="Peak learning rate, per step.")
    weight_decay: NonNegative = Field(0.05, description="Decoupled weight decay, times lr.")
    warmup: Fraction = Field(0.1, description="Part of the steps with a rising rate, 0 to 1.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Probability spread over all classes, 0 to 1."
    )
    augment: Augment = Field((), description="Random changes to the training pictures.")
    seed: Seed = Field(0, description="Seed of the start, the order and the augmentation.")


class _Shaped(Strict):
    """A base of its own, so that what it starts from stands before the rest."""

    config: TrainConfig | None = Field(
        None, description="The shape of a new model; exactly one of config and start."
    )
    start: Location | None = Field(
        None,
        description="Pretrained model to start from with a new head: folder, hub id or "
        "package:NAME.",
    )


class Train(Training, _Shaped):
    """How a demo makes its own parent (AdamW, cosine schedule)."""

    classes: Distinct[Text] | None = Field(
        None, description="Train on the samples of these classes only; null: all."
    )

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand one beginning."""
        given = [key for key in ("config", "start") if raw.get(key) is not None]
        if not given:
            return [Finding((), "missing key: needs 'config' or 'start'")]
        if len(given) > 1:
            return [Finding(("start",), "stands beside 'config'", allowed="one of the two")]
        return []


class Parent(Strict):
    """A trained model to fuse: from a path or the hub, or trained by the run."""

    name: Slug = Field(description="Its name in the report and in distill.teachers.")
    from_: Location | None = Field(
        None,
        alias="from",
        description="Local folder or .gguf file, hub id or package:NAME; exactly one of from and "
        "train.",
    )
    train: Train | None = Field(
        None, description="Train it in this run; exactly one of from and train."
    )
    weight: Positive = Field(
        1.0, description="Its share in the fused model, relative to the other parents'."
    )
    revision: Text | None = Field(None, description="Hub commit, tag or branch; only with from.")

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Demand one origin, and keep revision to hub models."""
        origin, train = raw.get("from") is not None, raw.get("train") is not None
        findings = []
        if origin and train:
            findings.append(Finding(("train",), "stands beside 'from'", allowed="one of the two"))
        if not origin and not train:
            findings.append(Finding((), "missing key: needs 'from' or 'train'"))
        if raw.get("revision") is not None and not origin:
            findings.append(Finding(("revision",), "goes only with 'from'", allowed="null"))
        return findings
