"""An opened folder: prepares raw inputs, runs them in batches, and says what came out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from slimfuse_export.deployed import answers
from slimfuse_export.deployed.answers import Answer
from slimfuse_export.deployed.description import POOLINGS, Description, Pooling, describe
from slimfuse_export.deployed.generation import generate
from slimfuse_export.deployed.images import (
    MOST_PIXELS,
    ImagePreparation,
    open_image,
    read_preparation,
)
from slimfuse_export.deployed.options import Options
from slimfuse_export.deployed.texts import MASK, TextPreparation, Tokens, read_tokenizer
from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.folder import INT8, MODEL
from slimfuse_export.sessions import open_session, run_session

PIXELS = "pixel_values"
_MOST_VALUES = 2**25  # of one call's output: logits of long texts would take gigabytes


@dataclass(frozen=True)
class Row:
    """One prepared input. Rows of one `key` may share a batch without waste."""

    value: NDArray[np.float32] | Tokens
    options: Options
    key: tuple[int, ...]

    @property
    def length(self) -> int:
        """A text's tokens; images are all of one."""
        return len(self.value) if isinstance(self.value, Tokens) else 0

    @property
    def truncated(self) -> bool:
        """Whether a text was cut."""
        return isinstance(self.value, Tokens) and self.value.truncated


@dataclass(frozen=True)
class Deployed:
    """A model that takes texts or images. Methods may be called from several threads.

    preparation: of images or of texts. int8: whether the quantised file is the one that runs. Its
    activations' scales are those of the whole batch, so there a row's answer depends on what
    shares the batch; the float file's does not.
    """

    description: Description
    session: ort.InferenceSession
    preparation: ImagePreparation | TextPreparation
    int8: bool

    @property
    def takes_images(self) -> bool:
        """Whether inputs are images, not texts."""
        return isinstance(self.preparation, ImagePreparation)

    @property
    def mask(self) -> str | None:
        """The token that stands for what a masked language model fills in, None elsewhere."""
        if self.description.task != "masked-lm" or isinstance(self.preparation, ImagePreparation):
            return None
        return self.preparation.token(self.preparation.mask)

    def example(self) -> Row:
        """Return a prepared input of no meaning, to run the model once."""
        return self.prepare(Image.new("RGB", (16, 16)) if self.takes_images else self.mask or "a")

    def prepare(
        self,
        item: str | bytes | Path | Image.Image,
        options: Options | None = None,
        *,
        most_pixels: int = MOST_PIXELS,
    ) -> Row:
        """Return one input as the model wants it: a text, or an image, its file or its content.

        Raises: ExportError for what can't be decoded, is too large, or of the wrong kind.
        """
        options = options or Options()
        if isinstance(self.preparation, ImagePreparation):
            if isinstance(item, str):
                item = Path(item)
            if not isinstance(item, Image.Image):
                item = open_image(item, most_pixels=most_pixels)
            pixels = self.preparation(item)
            return Row(pixels, options, pixels.shape)
        if not isinstance(item, str):
            raise ExportError("the model takes texts", got=type(item).__name__)
        return self._text(item, options, self.preparation)

    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """Return the answers of prepared inputs, run together.

        Raises: CheckFailed where the model fails on them.
        """
        if not rows:
            return []
        if isinstance(self.preparation, ImagePreparation):
            pixels = {PIXELS: np.stack([np.asarray(row.value) for row in rows])}
            return self._read(self._run(pixels), rows, None)
        found: list[Answer] = []
        for part in answers.in_chunks(rows, self._at_once(rows)):
            found += self._texts(part, self.preparation)
        for row, answer in zip(rows, found, strict=True):
            if row.truncated:
                answer["truncated"] = True
        return found

    def predict(
        self,
        items: Iterable[str | bytes | Path],
        options: Options | None = None,
        *,
        batch: int = 16,
    ) -> Iterator[Answer | ExportError]:
        """Yield every input's answer in order, or what is wrong with that input."""
        waiting: list[Row | ExportError] = []
        for item in items:
            try:
                waiting.append(self.prepare(item, options))
            except ExportError as error:
                waiting.append(error)
            if len(waiting) >= batch:
                yield from self._settle(waiting)
                waiting = []
        yield from self._settle(waiting)

    def _settle(self, waiting: Sequence[Row | ExportError]) -> Iterator[Answer | ExportError]:
        """Run rows of one shape together, where that fails one by one, and keep the order."""
        found: list[Answer | ExportError | None] = [
            row if isinstance(row, ExportError) else None for row in waiting
        ]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(waiting):
            if isinstance(row, Row):
                groups.setdefault(row.key if self._apart else (), []).append(i)
        for places in groups.values():
            rows = [row for i in places if isinstance(row := waiting[i], Row)]
            for i, answer in zip(places, self.answer_each(rows), strict=True):
                found[i] = answer
        for one in found:
            assert one is not None
            yield one

    def answer_each(self, rows: Sequence[Row]) -> list[Answer | ExportError]:
        """Return answers of rows run together; where that fails, of each alone, or its error."""
        try:
            return list(self.answer(rows))
        except ExportError as error:
            if len(rows) == 1:
                return [error]
        return [one for row in rows for one in self.answer_each([row])]

    @property
    def _apart(self) -> bool:
        """Whether only rows of one key may share a batch."""
        return not isinstance(self.preparation, TextPreparation) or (
            not self.preparation.batches_lengths
        )

    def _run(self, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        """Return the graph's one output that counts."""
        (first, *_) = (value.name for value in self.session.get_outputs())
        found = run_session(self.session, inputs, [first])[first]
        if not np.all(np.isfinite(found)):
            raise CheckFailed("the model's output is not finite", where=first)
        return found

    def _read(
        self, found: NDArray[Any], rows: Sequence[Row], mask: NDArray[np.int64] | None
    ) -> list[Answer]:
        told = self.description
        if told.task in ("sentence-embedding", "feature-extraction"):
            return answers.embedded(found, mask, told.pooling, told.unit)
        return [
            answers.classified(logits, told, row.options.top_k)
            for logits, row in zip(found, rows, strict=True)
        ]

    def _text(self, text: str, options: Options, preparation: TextPreparation) -> Row:
        causal = self.description.task == "causal-lm"
        row = preparation(text, truncate=options.truncate and not causal)
        if causal and not row.ids and preparation.start is not None:
            row = Tokens((preparation.start,), (0,))
        if not row.ids:
            raise ExportError("the text has no tokens", got=repr(text[:40]))
        if causal and preparation.limit is not None and len(row) >= preparation.limit:
            raise ExportError(
                "the text leaves no place to go on",
                got=f"{len(row)} tokens",
                allowed=f"up to {preparation.limit - 1}",
            )
        if self.description.task == "masked-lm" and preparation.mask not in row.ids:
            raise ExportError("the text has no mask", allowed=preparation.token(preparation.mask))
        # lengths up to the same power of two: less than half of a batch is filling
        length = len(row) if not preparation.batches_lengths else (len(row) - 1).bit_length()
        return Row(row, options, (length,))

    def _texts(self, rows: Sequence[Row], preparation: TextPreparation) -> list[Answer]:
        texts = [row.value for row in rows if isinstance(row.value, Tokens)]
        told = self.description
        if told.task == "causal-lm":
            wanted = [row.options for row in rows]
            return generate(texts, wanted, preparation, told.ends, self._next)
        inputs = preparation.collate(texts)
        found = self._run(dict(inputs))
        if told.task == "masked-lm":
            return [
                answers.unmasked(logits, text, preparation, row.options.top_k)
                for logits, text, row in zip(found, texts, rows, strict=True)
            ]
        return self._read(found, rows, inputs.get(MASK))

    def _next(self, texts: Sequence[Tokens]) -> NDArray[Any]:
        """Return the logits (rows, vocabulary) behind each text's last token."""
        assert isinstance(self.preparation, TextPreparation)
        groups: dict[int, list[int]] = {}
        for i, text in enumerate(texts):
            groups.setdefault(0 if self.preparation.batches_lengths else len(text), []).append(i)
        rows: dict[int, NDArray[Any]] = {}
        for places in groups.values():
            part = [texts[i] for i in places]
            found = self._run(dict(self.preparation.collate(part)))
            rows |= {i: found[j, len(texts[i]) - 1] for j, i in enumerate(places)}
        return np.stack([rows[i] for i in range(len(texts))])

    def _at_once(self, rows: Sequence[Row]) -> int:
        """Return how many texts run together so that the logits of all their tokens fit."""
        last = self.session.get_outputs()[0].shape[-1]
        if self.description.task not in ("masked-lm", "causal-lm") or not isinstance(last, int):
            return len(rows)
        longest = max(
            len(row.value) + row.options.max_new_tokens * (self.description.task == "causal-lm")
            for row in rows
        )
        return max(1, _MOST_VALUES // (longest * last))


def open_deployed(
    folder: str | os.PathLike[str],
    *,
    int8: bool = False,
    threads: int = 1,
    pooling: Pooling | None = None,
) -> Deployed:
    """Return a finished folder's model, ready to be asked.

    int8: run onnx/model_quantized.onnx. threads: of one call. pooling: of embeddings, by default
    what the folder says.
    Raises: ExportError for a missing or odd file, an unknown task or a pooling without use.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError("there is no such folder", where=folder)
    session = open_session(folder / (INT8 if int8 else MODEL), threads=threads)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    told = describe(folder, list(shapes), [value.name for value in session.get_outputs()])
    if pooling is not None:
        if told.task not in ("sentence-embedding", "feature-extraction"):
            raise ExportError(
                "a model without embeddings isn't pooled", where=folder, got=told.task
            )
        if pooling not in POOLINGS:
            raise ExportError("unknown pooling", got=pooling, allowed=", ".join(POOLINGS))
        told = replace(told, pooling=pooling)
    preparation: ImagePreparation | TextPreparation
    if PIXELS in shapes:
        channels = shapes[PIXELS][1]
        preparation = read_preparation(told, channels if isinstance(channels, int) else 3)
    else:
        preparation = read_tokenizer(told, list(shapes))
        if told.task == "masked-lm" and preparation.mask is None:
            raise ExportError("the tokenizer has no mask token", where=folder)
    return Deployed(told, session, preparation, int8)
