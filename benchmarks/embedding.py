"""Sentence embeddings without labels: MiniLM at half width, similarities against its parent's.

Controls: a random start and a truncated one (subclone) with the same teacher and budget, a random
model with the same refit, and the parent's own embeddings cut to the child's width by PCA, which
is about the best that any embedding of that width can do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, write
from scipy.stats import spearmanr
from torch import Tensor, nn

from slimfuse.pipeline.comparison import interval
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.run import quiet
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store

RECIPE = Path(__file__).parents[1] / "recipes" / "bert" / "minilm-embedding.yaml"
SEEDS = (0, 1, 2)
STARTS = {"fused": "child", "random-start": "random start", "subclone": "truncated start"}


def graded(embeddings: Tensor, reference: Tensor) -> float:
    """Return Spearman's correlation over pairs of every degree of likeness.

    Every text with one other, drawn so that all ranks of the reference's likeness are as likely on
    a logarithmic scale: as a search meets them.
    """
    own, wanted = (nn.functional.normalize(x.double(), dim=1) for x in (embeddings, reference))
    generator = torch.Generator().manual_seed(0)
    likeness = wanted @ wanted.T
    likeness.fill_diagonal_(-2)
    order = likeness.argsort(dim=1, descending=True)
    count = len(own) - 1
    ranks = (count ** torch.rand(len(own), generator=generator, dtype=torch.float64)).long() - 1
    others = order[torch.arange(len(own)), ranks.clamp(0, count - 1)]
    pairs = [(x * x[others]).sum(1).numpy() for x in (own, wanted)]
    return float(spearmanr(*pairs).statistic)


def main() -> None:
    """Measure and write benchmarks/results/embedding.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", default="runs/zoo/minilm", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--control-seeds", type=int, default=1, help="of the other starts")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-embedding"))
    parser.add_argument("--set", action="append", default=[], help="change of the recipe")
    arguments = parser.parse_args()
    quiet()
    origin = str(Path(arguments.parent).resolve())
    shared = (
        f"parents.0.from={origin}", f"runtime.threads={arguments.threads}", "baselines=[]",
        *arguments.set,
    )  # fmt: skip
    figures: dict[str, dict[str, list[float]]] = {}
    minutes: dict[str, list[float]] = {}
    reference = torch.zeros(0)

    def note(name: str, stages: Stages, evidence: dict[str, Tensor]) -> None:
        found = {key: one.value for key, one in stages.figures(evidence).items()}
        found["graded"] = graded(evidence["embeddings"], reference)
        for key, value in found.items():
            figures.setdefault(name, {}).setdefault(key, []).append(value)
        print(name, {key: round(value, 4) for key, value in found.items()}, flush=True)
        write("embedding", content(), markdown(content()))

    def spent(name: str, begun: float) -> None:
        minutes.setdefault(name, []).append((time.process_time() - begun) / 60)

    def content() -> dict[str, Any]:
        return {
            "figures": figures,
            "cpu_minutes": minutes,
            "conditions": conditions,
            "samples": job.count("test"),
            "steps": stages.tuning.schedule.steps,
        }

    conditions = machine() | {"threads": str(arguments.threads), "recipe": RECIPE.name}
    store = Store(arguments.out)
    store.check_ours()
    with store.lock():
        every = [(start, seed) for seed in SEEDS[: arguments.seeds] for start in STARTS]
        for start, seed in every:
            name = STARTS[start]
            if start != "fused" and seed >= arguments.control_seeds:
                continue
            own = [f"finetune.seed={seed}", f"runtime.seed={seed}"]
            if start != "fused":  # their tables aren't the parent's
                own.append("finetune.freeze_embeddings=false")
            job = prepare(load_recipe(RECIPE, (*shared, *own)), RECIPE)
            torch.set_num_threads(job.threads)
            stages = Stages(job, store)
            begun = time.process_time()
            told = stages.outputs(job.parents[0])
            reference = told.test["embeddings"]
            if not figures:
                spent("asking the teacher", begun)
                note("parent", stages, told.test)
                assert told.train is not None
                units = nn.functional.normalize(told.train, dim=1)
                width = job.target.hidden_size
                basis = torch.linalg.svd(units, full_matrices=False).Vh[:width]
                cut = nn.functional.normalize(reference, dim=1) @ basis.T
                note(f"parent's embeddings, PCA to {width}", stages, {"embeddings": cut})
                control = stages.start("random-refit")
                note("random model, same refit", stages, stages.evidence(control))
            begun = time.process_time()
            untrained = stages.start(start)
            spent(f"{name}, made", begun)
            note(f"{name}, one-shot", stages, stages.evidence(untrained))
            stages.samples("train")
            begun = time.process_time()
            tuned = stages.finetune(start)
            spent(f"{name}, finetuned", begun)
            note(f"{name}, finetuned", stages, stages.evidence(tuned))


def markdown(content: dict[str, Any]) -> str:
    """Return the table."""
    samples, steps = content["samples"], content["steps"]
    lines = [
        "# Sentence embeddings without labels: MiniLM-L6 (384) to half its width",
        "",
        f"{samples:,} held-out glosses; {steps} steps of finetuning, the parent as only teacher. "
        f"Spearman of cosines on {samples // 2:,} disjoint random pairs, and on pairs of every "
        "degree of likeness (each text with one at a random rank of the parent's likeness, "
        "logarithmic); share of the 10 nearest that are the parent's. ± is half the 95 % interval "
        "over seeds (Student's t).",
        "",
        "| model | Spearman, random pairs | Spearman, graded pairs | neighbours kept |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in content["figures"].items():
        cells = []
        for key in ("spearman", "graded", "neighbour_overlap"):
            mean, low, high = interval(found[key], 0)
            spread = f" ± {(high - low) / 2:.3f}" if len(found[key]) > 1 else ""
            cells.append(f"{mean:.3f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "CPU minutes (all threads together):", ""]
    for name, values in content["cpu_minutes"].items():
        lines.append(f"- {name}: {', '.join(f'{v:.1f}' for v in values)}")
    told = "; ".join(f"{k} {v}" for k, v in content["conditions"].items())
    return "\n".join([*lines, "", f"Conditions: {told}.", ""])


if __name__ == "__main__":
    main()
