"""Families by task: which stock class, what a saved model may hold or lack, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import CASES, EVERY, MASKED, Case, logits, shaken
from safetensors.torch import load_file, save_file

from slimfuse.batch import call
from slimfuse.errors import ParentError, UserError
from slimfuse.families import FAMILIES, FAMILIES_OF, TASK_FAMILIES, family_of

CASE = {case.name: case for case in EVERY}
CPU = torch.device("cpu")
SAME = {"rtol": 0, "atol": 0}  # the same operations on the same numbers


def saved(case: Case, folder: Path, stock: str = "") -> Any:
    """Save a random float32 model of a case's family, or of another stock class; return it."""
    import transformers

    config = case.config()
    model = getattr(transformers, stock)(config) if stock else case.family.build(config)
    model = shaken(model.eval().double(), seed=3).float()
    model.save_pretrained(folder)
    return model


def changed(folder: Path, gone: str = "", new: str = "") -> None:
    """Take a weight out of a saved model, or put one into it."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    if gone:
        del weights[gone]
    if new:
        weights[new] = torch.zeros(2, 3)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_name_and_a_task_make_a_family_and_others_are_told() -> None:
    for task, names in TASK_FAMILIES.items():
        for name in names:
            assert family_of(name, task) is FAMILIES_OF[task][name]
            assert family_of(name, task).name == name
    assert family_of("bert", "masked-lm").stock == "BertForMaskedLM"
    assert family_of("bert", "sentence-embedding").stock == "BertModel"
    assert {type(f) for f in FAMILIES.values()} <= {type(c.family) for c in CASES}
    with pytest.raises(UserError, match="task isn't known") as caught:
        family_of("bert", "translation")
    assert "masked-lm" in str(caught.value.allowed)
    with pytest.raises(UserError, match="no task 'masked-lm'") as caught:
        family_of("vit", "masked-lm")
    assert "bert" in str(caught.value.allowed) and caught.value.where == "family"


@pytest.mark.parametrize(
    ("name", "stock"),
    [
        ("bert-body", "BertForSequenceClassification"),
        ("bert-body", "BertForMaskedLM"),
        ("bert-words", "BertForPreTraining"),
        ("roberta-body", "RobertaForMaskedLM"),
        ("distilbert-body", "DistilBertForMaskedLM"),
        ("electra-19-body", "ElectraForPreTraining"),
        ("mpnet-body", "MPNetForSequenceClassification"),
        ("vit-body", "ViTForImageClassification"),
        ("deit-body", "DeiTForImageClassificationWithTeacher"),
        ("dinov2-body", "Dinov2ForImageClassification"),
    ],
)
def test_a_model_with_another_head_gives_its_body(name: str, stock: str, tmp_path: Path) -> None:
    case = CASE[name]
    other, x = saved(case, tmp_path, stock), case.batch().to(CPU, torch.float32)
    found = case.family.load(tmp_path)
    with torch.no_grad():
        wanted = other(**x.arguments, output_hidden_states=True)
        if name.endswith("words"):
            torch.testing.assert_close(logits(found, x), wanted.prediction_logits, **SAME)
            return
        given = found(**x.arguments, output_hidden_states=True).hidden_states
    if not hasattr(case.family, "fold"):
        torch.testing.assert_close(given, wanted.hidden_states, **SAME)
        return
    # float32: its scales are multiplied into what writes, so that products are rounded once more
    torch.testing.assert_close(given, wanted.hidden_states, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["bert-body", "roberta-body", "vit-body"])
def test_a_pooler_that_nothing_reads_may_be_missing_and_is_nought(
    name: str, tmp_path: Path
) -> None:
    case = CASE[name]
    saved(case, tmp_path)
    pooler = case.family.layout(case.config()).unread.dense
    assert bool(case.family.load(tmp_path).get_parameter(f"{pooler}.weight").any())
    changed(tmp_path, gone=f"{pooler}.weight")
    changed(tmp_path, gone=f"{pooler}.bias")
    found = case.family.load(tmp_path)
    assert not bool(found.get_parameter(f"{pooler}.weight").any())
    assert not bool(found.get_parameter(f"{pooler}.bias").any())


@pytest.mark.parametrize(("name", "task"), [("bert", "bert"), ("bert-words", "bert-body")])
def test_a_missing_head_and_a_weight_of_the_body_too_many_are_refused(
    name: str, task: str, tmp_path: Path
) -> None:
    saved(CASE["bert-body"], tmp_path)
    with pytest.raises(ParentError, match="don't fit") as caught:
        CASE[name].family.load(tmp_path)
    assert "missing" in str(caught.value.got)
    saved(CASE[task], tmp_path)
    deep = f"{'' if task == 'bert-body' else 'bert.'}encoder.layer.7.output.dense.weight"
    changed(tmp_path, new=deep)
    with pytest.raises(ParentError, match="don't fit") as caught:
        CASE[task].family.load(tmp_path)
    assert "unexpected" in str(caught.value.got) and "layer.7" in str(caught.value.got)


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_a_masked_lm_head_with_a_table_of_its_own_is_refused(case: Case, tmp_path: Path) -> None:
    case.config(tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(ParentError, match="table of its own") as caught:
        case.family.load_config(str(tmp_path))
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_a_masked_lm_head_shares_the_embeddings(case: Case) -> None:
    model = case.model()
    layout = case.family.layout(model.config)
    head = model.get_parameter(f"{layout.head}.weight")
    table = [*layout.embed_parameters, *layout.kept][0]
    assert head is model.get_parameter(table)
    assert layout.tied == (table in layout.embed_parameters)


def test_a_vits_pooler_of_another_width_keeps_it(tmp_path: Path) -> None:
    case = CASE["vit-body"]
    config = case.config(pooler_output_size=11)
    model = case.family.build(config)
    case.family.atlas(config).check({n: tuple(p.shape) for n, p in model.named_parameters()})
    narrow = case.family.build(case.family.narrow(config, case.narrow))
    with torch.no_grad():
        out = call(narrow, case.batch().to(CPU, torch.float32))
    assert out.pooler_output.shape == (3, 11) and out.last_hidden_state.shape[2] == 8
