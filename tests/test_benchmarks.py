"""The benchmarks of saliency: what they keep, what they take away, and that their tables are whole.

They need trained models, and minutes: here their measuring is made up, their own code isn't.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import images, logits, random_vit
from torch import nn
from torch.nn.functional import cross_entropy

from slimfuse.families import FAMILIES
from slimfuse.recipe import load_recipe
from slimfuse.saliency import sparsify as library
from slimfuse.saliency.sparsify import sparsify
from slimfuse.saliency.sparsify_spec import Spec

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_rows_outlive_the_process_and_are_measured_once(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    kept, file, asked = script("kept").Kept, tmp_path / "found.json", []

    def measure() -> dict[str, float]:
        asked.append(1)
        return {"accuracy": 50.0}

    kept(file, {"samples": (1, 2)}).row("a 0: dense", measure)
    again = kept(file, {"samples": (1, 2)})
    assert again.row("a 0: dense", measure) == {"accuracy": 50.0}
    assert again.over((0, 1), "a {seed}: dense", "accuracy") == {0: 50.0}
    assert len(asked) == 1
    with pytest.raises(SystemExit, match="--fresh"):
        kept(file, {"samples": (1, 3)})
    kept(file, {"samples": (1, 3)}, fresh=True).row("a 0: dense", measure)
    assert len(asked) == 2
    assert json.loads(file.read_text())["conditions"] == {"samples": [1, 3]}


def test_two_processes_keep_each_others_rows(script: Callable[[str], Any], tmp_path: Path) -> None:
    kept, file = script("kept").Kept, tmp_path / "found.json"
    one, two = kept(file, {}), kept(file, {})
    for name, own in (("a", one), ("b", two), ("c", one)):
        own.row(name, lambda: {"accuracy": 1.0})
    assert set(kept(file, {}).rows) == {"a", "b", "c"}
    assert not kept(file, {}, fresh=True).rows and not file.exists()


def test_spreads_are_students(script: Callable[[str], Any]) -> None:
    kept = script("kept")
    first, other = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 1.5, 2: 1.0}
    assert kept.spread(first) == "2.0 ± 2.5"  # 4.303 · 1 / √3, by a printed table of t
    assert kept.ahead(first, other, 2) == "+1.17 ± 1.90"  # of 1, .5, 2: 4.303 · .7638 / √3
    assert kept.clear(first, other) == "="
    assert kept.clear({0: 1.0, 1: 1.1}, {0: 0.0, 1: 0.1001}) == ">"
    assert kept.spread({1: 7.0}) == "7.0"
    assert kept.spread({}) == kept.ahead(first, {}) == ""


def test_shared_sums_prune_as_new_ones(script: Callable[[str], Any]) -> None:
    bench, ways = script("unstructured"), script("unstructured_ways")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(10, 12), torch.randint(3, (10,))) for _ in range(2)]
    shared = bench.SharedSums()

    def pruned(way: Any, sums: Any) -> nn.Module:
        model = copy.deepcopy(net)
        spec = Spec(0.6, way.scorer, update=way.update, block=8, damping=ways.PUBLISHED)
        with bench.sharing(sums):
            sparsify(model, bench.loss, lambda: batches, spec, per_sample=True)
        return model

    for way in ways.JOINT:
        ours, theirs = pruned(way, shared), pruned(way, None)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), way
    assert {key[0] for key in shared.sums} == {"gram", "diagonal"}  # and no more were made
    assert len(shared.sums) == 2
    assert library.accumulate is bench.accumulate


def test_masks_hold_while_the_bench_trains(script: Callable[[str], Any]) -> None:
    bench = script("unstructured")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    data = (torch.randn(40, 12), torch.randint(3, (40,)))
    own = bench.Bench.__new__(bench.Bench)
    own.train, own.seed, own.net = data, 0, bench.NETS["mlp"]
    masks = sparsify(net, bench.loss, lambda: [data], Spec(0.5, "magnitude")).masks
    before = float(cross_entropy(net(data[0]), data[1]).detach())
    own.teach(net, masks, 20, 1)
    masks.check(net)
    assert float(cross_entropy(net(data[0]), data[1]).detach()) < before


def test_units_cut_away_are_units_that_write_nothing(script: Callable[[str], Any]) -> None:
    bench = script("structured")
    model: Any = random_vit(hidden_size=16, num_attention_heads=4, intermediate_size=18)
    family = FAMILIES["vit"]
    own = bench.Bench.__new__(bench.Bench)
    own.model, own.family, own.seed = model, family, 0
    shape = family.shape(model.config)
    silent = copy.deepcopy(model)
    for axis in ("intermediate_size", "num_attention_heads"):
        mlp, count = axis == "intermediate_size", getattr(shape, axis)
        silent.load_state_dict(model.state_dict())
        kept = {}
        for block in family.layout(model.config).blocks:
            kept[block.mlp_space if mlp else block.head_space] = list(range(1, count, 2))
            writer = silent.get_parameter(f"{block.down if mlp else block.o}.weight").detach()
            writer.unflatten(1, (count, -1))[:, ::2] = 0
        target = own.target(axis, 2).double()
        own.sliced(target, kept)
        # float64, sums in another order
        torch.testing.assert_close(
            logits(target, images(3)), logits(silent, images(3)), atol=1e-12, rtol=0
        )
        assert getattr(family.shape(target.config), axis) == count // 2


def test_every_variant_of_the_fusion_is_a_recipe(script: Callable[[str], Any]) -> None:
    bench = script("saliency_fusion")
    for kind, case in bench.CASES.items():
        for size, target in bench.SIZES.items():
            for variant, overrides in bench.variants(kind, size).items():
                anchor = (
                    ("fuse.method=ot", "fuse.ot.anchor={from: x}") if variant in bench.OT else ()
                )
                recipe = load_recipe(
                    ROOT / case.recipe, (*bench.SETTINGS, target, *anchor, *overrides)
                )
                assert recipe.to_lock(), variant


def test_tables_show_all_that_is_measured(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script("kept"), "write_text", lambda *_: None)  # a sync of the disk a row
    made, spread = Numbers(), script("kept").spread
    bench = script("unstructured")
    kept = script("kept").Kept(tmp_path / "unstructured.json", {"test": 10_000})
    for kind, net in bench.NETS.items():
        for seed in bench.SEEDS:
            own = SimpleNamespace(quick=False, net=net, tested=made, pruned=made, dense=None)
            for part in bench.PARTS:
                assert not bench.complete(kept)
                bench.MEASURES[part](own, kept, f"{kind} {seed}:")
    assert bench.complete(kept)
    text = "\n".join(bench.markdown(kept))
    whole(text, kept, spread)
    assert "woodfisher ≥ diagonal-fisher ≥ magnitude ≥ random" in text

    bench = script("structured")
    kept = script("kept").Kept(tmp_path / "structured.json", {})
    for kind, case in bench.CASES.items():
        for seed in bench.SEEDS:
            own = SimpleNamespace(case=case, seed=seed, tested=made, cut=made, model=None)
            own.target = own.refitted = lambda *_: None
            bench.measure(own, kept, kind, False)
    whole("\n".join(bench.markdown(kept)), kept, spread)

    bench = script("saliency_fusion")
    kept = script("kept").Kept(tmp_path / "fusion.json", {})
    asked = SimpleNamespace(sizes=list(bench.SIZES), quick=False)
    for kind in bench.ASKED:
        for seed in bench.SEEDS:
            own = SimpleNamespace(parents=made, accuracies=made, anchor=())
            bench.run(own, kept, kind, seed, asked)
    whole("\n".join(bench.markdown(kept)), kept, spread)


class Numbers:
    """Measures nothing: every row has figures of its own."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        self.last += 1.0
        return dict.fromkeys(("accuracy", "loss", "one-shot", "finetuned", "a", "b"), self.last)


def whole(text: str, kept: Any, spread: Callable[..., str]) -> None:
    """Check that no cell of a table is empty, and that every row's figures stand in one."""
    cells = [c.strip() for line in text.splitlines() if line.startswith("| ")
             for c in line.split("|")[1:-1]]  # fmt: skip
    assert cells and all(cells)
    by_name: dict[str, dict[int, float]] = {}
    for name, row in kept.rows.items():
        where, _, rest = name.partition(": ")
        kind, _, seed = where.partition(" ")
        by_name.setdefault(f"{kind} {rest}", {})[int(seed)] = row["accuracy"]
    assert not [name for name, values in by_name.items() if spread(values) not in text]
