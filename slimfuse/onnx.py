"""torch → ONNX: one graph with named dynamic dimensions and nothing of this machine in it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from slimfuse_export import stamp
from torch import Tensor, nn

from slimfuse.batch import Batch

BATCH, TOKENS = "batch_size", "sequence_length"


class _Answering(nn.Module):
    def __init__(self, model: nn.Module, names: list[str], output: str) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, *values: Tensor) -> Tensor:
        given = dict(zip(self.names, values, strict=True))
        found: Tensor = getattr(self.model(**given), self.output)
        return found


def export_onnx(
    model: nn.Module, example: Batch, path: Path, *, opset: int, output: str = "logits"
) -> None:
    """Write `model` as ONNX: inputs named as in a batch, one output, named as the class names it.

    example: two or more samples. Their number is dynamic, and of whole numbers, such as token ids,
    the second dimension too. Eager attention is exported, since it gives the smaller graph. The
    file says what it needs (`slimfuse_export.metadata`). Node metadata is removed: the exporter
    puts stack traces with local paths there.
    """
    names, values = list(example.arguments), tuple(example.arguments.values())
    batch, tokens = torch.export.Dim(BATCH), torch.export.Dim(TOKENS)
    shapes = tuple({0: batch} if v.is_floating_point() else {0: batch, 1: tokens} for v in values)
    with _quiet():
        program = torch.onnx.export(
            _Answering(model.eval(), names, output),
            values,
            input_names=names,
            output_names=[output],
            dynamic_shapes={"values": shapes},
            opset_version=opset,
            dynamo=True,
        )
    assert program is not None
    proto = program.model_proto
    for node in (*proto.graph.node, *(n for f in proto.functions for n in f.node)):
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.initializer, *proto.graph.input,
                  *proto.graph.output):  # fmt: skip
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    stamp(proto, step="export")
    onnx.save(proto, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
