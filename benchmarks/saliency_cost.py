"""Cost of the block inverse Fisher of a 25 M-weight transformer (`make bench-saliency-cost`).

Ours (`slimfuse.saliency`: Grams, float64 Cholesky factors) against the rank-one recurrence, written
as the papers do and fused in place, from the same gradients of a random-weight BERT. Each run is a
process of its own, because the peak of a process never falls; runs of the three alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.saliency.fisher import HELD, Part, Sums, plan, sweep
from slimfuse.saliency.gradients import gradients
from slimfuse.saliency.inverse import cut_rows
from slimfuse.saliency.obs import statistic
from slimfuse.saliency.patterns import prunable

BLOCK, SAMPLES, TOKENS = 50, 256, 32
RELATIVE = 1e-2  # λ in units of mean g², by a pilot: the recurrence needs λ before the gradients
PILOT = 8
LIMIT, FACTOR = 6 * 2**30, 10.0
CHECKED = 100  # blocks whose inverse is compared with float64's
SIZES = {"full": (8, 512, 8, 2048), "layer": (1, 512, 8, 2048), "tiny": (2, 40, 2, 72)}


def bert(size: str) -> nn.Module:
    """Return a random-weight BERT of (layers, width, heads, MLP units) with two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    layers, width, heads, units = SIZES[size]
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=1000, hidden_size=width, num_hidden_layers=layers,
                   num_attention_heads=heads, intermediate_size=units,
                   max_position_embeddings=TOKENS)
    ).eval()  # fmt: skip


def batches(samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield single samples, the same each time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(samples):
        ids = torch.randint(1000, (1, TOKENS), generator=generator)
        yield ids, torch.randint(2, (1,), generator=generator)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of one sample."""
    return nn.functional.cross_entropy(model(batch[0]).logits, batch[1])


def pilot(model: nn.Module, names: list[str]) -> float:
    """Return λ from the first gradients."""
    found = [
        torch.stack([g.square().sum() for g in one.values()]).sum()
        for one in gradients(model, loss, batches(PILOT), names)
    ]
    weights = sum(model.get_parameter(name).numel() for name in names)
    return RELATIVE * float(torch.stack(found).mean()) / weights


class Recurrence:
    """F⁻¹ ← F⁻¹ − (F⁻¹g)(F⁻¹g)ᵀ/(m + gᵀF⁻¹g) from I/λ, all blocks of a part at once, float32.

    As the papers write it (WoodFisher, arXiv 2004.14340, section 3).
    """

    def __init__(self, part: Part, samples: int, damping: float) -> None:
        self.part, self.samples = part, samples
        eye = torch.eye(part.block) / damping
        self.inverse = eye.repeat(part.stop - part.start, 1, 1)

    def add(self, rows: Tensor) -> None:
        """Take one gradient (1, d)."""
        g = cut_rows(rows[:, self.part.weights], self.part.block)[:, 0]
        h = torch.einsum("bij,bj->bi", self.inverse, g)
        outer = h[:, :, None] * h[:, None]
        self.inverse -= outer / (self.samples + (g * h).sum(1))[:, None, None]

    def diagonal(self, blocks: slice) -> Tensor:
        """Return the diagonal of F⁻¹ of some blocks."""
        return self.inverse[blocks].diagonal(dim1=1, dim2=2)

    def score(self, weights: Tensor) -> Tensor:
        """Return ρ_q of all weights (n, B)."""
        return weights.square() / (2 * self.inverse.diagonal(dim1=1, dim2=2))


class Fused(Recurrence):
    """The recurrence in one fused product a gradient, in place: the fastest way that we know."""

    def add(self, rows: Tensor) -> None:
        """Take one gradient (1, d)."""
        g = cut_rows(rows[:, self.part.weights], self.part.block)[:, 0]
        h = torch.einsum("bij,bj->bi", self.inverse, g)
        h /= (self.samples + (g * h).sum(1)).sqrt()[:, None]
        self.inverse.baddbmm_(h[:, :, None], h[:, None], alpha=-1)


class Ours:
    """The library's sums and inverses of a part."""

    def __init__(self, part: Part, samples: int, damping: float) -> None:
        self.sums, self.damping = Sums(part, "gram"), damping
        self.add = self.sums.add

    def diagonal(self, blocks: slice) -> Tensor:
        """Return the diagonal of F⁻¹ of some blocks."""
        return self.sums.inverse(blocks, self.damping).diagonal()

    def score(self, weights: Tensor) -> Tensor:
        """Return ρ_q of all weights (n, B)."""
        self.sums.finish()

        def visit(own: slice) -> Tensor:
            inverse = self.sums.inverse(own, self.damping)
            return statistic(inverse, weights[own].double()).float()

        return torch.cat(sweep(visit, len(weights), BLOCK**2))


KINDS: dict[str, Callable[[Part, int, float], Any]] = {
    "ours": Ours, "recurrence": Recurrence, "fused": Fused,
}  # fmt: skip


def one(kind: str, size: str, samples: int, threads: int, memory: int, share: float) -> None:
    """Measure one way in this process and print it as JSON.

    share: of the layers, for the recurrence alone; seconds are given as measured.
    """
    torch.set_num_threads(threads)
    model = bert(size)
    layers = prunable(model, leave_out=["classifier*", "*pooler*"])
    total = sum(layer.size for layer in layers)
    damping = pilot(model, [layer.name for layer in layers])
    make: Callable[[Part, int, float], Any] = KINDS[kind]
    if make is not Ours:
        memory = memory * (BLOCK + HELD) // BLOCK  # it holds no gradients: more fits in a pass
        layers = layers[: max(1, round(share * len(layers)))]
    passes = plan(layers, BLOCK, samples, "gram", memory=memory, itemsize=4)
    seconds = {"gradients": 0.0, "sums": 0.0, "inverse": 0.0}
    held: list[Tensor] = []
    error = 0.0
    for parts in passes:
        start = time.perf_counter()
        own = [(part, make(part, samples, damping)) for part in parts]
        names = list({part.layer.name: None for part in parts})
        seconds["sums"] += time.perf_counter() - start
        checked = parts[0] if parts is passes[0] else None
        start = time.perf_counter()
        for found in gradients(model, loss, batches(samples), names):
            seconds["gradients"] += time.perf_counter() - start
            start = time.perf_counter()
            for part, sums in own:
                sums.add(found[part.layer.name].reshape(1, -1))
            seconds["sums"] += time.perf_counter() - start
            if checked:
                held.append(found[checked.layer.name].reshape(1, -1)[:, : CHECKED * BLOCK].double())
            start = time.perf_counter()
        for part, sums in own:
            start = time.perf_counter()
            flat = model.get_parameter(part.layer.name).detach().reshape(1, -1)
            score = sums.score(cut_rows(flat[:, part.weights], BLOCK)[:, 0])
            seconds["inverse"] += time.perf_counter() - start
            assert score.isfinite().all()
            if part == checked:
                error = wrong(sums, torch.cat(held), damping)
        del own, sums
    figures = {
        "kind": kind, "seconds": seconds, "peak": peak(), "passes": len(passes), "error": error,
        "damping": damping, "weights": sum(layer.size for layer in layers), "all_weights": total,
    }  # fmt: skip
    print(json.dumps(figures))


def wrong(sums: Any, rows: Tensor, damping: float) -> float:
    """Return the largest relative error of the first blocks' diagonal against dense float64."""
    cut = cut_rows(rows, BLOCK)
    dense = cut.mT @ cut / len(rows) + damping * torch.eye(BLOCK).double()
    truth = torch.linalg.inv(dense).diagonal(dim1=1, dim2=2)
    found = sums.diagonal(slice(0, len(truth))).double()
    return float(((found - truth) / truth).abs().max())


def peak() -> int:
    """Return the most bytes that this process ever held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(s for s in status.splitlines() if s.startswith("VmHWM")).split()[1])


def case(*arguments: object) -> dict[str, Any]:
    """Return one run's figures, measured in a process of its own."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(figures, flush=True)
    return figures


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of one way's runs, scaled to all weights."""
    scale = runs[0]["all_weights"] / runs[0]["weights"]
    seconds = {
        part: statistics.median(r["seconds"][part] for r in runs) * (1 if part == "gradients"
                                                                     else scale)
        for part in runs[0]["seconds"]
    }  # fmt: skip
    return {
        "seconds": seconds, "total": seconds["sums"] + seconds["inverse"], "scale": scale,
        "spread": [scale * (r["seconds"]["sums"] + r["seconds"]["inverse"]) for r in runs],
        "peak": max(r["peak"] for r in runs), "passes": runs[0]["passes"],
        "error": runs[0]["error"],
    }  # fmt: skip


def main() -> None:
    """Alternate the three ways and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=6)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, default=4.0, help="GiB of sums in one pass")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help="of layers, for the recurrence")
    parser.add_argument("--dry", action="store_true", help="print only; settle nothing")
    arguments = parser.parse_args()
    if arguments.one:
        kind, size, samples, threads, memory, share = arguments.one
        one(kind, size, int(samples), int(threads), int(memory), float(share))
        return
    shared = (arguments.size, arguments.samples, arguments.threads,
              int(arguments.memory * 2**30), arguments.share)  # fmt: skip
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind, found in runs.items():
            found.append(case(kind, *shared))
    found = {kind: summary(own) for kind, own in runs.items()}
    faster = {kind: own["total"] / found["ours"]["total"] for kind, own in found.items()}
    if arguments.dry:
        print(faster, found)
        return
    report(arguments, runs, found, faster)


def report(
    arguments: argparse.Namespace,
    runs: dict[str, list[dict[str, Any]]],
    found: dict[str, dict[str, Any]],
    faster: dict[str, float],
) -> None:
    """Write the files and check the claims."""
    from common import machine, settle, write

    ours, recurrence, fused = (found[kind] for kind in KINDS)
    weights = runs["ours"][0]["weights"]
    layers, width, heads, units = SIZES[arguments.size]
    sampled = (
        "in full" if recurrence["scale"] == 1
        else f"on {1 / recurrence['scale']:.0%} of the weights, and extrapolated"
    )  # fmt: skip
    lines = [
        f"# Block inverse Fisher of {weights / 1e6:.1f} M weights, B = {BLOCK}, "
        f"m = {arguments.samples}",
        "",
        f"Random-weight BERT ({layers} layers, width {width}, {heads} heads, {units} MLP units, "
        f"{TOKENS} tokens), per-sample gradients in float32, "
        f"λ = {runs['ours'][0]['damping']:.1e} ({RELATIVE:g} of mean g²), "
        f"{arguments.threads} threads. Medians of {arguments.rounds} alternating runs, each a "
        f"process of its own; the recurrence was run {sampled}. Made by "
        "`make bench-saliency-cost`.",
        "",
        "| | sums or recurrence s | inverse and ρ s | both s (runs) | gradients s (passes) "
        "| peak GiB | error of [F⁻¹]_qq |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {r['seconds']['sums']:.1f} | {r['seconds']['inverse']:.1f} | "
            f"**{r['total']:.1f}** ({', '.join(f'{s:.1f}' for s in r['spread'])}) | "
            f"{r['seconds']['gradients']:.1f} ({r['passes']}) | {r['peak'] / 2**30:.2f} | "
            f"{r['error']:.1e} |"
            for name, r in (("Grams, float64 Cholesky", ours),
                            ("rank-one recurrence as published, float32", recurrence),
                            ("the same, fused in place", fused))
        ),
        "",
        f"**{faster['recurrence']:.1f} times as fast** as the recurrence, {faster['fused']:.1f} "
        "times as the fused one, without the gradients, which all need alike. Error: the "
        f"largest relative one of the first {CHECKED} blocks against a dense inverse in float64.",
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]  # fmt: skip
    data = {"runs": runs, "medians": found, "faster": faster, "machine": machine(),
            "threads": arguments.threads}  # fmt: skip
    write("saliency-cost", data, "\n".join(lines))
    settle({f"at least {FACTOR:g} times as fast as the recurrence": faster["recurrence"] >= FACTOR,
            "below 6 GiB": ours["peak"] < LIMIT})  # fmt: skip


if __name__ == "__main__":
    main()
