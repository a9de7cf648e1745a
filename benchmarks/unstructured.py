"""Unstructured pruning of an MLP and of a ViT, all scorers (`make bench-unstructured`).

Three parts: one-shot, damping (of WoodFisher), and the gradual schedule. Each row is kept as soon
as it is measured, so that `--nets`, `--parts` and `--seeds` may run one after the other; whoever
runs the last piece writes the table.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from common import machine, write
from kept import Figures, Kept, ahead, average, clear, spread
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from unstructured_ways import DAMPINGS, INDEPENDENT, JOINT, NETS, ORDERS, Net, Way

from slimfuse.data import load_fashion_mnist
from slimfuse.families import FAMILIES
from slimfuse.finetune.schedule import batch_indices
from slimfuse.nets import load
from slimfuse.saliency import sparsify as library
from slimfuse.saliency.fisher import Part, Sums, accumulate
from slimfuse.saliency.inverse import Damping
from slimfuse.saliency.masks import Masks
from slimfuse.saliency.sparsify import sparsify
from slimfuse.saliency.sparsify_spec import Spec
from slimfuse.saliency.step_length import step_length
from slimfuse.tasks.image_classification import PIXELS, Pixels, make_processor

OUT = Path("runs/bench-unstructured")
SEEDS = (0, 1, 2)
TEST = 4_000  # images; a fraction of them for the dearer net
SHARE = {"mlp": 1, "vit": 2}
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
GRADUAL = (0.95,)
STEPS = 8  # of the cubic schedule
CHUNK = 50  # gradients of one vmap
PARTS = ("one-shot", "damping", "gradual")
Batch = tuple[Tensor, Tensor]


@cache
def pixels(kind: str, part: str, count: int) -> Batch:
    """Return the first images of a split, drawn by seed 0 from the training set, and labels."""
    data = load_fashion_mnist()
    split = data.train.sample(count, 0) if part == "train" else data.test.first(count)
    if kind == "vit":
        seen = Pixels(split, make_processor(data.image_size, data.mean, data.std))
        x = seen[torch.arange(len(split))].arguments[PIXELS]
    else:
        grey = torch.stack([torch.from_numpy(image[..., 0].copy()) for image in split.items])
        x = (grey[:, None].float() / 255 - data.mean[0]) / data.std[0]
    return x, torch.from_numpy(split.labels.copy())


def said(model: nn.Module, x: Tensor) -> Tensor:
    """Return logits."""
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return cross_entropy(said(model, batch[0]).float(), batch[1])


class SharedSums:
    """The Fisher's sums of the model that all one-shot rows start from, made once.

    Stands in for `accumulate` inside `sparsify`: the same sums, with Σ g for WoodTaylor; `length`
    for `step_length`, which is the same wherever the step is.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[Any, ...], dict[str, Sums]] = {}
        self.lengths: dict[float, float] = {}

    def length(self, *given: Any) -> float:
        """Return WoodTaylor's step; Σ λ|h|² tells steps apart."""
        damped = given[3]
        if damped not in self.lengths:
            self.lengths[damped] = step_length(*given)
        return self.lengths[damped]

    def __call__(
        self, model: nn.Module, loss: Any, batches: Iterable[Any], parts: Sequence[Part],
        route: Any, **given: Any,
    ) -> dict[str, Sums]:  # fmt: skip
        """Return the sums of parts."""
        key = (route, *(p.key for p in parts), parts[0].block)
        if key not in self.sums:
            given["first"] = True
            self.sums[key] = accumulate(model, loss, batches, parts, route, **given)
        return self.sums[key]


@contextmanager
def sharing(shared: SharedSums | None) -> Iterator[None]:
    """Let `sparsify` take its sums from those that are shared."""
    if shared is not None:
        library.accumulate = shared  # type: ignore[assignment]
        library.step_length = shared.length
    try:
        yield
    finally:
        library.accumulate, library.step_length = accumulate, step_length


class Bench:
    """One net and seed: the dense model, its gradients' samples, the test images."""

    def __init__(self, kind: str, seed: int, arguments: argparse.Namespace) -> None:
        self.kind, self.seed, self.net = kind, seed, net_of(kind, arguments)
        self.quick = arguments.quick
        folder = Path(arguments.zoo) / self.net.model.replace("{seed}", str(seed))
        if not folder.is_dir():
            maker = "benchmarks/zoo.py" if kind == "vit" else "benchmarks/nets.py"
            raise SystemExit(f"{folder} isn't there: {maker} makes it")
        self.dense = load(folder) if kind == "mlp" else FAMILIES["vit"].load(folder)
        self.test = pixels(kind, "test", 200 if arguments.quick else arguments.test // SHARE[kind])
        self.train = pixels(kind, "train", 200 if arguments.quick else 20_000)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.train[1]), generator=generator)[: self.net.samples]
        self.sample = (self.train[0][chosen], self.train[1][chosen])
        self.shared = SharedSums()

    def batches(self) -> Iterable[Batch]:
        """Return the gradients' samples."""
        return zip(self.sample[0].split(CHUNK), self.sample[1].split(CHUNK), strict=True)

    @torch.no_grad()
    def tested(self, model: nn.Module) -> Figures:
        """Return test accuracy in per cent and cross-entropy in nats."""
        model.eval()
        z = torch.cat([said(model, x).float() for x in self.test[0].split(250)])
        right = (z.argmax(1) == self.test[1]).double().mean()
        return {"accuracy": 100 * float(right), "loss": float(cross_entropy(z, self.test[1]))}

    def pruned(
        self,
        way: Way,
        sparsity: float,
        *,
        joint: bool = True,
        steps: int = 1,
        taught: int = 0,
        after: int = 0,
    ) -> Figures:
        """Return the figures of a pruned copy; taught: steps of training after each of `steps`."""
        model = copy.deepcopy(self.dense)
        spec = Spec(
            sparsity, way.scorer, joint=joint, update=way.update, block=self.net.block,
            damping=way.damping or self.net.damping, steps=steps, seed=self.seed,
        )  # fmt: skip
        start = time.perf_counter()

        def between(own: nn.Module, masks: Masks, step: int) -> None:
            self.teach(own, masks, taught, step)

        with sharing(self.shared if steps == 1 else None):
            found = sparsify(
                model, loss, self.batches, spec, per_sample=True,
                between=between if taught else None,
            )  # fmt: skip
        seconds = time.perf_counter() - start
        self.teach(model, found.masks, after or taught, steps)
        found.masks.check(model)
        return self.tested(model) | {"sparsity": found.masks.sparsity, "seconds": seconds}

    def teach(self, model: nn.Module, masks: Masks, count: int, stage: int) -> None:
        """Train with labels by AdamW at a fixed rate; pruned weights stay zero."""
        if not count:
            return
        x, y = self.train
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.net.rate)
        hold = masks.holding(model)
        model.train()
        for step in range(count):
            i = batch_indices(len(y), step, self.net.batch, 1000 * self.seed + stage)
            optimizer.zero_grad()
            loss(model, (x[i], y[i])).backward()
            optimizer.step()
            hold()
        model.eval()


def net_of(kind: str, arguments: argparse.Namespace) -> Net:
    """Return a net, with few samples and steps where only the script is tried."""
    net = NETS[kind]
    return replace(net, samples=2 * CHUNK, taught=1, batch=8) if arguments.quick else net


def one_shot(bench: Bench, kept: Kept, where: str) -> None:
    """Measure all scorers at all sparsities, thresholds and updates."""
    kept.row(f"{where} dense", lambda: bench.tested(bench.dense))
    for joint, ways in ((True, JOINT), (False, INDEPENDENT)):
        for way in ways[:: 4 if bench.quick else 1]:
            for sparsity in SPARSITIES[2:3] if bench.quick else SPARSITIES:
                kept.row(
                    f"{where} {title(way, sparsity, joint)}",
                    lambda w=way, s=sparsity, j=joint: bench.pruned(w, s, joint=j),
                )


def dampings(bench: Bench, kept: Kept, where: str) -> None:
    """Measure WoodFisher under several dampings, and the diagonal Fisher under the published."""
    ways = [damped(damping, bench.net) for damping in DAMPINGS.values()]
    for way in [*ways, ORDERS["the published damping"][1]]:
        for sparsity in SPARSITIES[2:3] if bench.quick else SPARSITIES[1:]:
            kept.row(
                f"{where} {title(way, sparsity)}", lambda w=way, s=sparsity: bench.pruned(w, s)
            )


def damped(damping: Damping, net: Net) -> Way:
    """Return WoodFisher with a damping, the one-shot part's row where it is the net's."""
    return Way("woodfisher", "joint", None if damping == net.damping else damping)


def gradual(bench: Bench, kept: Kept, where: str) -> None:
    """Measure one step against eight, without training, and with as many steps of it in all."""
    wood, plain = Way("woodfisher", "joint"), Way("magnitude")
    steps, taught = (2 if bench.quick else STEPS), bench.net.taught
    for sparsity in GRADUAL[:1] if bench.quick else GRADUAL:
        name = f"{where} {{}} to {sparsity:.0%}"
        kept.row(
            name.format("woodfisher, gradual"),
            lambda s=sparsity: bench.pruned(wood, s, steps=steps),
        )
        for way in (wood, plain):
            kept.row(
                name.format(f"{way.scorer}, one-shot, trained"),
                lambda w=way, s=sparsity: bench.pruned(w, s, after=steps * taught),
            )
            kept.row(
                name.format(f"{way.scorer}, gradual, trained"),
                lambda w=way, s=sparsity: bench.pruned(w, s, steps=steps, taught=taught),
            )


def title(way: Way, sparsity: float, joint: bool = True) -> str:
    """Return the name of a one-shot row."""
    return f"{way} to {sparsity:.0%}, {'joint' if joint else 'independent'} threshold"


MEASURES: dict[str, Callable[[Bench, Kept, str], None]] = {
    "one-shot": one_shot, "damping": dampings, "gradual": gradual,
}  # fmt: skip


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--zoo", default="runs/zoo", help="where the trained models lie")
    parser.add_argument("--test", type=int, default=TEST, help="test images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--quick", action="store_true", help="a few samples, and no file written")
    return parser.parse_args()


def main() -> None:
    """Measure what is asked for; write the tables once all is there."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    out = OUT.with_name(f"{OUT.name}-quick") if arguments.quick else OUT
    conditions: dict[str, Any] = {kind: str(net_of(kind, arguments)) for kind in NETS}
    conditions["test"] = arguments.test
    kept = Kept(out / "found.json", conditions, fresh=arguments.fresh)
    for kind in arguments.nets:
        for seed in arguments.seeds:
            bench = Bench(kind, seed, arguments)
            for part in arguments.parts:
                MEASURES[part](bench, kept, f"{kind} {seed}:")
    text = markdown(kept)
    if arguments.quick or not complete(kept):
        print("\n".join(text))
        return
    data = {"rows": kept.rows, "settings": conditions, "machine": machine(), "seeds": SEEDS}
    write("unstructured", data, "\n".join(text))


def complete(kept: Kept) -> bool:
    """Return whether all nets and seeds are there: the last row of each is; dampings of one."""
    last = [
        title(INDEPENDENT[-1], SPARSITIES[-1], False),
        f"magnitude, gradual, trained to {GRADUAL[-1]:.0%}",
    ]
    damping = title(ORDERS["the published damping"][1], SPARSITIES[-1])
    return all(
        f"{k} {s}: {name}" in kept.rows for k in NETS for s in SEEDS for name in last
    ) and all(f"{k} {SEEDS[0]}: {damping}" in kept.rows for k in NETS)


def markdown(kept: Kept) -> list[str]:
    """Return the tables of what is there."""
    lines = [
        "# Unstructured pruning: scorers, thresholds, updates, schedules",
        "",
        f"Fashion-MNIST, test accuracy in % on {kept.conditions['test']:,} images, of the ViT "
        f"on {kept.conditions['test'] // SHARE['vit']:,} (one accuracy's "
        f"own 95 % interval about ±1 … ±1.4 points); {len(SEEDS)} seeds are {len(SEEDS)} "
        "trained nets, each with its own draw of gradients; ± is half the 95 % interval over "
        "them (Student's t), figures without it are of one net. Single-sample "
        "gradients of the cross-entropy on training images with their labels (empirical Fisher). "
        "Sparsity of all weight matrices together, biases and norms stay; joint: one ranking over "
        "all layers. The damping λ is the library's where no other is named, for WoodFisher and "
        "diagonal Fisher alike. No training but where it is said. Made by "
        "`make bench-unstructured`.",
        "",
    ]
    for kind, net in NETS.items():
        if any(name.startswith(f"{kind} ") for name in kept.rows):
            lines += [*tables(kept, kind, net), *verdicts(kept, kind), ""]
    return [*lines, "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]


def tables(kept: Kept, kind: str, net: Net) -> list[str]:
    """Return one net's tables."""

    def cell(name: str) -> str:
        return spread(kept.over(SEEDS, f"{kind} {{seed}}: {name}", "accuracy"))

    def table(first: str, columns: Sequence[float], rows: dict[str, Callable[[float], str]]) -> Any:
        heads = " | ".join(f"{s:.0%}" for s in columns)
        yield f"| {first} | {heads} |"
        yield f"| --- |{' --- |' * len(columns)}"
        for title, name in rows.items():
            yield f"| {title} | {' | '.join(cell(name(s)) for s in columns)} |"
        yield ""

    lines = [f"## {net.name}", "", f"Dense {cell('dense')} %. {net.settings()}.", ""]
    for joint, ways in ((True, JOINT), (False, INDEPENDENT)):
        names = {str(way): lambda s, w=way, j=joint: title(w, s, j) for way in ways}
        lines += table(f"{'joint' if joint else 'independent'} threshold", SPARSITIES, names)
    names = {
        f"λ = {text}": lambda s, d=damping: title(damped(d, net), s)
        for text, damping in DAMPINGS.items()
    }
    diagonal = ORDERS["the published damping"][1]
    names[str(diagonal)] = lambda s: title(diagonal, s)
    lines += table("woodfisher, joint threshold and update", SPARSITIES[1:], names)
    once = {"woodfisher, one-shot": lambda s: title(Way("woodfisher", "joint"), s)}
    names = once | {
        row.replace("gradual", f"{STEPS} steps").replace(
            "trained", f"{STEPS * net.taught} steps of training"
        ): lambda s, r=row: f"{r} to {s:.0%}"
        for row in ("woodfisher, gradual",
                    *(f"{scorer}, {how}, trained" for scorer in ("woodfisher", "magnitude")
                      for how in ("one-shot", "gradual")))
    }  # fmt: skip
    return lines + list(table("one-shot or gradual, joint threshold", GRADUAL, names))


def verdicts(kept: Kept, kind: str) -> list[str]:
    """Return whether the order is the paper's, in figures, paired by seed."""
    prefix = f"{kind} {{seed}}: "
    lines = ["Paired by seed, in points (95 %, Student's t):", ""]
    for (name, ways), sparsity in product(ORDERS.items(), SPARSITIES[1:]):
        found = [kept.over(SEEDS, prefix + title(w, sparsity), "accuracy") for w in ways]
        if not all(found):
            continue
        means = [average(values) for values in found]
        held = all(a >= b for a, b in pairwise(means))
        steps = "; ".join(
            f"{a.scorer} over {b.scorer} {ahead(x, y) or f'{average(x) - average(y):+.1f}'}"
            f"{' (not clear)' * (clear(x, y) == '=')}"
            for a, b, x, y in zip(ways, ways[1:], found, found[1:], strict=False)
        )
        order = " ≥ ".join(w.scorer for w in ways)
        verdict = "holds" if held else "does NOT hold"
        lines.append(f"- {sparsity:.0%}, {name}: {order} {verdict}: {steps}")
    for sparsity in GRADUAL:
        once = kept.over(SEEDS, prefix + title(Way("woodfisher", "joint"), sparsity), "accuracy")
        eight = kept.over(SEEDS, f"{prefix}woodfisher, gradual to {sparsity:.0%}", "accuracy")
        if once and eight:
            gain = ahead(eight, once) or f"{average(eight) - average(once):+.1f}"
            lines.append(f"- {sparsity:.0%}: {STEPS} recomputations over one-shot {gain}")
    return lines


if __name__ == "__main__":
    main()
