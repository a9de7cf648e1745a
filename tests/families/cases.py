"""Every family with a tiny config of odd, distinct sizes, and what its models are called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from tiny import duplicate, permute
from torch import Tensor, nn

from slimfuse.batch import Batch, call
from slimfuse.families import (
    Bert,
    DeiT,
    Dinov2,
    DistilBert,
    Electra,
    MPNet,
    Roberta,
    Shape,
    ViT,
    family_of,
)
from slimfuse.spaces import NestedMap, Role, transform

LABELS = ("a", "b", "c", "d", "e", "f", "g")
VOCABULARY, TOKENS = 13, 6
TEXT: Mapping[str, Any] = MappingProxyType(
    {"vocab_size": VOCABULARY, "positions": TOKENS, "labels": LABELS}
)
IMAGE: Mapping[str, Any] = MappingProxyType({"patch_size": 2, "image_size": 6, "labels": LABELS})
IMAGES = "AutoModelForImageClassification"
TEXTS = "AutoModelForSequenceClassification"
BODIES = "AutoModel"
WORDS = "AutoModelForMaskedLM"


@dataclass(frozen=True)
class Case:
    """A family, the inputs of its configs and what is legal for its targets.

    keeps: the sizes that a target has to take over; ratio: of the MLP's width to the stream's
    where the class knows no other; refits: whether it has a layout; loads: whether parents may be
    of this kind.
    """

    name: str
    family: Any
    auto: str
    inputs: Mapping[str, Any]
    keeps: tuple[str, ...] = ()
    ratio: int = 0
    refits: bool = True
    loads: bool = True

    def sized(self, width: int, heads: int, mlp: int, depth: int = 2) -> Shape:
        """Return a shape, its MLP's width legal."""
        return Shape(width, heads, self.ratio * width or mlp, depth)

    @property
    def images(self) -> bool:
        return "patch_size" in self.inputs

    @property
    def wide(self) -> Shape:
        return self.sized(15, 3, 17)

    @property
    def narrow(self) -> Shape:
        return self.sized(9, 3, 11) if "num_attention_heads" in self.keeps else self.sized(8, 2, 11)

    def config(self, shape: Shape | None = None, **inputs: Any) -> Any:
        """Return a new config, by default as wide as all parents here."""
        return self.family.new_config(shape or self.wide, **{**self.inputs, **inputs})

    def model(self, shape: Shape | None = None, seed: int = 0, **inputs: Any) -> Any:
        """Return a float64 model with random values everywhere, norms and biases too."""
        return shaken(self.family.build(self.config(shape, **inputs)).double(), seed)

    def parent(self, seed: int = 0) -> Any:
        """Return a model as the family's `load` gives it."""
        model = self.model(seed=seed)
        if hasattr(self.family, "fold"):
            self.family.fold(model)
        return model

    def batch(self, n: int = 3, tokens: int = TOKENS) -> Batch:
        """Return inputs of n samples; the texts' last token only pads in every second one."""
        generator = torch.Generator().manual_seed(1)
        if self.images:
            shape = (n, 3, 6, 6)
            return Batch({"pixel_values": torch.randn(shape, generator=generator).double()})
        ids = torch.randint(2, VOCABULARY, (n, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, -1] = 0
        return Batch({"input_ids": ids, "attention_mask": mask})


CASES = (
    Case("vit", ViT(), IMAGES, IMAGE),
    Case("deit", DeiT(), IMAGES, IMAGE),
    Case("dinov2", Dinov2(), IMAGES, IMAGE, ratio=3),
    Case("bert", Bert(), TEXTS, TEXT),
    Case("roberta", Roberta(), TEXTS, TEXT),
    Case("distilbert", DistilBert(), TEXTS, TEXT),
    Case("electra", Electra(), TEXTS, TEXT),
    Case("electra-19", Electra(), TEXTS, {**TEXT, "embedding_size": 19}),
    Case("mpnet", MPNet(), TEXTS, TEXT, ("num_attention_heads", "num_hidden_layers")),
)


def variant(case: Case, task: str) -> Case:
    """Return a case's family with the stock class of another task."""
    name, auto = ("words", WORDS) if task == "masked-lm" else ("body", BODIES)
    inputs = {k: v for k, v in case.inputs.items() if k != "labels"}
    family = family_of(case.family.name, task)
    return replace(case, name=f"{case.name}-{name}", family=family, auto=auto, inputs=inputs)


HEADLESS = tuple(variant(case, "feature-extraction") for case in CASES)
MASKED = tuple(variant(case, "masked-lm") for case in CASES if not case.images)
EVERY = (*CASES, *HEADLESS, *MASKED)


def those(keep: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Return the mark that runs a test for some of the cases."""
    found = [case for case in EVERY if keep(case)]
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


every = those(lambda case: True)
every_refit = those(lambda case: case.refits)
every_text = those(lambda case: case.auto == TEXTS)
any_heads = those(lambda case: "num_attention_heads" not in case.keeps)
any_depth = those(lambda case: "num_hidden_layers" not in case.keeps)


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter random values; gains of norms and scales lie about 1."""
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            fan = 1 if "embeddings." in name or p.ndim < 2 else p[0].numel()
            about_one = name in norms or name.endswith("lambda1")
            p.copy_(1 + 0.2 * noise if about_one else noise / fan**0.5)
    return model


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return a model's logits; without a head all tokens' cosines, which no basis changes."""
    with torch.no_grad():
        out = call(model, batch)
    if "logits" not in out:
        unit = nn.functional.normalize(out.last_hidden_state.flatten(0, 1), dim=1)
        return unit @ unit.T
    found: Tensor = out.logits
    return found


def moved(case: Case, model: Any, spaces: tuple[str, ...], make: Any, config: Any = None) -> Any:
    """Return the model with a map in every space of these names, numbers left out.

    make: (units, seed) -> map; inside heads every head has its own.
    """
    family, config = case.family, config or model.config
    atlas, heads = family.atlas(model.config), model.config.num_attention_heads
    maps: dict[str, Any] = {}
    for seed, name in enumerate(n for n in atlas.free if n.split(".")[0] in spaces):
        space = atlas.spaces[name]
        each = [make(space.size, 100 * seed + h) for h in range(heads)]
        maps[name] = NestedMap(each) if space.kind in ("qk", "vo") else each[0]
    state = transform(model.state_dict(), atlas, maps)
    for name, axes in atlas.axes.items():
        if any(leg.space.startswith("qk.") and leg.role is Role.WRITE for a in axes for leg in a):
            state[name] *= family.query_scale(model.config, config)
    out = family.build(config).double()
    assert state.keys() == dict(out.named_parameters()).keys()  # a tied table counts once
    out.load_state_dict(state, strict=False)
    return out


def permuted(case: Case, model: Any, spaces: tuple[str, ...]) -> Any:
    """Return the model with permuted units."""
    return moved(case, model, spaces, permute)


def widened(case: Case, model: Any, spaces: tuple[str, ...], shape: Shape, **inputs: Any) -> Any:
    """Return the model with two copies of every unit of some spaces."""
    config = case.config(shape, **inputs)
    return moved(case, model, spaces, lambda n, _seed: duplicate(n), config)


def deeper(shape: Shape, depth: int) -> Shape:
    """Return a shape of another depth."""
    return replace(shape, num_hidden_layers=depth)
