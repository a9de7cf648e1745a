"""Exported graphs give the stock model's logits at shapes other than the example's."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from families.cases import CASES, TEXTS, Case, logits, shaken

from slimfuse.onnx import export_onnx

QUICK = ("vit", "distilbert")
marked = [
    pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow, id=case.name)
    for case in CASES
]


@pytest.mark.parametrize("case", marked)
def test_the_exported_graph_gives_the_logits_at_two_other_shapes(
    case: Case, tmp_path: Path
) -> None:
    config = case.family.narrow(case.config(), case.narrow)
    model = shaken(case.family.build(config, attention="eager"), seed=0).float()
    file = tmp_path / "model.onnx"
    cpu = torch.device("cpu")
    export_onnx(model, case.batch(2, 5).to(cpu, torch.float32), file, opset=20)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n, tokens in ((1, 4), (5, 6)):
        x = case.batch(n, tokens).to(cpu, torch.float32)
        names = [value.name for value in session.get_inputs()]
        assert names == list(x.arguments)
        (found,) = session.run(None, {name: x.arguments[name].numpy() for name in names})
        # float32, two blocks: the runtime sums in another order
        torch.testing.assert_close(torch.from_numpy(found), logits(model, x), rtol=0, atol=1e-5)
        if case.auto == TEXTS and n > 1:
            assert not bool(x.arguments["attention_mask"].all())  # padding took part
