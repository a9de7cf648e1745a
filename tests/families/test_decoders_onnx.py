"""Exported causal language models give the stock logits at shapes other than the example's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from families import test_gpt2
from families.cases import shaken
from tiny_decoders import DECODERS, NARROW, TOKENS, VOCABULARY, config_of

from slimfuse.batch import Batch, arrays
from slimfuse.onnx import export_onnx

QUICK = ("gemma3",)  # GPT-2's graph: tests/deployed, at texts of all lengths
FAMILIES: dict[str, Any] = {"gpt2": test_gpt2.FAMILY, **DECODERS}
marked = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def batch(n: int, tokens: int) -> Batch:
    """Return ids of texts, padded on the right in every second one."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(0, VOCABULARY, (n, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, -2:] = 0
    return Batch({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("name", marked)
def test_the_exported_graph_gives_the_logits_at_two_other_shapes(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    if name == "gpt2":
        config = test_gpt2.CASE.config(vocab_size=VOCABULARY, positions=TOKENS)
    else:
        config = family.narrow(config_of(family, tied=True), NARROW)
    model = shaken(family.build(config, attention="eager"), seed=0).float()
    file = tmp_path / "model.onnx"
    export_onnx(family.stock_form(model), batch(2, 5), file, opset=20)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n, tokens in ((1, 4), (5, TOKENS)):
        x = batch(n, tokens)
        assert [value.name for value in session.get_inputs()] == list(x.arguments)
        (found,) = session.run(None, arrays(x))
        with torch.no_grad():
            wanted = model(**x.arguments).logits
        real = x.arguments["attention_mask"].bool()
        # float32, two blocks: the runtime sums in another order; what pads is nobody's
        torch.testing.assert_close(torch.from_numpy(found)[real], wanted[real], rtol=0, atol=2e-5)
    assert not bool(real.all())  # padding took part
