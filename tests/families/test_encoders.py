"""What single encoders have of their own: positions, projections, shared heads, scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import CASES, LABELS, Case, every_text, logits, those
from torch import nn

from slimfuse.batch import Batch
from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import Dinov2, Shape
from slimfuse.fuse import walk
from slimfuse.spaces import Role

CASE = {case.name: case for case in CASES}
SUMS = {"rtol": 0, "atol": 1e-12}  # float64, the same sums in another order
SAME = {"rtol": 0, "atol": 0}  # the same operations on the same numbers
with_decoders = those(lambda case: case.name in ("bert", "roberta", "electra"))


def test_what_a_norm_divides_by_is_what_turns_its_sum_into_its_output() -> None:
    case = CASE["bert"]
    model = case.model()
    layout = case.family.layout(model.config)
    norm = model.get_submodule(layout.embed_norm)
    with torch.no_grad():
        begun, total = walk.start_sum(model, layout, case.batch(5))
        scale = walk.norm_scale(norm, total)
        by_hand = (total - total.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
    torch.testing.assert_close(begun.stream, by_hand, **SUMS)
    assert scale.std() > 0.01  # tokens differ: a constant would not do


@with_decoders
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key"),
    ],
)
def test_what_is_no_encoder_with_a_table_of_positions_is_refused(
    case: Case, key: str, value: Any, tmp_path: Path
) -> None:
    config = case.config()
    setattr(config, key, value)
    config.save_pretrained(tmp_path)
    with pytest.raises(ParentError, match="isn't an encoder") as caught:
        case.family.load_config(str(tmp_path))
    assert f"{key} {value}" in str(caught.value.got) and caught.value.where == str(tmp_path)


@every_text
def test_another_family_and_a_missing_weight_are_refused(case: Case, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ParentError, match="another family") as caught:
        case.family.load_config(str(tmp_path))
    assert (caught.value.got, caught.value.allowed) == ("vit", case.family.name)
    if not case.loads:
        return
    case.family.save(case.model().float(), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    gone = f"{case.family.layout(case.config()).pooler.dense}.weight"
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ParentError, match="don't fit") as caught:
        case.family.load(tmp_path)
    assert gone in str(caught.value.got)


@every_text
def test_the_longest_text_fits_and_one_more_token_does_not(case: Case) -> None:
    model, tokens = case.model(), 6
    last = case.family.first_position(model.config) + tokens
    assert model.config.max_position_embeddings == last
    assert logits(model, case.batch(2, tokens)).shape == (2, len(LABELS))
    with pytest.raises((IndexError, RuntimeError)):
        logits(model, case.batch(2, tokens + 1))


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_roberta_counts_positions_from_behind_its_pad_token(pad: int) -> None:
    case = CASE["roberta"]
    model = case.model(pad_token_id=pad)
    assert model.config.max_position_embeddings == pad + 1 + 6
    ids = torch.tensor([[5, 6, 7]])
    places = torch.arange(3)[None] + pad + 1
    short = Batch({"input_ids": ids, "position_ids": places})
    padded = torch.cat([ids, torch.full((1, 3), pad)], dim=1)
    whole = Batch({"input_ids": padded, "attention_mask": (padded != pad).long()})
    torch.testing.assert_close(logits(model, whole), logits(model, short), **SUMS)
    assert case.family.mismatches({"p": case.config(), "q": case.config(pad_token_id=3)}) == [
        "max_position_embeddings: p has 8, q has 10", "pad_token_id: p has 1, q has 3",
    ]  # fmt: skip


def test_distilbert_keeps_the_names_of_its_own_config() -> None:
    case = CASE["distilbert"]
    narrow = case.family.narrow(case.config(), case.narrow).to_dict()
    sizes = [narrow[key] for key in ("dim", "n_heads", "hidden_dim", "n_layers")]
    assert sizes == [8, 2, 11, 2]
    assert not narrow.keys() & set(Shape.__dataclass_fields__)


def test_mpnet_heads_and_blocks_stay() -> None:
    case = CASE["mpnet"]
    for shape, key in ((Shape(8, 2, 11, 2), "num_attention_heads"),
                       (Shape(9, 3, 11, 1), "num_hidden_layers")):  # fmt: skip
        with pytest.raises(ShapeError, match="share one table of heads") as caught:
            case.family.narrow(case.config(), shape)
        assert caught.value.where == f"target.{key}"
        assert caught.value.allowed == getattr(case.wide, key)
    (line,) = case.family.mismatches({"p": case.config(), "q": case.config()})
    assert "2 parents" in line
    assert case.family.mismatches({"p": case.config()}) == []


def test_mpnet_moves_its_table_with_the_heads_of_all_blocks() -> None:
    case = CASE["mpnet"]
    atlas = case.family.atlas(case.config())
    users = {*atlas.users("head", Role.WRITE), *atlas.users("head", Role.READ)}
    blocks = [f"mpnet.encoder.layer.{i}.attention.attn" for i in range(2)]
    wanted = {f"{b}.{part}.weight" for b in blocks for part in "qkvo"}
    wanted |= {f"{b}.{part}.bias" for b in blocks for part in "qkv"}
    assert users == wanted | {"mpnet.encoder.relative_attention_bias.weight"}


def test_mpnet_knows_no_other_attention_than_eager() -> None:
    model = CASE["mpnet"].family.build(CASE["mpnet"].config(), attention="sdpa")
    assert model.config._attn_implementation == "eager"
    assert CASE["bert"].family.build(CASE["bert"].config()).config._attn_implementation == "sdpa"


def test_electras_embeddings_stay_as_wide_as_its_stream() -> None:
    case = CASE["electra"]
    narrow = case.family.narrow(case.config(), case.narrow)
    assert narrow.embedding_size == narrow.hidden_size == 8
    assert not hasattr(case.family.build(narrow).electra, "embeddings_project")
    assert case.family.mismatches({"p": case.config(), "q": narrow}) == []
    projected = CASE["electra-19"].config()
    assert case.family.mismatches({"p": case.config(), "q": projected}) == [
        "embedding_size: p has 15, q has 19"
    ]


def test_a_projected_electra_keeps_its_projection() -> None:
    # a stream as wide as the embeddings would lose it
    family, narrow = CASE["electra-19"].family, CASE["electra-19"].config(embedding_size=8)
    with pytest.raises(ShapeError, match="no projection"):
        family.narrow(narrow, Shape(8, 2, 11, 2))
    assert family.narrow(narrow, Shape(6, 2, 11, 2)).embedding_size == 8


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_images_and_patches_may_be_oblong(name: str) -> None:
    case = CASE[name]
    config = case.config(image_size=(6, 4), patch_size=(3, 2))
    model = case.family.build(config, attention="eager")
    case.family.atlas(config).check({n: tuple(p.shape) for n, p in model.named_parameters()})
    assert case.family.patches(config) == 4
    assert case.family.tokens(config) == {"vit": 5, "deit": 6, "dinov2": 5}[name]


def scales(model: nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith("lambda1")]


def test_dinov2_loads_with_its_scales_in_what_writes(tmp_path: Path) -> None:
    case, x = CASE["dinov2"], CASE["dinov2"].batch()
    model = case.model()
    before = logits(model, x)
    assert len(scales(model)) == 4 and not any(bool((p == 1).any()) for p in scales(model))
    Dinov2().fold(model)
    torch.testing.assert_close(logits(model, x), before, **SUMS)
    assert all(bool((p == 1).all()) for p in scales(model))
    again = {name: p.clone() for name, p in model.state_dict().items()}
    Dinov2().fold(model)
    assert all(torch.equal(p, again[name]) for name, p in model.state_dict().items())
    other = case.model(seed=1).float()
    other.save_pretrained(tmp_path)
    loaded = case.family.load(tmp_path)
    assert all(bool((p == 1).all()) for p in scales(loaded))
    x = x.to(torch.device("cpu"), torch.float32)
    # float32: a product of two numbers is rounded once more
    torch.testing.assert_close(logits(loaded, x), logits(other, x), rtol=0, atol=1e-5)


def test_dinov2_adds_to_its_stream_what_its_folded_branches_write() -> None:
    case, x = CASE["dinov2"], CASE["dinov2"].batch()
    model = case.model()
    Dinov2().fold(model)
    blocks, found = case.family.blocks(model.config), []
    with torch.no_grad():
        stream = model.dinov2.embeddings(x.arguments["pixel_values"])
        for block in blocks:
            heads = walk.attend(model, block, stream, walk.Call())
            stream = stream + walk.apply(model, block.o, heads)
            stream = stream + walk.mlp(model, block, stream)[1]
            found.append(stream)
        hidden = model(**x.arguments, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, list(hidden[1:]), rtol=0, atol=1e-13)  # the same sums


def test_dinov2_may_lack_its_mask_token_and_may_not_be_gated(tmp_path: Path) -> None:
    case = CASE["dinov2"]
    config = case.config(use_mask_token=False)
    model = case.family.build(config)
    case.family.atlas(config).check({n: tuple(p.shape) for n, p in model.named_parameters()})
    case.config(use_swiglu_ffn=True).save_pretrained(tmp_path)
    with pytest.raises(ParentError, match="gated"):
        case.family.load_config(str(tmp_path))


def test_dinov2_takes_whole_ratios_only() -> None:
    case = CASE["dinov2"]
    for mlp, allowed in ((20, 16), (7, 8)):
        with pytest.raises(ShapeError, match="multiple") as caught:
            case.family.narrow(case.config(), Shape(8, 2, mlp, 2))
        assert caught.value.where == "target.intermediate_size"
        assert caught.value.allowed == f"intermediate_size {allowed}"
        case.family.narrow(case.config(), Shape(8, 2, allowed, 2))


def test_a_shallower_dinov2_reads_its_own_config_again(tmp_path: Path) -> None:
    case = CASE["dinov2"]
    parent = case.config(layerscale_value=1e-5, out_features=["stage1", "stage2"])
    narrow = case.family.narrow(parent, Shape(8, 2, 16, 1))
    narrow.save_pretrained(tmp_path)
    found = case.family.load_config(str(tmp_path))
    assert case.family.shape(found) == Shape(8, 2, 16, 1)
    assert found.stage_names == ["stem", "stage1"] and found.out_features == ["stage1"]
    assert found.layerscale_value == 1  # what the fusion writes needs no scale


def test_a_deep_mpnet_hands_on_tuples() -> None:
    case = CASE["mpnet"]
    model, x = case.model(Shape(15, 3, 17, 6)), case.batch()
    layout = case.family.layout(model.config)
    with torch.no_grad():
        begun = walk.start(model, layout, x)
        *_, last = walk.streams_from(model, layout, begun)
        top = walk.apply(model, layout.head, walk.read_out(model, layout, last, begun.mask))
    torch.testing.assert_close(top, logits(model, x), **SUMS)
