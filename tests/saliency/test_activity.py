"""Second moments of units: which rows count."""

from __future__ import annotations

from dataclasses import replace

import torch
from families.cases import EVERY

from slimfuse.batch import Batch
from slimfuse.saliency import Subject, score
from slimfuse.saliency.activity import observed
from slimfuse.saliency.losses import own_answers
from slimfuse.saliency.units import PER_HEAD, sites


def test_a_pooler_as_wide_as_texts_are_long_is_not_masked_by_tokens() -> None:
    """Its units (samples, width) have the shape of a mask (samples, tokens) then."""
    case = next(c for c in EVERY if c.name.startswith("bert"))
    model = replace(case, inputs={**case.inputs, "positions": 32}).parent()
    family = case.family
    atlas, layout = family.atlas(model.config), family.layout(model.config)
    assert layout.pooler is not None
    width = atlas.spaces[layout.pooler.space].size
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (9, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(9):
        mask[row, 3 + row % 4 :] = 0
    batch = Batch({"input_ids": ids, "attention_mask": mask})
    subject = Subject(model, atlas, layout, lambda: [batch], own_answers())
    site = next(s for s in sites(atlas, layout) if s.name == layout.pooler.space)
    found = observed(subject, [site])[site.name].second("x")
    with torch.no_grad():
        hidden = []
        handle = model.get_submodule(layout.head).register_forward_pre_hook(
            lambda _m, given: hidden.append(given[0].double())
        )
        model(**batch.arguments)
        handle.remove()
    rows = torch.cat(hidden)
    torch.testing.assert_close(found, rows.T @ rows / len(rows), rtol=1e-9, atol=1e-12)
    assert score("energy", subject)[site.name].min() >= 0


def test_heads_over_a_vocabulary_see_few_tokens_at_once() -> None:
    from saliency.asked import every_subject

    subject = every_subject()["llama"]
    (batch,) = subject.examples()
    assert isinstance(batch, Batch)
    many = batch[torch.arange(len(batch)).repeat(60)]
    asked = Subject(subject.model, subject.atlas, subject.layout, lambda: [many], subject.loss)
    parts = [inputs for inputs, _ in asked.passes()]
    tokens = many.arguments["input_ids"].shape[1]
    assert len(parts) > 1 and sum(map(len, parts)) == len(many)
    assert max(map(len, parts)) * tokens <= PER_HEAD
