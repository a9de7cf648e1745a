"""Unstructured, N:M and block pruning of a model by second-order saliency, in one or more steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from slimfuse.errors import UserError
from slimfuse.progress import track
from slimfuse.saliency import obs
from slimfuse.saliency.fisher import Part, Reduce, Sums, accumulate, agreed, mean_square, sweep
from slimfuse.saliency.gradients import Batches, BatchLoss, count_rows, gradients
from slimfuse.saliency.inverse import Route, choose, cut_rows
from slimfuse.saliency.masks import Masks
from slimfuse.saliency.patterns import UNSTRUCTURED, Layer, lowest, prunable
from slimfuse.saliency.sparsify_plan import joined, units
from slimfuse.saliency.sparsify_spec import Spec, cubic
from slimfuse.saliency.sparsify_state import (
    LayerRecord,
    State,
    StepRecord,
    check_alike,
    content,
    fingerprint,
    noise_of,
    restore,
)
from slimfuse.saliency.step_length import step_length
from slimfuse.saliency.weight_scores import WEIGHT_SCORERS, Blocks

T = TypeVar("T")
R = TypeVar("R")
Between = Callable[[nn.Module, Masks, int], None]
"""Trains a model after a step of the schedule (1, 2, …) that isn't the last; masks must hold."""

CHECKPOINT_SECONDS = 15.0


@dataclass(frozen=True)
class Sparsified:
    """Masks, and what happened to every layer and in every step."""

    masks: Masks
    layers: tuple[LayerRecord, ...]
    steps: tuple[StepRecord, ...]


def sparsify(
    model: nn.Module,
    loss: BatchLoss[T],
    batches: Batches[T],
    spec: Spec,
    *,
    layers: Sequence[Layer] | None = None,
    masks: Masks | None = None,
    per_sample: bool = False,
    between: Between | None = None,
    checkpoint: Path | None = None,
    reduce: Reduce | None = None,
    main: bool = True,
) -> Sparsified:
    """Prune `model` in place and return its masks with a record of every layer.

    In each step the scores of all layers, the threshold, and the updates come from the Fisher at
    the step's beginning; a weight that went never returns, and is no part of later Fishers.
    loss, batches: see `fisher.gradients`; one gradient a batch, or one a sample (`per_sample`).
    layers: what is pruned, `prunable(model)` by default. masks: of weights that went before.
    between: called after every step but the last, to train. checkpoint: a safetensors file, written
    as layers are done; if it exists the work goes on from it and ends with the same bytes; the
    last one is left for the caller to remove. reduce: sums a tensor over processes that see
    different batches; main: whether this one writes the checkpoint, which all of them read; see
    `parallel`. Raises UserError, and ShapeError for layers that don't fit the pattern.
    """
    run = _Run(model, loss, batches, spec, layers, per_sample, reduce, checkpoint, main)
    state = run.begin(masks)
    while state.step < spec.steps:
        run.step(cubic(state.step + 1, spec.steps, spec.initial, spec.final))
        if between is not None and state.step + 1 < spec.steps:
            between(model, run.masks(), state.step + 1)
            run.masks().check(model)
        state.step += 1
        run.save(now=True)
    return Sparsified(run.masks(), tuple(state.layers), tuple(state.records))


def weight_scores(
    model: nn.Module,
    loss: BatchLoss[T],
    batches: Batches[T],
    spec: Spec,
    *,
    layers: Sequence[Layer] | None = None,
    per_sample: bool = False,
    reduce: Reduce | None = None,
) -> dict[str, Tensor]:
    """Return the score of every single weight by its parameter's name, float64, in its shape.

    The weights don't change; `spec.pattern` isn't looked at. See `sparsify`.
    """
    single = replace(spec, pattern=UNSTRUCTURED, sparsity=spec.final)
    run = _Run(model, loss, batches, single, layers, per_sample, reduce, None)
    run.begin(None)
    run.measure_step()
    for passes in run.units():
        run.score(passes)
    return {la.name: joined(run.state.scores, la).view(la.shape) for la in run.layers}


class _Run(Generic[T]):
    """One sparsification: what it was given, and its state."""

    state: State

    def __init__(
        self,
        model: nn.Module,
        loss: BatchLoss[T],
        batches: Batches[T],
        spec: Spec,
        layers: Sequence[Layer] | None,
        per_sample: bool,
        reduce: Reduce | None,
        checkpoint: Path | None,
        main: bool = True,
    ) -> None:
        self.model, self.loss, self.batches, self.spec = model, loss, batches, spec
        self.layers = list(prunable(model) if layers is None else layers)
        self.per_sample, self.reduce = per_sample, reduce
        self.checkpoint, self.main = checkpoint, main
        self.pattern, self.scorer = spec.pattern, WEIGHT_SCORERS[spec.scorer]
        self.pattern.check(self.layers)
        self.parameters = dict(model.named_parameters())
        self.samples, self.route = self._samples_and_route()
        self.saved = time.monotonic()
        self.length = 1.0
        self.digest = fingerprint(spec, self.layers, self.samples, per_sample)

    def _samples_and_route(self) -> tuple[int, Route | None]:
        if self.scorer.needs == "none" and self.spec.updating == "none":
            return 0, None
        samples = count_rows(self.batches(), per_sample=self.per_sample)
        if self.reduce is not None:  # a process may have none
            samples = round(float(self.reduce(torch.tensor([samples], dtype=torch.float64))))
        if not samples:
            raise UserError("there is no batch to take gradients of", where=self.spec.scorer)
        if self.scorer.needs != "block" and self.spec.updating == "none":
            return samples, "diagonal"
        if self.reduce is not None:
            return samples, "gram"  # the only sums
        largest = max(layer.size for layer in self.layers)
        block = -(-(self.spec.block or largest) // self.pattern.size) * self.pattern.size
        way = self.spec.route or choose(samples, min(block, largest))
        return samples, way

    def begin(self, masks: Masks | None) -> State:
        """Set the state, by the checkpoint if there is one, and return it."""
        found = self._restored()
        if found is None:
            if masks is not None:
                masks.apply(self.model)
            kept = {}
            for layer in self.layers:
                whole = torch.ones(layer.shape, dtype=torch.bool)
                mask = whole if masks is None else masks.get(layer.name, whole)
                kept[layer.name] = self.pattern.flat(layer, mask[None])[0]
            found = State(0, kept)
        self.state = found
        return found

    def _restored(self) -> State | None:
        """Return the checkpoint's state, if all processes read the same."""
        if self.reduce is not None and not agreed(content(self.checkpoint), self.reduce):
            return None
        path = self.checkpoint
        found = path and restore(path, self.model, self.layers, self.digest)
        if self.reduce is not None:
            agreed(0, self.reduce)  # none goes on to write while another reads
        return found or None

    def step(self, share: float) -> None:
        """Prune to a share of zeros."""
        chosen: dict[str, Tensor] = {}
        self.measure_step()
        for passes in self.units():
            sums = self.score(passes)
            kept = self._choose(passes, share)
            self._update(passes, kept, sums)
            chosen |= kept
            sums = {}
        if self.reduce is not None:
            check_alike([*chosen.values(), *self.state.new.values()], self.reduce)
        self.save(now=True)  # the model is still the one that the parts were made from
        for layer in self.layers:
            new = self.pattern.back(layer, joined(self.state.new, layer))
            with torch.no_grad():
                self.parameters[layer.name].copy_(new)
        self.state.end(self.layers, chosen)

    def measure_step(self) -> None:
        """Set how far the step along −h goes, where the scorer makes one; see `step_length`."""
        self.length = 1.0
        if not self.scorer.gradient:
            return
        steps: dict[str, Tensor] = {}
        damped = 0.0

        def step(_where: slice, blocks: Blocks) -> Tensor:
            assert blocks.inverse is not None and blocks.gradient is not None
            return obs.newton(blocks.inverse, blocks.gradient).flatten()

        sums: dict[str, Sums] = {}
        for parts in (parts for passes in self.units() for parts in passes):
            sums = {}  # gone before the next ones are made
            sums = self._sums(parts)
            for part in parts:
                found = torch.cat(self._sweep(part, sums[part.key], step))
                steps[part.key] = found[: part.weights.stop - part.weights.start]
                damped += self.state.dampings[part.key] * float(found.square().sum())
        sums = {}
        whole = {la.name: self.pattern.back(la, joined(steps, la)) for la in self.layers}

        def seen() -> Iterable[Mapping[str, Tensor]]:
            return gradients(self.model, self.loss, self.batches(), list(whole),
                             per_sample=self.per_sample, seed=self.spec.seed)  # fmt: skip

        self.length = step_length(self.model, seen, whole, damped, self.reduce)

    def units(self) -> list[list[list[Part]]]:
        """Return what is decided together; see `sparsify_plan`."""
        item = max(4, *(self.parameters[la.name].dtype.itemsize for la in self.layers))
        return units(self.layers, self.spec, self.samples, self.route, item)

    def score(self, passes: Sequence[Sequence[Part]]) -> dict[str, Sums]:
        """Score all parts that aren't scored; return sums that the updates may use again."""
        sums: dict[str, Sums] = {}
        for parts in passes:
            todo = [p for p in parts if p.key not in self.state.scores]
            if self.scorer.needs != "none":
                sums = {}  # gone before the next ones are made
                sums = self._sums(todo)
            with track("scores of weights", len(todo)) as tell:
                for done, part in enumerate(todo, start=1):
                    found = self._sweep(part, sums.get(part.key), self._scores_of)
                    where = part.weights
                    count = where.stop - where.start
                    if self.pattern.keep is None:
                        count //= self.pattern.size
                    self.state.scores[part.key] = torch.cat(found)[:count].cpu()
                    self.save()
                    tell(done)
        return sums if len(passes) == 1 else {}

    def _scores_of(self, _where: slice, blocks: Blocks) -> Tensor:
        """Return the scores of groups, flat; of N:M which weights stay."""
        inverse, weights = self.scorer.view(blocks)
        size, keep = self.pattern.size, self.pattern.keep
        if keep is None:
            return obs.group_statistic(inverse, weights, size).flatten()
        share = cubic(self.state.step + 1, self.spec.steps, self.spec.initial, self.spec.final)
        removed = min(size - keep, int(share * size + 1e-9))
        return obs.keep_of_every(inverse, weights, blocks.alive, size, removed).flatten()

    def _choose(self, passes: Sequence[Sequence[Part]], share: float) -> dict[str, Tensor]:
        """Return which weights (d,) of the passes' layers stay."""
        layers = list({part.layer: None for parts in passes for part in parts})
        found = {la.name: joined(self.state.scores, la) for la in layers}
        if self.pattern.keep is not None:
            return {name: keep & self.state.kept[name] for name, keep in found.items()}
        size = self.pattern.size
        gone = {name: ~self.state.kept[name].view(-1, size).any(1) for name in found}
        removed = lowest(found, gone, share, joint=self.spec.joint)
        return {
            name: self.state.kept[name] & ~mask.repeat_interleave(size)
            for name, mask in removed.items()
        }

    def _update(
        self,
        passes: Sequence[Sequence[Part]],
        kept: Mapping[str, Tensor],
        sums: dict[str, Sums],
    ) -> None:
        """Make the new weights of all parts that have none."""
        for parts in passes:
            todo = [p for p in parts if p.key not in self.state.new]
            if self.spec.updating == "none":
                sums = {}
            else:
                sums = sums | self._sums([p for p in todo if p.key not in sums])
            with track("updates of weights", len(todo)) as tell:
                for done, part in enumerate(todo, start=1):
                    self._update_part(part, kept[part.layer.name], sums.get(part.key))
                    self.save()
                    tell(done)
            sums = {}

    def _update_part(self, part: Part, kept: Tensor, sums: Sums | None) -> None:
        stays = self._cut(part, kept)

        def updated(where: slice, blocks: Blocks) -> tuple[Tensor, float]:
            if blocks.inverse is None:
                return (blocks.weights * stays[where]).flatten(), 0.0
            weights = self.scorer.view(blocks)[1] if self.scorer.gradient else blocks.weights
            new = obs.update(blocks.inverse, weights, stays[where], self.spec.updating)
            change = new - blocks.weights
            cost = float(obs.increase(blocks.inverse, change, blocks.gradient).sum())
            if blocks.gradient is not None and self.length:  # what all of h gains is α of h's own
                gain = (blocks.gradient * obs.newton(blocks.inverse, blocks.gradient)).sum()
                cost -= 0.5 * (1 / self.length - 1) * float(gain)
            return new.flatten(), cost

        found, costs = zip(*self._sweep(part, sums, updated), strict=True)
        new = torch.cat(found)[: part.weights.stop - part.weights.start]
        self.state.new[part.key] = new.to(self.parameters[part.layer.name].dtype).cpu()
        if sums is not None:
            self.state.costs[part.key] = math.fsum(costs)

    def _sums(self, parts: Sequence[Part]) -> dict[str, Sums]:
        if not parts:
            return {}
        assert self.route is not None
        found = accumulate(
            self.model, self.loss, self.batches(), parts, self.route, samples=self.samples,
            pattern=self.pattern, first=self.scorer.gradient, per_sample=self.per_sample,
            seed=self.spec.seed, reduce=self.reduce,
        )  # fmt: skip
        if self.spec.compares_layers and self.spec.damping.relative and self.state.mean is None:
            self.state.mean = mean_square(
                self.model, self.loss, self.batches, self.layers, found.values(),
                per_sample=self.per_sample, seed=self.spec.seed, reduce=self.reduce,
            )  # fmt: skip
        return found

    def _sweep(self, part: Part, sums: Sums | None, visit: Callable[[slice, Blocks], R]) -> list[R]:
        """Return what a function makes of a part's blocks, a few at a time, and of their places."""
        layer = part.layer
        flat = self.pattern.flat(layer, self.parameters[layer.name].detach()[None])[0]
        weights, alive = self._cut(part, flat), self._cut(part, self.state.kept[layer.name])
        noise = gradient = None
        damping = 0.0
        if self.scorer.needs == "none":
            noise = self._cut(part, noise_of(layer, self.spec.seed).to(flat.device))
        if sums is not None:
            own, whole = sums.mean_diagonal, self.state.mean
            damping = self.spec.damping.of(own if whole is None else math.sqrt(own * whole))
            self.state.dampings[part.key] = damping
            if self.scorer.gradient:
                gradient = cut_rows(self.length * sums.mean_gradient()[None], part.block)[:, 0]

        def visited(where: slice) -> R:
            inverse = None
            if sums is not None:
                inverse = sums.inverse(where, damping).restricted(alive[where])
            blocks = Blocks(
                weights=weights[where].double(),
                alive=alive[where],
                inverse=inverse,
                gradient=None if gradient is None else gradient[where] * alive[where],
                noise=None if noise is None else noise[where],
            )
            return visit(where, blocks)

        numbers = part.block if self.route in ("diagonal", None) else part.block**2
        return sweep(visited, part.stop - part.start, numbers, flat.device)

    def _cut(self, part: Part, flat: Tensor) -> Tensor:
        """Return a part's own of a layer's flat values (d,), as blocks (n, B)."""
        device = self.parameters[part.layer.name].device
        return cut_rows(flat[part.weights][None].to(device), part.block)[:, 0]

    def masks(self) -> Masks:
        """Return the masks as they are."""
        kept = self.state.kept
        return Masks({la.name: self.pattern.back(la, kept[la.name]) for la in self.layers})

    def save(self, *, now: bool = False) -> None:
        """Write the checkpoint, if there is to be one and the last is old."""
        old = time.monotonic() - self.saved >= CHECKPOINT_SECONDS
        if self.checkpoint is not None and self.main and (now or old):
            self.state.save(self.checkpoint, self.model, self.digest)
            self.saved = time.monotonic()
