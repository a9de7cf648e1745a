"""Tokenizers that a run trains for models of its own, of the kind that their family has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ALPHABET = 1000  # most letters of a word-piece vocabulary
LEAST = 2  # how often a pair has to stand in the texts to become a token


@dataclass(frozen=True)
class Kind:
    """A family's kind of tokenizer.

    special: its tokens in order of their numbers, by what transformers calls them; a token may
    have several names. pieces: word pieces, lower-cased (Wu et al. 2016, arXiv 1609.08144), not
    byte pairs (Radford et al. 2019). types: whether segments are told apart.
    """

    special: tuple[tuple[str, tuple[str, ...]], ...]
    pieces: bool
    types: bool = False

    @property
    def names(self) -> dict[str, str]:
        """The special tokens by transformers' names."""
        return {f"{name}_token": token for token, names in self.special for name in names}


BERT = Kind(
    (
        ("[PAD]", ("pad",)), ("[UNK]", ("unk",)), ("[CLS]", ("cls",)), ("[SEP]", ("sep",)),
        ("[MASK]", ("mask",)),
    ),
    pieces=True,
    types=True,
)  # fmt: skip
ROBERTA = Kind(
    (
        ("<s>", ("bos", "cls")), ("<pad>", ("pad",)), ("</s>", ("eos", "sep")),
        ("<unk>", ("unk",)), ("<mask>", ("mask",)),
    ),
    pieces=False,
)  # fmt: skip
MPNET = Kind(
    (
        ("<s>", ("bos", "cls")), ("<pad>", ("pad",)), ("</s>", ("eos", "sep")),
        ("[UNK]", ("unk",)), ("<mask>", ("mask",)),
    ),
    pieces=True,
)  # fmt: skip
DECODER = Kind((("<|endoftext|>", ("bos", "eos")),), pieces=False)
KINDS = {
    "bert": BERT,
    "electra": BERT,
    "distilbert": Kind(BERT.special, pieces=True),
    "roberta": ROBERTA,
    "mpnet": MPNET,
}
"""Of encoders, by family; decoders are of one kind."""


def train_tokenizer(texts: Sequence[str], size: int, family: str, length: int) -> Any:
    """Return a fast tokenizer of at most `size` tokens for a family, the same for the same texts.

    length: the most tokens of a text. Fewer tokens come out where the texts have no more pairs.
    """
    from transformers import PreTrainedTokenizerFast

    kind = KINDS.get(family, DECODER)
    backend = (_pieces if kind.pieces else _byte_pairs)(texts, size, kind)
    names = ["input_ids", *(["token_type_ids"] if kind.types else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=length, model_input_names=names, **kind.names
    )


def _byte_pairs(texts: Iterable[str], size: int, kind: Kind) -> Any:
    """Return byte pairs: any text has tokens, none is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=LEAST,
        special_tokens=[token for token, _ in kind.special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return _framed(made, kind)


def _pieces(texts: Sequence[str], size: int, kind: Kind) -> Any:
    """Return word pieces.

    The library numbers the letters within words in a random order, which decides between pairs
    that stand there equally often. So all letters are given beforehand, in order.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    unknown = kind.names["unk_token"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts = Counter(letter for text in texts for letter in normalizer.normalize_str(text))
    known = [letter for letter in counts if not letter.isspace()]
    # at the start of words and within them letters take half of the vocabulary at most
    most = min(ALPHABET, size // 4)
    letters = sorted(sorted(known, key=lambda letter: (-counts[letter], letter))[:most])
    first = [*(token for token, _ in kind.special), *letters, *(f"##{x}" for x in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=LEAST,
        special_tokens=first,
        limit_alphabet=len(letters),
        initial_alphabet=letters,
        show_progress=False,
    )
    trained = Tokenizer(models.WordPiece(unk_token=unknown))
    trained.normalizer, trained.pre_tokenizer = normalizer, splitter
    trained.train_from_iterator(texts, trainer)
    # only to the trainer the letters were special
    made = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token=unknown))
    made.normalizer, made.pre_tokenizer = normalizer, splitter
    made.decoder = decoders.WordPiece(prefix="##")
    made.add_special_tokens([token for token, _ in kind.special])
    return _framed(made, kind)


def _framed(made: Any, kind: Kind) -> Any:
    """Put the special tokens around texts, where the kind has any."""
    from tokenizers import processors

    names = kind.names
    if "cls_token" in names:
        sep, cls = ((names[k], made.token_to_id(names[k])) for k in ("sep_token", "cls_token"))
        if "bos_token" in names:
            made.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=False)
        else:
            made.post_processor = processors.BertProcessing(sep, cls)
    return made
