"""torch → ONNX: one graph with a named batch dimension and nothing of this machine in it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

BATCH = "batch_size"


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def export_onnx(model: nn.Module, pixels: Tensor, path: Path, *, opset: int) -> None:
    """Write `model` as ONNX: input pixel_values (batch_size, 3, h, w), output logits.

    pixels: two or more example inputs. Eager attention is exported, since it gives the smaller
    graph. Node metadata is removed: the exporter puts stack traces with local paths there.
    """
    with _quiet():
        program = torch.onnx.export(
            _Logits(model.eval()),
            (pixels,),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim(BATCH)}},
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
    proto.producer_name, proto.producer_version = "slimfuse", ""
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
