"""What `slimfuse diagnose` costs with its default flags (`make bench-diagnose`).

Models of the published sizes with random weights, on WordNet's glosses, Fashion-MNIST at 224 pixels
and the sentences of a book: the cost doesn't depend on what a model knows. Each is diagnosed by the
command line in a process of its own, whose wall time and largest resident memory are taken.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import settle, write
from kept import Figures, Kept, kept_parser
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from weights import minilm

from slimfuse.data import load_fashion_mnist, load_wordnet
from slimfuse.tasks.image_classification import make_processor

OUT = Path("runs/bench-diagnose")
MINUTES, GIBIBYTES = 10, 8


@dataclass(frozen=True)
class Case:
    """A kind of model: what makes it, and the data it is diagnosed on."""

    make: Callable[[], PreTrainedModel]
    data: str


def labelled(names: Sequence[str]) -> dict[str, Any]:
    """Return a configuration's classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def sized(hidden: int, layers: int, inner: int) -> dict[str, int]:
    """Return a configuration's sizes, with heads of 64."""
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner,
        "num_attention_heads": hidden // 64,
    }  # fmt: skip


def bert(hidden: int, layers: int, inner: int) -> PreTrainedModel:
    """Return a BERT that knows WordNet's classes."""
    classes = labelled(load_wordnet().classes)
    return BertForSequenceClassification(BertConfig(**sized(hidden, layers, inner), **classes))


def vit_large() -> PreTrainedModel:
    """Return a ViT-L/16 of 224 pixels that knows Fashion-MNIST's classes."""
    classes = labelled(load_fashion_mnist().classes)
    return ViTForImageClassification(ViTConfig(**sized(1024, 24, 4096), **classes))


def llama() -> PreTrainedModel:
    """Return a Llama of BERT's vocabulary."""
    sizes = sized(1024, 24, 2816)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30522, tie_word_embeddings=True))


CASES = {
    "BERT base": Case(lambda: bert(768, 12, 3072), "wordnet"),
    "BERT large": Case(lambda: bert(1024, 24, 4096), "wordnet"),
    "ViT large": Case(vit_large, "fashion-mnist"),
    "Llama": Case(llama, "anarchism"),
}


def main() -> None:
    """Diagnose what is asked for; write the table once all is there."""
    parser = kept_parser((), __doc__)
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    kept = Kept(OUT / "found.json", {"cases": list(CASES)}, fresh=arguments.fresh)
    for name in arguments.models:
        kept.row(name, lambda n=name: one(CASES[n]))
    rows = kept.rows
    if rows.keys() < CASES.keys():
        return
    lines = [
        "# What diagnosing costs", "", str(__doc__).strip(), "",
        "| model | parameters, M | minutes | peak GiB | held-out samples: spectra | signal | "
        "rounding |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {name} | {r['params'] / 1e6:.0f} | {r['seconds'] / 60:.1f} | {r['gib']:.2f} | "
        + " | ".join(f"{r[table]:.0f}" for table in TABLES.values()) + " |"
        for name, r in ((name, rows[name]) for name in CASES)
    ]  # fmt: skip
    lines += ["", f"Machine: {kept.machine()}"]
    write("diagnose", kept.record(()), "\n".join(lines) + "\n")
    base = rows["BERT base"]
    settle(
        {f"{name}: under {GIBIBYTES} GiB": r["gib"] < GIBIBYTES for name, r in rows.items()}
        | {f"BERT base: under {MINUTES} minutes": base["seconds"] < 60 * MINUTES}
    )


TABLES = {"How narrow": "spectra", "How the signal": "signal", "What to keep": "rounding"}
"""Tables that say how many samples they saw, by how their titles begin."""


def one(case: Case) -> Figures:
    """Return what one model's diagnosis cost."""
    with TemporaryDirectory(prefix="bench-diagnose-") as place:
        torch.manual_seed(0)
        model = case.make()
        model.save_pretrained(place)
        params = sum(p.numel() for p in model.parameters())
        del model
        if case.data == "fashion-mnist":
            data = load_fashion_mnist()
            make_processor(224, data.mean, data.std).save_pretrained(place)
        else:
            AutoTokenizer.from_pretrained(minilm()).save_pretrained(place)
        words = [sys.executable, "-m", "slimfuse", "diagnose", place, "--data", case.data, "--json"]
        begun = time.perf_counter()
        with (Path(place) / "tables.json").open("w") as file:
            process = subprocess.Popen(words, stdout=file)
            _, status, usage = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        seconds = time.perf_counter() - begun
        tables = json.loads((Path(place) / "tables.json").read_text())
    seen = {
        key: float(t["conditions"].split()[0])
        for t in tables
        for start, key in TABLES.items()
        if t["title"].startswith(start) and t["conditions"][0].isdigit()
    }
    unit = 2**20 if sys.platform != "darwin" else 2**30
    assert isinstance(usage, resource.struct_rusage)
    return {"params": params, "seconds": seconds, "gib": usage.ru_maxrss / unit} | seen


if __name__ == "__main__":
    main()
