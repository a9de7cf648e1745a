"""Recipes that don't load: exact messages, all problems at once with their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe.texts import GOOD

from slimfuse.errors import RecipeError
from slimfuse.recipe import (
    InvalidRecipe,
    load_recipe,
    tree,
)

TOP_KEYS = (
    "baselines, bench, data, diagnose, export, family, finetune, fuse, gates, name, parents, "
    "runtime, sparsify, target, task, version"
)
FUSE_KEYS = (
    "alignment, batch_size, heads, layers, method, ot, parent_weights, parents, refit, ridge, "
    "saliency, stream, units"
)
NAME_RULE = "1 to 64 of a-z 0-9 . _ -, the first a letter or digit, the last no dot, without '..'"
DEVICES = "any but con, prn, aux, nul, com0-9 and lpt0-9, with or without a dot behind"


@pytest.fixture
def problems(write: Any) -> Any:
    """Return the lines of the error of a recipe, the file's folder cut off."""

    def problems(text: str | bytes, *overrides: str) -> list[str]:
        path = write(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        return str(caught.value).replace(f"{path.parent}/", "").split("\n")

    return problems


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
         r"^(?!.*\.\.)[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9_-])?$"),
        ("      epochs: 3\n", "",
         "12: parents[1].train.epochs: missing key; allowed: integer >= 1"),
        ("family: vit", "family: vit\nname: again", "5: name: key given twice, first at r.yaml:3"),
        ("version: 1", "version: true",
         "2: version: not an integer; got: true; allowed: 1"),
        ("version: 1", "version: 2", "2: version: unknown value; got: 2; allowed: 1"),
        ("name: try", "name: a..b",
         f"3: name: not a usable name; got: 'a..b'; allowed: {NAME_RULE}"),
        ("name: try", "name: a.",
         f"3: name: not a usable name; got: 'a.'; allowed: {NAME_RULE}"),
        ("name: try", "name: nul",
         f"3: name: is a device's name on Windows, no folder's; got: 'nul'; allowed: {DEVICES}"),
        ("name: b", "name: com1.x", "10: parents[1].name: is a device's name on Windows, "
         f"no folder's; got: 'com1.x'; allowed: {DEVICES}"),
        ("name: try", "name: 12", "3: name: wrong type; got: 12; allowed: text like "
         r"^(?!.*\.\.)[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9_-])?$"),
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
    shown, last = found[:-1], found[-1]
    assert 10 < len(shown) < 51 and last == f"and {500 - len(shown)} problems more"
    assert sum(map(len, found)) < 4000


LONG = "x" * 50_000


@pytest.mark.parametrize(
    ("text", "override"),
    [
        (GOOD.replace("try", LONG), ""),
        (GOOD.replace("target:", f"{LONG}: 1\ntarget:"), ""),
        (GOOD.replace("target:", f"finetune: {{distill: {{teachers: [{LONG}]}}}}\ntarget:")
         .replace("name: b", f"name: {LONG}"), ""),
        (f"a: *{LONG}\n", ""),
        (f"a: !{LONG} b\n", ""),
        (GOOD, f"{LONG}=1"),
        (GOOD, f"fuse.{LONG}={LONG}"),
        (GOOD, "a.b=\n\x1b[31m\u2028"),
    ],
    ids=["name", "key", "parent", "alias", "tag", "override", "value", "terminal"],
)  # fmt: skip
def test_no_text_of_a_user_makes_a_message_long_or_odd(
    problems: Any, text: str, override: str
) -> None:
    lines = problems(text, *filter(None, [override]))
    assert sum(map(len, lines)) < 4000
    assert all(line and line.isprintable() for line in lines)


def test_a_long_file_name_is_cut_in_its_middle(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="can't be read: File name too long") as caught:
        load_recipe(tmp_path / f"{LONG}.yaml")
    shown = str(caught.value)
    assert len(shown) < 4000 and str(tmp_path) in shown and "xx.yaml" in shown


@pytest.mark.parametrize(
    ("old", "place"),
    [
        ("task: image-classification", "task"),
        ("family: vit", "family"),
        ("name: a", "parents[0].name"),
        ("source: digits", "data.source"),
        ("target:", "gates[0].metric"),
        ("target:", "fuse.method"),
    ],
)
@pytest.mark.parametrize("value", ["{a: 1}", "[vit]"])
def test_a_mapping_where_a_word_is_meant_is_a_wrong_type(
    problems: Any, old: str, place: str, value: str
) -> None:
    new = {
        "gates[0].metric": f"gates: [{{metric: {value}, max_drop: 0}}]\n{old}",
        "fuse.method": f"fuse: {{method: {value}}}\n{old}",
    }.get(place, f"{old.partition(':')[0]}: {value}")
    found = problems(GOOD.replace(old, new, 1))
    assert any(f"{place}: " in line and ("wrong type" in line or "unknown value" in line)
               for line in found), found  # fmt: skip


def test_a_net_whose_architecture_is_no_word_has_a_line(problems: Any) -> None:
    text = GOOD.replace("family: vit", "family: auto")
    found = problems(text, "parents.1.train.config={architecture: {mlp: 1}}")
    assert any("architecture: " in line for line in found)


@pytest.mark.parametrize("piece", ["k: 1\n", "- a\n", "[], ", "? - a\n: - b\n", "<<: {a: 1}\n"])
def test_a_text_of_too_many_values_is_not_read_to_its_end(
    problems: Any, piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "MAX_NODES", 300)
    closed = ("[", "]") if piece.startswith("[") else ("", "")
    # were all of it read, the broken end would be what is said
    (line,) = problems(piece.join([closed[0], *[""] * 2000, closed[1] + "{{{"]))
    assert line.endswith("too many or too deep values; "
                         "allowed: 10000 values, 32 levels, aliases included")  # fmt: skip
