"""Language models' samples: which tokens are asked for, what counts, the same each time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import MASK, Batch
from slimfuse.finetune.distill import distillation_loss, labels_loss
from slimfuse.tasks import CausalLanguageModelling, MaskedLanguageModelling, ask
from slimfuse.tasks.language import EXCERPT_TOKENS, IGNORED
from slimfuse.tasks.texts import IDS

VOCAB, MASKED, SPECIAL, PAD = 50, 3, (0, 1, 2, 3), 0


class Tokenizer:
    all_special_ids = SPECIAL
    mask_token_id = MASKED

    def __len__(self) -> int:
        return VOCAB


class Texts:
    """Samples of token ids, the last of each row padding."""

    tokenizer: Any = Tokenizer()

    def __init__(self, count: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(4, VOCAB, (count, tokens), generator=generator)
        self.ids[:, 0], self.ids[:, -1] = 1, PAD
        self.labels = torch.zeros(count, dtype=torch.long)
        self.order = torch.arange(count).flip(0)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, indices: Tensor) -> Batch:
        ids = self.ids[indices]
        return Batch({IDS: ids, MASK: (ids != PAD).long()})


def test_a_causal_model_is_asked_for_the_next_real_token() -> None:
    texts = Texts(5, 9)
    inputs, labels = CausalLanguageModelling().examples(texts, torch.tensor([4, 1]))
    assert torch.equal(inputs.arguments[IDS], texts.ids[[4, 1]])
    assert torch.equal(labels[:, :-2], texts.ids[[4, 1], 1:-1])
    assert bool((labels[:, -2:] == IGNORED).all())  # padding is no token to guess


def test_measuring_masks_the_same_tokens_whatever_the_batch() -> None:
    texts, task = Texts(64, 40), MaskedLanguageModelling()
    whole, labels = task.examples(texts, torch.arange(64))
    for i in (0, 7, 63):
        one, own = task.examples(texts, torch.tensor([i]))
        assert torch.equal(one.arguments[IDS][0], whole.arguments[IDS][i])
        assert torch.equal(own[0], labels[i])


def test_a_seventh_of_the_tokens_is_asked_for_and_most_of_those_are_hidden() -> None:
    texts, task = Texts(400, 40), MaskedLanguageModelling()
    inputs, labels = task.examples(texts, torch.arange(400))
    ids, asked = inputs.arguments[IDS], labels != IGNORED
    usual = ~torch.isin(texts.ids, torch.tensor(SPECIAL))
    assert not bool((asked & ~usual).any())
    assert torch.equal(ids[~asked], texts.ids[~asked])  # nothing else is changed
    assert torch.equal(labels[asked], texts.ids[asked])
    count = int(asked.sum())
    # 15 200 tokens: ±3 standard deviations of the binomials
    assert abs(count / int(usual.sum()) - 0.15) < 0.01
    hidden = float((ids[asked] == MASKED).float().mean())
    kept = float((ids[asked] == texts.ids[asked]).float().mean())
    assert abs(hidden - 0.8) < 0.03 and abs(kept - 0.1 - 0.1 / VOCAB) < 0.025


def test_training_masks_anew_by_the_global_generator() -> None:
    texts, task = Texts(8, 40), MaskedLanguageModelling()
    torch.manual_seed(0)
    first, second = (task.examples(texts, torch.arange(8), ())[1] for _ in range(2))
    torch.manual_seed(0)
    again = task.examples(texts, torch.arange(8), ())[1]
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_evidence_is_that_of_the_whole_and_in_order() -> None:
    texts, task = Texts(11, 9), CausalLanguageModelling()
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))

    def answer(inputs: Batch) -> Tensor:
        return table[inputs.arguments[IDS]]

    found = ask(answer, task, texts, what="x", batch_size=4)
    inputs, labels = task.examples(texts, torch.arange(11))
    logs, counted = answer(inputs).double().log_softmax(2), labels != IGNORED
    told = -logs.gather(2, labels.clamp_min(0)[:, :, None])[:, :, 0] * counted
    torch.testing.assert_close(found["nll"], told.sum(1), rtol=1e-6, atol=0)
    assert torch.equal(found["tokens"], torch.full((11,), 7.0, dtype=torch.float64))
    hits = (logs.argmax(2) == labels).sum(1)
    assert torch.equal(found["hits"], hits.double())
    figures = task.figures(found)
    assert list(figures) == [m.key for m in task.metrics]
    want = float((told.sum() / counted.sum()).exp())
    assert abs(figures["perplexity"].value - want) < 1e-4 * want


def test_an_excerpt_is_short() -> None:
    texts = Texts(3, 40)
    short = CausalLanguageModelling().excerpt(texts[torch.arange(3)])
    assert short.arguments[IDS].shape == short.arguments[MASK].shape == (3, EXCERPT_TOKENS)


def test_rows_are_the_tokens_that_count() -> None:
    output, labels = (
        torch.randn(2, 3, VOCAB),
        torch.tensor([[5, IGNORED, 7], [IGNORED, 9, IGNORED]]),
    )
    rows, wanted = CausalLanguageModelling().rows(output, SimpleNamespace(), labels)  # type: ignore[arg-type]
    assert torch.equal(wanted, torch.tensor([5, 7, 9]))
    assert torch.equal(rows, torch.stack([output[0, 0], output[0, 2], output[1, 1]]))


def test_a_batch_without_a_masked_token_teaches_nothing() -> None:
    task, net = MaskedLanguageModelling(), nn.Linear(3, VOCAB)
    labels = torch.full((2, 4), IGNORED)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.net(x))

    def fetch(indices: Tensor) -> tuple[Batch, Tensor]:
        return Batch({"x": torch.ones(2, 4, 3)}), labels

    def teach(*_: object) -> Tensor:
        return torch.zeros(0, VOCAB)

    for loss in (
        labels_loss(task, fetch),
        distillation_loss(task, fetch, teach, temperature=1.0, hardness=0.5),
    ):
        net.zero_grad()
        value = loss(Model(), torch.arange(2))
        value.backward()
        assert float(value.detach()) == 0 and net.weight.grad is not None
        assert float(net.weight.grad.abs().sum()) == 0
