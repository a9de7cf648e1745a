"""Locks reload to the same recipe, and whatever is random raises recipe errors only."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from slimfuse.errors import RecipeError
from slimfuse.recipe import (
    Recipe,
    load_recipe,
)
from slimfuse.recipe.models import RESERVED_NAMES

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


@settings(max_examples=30, deadline=None)
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


@settings(max_examples=75, deadline=None)
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
