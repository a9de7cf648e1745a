"""What is written of a tokenizer: read again it is the same, by older releases, too."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_text import tokenizer
from transformers import AutoTokenizer

from slimfuse.tasks import TASKS


def test_older_releases_know_the_saved_tokenizers_class(tmp_path: Path) -> None:
    """`TokenizersBackend` is transformers 5's own name: 4 and optimum-onnx refuse the folder."""
    made = tokenizer()
    TASKS["masked-lm"].save(made, tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(made)
    assert again("the old cat").input_ids == made("the old cat").input_ids
