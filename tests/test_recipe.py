"""Recipes: exact messages, all problems at once with their lines, locks that reload."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from slimfuse.errors import RecipeError
from slimfuse.recipe import (
    InvalidRecipe,
    Recipe,
    find_recipes,
    load_recipe,
    recipe_schema,
)
from slimfuse.recipe.models import RESERVED_NAMES

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


def stem(path: Path) -> str:
    return path.stem


GOOD = """\
# A short line about it.
version: 1
name: try
family: vit
task: image-classification
data: {source: digits}
parents:
  - name: a
    from: some/model
  - name: b
    weight: 2
    train:
      config: {hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4,
               intermediate_size: 128, patch_size: 2}
      epochs: 3
target:
  hidden_size: 0.5
"""
TOP_KEYS = (
    "baselines, bench, data, diagnose, export, family, finetune, fuse, gates, name, parents, "
    "runtime, sparsify, target, task, version"
)
FUSE_KEYS = (
    "alignment, batch_size, heads, layers, method, ot, parent_weights, parents, refit, ridge, "
    "saliency, stream, units"
)
NAME_RULE = "1 to 64 of a-z 0-9 . _ -, the first a letter or digit, without '..'"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "r.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.fixture
def problems(write: Any) -> Any:
    """Return the lines of the error of a recipe, the file's folder cut off."""

    def problems(text: str | bytes, *overrides: str) -> list[str]:
        path = write(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        return str(caught.value).replace(f"{path.parent}/", "").split("\n")

    return problems


# ---- what loads


def test_defaults_are_filled_in_under_the_yaml_names(write: Any) -> None:
    recipe = load_recipe(write(GOOD))
    lock = recipe.to_lock()
    assert recipe.parents[0].from_ == "some/model"
    assert lock["parents"][0] == {
        "name": "a", "from": "some/model", "train": None, "weight": 1.0, "revision": None,
    }  # fmt: skip
    assert lock["fuse"] == {
        "method": "refit", "parents": None, "stream": "pca", "units": "cholesky",
        "saliency": None, "parent_weights": "equal", "heads": "drop",
        "ridge": "auto", "layers": None, "alignment": "gauge", "refit": True,
        "ot": lock["fuse"]["ot"], "batch_size": 128,
    }  # fmt: skip
    assert lock["fuse"]["ot"] == {
        "solver": "emd", "reg": None, "effective_units": None, "marginal_reg": 1.0, "mass": 1.0,
        "cost": "activations", "masses": "uniform", "residual": "mean", "qk": "equal",
        "heads": "kept", "tokens": "all", "window": 1, "anchor": None, "anchor_weight": None,
    }  # fmt: skip
    assert lock["bench"] == {"threads": [1], "batch": [1, 8], "warmup": 10, "min_seconds": 3.0}
    assert lock["finetune"]["distill"]["teachers"] is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("1E-3", 1e-3), (".5", 0.5), ("+2", 2.0), ("3", 3.0)],
)
def test_a_number_is_what_yaml_1_2_calls_one(write: Any, text: str, value: float) -> None:
    for head in ("", "%YAML 1.1\n---\n"):  # 1.1 reads 1e-3 as text
        lr = load_recipe(write(f"{head}{GOOD}finetune: {{lr: {text}}}\n")).finetune.lr
        assert lr == value and type(lr) is float


def test_json_is_yaml_with_its_surrogate_pairs(write: Any) -> None:
    recipe = load_recipe(write(GOOD.replace("some/model", '"\\ud83d\\ude00"')))
    assert recipe.parents[0].from_ == "\N{GRINNING FACE}"


@pytest.mark.parametrize("value", [1, 1.0, 32, 0.25])
def test_a_size_stays_absolute_or_ratio(write: Any, value: int | float) -> None:
    size = load_recipe(write(GOOD), [f"target.hidden_size={value}"]).target.hidden_size
    assert size == value and type(size) is type(value)


def test_overrides_set_nested_keys_items_and_lists(write: Any) -> None:
    overrides = [
        "parents.0.weight=3", "parents[1].train.epochs=7", "finetune.distill.teachers=[b]",
        "fuse.stream=ot", "fuse.ot.solver=sinkhorn", "fuse.ot.reg=1e-1", "fuse.ot.reg=2e-1",
        "parents.0.from=null",
        "parents.0.train="
        "{epochs: 1, config: {hidden_size: 6, num_hidden_layers: 1, num_attention_heads: 3,"
        " intermediate_size: 5, patch_size: 2}}",
    ]  # fmt: skip
    recipe = load_recipe(write(GOOD), overrides)
    assert recipe.parents[0].weight == 3.0 and recipe.fuse.ot.reg == 0.2
    assert recipe.parents[1].train is not None and recipe.parents[1].train.epochs == 7
    assert recipe.parents[0].from_ is None and recipe.parents[0].train is not None
    assert recipe.finetune.distill.teachers == ("b",)


def test_a_recipe_is_frozen(write: Any) -> None:
    recipe = load_recipe(write(GOOD))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.fuse.ridge = 1.0  # type: ignore[misc]
    assert isinstance(hash(recipe), int)


@pytest.mark.parametrize("path", SHIPPED, ids=stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert path.parent.name in (recipe.family, "ablations")
    assert len(SHIPPED) >= 20


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "ablations").glob("*.yaml")), ids=stem)
def test_an_ablation_changes_one_choice_of_the_base(path: Path) -> None:
    base, lock = (load_recipe(p).to_lock() for p in (path.with_name("base.yaml"), path))
    assert lock["name"] == f"ablation-{path.stem}" and lock["fuse"]["method"] == "ot"
    if path.stem == "equal-width":
        assert lock["fuse"]["ot"]["anchor"]["train"] == lock["parents"][0]["train"]
        return
    changed = {k for k, v in lock["fuse"]["ot"].items() if v != base["fuse"]["ot"][k]}
    softness = {"reg", "effective_units", "marginal_reg", "mass"}
    assert len(changed - softness) == (path.stem != "base")
    assert changed <= softness | {"solver"} or not changed & softness
    lock["fuse"]["ot"], lock["name"] = base["fuse"]["ot"], base["name"]
    assert lock == base


def test_the_recipe_imports_no_torch() -> None:
    code = "import sys, slimfuse.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- exact messages


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("target:", "traget:",
         f"16: traget: unknown key; did you mean 'target'? allowed: {TOP_KEYS}"),
        ("hidden_size: 0.5", "hidden_size: 0.5\n  head: 3",
         "18: target.head: unknown key; allowed: "
         "budget, hidden_size, intermediate_size, num_attention_heads, num_hidden_layers"),
        ("    weight:", "    wieght:",
         "11: parents[1].wieght: unknown key; did you mean 'weight'? "
         "allowed: from, name, revision, train, weight"),
        ("{source: digits}", "{source: digit}",
         "6: data.source: unknown value; did you mean 'digits'? got: 'digit'; "
         "allowed: digits, fashion-mnist, imagefolder, wordnet, vader, anarchism, textfolder, "
         "datasets"),
        ("name: try\n", "", "1: name: missing key; allowed: text like "
         r"^(?!.*\.\.)[a-z0-9][a-z0-9._-]{0,63}$"),
        ("      epochs: 3\n", "",
         "12: parents[1].train.epochs: missing key; allowed: integer >= 1"),
        ("family: vit", "family: vit\nname: again", "5: name: key given twice, first at r.yaml:3"),
        ("version: 1", "version: true",
         "2: version: not an integer; got: true; allowed: 1"),
        ("version: 1", "version: 2", "2: version: unknown value; got: 2; allowed: 1"),
        ("name: try", "name: a..b",
         f"3: name: not a usable name; got: 'a..b'; allowed: {NAME_RULE}"),
        ("name: try", "name: 12", "3: name: wrong type; got: 12; allowed: text like "
         r"^(?!.*\.\.)[a-z0-9][a-z0-9._-]{0,63}$"),
        ("weight: 2", "weight: .nan",
         "11: parents[1].weight: '.nan' is not a finite number"),
        ("weight: 2", "weight: 1e999",
         "11: parents[1].weight: '1e999' is not a finite number"),
        ("weight: 2", "weight: '2'",
         "11: parents[1].weight: wrong type; got: '2'; allowed: number > 0"),
        ("weight: 2", "weight: 0",
         "11: parents[1].weight: out of range; got: 0; allowed: number > 0"),
        ("epochs: 3", "epochs: 99999999999999999999",
         "15: parents[1].train.epochs: integer too large"),
        ("hidden_size: 0.5", "hidden_size: 1.5", "17: target.hidden_size: not a size; got: 1.5; "
         "allowed: integer >= 1 or number > 0 and <= 1 or null"),
        ("num_attention_heads: 4", "num_attention_heads: 5",
         "13: parents[1].train.config.num_attention_heads: does not divide hidden_size 64; got: 5"),
        ("epochs: 3", "epochs: 3\n      shard: 3/2", "16: parents[1].train.shard: not a shard; "
         "got: '3/2'; allowed: 'i/n' with 1 <= i <= n, as in '1/2'"),
        ("name: b", "name: a", "10: parents[1].name: is the name of parents[0] already; got: 'a'"),
        ("name: b", "name: onnx-int8", "10: parents[1].name: is the name of a report row; "
         "got: 'onnx-int8'; allowed: any but fused, finetuned, onnx, onnx-int8, random-start, "
         "anchor, refit, gauge, ot, intra, vanilla, select, subclone, keep, random-refit, sparse, "
         "sparse-woodfisher, sparse-woodtaylor, sparse-diagonal-fisher, sparse-magnitude, "
         "sparse-random"),
        ("from: some/model", "from: ~bob/model", "9: parents[0].from: not a usable path; "
         "got: '~bob/model'; allowed: a path without another user's home (~user)"),
        ("from: some/model", 'from: "a\\0b"', "9: parents[0].from: not a usable text; "
         "got: 'a\\x00b'; allowed: text without control characters"),
        ("    from: some/model\n", "", "8: parents[0]: missing key: needs 'from' or 'train'"),
        ("    weight: 2", "    from: x",
         "12: parents[1].train: stands beside 'from'; allowed: one of the two"),
        ("    weight: 2", "    revision: x",
         "11: parents[1].revision: goes only with 'from'; got: 'x'; allowed: null"),
        ("{source: digits}", "{source: digits, path: x}",
         "6: data.path: source 'digits' takes no path; got: 'x'; allowed: null"),
        ("{source: digits}", "{source: digits, test_split: held-out}",
         "6: data.test_split: source 'digits' takes no test_split; got: 'held-out'; "
         "allowed: no such key"),
        ("{source: digits}", "{source: fashion-mnist, label_column: y}",
         "6: data.label_column: source 'fashion-mnist' takes no label_column; got: 'y'; "
         "allowed: no such key"),
        ("target:", "fuse: {ot: {solver: sinkhorn}}\ntarget:",
         "16: fuse.ot.solver: has no effect here; got: 'sinkhorn'; "
         "allowed: with method: ot or intra, stream: ot, units: ot or alignment: soft"),
        ("target:", "fuse: {ridge: 0}\ntarget:",
         "16: fuse.ridge: not a ridge; got: 0; allowed: auto or number > 0"),
        ("target:", "fuse: {method: ot}\ntarget:",
         "16: fuse.ot.anchor: missing key: method 'ot' needs it"),
        ("target:", "fuse: {ot: {residual: none}}\ntarget:",
         "16: fuse.ot.residual: has no effect here; got: 'none'; allowed: with method: ot"),
        ("target:", "fuse: {stream: ot, ot: {reg: 0.1}}\ntarget:",
         "16: fuse.ot.reg: has no effect: solver is 'emd'; got: 0.1; allowed: with another solver"),
        ("target:", "fuse: {stream: ot, ot: {solver: sinkhorn, mass: 0.5}}\ntarget:",
         "16: fuse.ot.mass: has no effect: solver is 'sinkhorn'; got: 0.5; allowed: with partial"),
        ("target:",
         "fuse: {stream: ot, ot: {solver: sinkhorn, reg: 1, effective_units: 4}}\ntarget:",
         "16: fuse.ot.effective_units: stands beside 'reg'; got: 4.0; allowed: one of the two"),
        ("target:", "fuse: {ot: {anchor: {}}}\ntarget:",
         "16: fuse.ot.anchor: missing key: needs 'from' or 'train'"),
        ("target:", "fuse: {ot: {tokens: class, window: 3, anchor: {from: x}}}\ntarget:",
         "16: fuse.ot.window: has no effect; got: 3; allowed: with tokens: window"),
        ("target:", "fuse: {method: vanilla, ridge: 0.1}\ntarget:",
         "16: fuse.ridge: has no effect: method is 'vanilla'; got: 0.1; "
         "allowed: with method: refit or gauge or random-refit"),
        ("target:", "fuse: {saliency: taylor}\ntarget:",
         "16: fuse.saliency: has no effect here; got: 'taylor'; allowed: with units: saliency, "
         "ot or cluster, ot.masses: saliency or method: intra"),
        ("target:", "fuse: {units: saliency, saliency: uniform}\ntarget:",
         "16: fuse.saliency: chooses none before another; got: 'uniform'; allowed: a score"),
        ("target:", "fuse: {parent_weights: fisher}\ntarget:",
         "16: fuse.parent_weights: has no effect: method is 'refit'; got: 'fisher'; "
         "allowed: with method: ot"),
        ("target:", "fuse: {alignment: soft}\ntarget:",
         "16: fuse.alignment: has no effect: method is 'refit'; got: 'soft'; "
         "allowed: with method: gauge"),
        ("target:", "fuse: {parents: [a, c]}\ntarget:",
         "16: fuse.parents[1]: no such parent; got: 'c'; allowed: a, b"),
        ("target:", "fuse: {layers: [[0, -1]]}\ntarget:",
         "16: fuse.layers[0][1]: out of range; got: -1; allowed: integer >= 0"),
        ("target:", "baselines: [random, randm]\ntarget:",
         "16: baselines[1]: unknown value; did you mean 'random'? got: 'randm'; "
         "allowed: refit, gauge, ot, intra, vanilla, select, subclone, keep, random, random-refit"),
        ("hidden_size: 0.5", "hidden_size: null", "16: target: no size is given; "
         "allowed: one of hidden_size, num_attention_heads, intermediate_size, num_hidden_layers, "
         "or budget"),
        ("hidden_size: 0.5", "budget: {}",
         "17: target.budget: missing key: needs one of params, flops, latency_ratio"),
        ("hidden_size: 0.5", "budget: {params: 0.5, flops: 0.5}",
         "17: target.budget.flops: stands beside 'params'; got: 0.5; allowed: one of them"),
        ("hidden_size: 0.5", "budget: {latency_ratio: 2}",
         "17: target.budget.latency_ratio: out of range; got: 2; allowed: number > 0 and <= 1 "
         "or null"),
        ("hidden_size: 0.5", "{hidden_size: 9, budget: {params: 0.5}}",
         "17: target.hidden_size: is fixed here and free in budget; got: 9; "
         "allowed: one of the two"),
        ("epochs: 3", "epochs: 3\n      classes: [x, x]",
         "16: parents[1].train.classes: an item stands twice; allowed: each item once"),
        ("{source: digits}", "{source: imagefolder}",
         "6: data.path: missing key: source 'imagefolder' needs it"),
        ("{source: digits}", "{source: fashion-mnist, path: x, config: y}",
         "6: data.config: source 'fashion-mnist' takes no config; got: 'y'; allowed: null"),
        ("target:", "finetune: {distill: {teachers: [a, bb]}}\ntarget:",
         "16: finetune.distill.teachers[1]: no such parent; did you mean 'b'? got: 'bb'; "
         "allowed: a, b"),
        ("target:", "gates: [{metric: accuracy, max_drop: 0.1, max_ratio: 1}]\ntarget:",
         "16: gates[0].max_ratio: does not fit metric 'accuracy'; did you mean 'max_drop'? "
         "got: 1.0"),
        ("target:", "gates:\n- metric: params\ntarget:",
         "17: gates[0].max_ratio: missing key: metric 'params' needs it"),
        ("target:", "export: {opset: 17}\ntarget:",
         "16: export.opset: out of range; got: 17; allowed: integer >= 18 and <= 24"),
        ("target:", "bench: {threads: []}\ntarget:",
         "16: bench.threads: too few items; got: a list; "
         "allowed: a list of 1 or more, each integer >= 1"),
        ("target:", "bench: {batch: [1, 8, 1]}\ntarget:",
         "16: bench.batch: an item stands twice; allowed: each item once"),
        ("target:", "fuse:\ntarget:", "16: fuse: wrong type; got: null; "
         f"allowed: a mapping of {FUSE_KEYS}"),
        ("name: try", "name: !!python/name:os.system x",
         "3: name: tag 'python/name:os.system' is not read"),
        ("name: try", 'name: "\\ud800"', "3: name: text with half a surrogate pair"),
    ],
)  # fmt: skip
def test_one_mistake_one_line(problems: Any, old: str, new: str, line: str) -> None:
    assert GOOD.count(old) == 1
    found = problems(GOOD.replace(old, new))
    # a misspelt required key is also a missing one
    assert f"r.yaml:{line}" in found
    assert len(found) == 1 or "traget" in new


def test_every_problem_is_reported_at_once_in_the_order_of_lines(problems: Any) -> None:
    text = GOOD.replace("name: try", "name: Try").replace("    weight: 2", "    wait: 2")
    text = text.replace("{source: digits}", "{source: datasets}").replace("0.5", "x")
    text = text.replace("from: some/model", "from: some/model\n    train: {epochs: 0}")
    text += "finetune: {distill: {teachers: [c]}, ema: 1}\nname: other\n"
    found = [line.split(": ")[:3] for line in problems(text, "fuse.ridge=-1", "nmae=x")]
    assert found == [
        ["r.yaml:3", "name", "not a usable name; got"],
        ["r.yaml:6", "data.path", "missing key"],
        ["r.yaml:10", "parents[0].train.epochs", "out of range; got"],
        ["r.yaml:10", "parents[0].train", "missing key"],
        ["r.yaml:10", "parents[0].train", "stands beside 'from'; allowed"],
        ["r.yaml:12", "parents[1].wait", "unknown key; did you mean 'weight'? allowed"],
        ["r.yaml:18", "target.hidden_size", "not a size; got"],
        ["r.yaml:19", "finetune.ema", "out of range; got"],
        ["r.yaml:19", "finetune.distill.teachers[0]", "no such parent; got"],
        ["r.yaml:20", "name", "key given twice, first at r.yaml:3"],
        ["--set fuse.ridge=-1", "fuse.ridge", "not a ridge; got"],
        ["--set nmae=x", "nmae", "unknown key; did you mean 'name'? allowed"],
    ]


def test_the_error_carries_the_first_problems_place(write: Any) -> None:
    path = write(GOOD)
    with pytest.raises(InvalidRecipe) as caught:
        load_recipe(path, ["fuse.ridg=1"])
    assert caught.value.where == "--set fuse.ridg=1"
    assert caught.value.allowed == FUSE_KEYS
    assert caught.value.exit_code == 2
    assert [problem.meant for problem in caught.value.problems] == ["ridge"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("fuse.ridg=1", f"fuse.ridg: unknown key; did you mean 'ridge'? allowed: {FUSE_KEYS}"),
        ("fues.ridge=1", f"fues: unknown key; did you mean 'fuse'? allowed: {TOP_KEYS}"),
        ("parents.0.wait=1", "parents[0].wait: unknown key; did you mean 'weight'? "
         "allowed: from, name, revision, train, weight"),
        ("parents.2.weight=1", "parents: no such item; got: '2'; allowed: an index from 0 to 1"),
        ("parents.a.weight=1", "parents: no such item; got: 'a'; allowed: an index from 0 to 1"),
        ("name.x=1", "name: has no keys of its own; got: 'try'"),
        ("fuse.stream=pac", "fuse.stream: unknown value; did you mean 'pca'? got: 'pac'; "
         "allowed: pca, gradient-pca, select, ot, cluster"),
        ("finetune.lr=.inf", "finetune.lr: '.inf' is not a finite number"),
        ("finetune.distill={a: 1, a: 2}",
         "finetune.distill.a: key given twice, first at --set finetune.distill={a: 1, a: 2}"),
        ("name=[", "not valid YAML: expected the node content, but found '<stream end>'"),
        ("name", "not an override; allowed: key.key=value, as in finetune.lr=1e-3"),
        ("a..b=1", "not an override; allowed: key.key=value, as in finetune.lr=1e-3"),
        ("data.source=", "data.source: unknown value; got: null; "
         "allowed: digits, fashion-mnist, imagefolder, wordnet, vader, anarchism, textfolder, "
         "datasets"),
    ],
)  # fmt: skip
def test_a_bad_override_names_itself(problems: Any, override: str, line: str) -> None:
    assert f"--set {override}: {line}" in problems(GOOD, override)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"", "r.yaml:1: empty recipe"),
        (b"# only a comment\n", "r.yaml:1: empty recipe"),
        (b"- 1\n", "r.yaml:1: recipe is no mapping; got: a list; allowed: key: value lines"),
        (b"hello", "r.yaml:1: recipe is no mapping; got: 'hello'; allowed: key: value lines"),
        (b"a: 1\nb: \xff\n", "r.yaml:2: not UTF-8 text: byte 0xff at offset 8"),
        (b"a: 1\nb: [\n", "r.yaml:3: not valid YAML: expected the node content, "
         "but found '<stream end>'"),
        (b"a: 1\n b: 2\n", "r.yaml:2: not valid YAML: mapping values are not allowed here"),
        (b"a: 1\nb: \x01\n",
         "r.yaml:2: not valid YAML: special characters are not allowed"),
        (b"a: 1\n---\nb: 1\n", "r.yaml:2: not valid YAML: but found another document"),
        (b"a: *x\n", "r.yaml:1: not valid YAML: found undefined alias 'x'"),
        (b"a: &a [*a]\n", "r.yaml:1: too many or too deep values; "
         "allowed: 10000 values, 32 levels, aliases included"),
        (b"a: &a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(
            b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10))
            for i in range(8)),
         "r.yaml:1: too many or too deep values; "
         "allowed: 10000 values, 32 levels, aliases included"),
        (b"#" * 1_000_001, "r.yaml: file too large; allowed: at most 1000000 bytes"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_has_one_clear_line(problems: Any, text: bytes, line: str) -> None:
    assert problems(text) == [line]


def test_deep_nesting_is_refused(problems: Any) -> None:
    (line,) = problems("a: " + "[" * 100_000)
    what = "maximum depth of data structure exceeded (33)"
    assert line == f"r.yaml:1: not valid YAML: {what}"


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    for name in ("none.yaml", "a\0b", "."):
        with pytest.raises(RecipeError, match="recipe can't be read"):
            load_recipe(tmp_path / name)


def test_thousands_of_problems_stay_readable(problems: Any) -> None:
    found = problems(GOOD + "".join(f"k{i}: 1\n" for i in range(500)))
    assert len(found) == 51 and found[-1] == "and 450 problems more"


# ---- identities and fuzz

SLUGS = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True)
FLOATS = st.floats(1e-9, 1e9)
FRACTIONS = st.floats(0, 1)
COUNTS = st.integers(1, 2**40)
SIZES = st.integers(1, 9999) | st.floats(0, 1, exclude_min=True)
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp"]),
    min_size=1,
    max_size=9,
)
PATHS = TEXTS.filter(lambda text: not text.startswith("~"))


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 7))
    shape = {
        "hidden_size": heads * draw(st.integers(1, 9)), "num_attention_heads": heads,
        "num_hidden_layers": draw(COUNTS), "intermediate_size": draw(COUNTS),
        "patch_size": draw(COUNTS),
    }  # fmt: skip
    augment = st.permutations(["flip", "shift"])
    training = some(
        lr=FLOATS, weight_decay=FLOATS, warmup=FRACTIONS, augment=augment, batch_size=COUNTS,
        seed=st.integers(0, 2**32 - 1),
    )  # fmt: skip
    names = draw(st.lists(SLUGS.filter(lambda s: s not in RESERVED_NAMES), min_size=1, unique=True,
                          max_size=3))  # fmt: skip
    parents = []
    for name in names:
        parent = {"name": name, **draw(some(weight=FLOATS))}
        if draw(st.booleans()):
            parent |= {"from": draw(PATHS), **draw(some(revision=TEXTS))}
        else:
            parent["train"] = {"config": shape, "epochs": 2, "shard": "2/3", **draw(training)}
        parents.append(parent)
    data = draw(st.sampled_from([
        {"source": "digits"}, {"source": "fashion-mnist", "path": "a b"},
        {"source": "datasets", "path": "#x: [", "config": "null"},
    ]))  # fmt: skip
    if data["source"] == "datasets":
        data = data | draw(some(train_split=TEXTS, label_column=TEXTS))
    depth = draw(some(num_hidden_layers=SIZES | st.none()))
    budget = {"budget": {"params": draw(SIZES)}}
    target = {**draw(st.sampled_from([{"hidden_size": draw(SIZES)}, budget])), **depth}
    teachers = st.lists(st.sampled_from(names), min_size=1, unique=True)
    gates = st.lists(st.sampled_from([
        {"metric": "accuracy", "max_drop": 0}, {"metric": "latency_p50", "min_speedup": 1.5},
        {"metric": "params", "max_ratio": 1e-7},
    ]))  # fmt: skip
    softness = st.fixed_dictionaries({"solver": st.just("sinkhorn")}, optional={"reg": FLOATS})
    transport = st.fixed_dictionaries({"stream": st.just("ot"), "ot": softness})
    published = st.fixed_dictionaries({
        "solver": st.sampled_from(["emd", "partial"]), "cost": st.just("combined"),
        "anchor": st.sampled_from([
            {"from": "x"},
            {"train": {"config": shape, "epochs": 1, "samples": 9, "classes": ["a"]}},
        ]),
    })  # fmt: skip
    methods = transport | st.fixed_dictionaries({"method": st.just("ot"), "ot": published})
    methods |= st.fixed_dictionaries(
        {"method": st.just("gauge")}, optional={"refit": st.booleans(), "ridge": FLOATS}
    )
    rest = some(
        fuse=methods | some(
            stream=st.sampled_from(["select", "ot"]), ridge=FLOATS | st.just("auto"),
            parents=st.just(names[:1]), layers=st.just([[0, 1], [2]]) | st.none(),
        ),
        finetune=st.builds(
            dict.__or__, training, some(ema=FRACTIONS.filter(lambda x: 0 < x < 1) | st.none(),
                                        distill=some(teachers=teachers, hardness=FRACTIONS))
        ),
        baselines=st.permutations(["random", "subclone", "random-refit"]), gates=gates,
        export=some(opset=st.integers(18, 24), parity_atol=FLOATS),
        bench=some(threads=st.lists(COUNTS, min_size=1, unique=True)),
        runtime=some(threads=COUNTS | st.none(), precision=st.just("bf16")),
    )  # fmt: skip
    return {
        "version": 1, "name": draw(SLUGS), "family": "vit", "task": "image-classification",
        "data": data | draw(some(image_size=COUNTS)),
        "parents": parents, "target": target, **draw(rest),
    }  # fmt: skip


def dump(data: Any) -> bytes:
    buffer = io.BytesIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False  # in flow style ruamel 0.19 writes `{from: ?x}`, can't read it
    yaml.dump(data, buffer)
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(raw=recipes())
def test_a_dumped_lock_reloads_to_the_same_recipe(
    raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = Recipe.model_validate(raw)
    path = tmp_path_factory.getbasetemp() / "lock.yaml"
    for text in (dump(recipe.to_lock()), json.dumps(recipe.to_lock()).encode()):
        path.write_bytes(text)
        again = load_recipe(path)
        assert again == recipe
        # equality alone takes 1 for 1.0, and these are other sizes
        assert json.dumps(again.to_lock()) == json.dumps(recipe.to_lock())


def load_or_refuse(path: Path, text: bytes, overrides: list[str]) -> None:
    path.write_bytes(text)
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        str(error).encode()  # printable, too


@settings(max_examples=300, deadline=None)
@given(text=st.binary() | st.text(alphabet="ab: -[]{}&*!|>#'\"\n%?,~1.e").map(str.encode))
def test_random_bytes_raise_only_recipe_errors(
    text: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    load_or_refuse(tmp_path_factory.getbasetemp() / "bytes.yaml", text, [])


KEYS = st.sampled_from(
    ["name", "parents", "train", "config", "data", "source", "gates", "metric", "finetune",
     "distill", "teachers", "from", "hidden_size", "target", "num_attention_heads", "path"]
) | st.text(max_size=5)  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["digits", "accuracy", "1/2", "vit", "a"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5)
)


@settings(max_examples=150, deadline=None)
@given(
    base=recipes(),
    extra=st.dictionaries(KEYS, VALUES, max_size=4),
    overrides=st.lists(
        st.builds("{}={}".format, st.lists(KEYS | st.just("0"), max_size=4).map(".".join), VALUES)
        | st.text(max_size=9),
        max_size=3,
    ),
)
def test_random_mappings_and_overrides_raise_only_recipe_errors(
    base: dict[str, Any], extra: dict[str, Any], overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "mapping.yaml"
    load_or_refuse(path, dump(base | extra), overrides)
    load_or_refuse(path, json.dumps(extra).encode(), overrides)


# ---- the schema and the list


def objects(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [found for item in schema for found in objects(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if "properties" in schema else []
    return own + objects(list(schema.values()))


def undescribed(schema: dict[str, Any]) -> list[str]:
    return [
        f"{part['title']}.{key}"
        for part in objects(schema)
        for key, value in part["properties"].items()
        if not value.get("description", "").endswith(".")
    ]


def test_the_schema_describes_every_key() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert undescribed(schema) == []
    parts = objects(schema)
    assert len(parts) == len(schema["$defs"]) == 36
    assert schema["oneOf"] == [{"$ref": "#/$defs/Recipe"}, {"$ref": "#/$defs/NetRecipe"}]
    assert all(part["additionalProperties"] is False and part["description"] for part in parts)
    needed = ["version", "name", "family", "task", "data", "parents"]
    assert schema["required"] == needed  # what both kinds need
    assert schema["$defs"]["Recipe"]["required"] == [*needed, "target"]
    assert schema["$defs"]["Parent"]["required"] == ["name"]
    assert schema["$defs"]["Parent"]["properties"]["from"]["description"].startswith("Local folder")


def test_the_schema_walk_sees_a_missing_description() -> None:
    schema = recipe_schema()
    del schema["$defs"]["Ot"]["properties"]["reg"]["description"]
    assert undescribed(schema) == ["Ot.reg"]
    assert undescribed(recipe_schema()) == []  # the change stayed in our copy


def test_find_recipes_lists_good_and_faulty_ones(tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "b.yaml").write_text("# yaml-language-server: $schema=x\n" + GOOD)
    (tmp_path / "a.yaml").write_text("version: 1\n# late\n")
    bad, good = find_recipes(tmp_path)
    assert (good.name, good.family, good.task) == ("try", "vit", "image-classification")
    assert good.summary == "A short line about it." and good.error is None
    assert (bad.path.name, bad.name, bad.summary) == ("a.yaml", "a", "")
    assert isinstance(bad.error, RecipeError)
    with pytest.raises(RecipeError, match="no such folder"):
        find_recipes(tmp_path / "none")


def test_shipped_recipes_have_a_summary() -> None:
    assert all(info.summary and info.error is None for info in find_recipes(ROOT / "recipes"))
