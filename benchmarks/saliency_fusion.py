"""Saliency in fusion to half and quarter width (`make bench-saliency-fusion`).

Two parents into one narrower child, everything the same but what one recipe key says of saliency.
Each row is kept as soon as it is measured, so that `--families` and `--seeds` may run one after the
other; whoever runs the last piece writes the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import write
from kept import Figures, Kept, ahead, clear, kept_parser, spread
from parents import BERT_TINY, MINILM, parent_folder
from variants import measure, seeded

from slimfuse.pipeline.common import Part
from slimfuse.pipeline.comparison import lead
from slimfuse.tasks import Samples

OUT = Path("runs/bench-saliency-fusion")
SEEDS = (0, 1, 2)
STEPS, QUICK_STEPS = 100, 4
WHEN = ("one-shot", "finetuned")
# few enough that the teachers are asked once, not a step
SETTINGS = (
    "data.calibration.samples=512", "data.limit={train: 8000, test: 3000}", "gates=[]",
    "baselines=[]",
)  # fmt: skip
FEWER = ("data.calibration.samples=256", "data.limit={train: 8000, test: 2000}")
QUICK = (
    "data.calibration.samples=64", "data.limit={train: 400, test: 200}", "gates=[]", "baselines=[]",
)  # fmt: skip
SIZES = {
    "half": "target={hidden_size: 0.5, intermediate_size: 0.5}",
    "quarter": "target={hidden_size: 0.25, intermediate_size: 0.25}",
}
DEFAULT = "units: cholesky, stream: pca"
REFIT: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "units: ziplm": ("fuse.units=ziplm",),
    "units: magnitude": ("fuse.units=magnitude",),
    **{
        f"units: saliency, {s}": ("fuse.units=saliency", f"fuse.saliency={s}")
        for s in ("energy", "mask-fisher", "diagonal-fisher", "taylor", "random")
    },
    **{
        f"units: ot, {s} masses": ("fuse.units=ot", f"fuse.saliency={s}")
        for s in ("uniform", "mask-fisher")
    },
    "stream: gradient-pca": ("fuse.stream=gradient-pca",),
}
OT_DEFAULT = "method: ot, uniform masses, equal parents"
MASSES = ("fuse.ot.masses=saliency", "fuse.saliency=mask-fisher")
FISHER = ("fuse.parent_weights=fisher",)
OT: dict[str, tuple[str, ...]] = {
    OT_DEFAULT: (),
    "method: ot, mask-fisher masses": MASSES,
    "method: ot, Fisher-weighted parents": FISHER,
    "method: ot, mask-fisher masses, Fisher-weighted parents": (*MASSES, *FISHER),
}


@dataclass(frozen=True)
class Case:
    """A family and its parents; anchor: of half width, what `method: ot` needs, "" for none.

    rows: the variants that are measured; changes: of the settings.
    """

    title: str
    recipe: Path
    parents: tuple[str, ...]
    anchor: str
    seeds: str
    rows: Sequence[str] = tuple(REFIT)
    changes: tuple[str, ...] = ()


GLOSSES = "draws of calibration glosses and orders of finetuning for one pair of parents"
RECIPES = {"vit": Path("recipes/vit/fashion-mnist.yaml"),
           "bert": Path("recipes/bert/wordnet-minilm.yaml")}  # fmt: skip
CASES = {
    "vit": Case(
        "ViT 6 × 128 twice, Fashion-MNIST", RECIPES["vit"],
        ("zoo/fashion-{seed}-a", "zoo/fashion-{next}-a"), "",
        "pairs of three parents, 0 1, 1 2 and 2 0, so that each stands in two of them; 256 "
        "calibration and 2,000 test images",
        (DEFAULT, "units: saliency, mask-fisher", "units: saliency, random",
         "units: ot, uniform masses", "units: ot, mask-fisher masses", "stream: gradient-pca"),
        FEWER,
    ),
    "bert-tiny": Case(
        "BERT-tiny 2 × 128 twice, WordNet", RECIPES["bert"],
        BERT_TINY, "", GLOSSES,
    ),
    "minilm": Case(
        "MiniLM 6 × 384 twice, WordNet", RECIPES["bert"],
        MINILM, "", GLOSSES,
    ),
}  # fmt: skip
ASKED = ("vit", "bert-tiny")  # minilm takes hours


class Bench:
    """One family and seed: what all its rows share."""

    def __init__(self, kind: str, seed: int, arguments: argparse.Namespace, out: Path) -> None:
        self.case, self.out = CASES[kind], out / f"{kind}-{seed}"
        self.steps = QUICK_STEPS if arguments.quick else STEPS
        runs = Path(arguments.runs)
        following = (seed + 1) % len(SEEDS)
        a, b = (parent_folder(runs, p.format(seed=seed, next=following)) for p in self.case.parents)
        self.shared = (
            *seeded(seed, arguments.threads),
            *(QUICK if arguments.quick else (*SETTINGS, *self.case.changes)),
            f"parents=[{{name: a, from: {a}}}, {{name: b, from: {b}}}]",
        )  # fmt: skip
        self.anchor: tuple[str, ...] = ()
        if self.case.anchor:
            home = parent_folder(runs, self.case.anchor.format(seed=seed))
            self.anchor = ("fuse.method=ot", f"fuse.ot.anchor={{from: {home}}}")
        self.samples: dict[Part, Samples] = {}

    def accuracies(self, overrides: Sequence[str], size: str) -> Figures:
        """Return the child's test accuracies in per cent, one-shot and after the finetuning."""
        found = measure(
            self.case.recipe, (*self.shared, SIZES[size]), {"child": overrides},
            {"": (0, self.steps)}, self.out, with_parents=False, shared_samples=self.samples,
        )  # fmt: skip
        return dict(zip(WHEN, found.values(), strict=True))

    def parents(self) -> Figures:
        """Return the parents' test accuracies in per cent."""
        found = measure(
            self.case.recipe, (*self.shared, SIZES["half"], "fuse.method=random"), {"child": ()},
            {"": (0,)}, self.out, shared_samples=self.samples,
        )  # fmt: skip
        return {p: found[f"parent {p}"] for p in "ab"}


def variants(kind: str, size: str) -> Mapping[str, tuple[str, ...]]:
    """Return the rows of a family and size by title, as overrides."""
    case = CASES[kind]
    refits = {name: REFIT[name] for name in case.rows}
    return refits | (OT if case.anchor and size == "half" else {})


def name_of(kind: str, size: str, variant: str) -> str:
    """Return the name of a row, the seed left open."""
    return f"{kind} {{seed}}: {size}, {variant}"


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = kept_parser(SEEDS)
    parser.add_argument("--families", nargs="*", default=ASKED, choices=list(CASES))
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    return parser.parse_args()


def main() -> None:
    """Measure what is asked for; write the tables once all is there."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    out = OUT.with_name(f"{OUT.name}-quick") if arguments.quick else OUT
    settings = QUICK if arguments.quick else SETTINGS
    conditions = {"settings": settings, "steps": QUICK_STEPS if arguments.quick else STEPS}
    kept = Kept(out / "found.json", conditions, fresh=arguments.fresh)
    for kind in arguments.families:
        for seed in arguments.seeds:
            bench = Bench(kind, seed, arguments, out)
            run(bench, kept, kind, seed, arguments)
    text = markdown(kept)
    done = all(
        name_of(kind, size, list(variants(kind, size))[-1]).format(seed=seed) in kept.rows
        for kind in ASKED
        for size in SIZES
        for seed in SEEDS
    )
    if arguments.quick or not done:
        print("\n".join(text))
        return
    write("saliency-fusion", kept.record(SEEDS), "\n".join(text))


def run(bench: Bench, kept: Kept, kind: str, seed: int, arguments: argparse.Namespace) -> None:
    """Measure one family and seed."""
    kept.row(f"{kind} {seed}: parents", bench.parents)
    for size in arguments.sizes:
        rows = list(variants(kind, size).items())
        for variant, overrides in rows[::3] if arguments.quick else rows:
            more = (*bench.anchor, *overrides) if variant in OT else overrides
            kept.row(
                name_of(kind, size, variant).format(seed=seed),
                lambda o=more, s=size: bench.accuracies(o, s),
            )


def markdown(kept: Kept) -> list[str]:
    """Return the tables of what is there."""
    lines = [
        "# Saliency in fusion to half and quarter width",
        "",
        "Two parents into one child (`method: refit`, and `method: ot` where there is an anchor), "
        "everything the same but the keys named. 512 calibration samples without labels; "
        f"finetuned: {STEPS} steps of 64, taught by both parents on 8,000 samples. Accuracy in % "
        "on 3,000 test samples, where nothing else is said; ± is half the 95 % interval over the "
        f"seeds (Student's t). Behind, the lead over `{DEFAULT}`, of `method: ot` over uniform "
        "masses and equal parents, paired by seed. Made by `make bench-saliency-fusion`.",
        "",
    ]
    for kind, case in CASES.items():
        if any(name.startswith(f"{kind} ") for name in kept.rows):
            lines += family(kept, kind, case)
    return [*lines, f"Machine: {kept.machine()}", ""]


def family(kept: Kept, kind: str, case: Case) -> list[str]:
    """Return one family's tables, and what gained."""
    parents = [spread(kept.over(SEEDS, f"{kind} {{seed}}: parents", p)) for p in "ab"]
    told = f"{len(SEEDS)} seeds: {case.seeds}. Parents {' and '.join(parents)} %."
    lines = [f"## {case.title}", "", told, ""]
    for size in SIZES:
        lines += [f"| {size} width | {' | '.join(WHEN)} |", f"| --- |{' --- |' * len(WHEN)}"]
        gains: list[str] = []
        losses: list[str] = []
        for variant in variants(kind, size):
            cells = []
            for when in WHEN:
                own, first = (
                    kept.over(SEEDS, name_of(kind, size, v), when)
                    for v in (variant, OT_DEFAULT if variant in OT else DEFAULT)
                )
                told = ahead(own, first, 2) if variant not in (DEFAULT, OT_DEFAULT) else ""
                cells.append(f"{spread(own)}{f' ({told})' * bool(told)}")
                sign = clear(own, first)
                if told and sign != "=":
                    (gains if sign == ">" else losses).append(f"{variant}, {when} {told}")
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        measured = lead(*(kept.over(SEEDS, name_of(kind, size, DEFAULT), WHEN[0]),) * 2)
        if measured is not None:
            lines += ["", f"Clearly above the default (95 %): {'; '.join(gains) or 'none'}. "
                          f"Clearly below: {'; '.join(losses) or 'none'}."]  # fmt: skip
        lines.append("")
    return lines


if __name__ == "__main__":
    main()
