"""Tokenizers that number the same tokens differently: found, told apart from others, aligned."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_decoders
import tiny_text
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from slimfuse.errors import ParentError
from slimfuse.families import Family, Shape, family_of
from slimfuse.pipeline.vocabularies import align, common_tokenizer, compare, places, renumbered
from slimfuse.tasks.text_classification import TextClassification

TEXTS = ["the old cat and a big saw", "moss of the elm", "a yak"]
BATCH = {"return_tensors": "pt", "padding": True}


def scrambled(tokenizer: Any, seed: int = 0, kept: tuple[str, ...] = ()) -> Any:
    """Return the same tokenizer with other numbers; kept: tokens that keep theirs."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    old = tokenizer.get_vocab()
    moving = sorted(token for token in old if token not in kept)
    targets = [old[token] for token in moving]
    random.Random(seed).shuffle(targets)
    new = {token: i for token, i in old.items() if token in kept}
    new |= dict(zip(moving, targets, strict=True))
    told["model"]["vocab"] = {token: new[token] for token in told["model"]["vocab"]}
    for token in told["added_tokens"]:
        token["id"] = new[token["content"]]
    for special in told["post_processor"]["special_tokens"].values():
        special["ids"] = [new[token] for token in special["tokens"]]
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)),
        model_max_length=tokenizer.model_max_length,
        **{f"{kind}_token": name for kind, name in names.items()},
    )


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random float64 values, norms and biases, too."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 4)
    return model


def bert(task: str, vocabulary: int) -> tuple[Family, nn.Module]:
    family = family_of("bert", task)
    config = AutoConfig.for_model(
        "bert", hidden_size=12, num_attention_heads=3, intermediate_size=10, num_hidden_layers=2,
        vocab_size=vocabulary, max_position_embeddings=24, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return family, filled(family.build(config))


def llama(tied: bool, vocabulary: int) -> tuple[Family, nn.Module]:
    family = family_of("llama", "causal-lm")
    config = tiny_decoders.DECODERS["llama"].new_config(
        Shape(12, 3, 10, 2), vocab_size=vocabulary, positions=24, key_heads=1, tied=tied,
        bos_token_id=2, eos_token_id=[3, 5], pad_token_id=0,
    )  # fmt: skip
    return family, filled(family.build(config))


MADE: dict[str, Callable[[int], tuple[Family, nn.Module]]] = {
    "bert": lambda n: bert("text-classification", n),
    "bert masked": lambda n: bert("masked-lm", n),
    "llama": lambda n: llama(False, n),
    "llama tied": lambda n: llama(True, n),
}


@pytest.mark.parametrize("made", MADE)
def test_an_aligned_model_says_the_same_of_texts_through_the_other_tokenizer(made: str) -> None:
    base = tiny_text.tokenizer(("yak",))
    own = scrambled(base)
    unused = 3  # rows that no token uses
    family, model = MADE[made](len(base) + unused)
    order = compare("a", base, "b", own)
    assert order is not None
    aligned = align(family, model, order)
    theirs, ours = own(TEXTS, **BATCH), base(TEXTS, **BATCH)
    assert not torch.equal(theirs["input_ids"], ours["input_ids"])
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        wanted: Tensor = model(**{n: theirs[n] for n in names}).logits
        found: Tensor = aligned(**{n: ours[n] for n in names}).logits
    if wanted.shape[-1] > 3:
        wanted = wanted[..., places(order, len(base) + unused)]
    # the same float64 products, their rows gathered elsewhere
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_configs_own_tokens_keep_their_meaning() -> None:
    base = tiny_text.tokenizer()
    own = scrambled(base)
    family, model = llama(False, len(base))
    model.generation_config.bos_token_id = 4  # type: ignore[union-attr]
    order = compare("a", base, "b", own)
    assert order is not None
    aligned: Any = align(family, model, order)
    for key in ("bos_token_id", "pad_token_id"):
        old, new = getattr(model.config, key), getattr(aligned.config, key)
        assert own.convert_ids_to_tokens(old) == base.convert_ids_to_tokens(new)
    ends = own.convert_ids_to_tokens([3, 5])
    assert base.convert_ids_to_tokens(aligned.config.eos_token_id) == ends
    start = aligned.generation_config.bos_token_id
    assert base.convert_ids_to_tokens(start) == own.convert_ids_to_tokens(4)
    assert model.config.eos_token_id == [3, 5]  # the model itself is only read


def test_renumbered_leaves_what_is_no_token() -> None:
    config = AutoConfig.for_model("bert", pad_token_id=1, bos_token_id=None, eos_token_id=99)
    turned = renumbered(config, torch.tensor([2, 0, 1]))
    assert (turned.pad_token_id, turned.bos_token_id, turned.eos_token_id) == (2, None, 99)


def test_equal_tokenizers_have_no_order() -> None:
    assert compare("a", tiny_text.tokenizer(), "b", tiny_text.tokenizer()) is None


def test_rows_that_no_token_uses_fill_the_rest_in_order() -> None:
    assert places({0: 3, 1: 0}, 5).tolist() == [3, 0, 1, 2, 4]


def test_a_token_without_a_row_is_refused() -> None:
    with pytest.raises(ParentError, match="no row for") as caught:
        places({0: 1, 1: 7}, 5, "parents.b")
    assert caught.value.got == "token 7, 5 rows" and caught.value.where == "parents.b"


def test_positions_that_count_from_the_padding_token_keep_its_number() -> None:
    family = family_of("roberta", "text-classification")
    config = AutoConfig.for_model(
        "roberta", hidden_size=8, num_attention_heads=2, intermediate_size=6, num_hidden_layers=1,
        vocab_size=30, max_position_embeddings=12, pad_token_id=1,
    )  # fmt: skip
    model = filled(family.build(config))
    order = {i: i for i in range(30)}
    with pytest.raises(ParentError, match="count from the padding token") as caught:
        align(family, model, order | {1: 4, 4: 1})
    assert (caught.value.got, caught.value.allowed) == ("pad_token_id 1", "pad_token_id 4")
    ids = torch.tensor([[0, 7, 9, 2]])
    aligned = align(family, model, order | {7: 9, 9: 7})
    with torch.no_grad():
        wanted = model(ids).logits
        found = aligned(torch.tensor([[0, 9, 7, 2]])).logits
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def byte_pairs(merges: list[tuple[str, str]], numbers: list[int], trims: bool = True) -> Any:
    """Return a BPE tokenizer of six tokens with these numbers."""
    tokens = ("a", "b", "ab", "ba", "c", "<s>")
    made = Tokenizer(models.BPE(dict(zip(tokens, numbers, strict=True)), merges))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    around = ("<s>", numbers[5])
    made.post_processor = processors.RobertaProcessing(around, around, trims)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_the_numbers_of_merges_and_of_what_stands_around_a_text_follow_the_tokens() -> None:
    merges = [("a", "b"), ("b", "a")]
    base, own = byte_pairs(merges, [0, 1, 2, 3, 4, 5]), byte_pairs(merges, [5, 3, 1, 0, 2, 4])
    assert compare("a", base, "b", own) == {0: 5, 1: 3, 2: 1, 3: 0, 4: 2, 5: 4}
    text = "abba cab"
    ids = base(text)["input_ids"]
    assert base.convert_ids_to_tokens(ids) == own.convert_ids_to_tokens(own(text)["input_ids"])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: byte_pairs([("b", "a"), ("a", "b")], [0, 1, 2, 3, 4, 5]), "model.merges"),
        (
            lambda: byte_pairs([("a", "b"), ("b", "a")], [1, 0, 2, 3, 4, 5], trims=False),
            "post_processor",
        ),
    ],
    ids=["merges", "post-processor"],
)
def test_what_else_differs_is_told_by_name(other: Callable[[], Any], words: str) -> None:
    base = byte_pairs([("a", "b"), ("b", "a")], [0, 1, 2, 3, 4, 5])
    with pytest.raises(ParentError, match="into other tokens") as caught:
        compare("a", base, "b", other())
    assert caught.value.got == f"{words} of a and b"


def test_a_number_of_another_token_around_a_text_is_a_difference() -> None:
    base, other = tiny_text.tokenizer(), tiny_text.tokenizer()
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 2)]
    )
    with pytest.raises(ParentError) as caught:
        compare("a", base, "b", other)
    assert caught.value.got == "post_processor of a and b"


def unigram(scores: dict[str, float], names: tuple[str, ...]) -> Any:
    made = Tokenizer(models.Unigram([(name, scores[name]) for name in names], 0, False))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=names[0])


def test_scores_follow_their_tokens() -> None:
    scores = {"?": 0.0, "x": -1.0, "y": -2.0, "xy": -2.5}
    base = unigram(scores, ("?", "x", "y", "xy"))
    assert compare("a", base, "b", unigram(scores, ("?", "xy", "x", "y"))) == {
        0: 0,
        1: 2,
        2: 3,
        3: 1,
    }
    with pytest.raises(ParentError) as caught:
        compare("a", base, "b", unigram({**scores, "y": -3.0}, ("?", "x", "y", "xy")))
    assert caught.value.got == "model.vocab of a and b"
    with pytest.raises(ParentError) as caught:
        compare("a", base, "b", unigram(scores, ("x", "?", "y", "xy")))
    assert "model.unk_id" in str(caught.value.got)


def test_tokens_of_one_tokenizer_only_are_listed() -> None:
    with pytest.raises(ParentError) as caught:
        compare("a", tiny_text.tokenizer(("yak",)), "b", tiny_text.tokenizer(("zebu",)))
    assert "2 are of one of them only, such as 'yak', 'zebu'" in str(caught.value.got)


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("truncation_side", "right", "left"),
        ("padding_side", "right", "left"),
        ("pad_token", "[PAD]", "[UNK]"),
        ("cls_token", "[CLS]", "[SEP]"),
        ("sep_token", "[SEP]", "[CLS]"),
        ("mask_token", "elm", "fox"),
        ("bos_token", "[CLS]", "[SEP]"),
        ("eos_token", "[SEP]", "[PAD]"),
    ],
)
def test_settings_that_differ_are_told(name: str, value: str, other: str) -> None:
    base, twin = tiny_text.tokenizer(), tiny_text.tokenizer()
    for made in (base, twin):
        setattr(made, name, value)
    assert compare("a", base, "b", twin) is None
    setattr(twin, name, other)
    with pytest.raises(ParentError, match="set up differently") as caught:
        compare("a", base, "b", twin)
    assert caught.value.got == f"{name}: a has {value!r}, b {other!r}"


def test_a_special_token_that_one_tokenizer_lacks_is_no_difference() -> None:
    base, other = tiny_text.tokenizer(), tiny_text.tokenizer()
    other.eos_token = "[SEP]"
    assert compare("a", base, "b", other) is None and compare("a", other, "b", base) is None


def test_the_first_tokenizer_serves_all_and_the_shortest_length_holds(tmp_path: Path) -> None:
    base = tiny_text.tokenizer()
    own = scrambled(base, kept=("[PAD]",))
    own.model_max_length = 11
    for name, made in (("a", base), ("b", own), ("c", base)):
        made.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in "abc"}
    found, orders = common_tokenizer(TextClassification(), folders)
    assert found.get_vocab() == base.get_vocab() and found.model_max_length == 11
    assert list(orders) == ["b"]
    assert orders["b"][0] == 0 and sorted(orders["b"]) == sorted(orders["b"].values())
