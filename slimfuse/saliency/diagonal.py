"""Diagonal Fisher: every weight's mean squared gradient over single samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from slimfuse.batch import Inputs, call
from slimfuse.errors import UserError
from slimfuse.families import Layout
from slimfuse.saliency.gradients import gradients
from slimfuse.saliency.magnitude import powers
from slimfuse.saliency.units import Scores, Site, Subject, gathered, scorer, sites
from slimfuse.spaces import Atlas, Role


def sample_gradients(subject: Subject, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield ∂L_n/∂w of the named parameters, one sample after the other."""
    assert subject.loss is not None
    own = subject.loss

    def loss(model: nn.Module, one: tuple[Inputs, Tensor | None]) -> Tensor:
        return own(call(model, one[0]), *one).sum()

    singles = (
        (inputs[n : n + 1], None if labels is None else labels[n : n + 1])
        for inputs, labels in subject.passes()
        for n in range(len(inputs))
    )
    for found in gradients(subject.model, loss, singles, names):
        yield {name: g[0] for name, g in found.items()}


def diagonal(subject: Subject, names: Sequence[str]) -> dict[str, Tensor]:
    """Return E_n (∂L_n/∂w)² of the named parameters, float64, in their shapes."""
    total: dict[str, Tensor] = {}
    count = 0
    for one in sample_gradients(subject, names):
        for name, g in one.items():
            square = g.double().square()
            total[name] = square if name not in total else total[name].add_(square)
        count += 1
    if not count:
        raise UserError("there is no sample to take gradients of", where="saliency")
    return {name: (found / count).cpu() for name, found in total.items()}


def traces(subject: Subject, scales: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the mean E_n (∂L_n/∂w)² of every tensor's weights, their mean over tensors 1.

    scales: of the squared gradients by tensor, where models are compared that have other units.

    What a tensor counts in a Fisher-weighted average by tensors (Matena & Raffel 2022, arXiv
    2111.09832, weights by tensor instead of by entry). The common factor is left out: models
    differ in how sure they are, and a parent's own weight says how much it counts.
    """
    names = list(subject.atlas.axes)
    scale = scales or {}
    means = {
        name: scale.get(name, 1.0) * float(found.mean())
        for name, found in diagonal(subject, names).items()
    }
    whole = sum(means.values()) / len(means)
    return {name: mean / whole if whole > 0 else 1.0 for name, mean in means.items()}


@scorer("diagonal-fisher", reads="gradients", source="LeCun et al. 1989; Theis et al. 2018")
def diagonal_fisher(subject: Subject) -> Scores:
    """Return Σ w² E_n (∂L_n/∂w)² over the weights that a unit's mask scales.

    The mask Fisher without the products between different weights of a unit.
    """
    state = dict(subject.model.named_parameters())
    masked = scaled(subject.atlas, subject.layout)
    names = list(dict.fromkeys(n for _, parameters, _ in masked for n in parameters))
    fisher = diagonal(subject, names)
    weighted = {n: state[n].detach().double().cpu().square() * fisher[n] for n in names}

    def found(site: Site, parameters: Sequence[str], role: Role) -> Tensor:
        part = Atlas({n: subject.atlas.axes[n] for n in parameters}, subject.atlas.spaces)
        return powers(weighted, part, site.spaces, role, 1)[None]

    return gathered((name, v[0]) for mask in masked for name, v in mask[0].split(found(*mask)))


def scaled(atlas: Atlas, layout: Layout) -> list[tuple[Site, tuple[str, ...], Role]]:
    """Return every site with the parameters that its mask scales, and how they have its units.

    Of units their readers' weights; of queries what makes them; of a pre-norm stream all that
    writes it (behind a branch's own norm that norm's gain), of a post-norm one what its last norm
    makes.
    """
    found = []
    for site in sites(atlas, layout):
        if site.side == "input" and site.spaces[0] != layout.stream_space:
            found.append((site, tuple(f"{path}.weight" for path in site.paths), Role.READ))
            continue
        paths: list[str] = list(site.paths)
        tables: tuple[str, ...] = ()
        if site.side == "input":
            tables = layout.embed_parameters
            paths = [b.post(p) or getattr(b, p) for b in layout.blocks for p in ("o", "down")]
        names = [f"{path}.{part}" for path in paths for part in ("weight", "bias")]
        found.append((site, (*tables, *(n for n in names if n in atlas.axes)), Role.WRITE))
    return found
