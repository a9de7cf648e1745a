"""What `slimfuse diagnose` costs with its default flags (`make bench-diagnose`).

BERTs of the published sizes with random weights and WordNet's glosses: the cost doesn't depend on
what a model knows. Each is diagnosed by the command line in a process of its own, whose wall time
and largest resident memory are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import machine, settle, write
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from slimfuse.data import load_wordnet

SIZES = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096)}
TOKENIZER = Path("runs/zoo/minilm")
MINUTES, GIBIBYTES = 10, 8


def main() -> None:
    """Diagnose every size and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="of BERT's vocabulary")
    arguments = parser.parse_args()
    rows = [one(size, arguments.tokenizer) for size in arguments.sizes]
    lines = [
        "# What diagnosing costs", "", str(__doc__).strip(), "",
        "| BERT | parameters, M | minutes | peak GiB | samples a table saw |",
        "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {r['size']} | {r['params'] / 1e6:.0f} | {r['seconds'] / 60:.1f} | {r['gib']:.2f} "
        f"| {'; '.join(r['seen'])} |"
        for r in rows
    ]
    lines += ["", "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items())]
    write("diagnose", {"rows": rows, "machine": machine()}, "\n".join(lines) + "\n")
    settle(
        {
            f"{r['size']}: under {MINUTES} minutes and {GIBIBYTES} GiB": r["seconds"] < 60 * MINUTES
            and r["gib"] < GIBIBYTES
            for r in rows
            if r["size"] == "base"
        }
    )


def one(size: str, tokenizer: Path) -> dict[str, object]:
    """Return what one model's diagnosis cost."""
    hidden, layers, heads, inner = SIZES[size]
    labels = list(load_wordnet().classes)
    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    with TemporaryDirectory(prefix="bench-diagnose-") as place:
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        model.save_pretrained(place)
        params = sum(p.numel() for p in model.parameters())
        del model
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place)
        words = [sys.executable, "-m", "slimfuse", "diagnose", place, "--data", "wordnet", "--json"]
        begun = time.perf_counter()
        with (Path(place) / "tables.json").open("w") as file:
            process = subprocess.Popen(words, stdout=file)
            _, status, usage = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        seconds = time.perf_counter() - begun
        tables = json.loads((Path(place) / "tables.json").read_text())
    seen = [
        f"{t['title'].split(' parent')[0]}: {t['conditions'].split(',')[0]}"
        for t in tables
        if t["conditions"][0].isdigit()
    ]
    unit = 2**20 if sys.platform != "darwin" else 2**30
    assert isinstance(usage, resource.struct_rusage)
    return {"size": size, "params": params, "seconds": seconds, "gib": usage.ru_maxrss / unit,
            "seen": seen}  # fmt: skip


if __name__ == "__main__":
    main()
