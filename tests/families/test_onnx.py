"""Exported graphs give the stock model's answers at shapes other than the example's."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from families.cases import EVERY, Case, shaken

from slimfuse.batch import call
from slimfuse.onnx import export_onnx

QUICK = ("vit", "distilbert")  # an encoder's body: tests/deployed
marked = [
    pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow, id=case.name)
    for case in EVERY
]


@pytest.mark.parametrize("case", marked)
def test_the_exported_graph_gives_the_models_answer_at_two_other_shapes(
    case: Case, tmp_path: Path
) -> None:
    config = case.family.narrow(case.config(), case.narrow)
    model = shaken(case.family.build(config, attention="eager"), seed=0).float()
    file = tmp_path / "model.onnx"
    cpu = torch.device("cpu")
    output = "logits" if case.family.layout(config).head else "last_hidden_state"
    export_onnx(model, case.batch(2, 5).to(cpu, torch.float32), file, opset=20, output=output)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n, tokens in ((1, 4), (5, 6)):
        x = case.batch(n, tokens).to(cpu, torch.float32)
        names = [value.name for value in session.get_inputs()]
        assert names == list(x.arguments)
        (found,) = session.run(None, {name: x.arguments[name].numpy() for name in names})
        # float32, two blocks: the runtime sums in another order
        with torch.no_grad():
            wanted = getattr(call(model, x), output)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)
        if not case.images and n > 1:
            assert not bool(x.arguments["attention_mask"].all())  # padding took part
