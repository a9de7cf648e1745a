"""MiniLM on WordNet's glosses to half width, against everything cheaper (`make bench-wordnet`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import accuracy, machine, row, settle, write
from variants import interval, measure, rows, seeded
from weights import bert_tiny, minilm

from slimfuse.data import load_wordnet
from slimfuse.finetune.schedule import steps_of
from slimfuse.pipeline import Run, compress
from slimfuse.recipe import Recipe, load_recipe
from slimfuse.report import Row

RECIPE = Path("recipes/bert/wordnet-minilm.yaml")
OUT = Path("runs/bench-wordnet")
SEEDS = (0, 1, 2)  # the first one is exported and timed
TINY = ("target={hidden_size: 128, num_attention_heads: 2, intermediate_size: 512, "
        "num_hidden_layers: 2}")  # fmt: skip
TINY_LR, RANDOM_LR, TINY_EPOCHS = 1e-3, 1e-3, 2
ALL = 74_064  # training glosses
INVERSE_RIDGE = 10.0  # of the bag of words
CHILD, RANDOM = "fused", "random start"
CONTROL = "random model + the same refit"
TAUGHT, LABELS = "BERT-tiny, taught", "BERT-tiny, labels alone"
QUICK = (
    "data.limit={train: 400, test: 200}", "data.calibration.samples=64",
)  # fmt: skip


def recipe_of(shared: Sequence[str]) -> Recipe:
    """Return the recipe with overrides."""
    found = load_recipe(RECIPE, shared)
    assert isinstance(found, Recipe)
    return found


def halves(shared: Sequence[str], start: Path, **changes: Any) -> list[dict[str, Any]]:
    """Return the recipe's parents, both from the model in `start`; changes: of their training."""
    parents = []
    for parent in recipe_of(shared).parents:
        assert parent.train is not None
        train = parent.train.model_dump(mode="json", exclude_none=True)
        parents.append({"name": parent.name, "train": train | {"start": str(start)} | changes})
    return parents


def tiny_halves(shared: Sequence[str]) -> list[dict[str, Any]]:
    """Return two BERT-tinys in the place of the recipe's parents."""
    return halves(shared, bert_tiny(), lr=TINY_LR, epochs=4)


def trained(shared: Sequence[str], parents: list[dict[str, Any]], out: Path) -> list[Path]:
    """Return the folders of parents that the recipe trains, training them where they aren't yet."""
    own = (*shared, f"parents={json.dumps(parents)}", "fuse.method=random")
    measure(RECIPE, own, {"random start": ()}, {"": (0,)}, out)
    folders = []
    for parent in parents:
        found = [f for f in (out / "stages").glob(f"parent-{parent['name']}-*")
                 if f.suffix != ".partial"]  # fmt: skip
        assert len(found) == 1, f"{parent['name']} was trained {len(found)} times in {out}"
        folders.append(found[0].resolve())
    return folders


def beside(shared: Sequence[str], name: str, **train: Any) -> str:
    """Return the override that puts a BERT-tiny beside the recipe's parents; it isn't fused."""
    tiny = {"name": name, "train": {"start": str(bert_tiny())} | train}
    return f"parents={json.dumps([*halves(shared, minilm()), tiny])}"


def labelled(seed: int, shared: Sequence[str]) -> tuple[str, str]:
    """Return overrides: the recipe's fusion, and a BERT-tiny that sees the labels only."""
    batch = recipe_of(shared).finetune.batch_size
    tiny = beside(shared, "bert-tiny", epochs=TINY_EPOCHS, batch_size=batch, lr=TINY_LR,
                  seed=seed)  # fmt: skip
    return tiny, "fuse.parents=[a, b]"


def taught(seed: int, shared: Sequence[str]) -> tuple[str, ...]:
    """Return overrides that distil into a BERT-tiny with a new head.

    One step at next to no rate gives it the head; a plain average of one model is that model.
    """
    tiny = beside(shared, "tiny", samples=32, epochs=1, lr=1e-12, seed=seed)
    return tiny, "fuse={method: vanilla, parents: [tiny]}", TINY, f"finetune.lr={TINY_LR}"


def one(seed: int, shared: Sequence[str], steps: int, out: Path) -> dict[str, float]:
    """Return one seed's accuracies, in per cent."""
    found = measure(
        RECIPE,
        (*shared, *seeded(seed, 1)),
        {
            CHILD: labelled(seed, shared),
            RANDOM: (*labelled(seed, shared), "fuse.method=random", f"finetune.lr={RANDOM_LR}"),
            TAUGHT: taught(seed, shared),
        },
        {"": (steps,), CHILD: (0, steps)},
        out,
    )
    found[f"{LABELS}, {TINY_EPOCHS} epochs"] = found.pop("parent bert-tiny")
    del found["parent tiny"]
    (out / f"seed-{seed}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def deployed(
    seed: int, shared: Sequence[str], epochs: float, bench: str, out: Path
) -> tuple[Run, dict[str, float]]:
    """Return the run of one seed with its ONNX files, and the accuracies that only it has."""
    own = (*seeded(seed, 1), *labelled(seed, shared), "baselines=[]",
           f"finetune.epochs={epochs!r}", bench)  # fmt: skip
    run = compress(RECIPE, overrides=(*shared, *own), out=out)
    names = {"random-refit": CONTROL, "onnx": "fused, ONNX float32", "onnx-int8":
             "fused, ONNX INT8"}  # fmt: skip
    return run, {name: accuracy(run, of) for of, name in names.items()}


def bench(arguments: argparse.Namespace) -> str:
    """Return the override of how latency is measured."""
    seconds = 0.1 if arguments.quick else arguments.seconds
    return f"bench={{threads: [1], batch: [1, 8], min_seconds: {seconds}}}"


def bag_of_words(samples: int) -> float:
    """Return the test accuracy of TF-IDF and logistic regression, in per cent."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    data = load_wordnet()
    train = data.train.sample(samples, 0)
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=INVERSE_RIDGE, max_iter=1000))
    model.fit(list(train.items), train.labels)
    return 100 * float(model.score(list(data.test.items), data.test.labels))


def speeds(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """Return how many times as fast as parent a every ONNX file is, and the lines of a table."""
    base, found = row(run, "a"), []
    measured = {(s.other, s.threads, s.batch): (s.low, s.high)
                for s in run.report.speedups if s.base == "a"}  # fmt: skip
    lines = [
        "| ONNX file | threads | batch | p50 ms | p90 ms | calls | times as fast as parent a's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in (base, *(row(run, name) for name in ("onnx", "onnx-int8", "bert-tiny"))):
        for x in model.latency:
            parent = base.at(x.threads, x.batch)
            assert parent is not None
            low, high = measured.get((model.name, x.threads, x.batch), (None, None))
            figures = {"name": model.name, "threads": x.threads, "batch": x.batch, "calls": x.n,
                       "p50_ms": x.p50_ms, "p90_ms": x.p90_ms, "noisy": x.noisy,
                       "ratio": parent.p50_ms / x.p50_ms, "low": low, "high": high}  # fmt: skip
            found.append(figures)
            span = "" if low is None else f" ({low:.2f} – {high:.2f})"
            lines.append(
                f"| {_title(model)} | {x.threads} | {x.batch} | {x.p50_ms:.2f} | {x.p90_ms:.2f} | "
                f"{x.n}{', noisy' * x.noisy} | {figures['ratio']:.2f}{span} |"
            )
    return found, lines


def _title(model: Row) -> str:
    titles = {"a": "parent a", "onnx": "child, float32", "onnx-int8": "child, INT8",
              "bert-tiny": "BERT-tiny"}  # fmt: skip
    return f"{titles[model.name]} ({model.params / 1e6:.1f} M)"


def parsed() -> argparse.Namespace:
    """Return the command line's seeds, and whether only the script is tried."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time per latency")
    parser.add_argument("--quick", action="store_true", help="a few samples, and no file written")
    torch.set_num_threads(1)
    return parser.parse_args()


def main() -> None:
    """Run the seeds and write the table."""
    arguments = parsed()
    shared = ("runtime.threads=1", "gates=[]", *(QUICK if arguments.quick else ()))
    out = OUT.with_name(f"{OUT.name}-quick") if arguments.quick else OUT
    recipe = recipe_of(shared)
    spec, used = recipe.finetune, recipe.data.limit.train or ALL
    steps = steps_of(used, spec.epochs, spec.batch_size)
    epochs = steps / steps_of(used, 1, spec.batch_size)
    runs = [one(seed, shared, steps, out) for seed in arguments.seeds]
    run, single = deployed(arguments.seeds[0], shared, epochs, bench(arguments), out)
    sizes = (used,) if arguments.quick else (1500, used, ALL)
    single |= {f"TF-IDF + logistic regression, {n:,} glosses": bag_of_words(n) for n in sizes}
    if arguments.quick or len(runs) < len(SEEDS):
        return
    single |= {f"parent {p.name}": runs[0][f"parent {p.name}"] for p in recipe.parents}
    table, lines = rows([{k: v for k, v in run.items() if k not in single} for run in runs])
    child = table[f"{CHILD}, {steps} steps"]
    best = max(single[f"parent {p.name}"] for p in recipe.parents)
    kept = [100 * value / best for value in child]
    leads = {
        other: [a - b for a, b in zip(child, values, strict=True)]
        for other, values in table.items()
        if not other.startswith(CHILD)
    }
    timings, timing_lines = speeds(run)
    text = [
        "# Two MiniLMs, fine-tuned on halves of WordNet's glosses, fused to half width",
        "",
        conditions(recipe, steps),
        "",
        *lines,
        *(f"| {name} | {value:.1f} | | |" for name, value in single.items()),
        "",
        f"The child keeps {mean(kept):.1f} ± {interval(kept):.1f} % of the better parent's "
        "accuracy. Its lead, paired by seed (95 %, Student's t):",
        "",
        *(f"- over {name}: {mean(lead):+.2f} ± {interval(lead):.2f} points"
          for name, lead in leads.items()),
        "",
        "ONNX files of the first seed and of the parents, interleaved in one run, on texts of a "
        "length that nine of ten don't pass; behind each ratio its 95 % interval. Noisy: the "
        "machine was busy, which the ratios feel less than the times.",
        "",
        *timing_lines,
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]  # fmt: skip
    data = {
        "accuracy": table, "one run": single, "latency": timings, "machine": machine(),
        "params": {r.name: r.params for r in run.report.rows}, "recipe": recipe.to_lock(),
        "seeds": list(arguments.seeds), "steps": steps,
    }  # fmt: skip
    write("wordnet", data, "\n".join(text))
    ratio = {(x["name"], x["batch"]): x["ratio"] for x in timings}
    lead = leads[f"{RANDOM}, {steps} steps"]
    settle(
        {
            "the child keeps at least 95 % of the better parent's accuracy": mean(kept)
            - interval(kept) >= 95,
            "the child's float32 file is at least twice as fast at batch 1 and 8": min(
                ratio["onnx", 1], ratio["onnx", 8]
            ) >= 2,
            "the child is above the random start (95 %)": mean(lead) > interval(lead),
        }
    )  # fmt: skip


def conditions(recipe: Recipe, steps: int) -> str:
    """Return what was compared, under which conditions."""
    train, spec = recipe.parents[0].train, recipe.finetune
    assert train is not None
    used = recipe.data.limit.train or ALL
    return (
        f"all-MiniLM-L6-v2 (6 × 384) twice, {train.epochs} epochs on {used // 2:,} glosses each; "
        f"child 6 × 192, fused on {recipe.data.calibration.samples:,} glosses without labels, then "
        f"{steps} steps of {spec.batch_size} on all {used:,}, taught by both parents; 25 classes "
        "of nouns, 8,000 test glosses (95 % interval of one accuracy about ±0.9 points), at most "
        f"{recipe.data.max_length} tokens. One pair of parents; seeds "
        f"{', '.join(map(str, SEEDS))} of calibration, order and new weights, ± is half the 95 % "
        "interval over them (Student's t); rows without ± are one model. Random start: the child's "
        f"shape, teachers, steps, and a rate of its own ({RANDOM_LR:g}). BERT-tiny (2 × 128, "
        "pretrained): the child's teachers and steps, or labels alone for "
        f"{TINY_EPOCHS} epochs of all {used:,} (rate {TINY_LR:g}). Rates were chosen on 4,000 "
        "training glosses that no row here was trained on, never on the test set. Made by "
        "`make bench-wordnet`."
    )


if __name__ == "__main__":
    main()
