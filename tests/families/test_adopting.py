"""Sibling families are one function: weights move both ways, or the error says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families.cases import IMAGE, IMAGES, LABELS, Case, logits, shaken
from families.test_timm import saved, stock_model

from slimfuse.errors import ParentError
from slimfuse.families import DeiT, Dinov2, ViT
from slimfuse.families.adopting import Adopting, acquaint, saved_kind
from slimfuse.families.timm_vit import TimmViT

CLOSE = {"rtol": 0, "atol": 1e-5}  # the task's bound; float32, measured below 1e-6
CPU = torch.device("cpu")


def adopting(kind: Any) -> Any:
    """Return a family that has siblings, whether or not its own class does."""
    return kind if issubclass(kind, Adopting) else type(kind.__name__, (Adopting, kind), {})


def families(task: str = "image-classification") -> dict[str, Any]:
    """Return a task's families, acquainted."""
    found = [adopting(kind)(task) for kind in (TimmViT, ViT, DeiT, Dinov2)]
    acquaint(found)
    return {family.name: family for family in found}


def hf_model(family: Any, **keys: Any) -> Any:
    """Return a random float32 model of a Hugging Face class, with timm's epsilon."""
    case = Case(family.name, family, IMAGES, {**IMAGE, "layer_norm_eps": 1e-6, **keys}, ratio=2)
    return shaken(family.build(case.config()), 0).float()


def images() -> Any:
    return Case("", None, IMAGES, IMAGE).batch().to(CPU, torch.float32)


@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.3}, {"qkv_bias": False}])
def test_timms_model_becomes_a_vit(arguments: dict[str, Any], tmp_path: Path) -> None:
    known, x = families(), images()
    parent = stock_model(**arguments)
    model = known["vit"].load(saved(tmp_path / "timm", parent))
    assert type(model).__name__ == "ViTForImageClassification"
    with torch.no_grad():
        want = parent(x.arguments["pixel_values"])
    torch.testing.assert_close(logits(model, x), want, **CLOSE)
    config = known["vit"].load_config(str(tmp_path / "timm"))
    assert config.to_diff_dict() == model.config.to_diff_dict()
    assert config.id2label == dict(enumerate(LABELS)) and config.layer_norm_eps == 1e-6
    known["vit"].save(model, tmp_path / "hf")  # and the way back
    back = known["timm-vit"].load(tmp_path / "hf", attention="eager")
    torch.testing.assert_close(logits(back, x), want, **CLOSE)
    known["timm-vit"].save(back, tmp_path / "again")
    own = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(own(x.arguments["pixel_values"]), want, **CLOSE)


def test_a_vit_becomes_timms_model() -> None:
    known, x = families(), images()
    parent = hf_model(known["vit"]).double()
    model = known["timm-vit"].adopt(parent, known["vit"])
    # float64: one product of q, k and v apart, as in the parent
    found, want = logits(model, x.to(CPU, torch.float64)), logits(parent, x.to(CPU, torch.float64))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-13)


def test_a_body_without_a_head_is_a_dinov2_a_vit_or_timms(tmp_path: Path) -> None:
    known, x = families("feature-extraction"), images()
    parent = stock_model(num_classes=0, init_values=0.3, mlp_ratio=2)
    saved(tmp_path / "timm", parent, label_names=[])
    with torch.no_grad():
        want = parent.forward_features(x.arguments["pixel_values"])
        for name in ("dinov2", "vit", "timm-vit"):
            model = known[name].load(tmp_path / "timm")
            torch.testing.assert_close(model(**x.arguments).last_hidden_state, want, **CLOSE)
            known[name].save(model, tmp_path / name)
            back = known["timm-vit"].load(tmp_path / name)
            torch.testing.assert_close(back(**x.arguments).last_hidden_state, want, **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"global_pool": "avg", "fc_norm": False}, "what the head reads: mean instead of 0"),
        ({"global_pool": "avg"}, "norm behind the pooling: True instead of False"),
        ({"reg_tokens": 1}, "tokens before the patches: cls_token, reg_token 0 instead of cls_to"),
        ({"no_embed_class": True}, "positions: 9 instead of 10"),
    ],
)
def test_what_no_vit_has_is_named(arguments: dict[str, Any], told: str, tmp_path: Path) -> None:
    saved(tmp_path, stock_model(**arguments))
    for read in (families()["vit"].load, lambda folder: families()["vit"].load_config(str(folder))):
        with pytest.raises(ParentError, match="no vit model can be") as caught:
            read(tmp_path)
        assert told in str(caught.value.got) and caught.value.where == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "keys", "told"),
    [
        ("vit", {"layer_norm_eps": 1e-3}, "layer_norm_eps: 0.001 instead of 1e-06"),
        ("vit", {"hidden_act": "relu"}, "hidden_act: relu instead of gelu"),
        ("deit", {}, "distillation_token instead of cls_token"),
        ("dinov2", {}, "what the head reads: first+mean instead of 0"),
    ],
)
def test_what_timm_does_not_have_is_named(name: str, keys: dict[str, Any], told: str) -> None:
    known = families()
    with pytest.raises(ParentError, match="no timm-vit model can be") as caught:
        known["timm-vit"].adopt(hf_model(known[name], **keys), known[name])
    assert told in str(caught.value.got)


def test_strangers_are_refused_as_before(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    assert saved_kind(tmp_path) == "bert" and saved_kind(tmp_path / "nowhere") == ""
    with pytest.raises(ParentError, match="another family"):
        families()["vit"].load_config(str(tmp_path))
    with pytest.raises(ParentError, match="no timm model"):
        families()["timm-vit"].load_config(str(tmp_path))


def test_parents_of_both_worlds_fuse_into_one(tmp_path: Path) -> None:
    """The same model twice, from either world, is the model itself."""
    from slimfuse.fuse.refit import Parent, Settings, refit

    known = families()
    saved(tmp_path / "a", stock_model())
    known["vit"].save(known["vit"].load(tmp_path / "a"), tmp_path / "b")
    x = Case("", None, IMAGES, IMAGE).batch(64)
    for family in (known["vit"], known["timm-vit"]):
        parents = [Parent(n, family.load(tmp_path / n).double()) for n in ("a", "b")]
        assert not family.mismatches({p.name: p.model.config for p in parents})
        target: Any = family.build(parents[0].model.config).double()
        refit(parents, target, family, lambda: x.split(16), Settings(stream="pca"), n_batches=4)
        want = logits(parents[0].model, x)
        gap = float((logits(target, x) - want).abs().max() / want.abs().max())
        assert gap < 1e-5  # the contract's relative bound
