"""What units do and what is done with them: second moments of activations and reading weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimfuse.batch import call, token_mask
from slimfuse.moments import Moments
from slimfuse.saliency.units import Hooked, Scores, Site, Subject, gathered, scorer, sites
from slimfuse.spaces import Atlas, Role


@dataclass(frozen=True)
class Seen:
    """Units of one axis: E[x xᵀ] (n, n) over real tokens, and what reads them (p, n).

    about the mean where the readers have a bias, which takes that up.
    """

    site: Site
    second: Tensor
    out: Tensor

    def groups(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield index tensors into n by name: single units, and those of each space's units."""
        places = torch.arange(self.site.units)
        yield self.site.name, list(places[:, None])
        if len(self.site.spaces) == 1:
            return
        whole = places.view(self.site.sizes)
        for dim, space in enumerate(self.site.spaces):
            if space in self.site.reports:
                yield space, list(whole.movedim(dim, 0).flatten(1))


def second_moments(subject: Subject) -> Iterator[Seen]:
    """Yield the statistics of every axis that something linear reads, the stream first.

    The stream's are of what its readers read, behind the norms, the mean over all depths, with
    all readers' weights as the rows of one matrix. Queries aren't read linearly.
    """
    atlas, layout = subject.atlas, subject.layout
    stream, *units = sites(atlas, layout)
    where = [stream, *(s for s in units if s.side == "input")]
    seen = observed(subject, where)
    state = {n: p.detach().double().cpu() for n, p in subject.model.named_parameters()}
    for site in where:
        if site is stream:
            readers = [n for n in atlas.users(layout.stream_space, Role.READ) if n in state]
            readers = [n for n in readers if state[n].ndim > 1]
        else:
            readers = [f"{site.paths[0]}.weight"]
        biased = any(f"{n.removesuffix('.weight')}.bias" in state for n in readers)
        moments = seen[site.name]
        second = moments.cov("x") if biased else moments.second("x")
        yield Seen(site, second, reading(state, atlas, readers, site.spaces))


def observed(subject: Subject, where: Sequence[Site]) -> dict[str, Moments]:
    """Return moments (site x) of the units at some sites by name, over all real tokens.

    Of the stream what its readers read: behind the norms, and so of one scale at every depth.
    """
    stream = subject.layout.stream_space
    seen = {site.name: Moments(x=site.units) for site in where}
    behind = [replace(s, side="output") if s.spaces == (stream,) else s for s in where]
    with torch.no_grad():
        for inputs, _ in subject.batches():
            mask = token_mask(inputs)

            def touch(site: Site, _path: str, x: Tensor, mask: Tensor | None = mask) -> None:
                of_tokens = mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape
                real = x[mask] if of_tokens else x  # a pooler's units are one row a sample
                seen[site.name].update(x=real.reshape(-1, site.units))

            with Hooked(subject.model, behind, touch):
                call(subject.model, inputs)
    return seen


def reading(
    state: Mapping[str, Tensor], atlas: Atlas, names: Sequence[str], spaces: Sequence[str]
) -> Tensor:
    """Return all weights (p, n) of some parameters that read the units of one flattened axis."""
    rows = []
    for name in names:
        for dim, axis in enumerate(atlas.axes[name]):
            legs = [leg.space for leg in axis]
            if not all(any(g.space == s and g.role is Role.READ for g in axis) for s in spaces):
                continue
            whole = state[name].unflatten(dim, [atlas.spaces[s].size for s in legs])
            places = [dim + legs.index(s) for s in spaces]
            last = list(range(whole.ndim - len(places), whole.ndim))
            rows.append(whole.movedim(places, last).flatten(-len(places)).flatten(0, -2))
    return torch.cat(rows)


@scorer("energy", reads="activations", source="Molchanov et al. 2019, arXiv 1906.10771")
def energy(subject: Subject) -> Scores:
    """Return tr(W_:R C_RR W_:Rᵀ), what a unit gives to its readers, as a share of what all give."""

    def shares(seen: Seen) -> Iterator[tuple[str, Tensor]]:
        cells = (seen.out.T @ seen.out) * seen.second
        total = float(cells.sum().clamp_min(1e-300))
        for name, groups in seen.groups():
            parts = [cells[g][:, g].sum() for g in groups]
            yield name, torch.stack(parts).clamp_min(0) / total

    return gathered(pair for seen in second_moments(subject) for pair in shares(seen))
