"""How to narrow a post-norm stream: `fuse.stream` on real BERTs (`make bench-stream-maps`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from common import machine, settle, write
from variants import Table, interval, measure, rows, seeded
from weights import minilm
from wordnet import OUT as PARENTS
from wordnet import QUICK, RECIPE, halves, tiny_halves, trained

OUT = Path("runs/bench-stream-maps")
SEEDS = (0, 1, 2)
STEPS = 300
MAPS = ("pca", "select", "ot", "gradient-pca")
DEFAULT = "pca"
TEST_TEXTS = 8_000
# few enough that 300 steps see each more than once: then the teachers are asked once, not a step
LIMIT = 8_000
SETTINGS = (
    "data.calibration.samples=512", "finetune.batch_size=32", f"data.limit.train={LIMIT}",
)  # fmt: skip
SIZES = {
    "minilm, 384 → 192": ("target={hidden_size: 0.5, intermediate_size: 0.5}",),
    "bert-tiny, 128 → 64": ("target={hidden_size: 0.5, intermediate_size: 0.5}",),
    "bert-tiny, 128 → 32": ("target={hidden_size: 0.25, intermediate_size: 0.25}",),
}


def parsed() -> argparse.Namespace:
    """Return the command line's seeds and models, and whether only the script is tried."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--models", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="a few samples, and no file written")
    torch.set_num_threads(1)
    return parser.parse_args()


def parents(name: str, shared: Sequence[str], out: Path) -> str:
    """Return the override that names the two fine-tuned parents of one size's model."""
    own = halves(shared, minilm()) if name.startswith("minilm") else tiny_halves(shared)
    folders = trained(shared, own, out if name.startswith("minilm") else out / "tiny")
    pairs = zip(own, folders, strict=True)
    return "parents=" + json.dumps([{"name": p["name"], "from": str(f)} for p, f in pairs])


def one(
    name: str, seed: int, shared: Sequence[str], given: str, out: Path, steps: int
) -> dict[str, float]:
    """Return one seed's accuracies of all maps, in per cent."""
    return measure(
        RECIPE,
        (*SETTINGS, *shared, given, *seeded(seed, 1), *SIZES[name]),
        {stream: (f"fuse.stream={stream}",) for stream in MAPS},
        {"": (0, steps)},
        out,
    )


def leads(table: Table, when: str) -> dict[str, list[float]]:
    """Return by how much the default is above every other map, seed by seed."""
    return {
        other: [
            a - b
            for a, b in zip(table[f"{DEFAULT}, {when}"], table[f"{other}, {when}"], strict=True)
        ]
        for other in MAPS
        if other != DEFAULT
    }


def main() -> None:
    """Run the sizes and seeds and write the tables."""
    arguments = parsed()
    shared = ("runtime.threads=1", "gates=[]", *(QUICK if arguments.quick else ()))
    out, home = (
        (folder.with_name(f"{folder.name}-quick") if arguments.quick else folder)
        for folder in (OUT, PARENTS)
    )
    steps = 5 if arguments.quick else STEPS
    tables: dict[str, Table] = {}
    lines: list[str] = []
    for name in arguments.models:
        given = parents(name, shared, home)
        runs = []
        for seed in arguments.seeds:
            runs.append(one(name, seed, shared, given, out, steps))
            (out / "found.json").write_text(json.dumps({**tables, name: runs}, indent=1) + "\n")
        tables[name], table = rows(runs)
        lines += [f"## {name}", "", *table, ""]
        if len(runs) > 1:
            lines += verdicts(tables[name], steps)
        print("\n".join(lines), flush=True)
    if arguments.quick or len(arguments.seeds) < len(SEEDS) or len(tables) < len(SIZES):
        return
    text = [
        "# Stream maps of post-norm models",
        "",
        "Two parents fine-tuned on halves of WordNet's glosses (25 classes of nouns), fused by "
        "`method: refit` with everything the same but `fuse.stream`: all-MiniLM-L6-v2 (6 blocks, "
        "the parents of `bench-wordnet`) and BERT-tiny (2 blocks). One-shot on 512 calibration "
        f"glosses without labels, and after {STEPS} steps of 32 taught by both parents on "
        f"{LIMIT:,} glosses. One pair of parents each, {len(SEEDS)} seeds of calibration and order "
        f"of the samples, {TEST_TEXTS:,} test glosses (95 % interval of one accuracy about ±0.9 "
        "points); ± is half the 95 % interval over the seeds (Student's t). Made by "
        "`make bench-stream-maps`.",
        "",
        *lines,
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]
    write("stream-maps", {"accuracy": tables, "machine": machine()}, "\n".join(text))
    settle(claims(tables))


def verdicts(table: Table, steps: int) -> list[str]:
    """Return lines that compare the default with the other maps, paired by seed."""
    lines = [f"`{DEFAULT}` over the others, paired by seed (95 %, Student's t):", ""]
    for when in ("one-shot", f"{steps} steps"):
        each = (
            f"`{other}` {mean(lead):+.2f} ± {interval(lead):.2f}"
            for other, lead in leads(table, when).items()
        )
        lines.append(f"- {when}: {', '.join(each)} points")
    return [*lines, ""]


def claims(tables: Mapping[str, Table]) -> dict[str, bool]:
    """Return what makes the default the right one of those that need no gradient."""
    return {
        f"{name}, {when}: {other} isn't above {DEFAULT} (95 %)": mean(lead) > -interval(lead)
        for name, table in tables.items()
        for when in ("one-shot", f"{STEPS} steps")
        for other, lead in leads(table, when).items()
        if other in ("select", "ot")
    }


if __name__ == "__main__":
    main()
