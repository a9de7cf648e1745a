"""Units and heads taken out of one model, by every saliency (`make bench-structured`).

In place (as they are, or merged by optimal transport) and with the least squares of the refit; no
training. Each row is kept as soon as it is measured, so that `--families` and `--seeds` may run one
after the other; whoever runs the last piece writes the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import write
from kept import Figures, Kept, ahead, average, clear, kept_parser, spread
from parents import BERT_TINY, parent_folder
from torch import nn
from torch.nn.functional import cross_entropy

from slimfuse.batch import Inputs
from slimfuse.fuse.choice import keep
from slimfuse.fuse.intra import IntraSettings, intra_fuse
from slimfuse.fuse.narrowing import count_rows
from slimfuse.fuse.refit import Parent, Settings, refit
from slimfuse.fuse.scoring import Saliency, subject
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.run import quiet
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.saliency import Scores, score
from slimfuse.saliency.activity import second_moments
from slimfuse.spaces import LinearMap, transform
from slimfuse.store import Store

OUT = Path("runs/bench-structured")
SEEDS = (0, 1, 2)
TEST, CALIBRATION = 2000, 512
HOW = ("in place", "refit")
SCORERS: tuple[Saliency, ...] = (
    "random", "l1", "magnitude", "taylor", "diagonal-fisher", "mask-fisher", "energy",
)  # fmt: skip
MERGED: tuple[Saliency, ...] = ("mask-fisher", "energy")
DEFAULT = "cholesky"  # of `fuse.units`
METHODS = (*SCORERS, "ziplm", DEFAULT, *(f"OT merge, {s}" for s in MERGED))
CONTROLS = ("dense", "nothing cut, refit")


@dataclass(frozen=True)
class Case:
    """A family, where its models lie, and what is cut: axis and share that stays, by title.

    share: of the samples that are drawn, for dear models; refits: the choices that are refitted.
    """

    title: str
    recipe: Path
    model: str
    cuts: Mapping[str, tuple[str, int]]
    title_of_seeds: str
    seeds: Sequence[int] = SEEDS
    share: int = 1
    refits: Sequence[str] = METHODS

    def methods(self, how: str) -> Sequence[str]:
        """Return the choices that are measured."""
        return self.refits if how == "refit" else METHODS


UNITS = {f"MLP 1/{n}": ("intermediate_size", n) for n in (2, 4, 8)}
CASES = {
    "vit": Case(
        "ViT 6 × 128, 4 heads, MLP 256, Fashion-MNIST", Path("recipes/vit/fashion-mnist.yaml"),
        "zoo/fashion-{seed}-a", {**UNITS, "heads 1/2": ("num_attention_heads", 2),
                                 "heads 1/4": ("num_attention_heads", 4)},
        "trained models, each with its own calibration images", share=2,
        refits=("random", "l1", "mask-fisher", "energy", "ziplm", DEFAULT,
                "OT merge, mask-fisher"),
    ),
    # the stock class has no size of a head of its own: fewer heads would be wider ones
    "bert": Case(
        "BERT-tiny 2 × 128, MLP 512, WordNet", Path("recipes/bert/wordnet-minilm.yaml"),
        BERT_TINY[0], UNITS,
        "draws of calibration glosses for one fine-tuned model",
    ),
}  # fmt: skip


class Bench:
    """One family and seed: the dense model, calibration batches, the test set, scores."""

    def __init__(self, kind: str, seed: int, arguments: argparse.Namespace) -> None:
        self.case, quick = CASES[kind], arguments.quick
        pattern = self.case.model.replace("{seed}", str(seed))
        folder = parent_folder(Path(arguments.runs), pattern)
        recipe = load_recipe(
            self.case.recipe,
            (f"parents=[{{name: a, from: {folder}}}]", "baselines=[]", "gates=[]",
             "finetune.distill.teachers=[a]", f"data.calibration.seed={seed}",
             f"data.calibration.samples={64 if quick else CALIBRATION // self.case.share}",
             f"data.limit.test={100 if quick else TEST // self.case.share}",
             f"runtime.threads={arguments.threads}"),
        )  # fmt: skip
        job = prepare(recipe, self.case.recipe)
        self.stages, self.family, self.task = Stages(job, Store(OUT)), job.family, job.task
        self.samples, self.chunks = self.stages.calibration()
        self.model = self.family.load(folder)
        self.seed = seed
        rows = count_rows(self.model, self.family.layout(self.model.config), self.batches())
        self.subject = subject(self.model, self.family, self.batches, rows, seed)
        self.scored = cache(lambda name: score(name, self.subject))
        self.seen = cache(lambda: list(second_moments(self.subject)))

    def batches(self) -> list[Inputs]:
        """Return the calibration inputs, without labels."""
        return [self.task.examples(self.samples, chunk)[0] for chunk in self.chunks]

    def tested(self, model: nn.Module) -> Figures:
        """Return test cross-entropy in nats and accuracy in per cent."""
        told = self.stages.ask(model, "test", "measuring")
        found = self.stages.figures(told)["accuracy"].value
        return {"loss": float(cross_entropy(told["logits"], told["labels"])),
                "accuracy": 100 * found}  # fmt: skip

    def target(self, axis: str = "", divisor: int = 1) -> nn.Module:
        """Return a random model of the dense one's shape but for one size; heads stay as wide."""
        config = self.model.config
        shape = self.family.shape(config)
        if axis:
            shape = replace(shape, **{axis: getattr(shape, axis) // divisor})
        narrow = self.family.narrow(config, shape)
        narrow.head_dim = self.family.head_dims(config)
        torch.manual_seed(self.seed)
        return self.family.build(narrow)

    def cut(self, method: str, how: str, axis: str, divisor: int) -> Figures:
        """Return the figures of the dense model cut along an axis."""
        target = self.target(axis, divisor)
        merged = method.removeprefix("OT merge, ")
        if how == "refit":
            self.refitted(target, settings_of(method, axis))
        elif merged != method:
            chosen: Any = merged
            settings = IntraSettings(saliency=chosen)
            intra_fuse(self.model, target, self.family, self.batches, settings)
        else:
            self.sliced(target, self.kept(method, axis, divisor))
        return self.tested(target)

    def refitted(self, target: nn.Module, settings: Settings) -> nn.Module:
        """Fit every layer of the target in closed form."""
        refit([Parent("a", self.model)], target, self.family, self.batches, settings,
              n_batches=len(self.chunks))  # fmt: skip
        return target

    def kept(self, method: str, axis: str, divisor: int) -> dict[str, list[int]]:
        """Return which units of every space along an axis stay."""
        blocks = self.family.layout(self.model.config).blocks
        heads = axis == "num_attention_heads"
        spaces = [b.head_space if heads else b.mlp_space for b in blocks]
        count = getattr(self.family.shape(self.model.config), axis) // divisor
        if method in SCORERS:
            scores: Scores = self.scored(method)
            return {s: sorted(scores[s].topk(count).indices.tolist()) for s in spaces}
        how: Any = method
        return {
            name: keep(how, seen.second, seen.out, groups, count)
            for seen in self.seen()
            for name, groups in seen.groups()
            if name in spaces
        }

    def sliced(self, target: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        """Write the dense model without the units that aren't kept into the target."""
        atlas = self.family.atlas(self.model.config)
        maps = {}
        for space, units in kept.items():
            pick = torch.eye(atlas.spaces[space].size, dtype=torch.float64)[:, list(units)]
            maps[space] = LinearMap(pick, pick)
        moved = transform(dict(self.model.named_parameters()), atlas, maps)
        with torch.no_grad():
            for name, value in target.named_parameters():
                value.copy_(moved[name])


def settings_of(method: str, axis: str) -> Settings:
    """Return how a refit chooses; of heads, which no plan merges, each joins the likest one."""
    merged = method.removeprefix("OT merge, ")
    chosen: Any = merged
    if merged != method and axis == "num_attention_heads":
        return Settings(units="saliency", saliency=chosen, heads="merge")
    if merged != method:
        return Settings(units="ot", saliency=chosen)
    if method in SCORERS:
        return Settings(units="saliency", saliency=chosen)
    return Settings(units=chosen)


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = kept_parser(SEEDS)
    parser.add_argument("--families", nargs="*", default=list(CASES), choices=list(CASES))
    return parser.parse_args()


def name_of(kind: str, cut: str, method: str, how: str) -> str:
    """Return the name of a row, the seed left open."""
    return f"{kind} {{seed}}: {cut}, {method}, {how}"


def main() -> None:
    """Measure what is asked for; write the tables once all is there."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    quiet()
    out = OUT.with_name(f"{OUT.name}-quick") if arguments.quick else OUT
    conditions = {"test": TEST, "calibration": CALIBRATION, "quick": arguments.quick}
    kept = Kept(out / "found.json", conditions, fresh=arguments.fresh)
    for kind in arguments.families:
        for seed in set(arguments.seeds) & set(CASES[kind].seeds):
            bench = Bench(kind, seed, arguments)
            measure(bench, kept, kind, arguments.quick)
    text = markdown(kept)
    done = all(
        name_of(kind, list(case.cuts)[-1], case.refits[-1], HOW[-1]).format(seed=seed) in kept.rows
        for kind, case in CASES.items()
        for seed in case.seeds
    )
    if arguments.quick or not done:
        print("\n".join(text))
        return
    write("structured", kept.record(SEEDS), "\n".join(text))


def measure(bench: Bench, kept: Kept, kind: str, quick: bool) -> None:
    """Measure one family and seed."""
    dense, whole = (f"{kind} {bench.seed}: {name}" for name in CONTROLS)
    kept.row(dense, lambda: bench.tested(bench.model))
    kept.row(whole, lambda: bench.tested(bench.refitted(bench.target(), Settings())))
    cuts = list(bench.case.cuts.items())
    for cut, (axis, divisor) in cuts[:: len(cuts) - 1] if quick else cuts:
        for how in HOW:
            methods = bench.case.methods(how)
            for method in methods[::3] if quick else methods:
                name = name_of(kind, cut, method, how).format(seed=bench.seed)
                kept.row(
                    name,
                    lambda m=method, h=how, a=axis, d=divisor: bench.cut(m, h, a, d),
                )


def markdown(kept: Kept) -> list[str]:
    """Return the tables of what is there."""
    lines = [
        "# Structured pruning: units and heads by every saliency, with and without refit",
        "",
        f"One model, its stream unchanged, one-shot, no training. {CALIBRATION} calibration "
        "samples without labels: gradients are those of answers drawn from the model itself (true "
        f"Fisher). Loss: test cross-entropy in nats, accuracy in %, on {TEST:,} test samples "
        f"(half as many of both for {CASES['vit'].title}); ± is half the 95 % interval over the "
        "seeds (Student's t), where there are several. In place: what reads and writes the "
        "units that go is cut away, or averaged into what stays (OT merge: `method: intra`). "
        "Refit: every layer by least squares (`method: refit` with `fuse.units` or "
        "`fuse.saliency`; OT merge: `units: ot`, of heads `heads: merge`). Made by "
        "`make bench-structured`.",
        "",
    ]
    for kind, case in CASES.items():
        if any(name.startswith(f"{kind} ") for name in kept.rows):
            lines += family(kept, kind, case)
    return [*lines, f"Machine: {kept.machine()}", ""]


def family(kept: Kept, kind: str, case: Case) -> list[str]:
    """Return one family's tables and which choice is the best."""

    def seen(key: str, name: str) -> str:
        return spread(kept.over(SEEDS, name, key), 3 if key == "loss" else 1)

    several = f"{len(case.seeds)} seed{'s' * (len(case.seeds) > 1)}"
    lines = [f"## {case.title}", "", f"{several}: {case.title_of_seeds}.", ""]
    for name in CONTROLS:
        row = f"{kind} {{seed}}: {name}"
        lines += [f"{name.capitalize()}: loss {seen('loss', row)}, {seen('accuracy', row)} %.", ""]
    for key in ("loss", "accuracy"):
        lines += [
            f"| {key} | {' | '.join(case.cuts)} |",
            f"| --- |{' --- |' * len(case.cuts)}",
            *(
                f"| {method}, {how} | "
                + " | ".join(seen(key, name_of(kind, cut, method, how)) for cut in case.cuts)
                + " |"
                for how in HOW
                for method in case.methods(how)
            ),
            "",
        ]
    return [*lines, *(line for how in HOW for line in best(kept, kind, case, how)), ""]


def best(kept: Kept, kind: str, case: Case, how: str) -> list[str]:
    """Return the best choice of each cut, and by its mean place over all cuts."""
    lines = [f"Best by loss, {how}; behind, the loss of others above it, paired by seed:", ""]
    places: dict[str, list[int]] = {}
    for cut in case.cuts:
        found = {
            method: values
            for method in case.methods(how)
            if (values := kept.over(SEEDS, name_of(kind, cut, method, how), "loss"))
        }
        if len(found) < len(case.methods(how)):
            continue
        order = sorted(found, key=lambda method: average(found[method]))
        for place, method in enumerate(order, start=1):
            places.setdefault(method, []).append(place)
        first = found[order[0]]
        rest = ", ".join(
            f"{m} {ahead(found[m], first, 3)}{' (not clear)' * (clear(found[m], first) == '=')}"
            for m in order[1:4]
        )
        lines.append(f"- {cut}: {order[0]} {average(first):.3f}; {rest}")
        default = found[DEFAULT]
        if order.index(DEFAULT) > 3:
            lines[-1] += f"; … {DEFAULT} {ahead(default, first, 3)}"
    if places:
        overall = sorted(places, key=lambda method: mean(places[method]))
        told = ", ".join(f"{m} {mean(places[m]):.1f}" for m in overall)
        lines.append(f"- mean place over the cuts: {told}")
    return [*lines, ""]


if __name__ == "__main__":
    main()
