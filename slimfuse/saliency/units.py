"""One interface for structured saliency: a scorer gives one vector a space, `masses` its masses.

A unit is scored where a mask would multiply it: what an attention's output projection reads (heads
and their units), what the MLP's second layer reads, queries, what the head reads of a pooler, and
the stream's channels wherever the stream is read (pre-norm) or leaves a norm (post-norm). Masking
what every reader sees of a sum is masking everything that writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs
from slimfuse.errors import UserError
from slimfuse.families import Layout
from slimfuse.saliency.fisher import Reduce
from slimfuse.spaces import Atlas
from slimfuse.transport import masses as masses_of

Example = Inputs | tuple[Inputs, Tensor]
"""A batch, with its labels (samples, …) where there are any."""
Examples = Callable[[], Iterable[Example]]
"""Gives the same batches each time it is called."""
Loss = Callable[[Any, Inputs, Tensor | None], Tensor]
"""Losses (samples,) of what a model returned for a batch, and its labels if any; see `losses`."""
Scores = dict[str, Tensor]
"""Float64 vectors, at least 0, by the atlas' names: of spaces (n,), and of flattened axes by their
spaces' joined names ("head.0 vo.0"), as in `spaces.transform`."""


@runtime_checkable
class Drawing(Protocol):
    """A loss with random numbers of its own."""

    def restart(self) -> None:
        """Begin its random numbers from their seed."""


Reads = Literal["weights", "activations", "gradients", "nothing"]
Name = Literal[
    "magnitude", "l1", "energy", "taylor", "diagonal-fisher", "mask-fisher", "ziplm", "random"
]
PER_PASS = 4_096  # tokens of one backward pass, which keeps every activation …
PER_HEAD = 256  # … and of a head that answers for every token, logits


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, its legs and places, what it is asked and how answers count.

    reduce: sums a tensor over processes whose examples differ; for scorers that are sums.
    """

    model: nn.Module
    atlas: Atlas
    layout: Layout
    examples: Examples = tuple
    loss: Loss | None = None
    seed: int = 0
    reduce: Reduce | None = None

    def batches(self) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Yield the batches with their labels, None where there are none."""
        for example in self.examples():
            yield example if isinstance(example, tuple) else (example, None)

    def passes(self) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Yield parts of the batches that are small enough for a backward pass.

        A loss that draws starts anew: every scorer sees the same draws.
        """
        if isinstance(self.loss, Drawing):
            self.loss.restart()
        most = PER_HEAD if self.layout.head and self.layout.readout == "all" else PER_PASS
        for inputs, labels in self.batches():
            size = max(1, most // _tokens(inputs))
            for start in range(0, len(inputs), size):
                part = slice(start, start + size)
                yield inputs[part], None if labels is None else labels[part]


Scorer = Callable[[Subject], Scores]
"""Says how much would be lost if a unit went, for every unit of every space that it can see."""


@dataclass(frozen=True)
class Known:
    """A scorer by its name: what it reads, and where it comes from.

    sums: whether what it reads is summed over processes.
    """

    name: Name
    reads: Reads
    source: str
    scorer: Scorer
    sums: bool = False


SCORERS: dict[str, Known] = {}


def scorer(
    name: Name, *, reads: Reads, source: str, sums: bool = False
) -> Callable[[Scorer], Scorer]:
    """Register a scorer under a name."""
    assert name in get_args(Name), name

    def register(function: Scorer) -> Scorer:
        SCORERS[name] = Known(name, reads, source, function, sums)
        return function

    return register


def score(name: str, subject: Subject) -> Scores:
    """Return the scores of a scorer by name, float64 on the CPU.

    Raises UserError for a name that there isn't, and for a scorer of gradients without a loss.
    """
    known = SCORERS.get(name)
    if known is None:
        raise UserError(
            "there is no such saliency", where="saliency", got=name, allowed=", ".join(SCORERS)
        )
    if known.reads == "gradients" and subject.loss is None:
        raise UserError(f"saliency {name} needs a loss", where="saliency", allowed="see losses")
    able = [k.name for k in SCORERS.values() if k.sums or k.reads in ("weights", "nothing")]
    if subject.reduce is not None and name not in able:
        raise UserError(
            "this saliency isn't summed over processes",
            where="saliency",
            got=name,
            allowed=", ".join(able),
        )
    found = known.scorer(subject)
    for space, values in found.items():
        if not bool(values.isfinite().all()):
            raise UserError(
                f"saliency {name} isn't finite in {space}",
                hint="check the model's activations and the loss for nan",
            )
    return {space: values.double().cpu() for space, values in found.items()}


def gathered(found: Iterable[tuple[str, Tensor]]) -> Scores:
    """Return values by name; those of one name are added, as for a space that blocks share."""
    scores: Scores = {}
    for name, values in found:
        scores[name] = scores[name] + values if name in scores else values
    return scores


def masses(scores: Tensor) -> Tensor:
    """Return the masses (n,) of units for a plan: √saliency, floored at 1e-3 of their mean, sum 1.

    The root, because saliencies are squares: exact copies of a unit then have its mass together.
    Source: saliency.md.
    """
    return masses_of(scores, power=0.5)


@dataclass(frozen=True)
class Site:
    """Where the units of an axis can be seen: the inputs or outputs of modules.

    spaces: the legs of the axis, outermost first; sizes: theirs; reports: those of them whose
    scores are taken from here.
    """

    spaces: tuple[str, ...]
    sizes: tuple[int, ...]
    paths: tuple[str, ...]
    side: Literal["input", "output"]
    reports: tuple[str, ...]

    @property
    def name(self) -> str:
        """The spaces' joined names."""
        return " ".join(self.spaces)

    @property
    def units(self) -> int:
        """How many units the flattened axis has."""
        return prod(self.sizes)

    def split(self, found: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield values (n, units) by name: of the axis, and summed to those of each space."""
        yield self.name, found
        if len(self.spaces) == 1:
            return
        whole = found.unflatten(1, self.sizes)
        for dim, space in enumerate(self.spaces, start=1):
            if space in self.reports:
                yield space, whole.sum([d for d in range(1, whole.ndim) if d != dim])


def sites(atlas: Atlas, layout: Layout) -> list[Site]:
    """Return where all scored units of a model can be seen, the stream first."""
    stream = layout.stream_space
    found = [_site(atlas, (stream,), *_stream(layout))]
    for block in layout.blocks:
        for part, parameter, dim, side in (
            (block.q, f"{block.q}.weight", 0, "output"),
            (block.o, f"{block.o}.weight", 1, "input"),
            (block.down, f"{block.down}.weight", 1, "input"),
        ):
            spaces = tuple(leg.space for leg in atlas.axes[parameter][dim])
            if all(atlas.spaces[s].kind != "fixed" for s in spaces):
                found.append(_site(atlas, spaces, (part,), side, query=part == block.q))
    if layout.pooler is not None and layout.head and layout.pooler.space != stream:
        found.append(_site(atlas, (layout.pooler.space,), (layout.head,), "input"))
    return found


def _site(
    atlas: Atlas, spaces: tuple[str, ...], paths: tuple[str, ...], side: Any, query: bool = False
) -> Site:
    reports = tuple(s for s in spaces if not query or atlas.spaces[s].kind == "qk")
    return Site(spaces, tuple(atlas.spaces[s].size for s in spaces), paths, side, reports)


def _stream(layout: Layout) -> tuple[tuple[str, ...], str]:
    """Return the modules between the stream and its readers, and on which side of them it is."""
    norms = [n for b in layout.blocks for n in (b.attention_norm, b.mlp_norm)]
    if layout.norm_order == "post":
        first = layout.embed_norm or layout.projection
        return (first, *norms), "output"
    return (*norms, layout.final_norm), "input"


Touch = Callable[[Site, str, Tensor], Tensor | None]
"""Looks at the units (samples, …, units) that a module, given by its path, reads or writes."""


class Hooked:
    """A model whose units are shown to a function, which may put others in their place."""

    def __init__(self, model: nn.Module, where: Iterable[Site], touch: Touch) -> None:
        self.model, self.where, self.touch = model, tuple(where), touch

    def __enter__(self) -> nn.Module:
        """Begin."""
        self.handles = []
        for site in self.where:
            for path in site.paths:
                module = self.model.get_submodule(path)
                if site.side == "input":
                    hook = module.register_forward_pre_hook(self._before(site, path))
                else:
                    hook = module.register_forward_hook(self._after(site, path))
                self.handles.append(hook)
        return self.model

    def __exit__(self, *_: object) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()

    def _before(self, site: Site, path: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            other = self.touch(site, path, inputs[0])
            return None if other is None else (other, *inputs[1:])

        return hook

    def _after(self, site: Site, path: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            return self.touch(site, path, output)

        return hook


def _tokens(inputs: Inputs) -> int:
    """Return about how many tokens a sample has: of images, one a patch of 16 x 16 pixels."""
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.arguments.values()))
    if first.ndim == 4:
        return max(1, first.shape[-1] * first.shape[-2] // 256) + 1
    return int(first.shape[1]) if first.ndim > 1 else 1


@scorer("random", reads="nothing", source="the control that every comparison needs")
def random(subject: Subject) -> Scores:
    """Return uniform random numbers in (0, 1], drawn from the subject's seed."""
    generator = torch.Generator().manual_seed(subject.seed)

    def draw(units: int) -> Tensor:
        return 1 - torch.rand(1, units, generator=generator, dtype=torch.float64)

    where = sites(subject.atlas, subject.layout)
    return gathered((n, v[0]) for site in where for n, v in site.split(draw(site.units)))
