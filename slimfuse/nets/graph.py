"""The spaces of any traceable net, from torch-pruning's dependency graph (arXiv 2301.12900)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from slimfuse.errors import ParentError, first_line
from slimfuse.spaces import Atlas, AtlasError, Axis, Leg, LinearMap, Role, Space, transform

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DENSE = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# one value per unit: these move with the space that passes through them
DIAGONAL = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
TOLERANCE = 1e-8  # float64, a permutation only reorders sums
HINT = "a declared family (slimfuse.families) can carry nets that can't be traced"


@dataclass(frozen=True)
class Writer:
    """A layer that writes a space: its module path, and its BatchNorm's where one follows."""

    module: str
    norm: str | None

    @property
    def site(self) -> str:
        """The module whose output is the layer's pre-activation."""
        return self.norm or self.module


@dataclass(frozen=True)
class Graph:
    """The atlas of a net and the writers of every free space, both in execution order."""

    atlas: Atlas
    writers: Mapping[str, tuple[Writer, ...]]


def graph_of(model: nn.Module, example: Tensor) -> Graph:
    """Return the spaces of `model`, traced on `example` (a batch that it accepts).

    Every parameter and floating buffer gets legs; axes that torch-pruning prunes together share a
    space. What leaves the net is fixed, and so is what no layer wrote. The spaces are then
    proved: a net of this shape with random weights must give the same outputs after its free
    spaces are permuted. `model` stays as it is. Raises ParentError naming what can't be covered.
    """
    net = copy.deepcopy(model).double().eval().requires_grad_(True)
    example = example.double() if example.is_floating_point() else example
    _refuse(_unsupported(net), "these parts of the net aren't followed by `family: auto`")
    trace = _Trace(net, example)
    graph = Graph(Atlas(trace.axes, trace.spaces), trace.writers)
    shapes = {k: tuple(v.shape) for k, v in floating(net.state_dict()).items()}
    missing = [f"{k}: has no legs" for k in shapes if k not in trace.axes]
    _refuse(missing + trace.problems, "the net's graph leaves gaps")
    try:
        graph.atlas.check(shapes)
    except AtlasError as error:
        _refuse(str(error).splitlines()[1:], "the net's graph doesn't fit its parameters", error)
    _prove(net, graph.atlas, example)
    return graph


def floating(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what an atlas covers: all of a state but counters such as num_batches_tracked."""
    return {k: v for k, v in state.items() if v.is_floating_point()}


def some(gaps: Sequence[str], most: int = 12) -> str:
    """Return gaps as one line that an error can show: the first `most`, then how many more."""
    told = [" ".join(gap.split()) for gap in gaps[:most]]
    return "; ".join([*told, *[f"and {len(gaps) - most} more"] * (len(gaps) > most)])


def _refuse(problems: list[str], what: str, cause: Exception | None = None) -> None:
    if problems:
        raise ParentError(what, got=some(sorted(problems)), hint=HINT) from cause


def _unsupported(net: nn.Module) -> list[str]:
    """Return what torch-pruning would follow wrongly, or not at all, one line each."""
    found = []
    for name, module in net.named_modules():
        kind = type(module).__name__
        grouped = getattr(module, "num_key_value_groups", 1)
        if isinstance(grouped, int) and grouped > 1:
            found.append(f"{name}: {kind} with grouped queries")  # its k_proj group hangs
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.groups > 1:
            if not _depthwise(module):
                found.append(f"{name}: {kind} with {module.groups} groups")
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            found.append(f"{name}: {kind} over {len(module.normalized_shape)} axes")
        elif not isinstance(module, DENSE + DIAGONAL):
            found += [
                f"{name}.{p}: parameter of a {kind}"
                for p, v in module.named_parameters(prefix="", recurse=False)
                if v.numel() != max(v.shape, default=1)  # vectors are followed: layer scales
            ]
    return found


def _depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, CONVOLUTIONS)
        and 1 < module.groups == module.in_channels == module.out_channels
    )


class _Trace:
    """Axes, spaces and writers, collected group by group in execution order."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.names: dict[nn.Module, str] = {m: name for name, m in net.named_modules()}
        self.parameters = {id(p): name for name, p in net.named_parameters()}
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.spaces: dict[str, Space] = {}
        self.writers: dict[str, tuple[Writer, ...]] = {}
        self.problems: list[str] = []
        # (module path, side) -> axis
        self.sides: dict[tuple[str, str], Axis] = {}
        self.order = _executed(net, example)
        try:
            self.graph = tp.DependencyGraph().build_dependency(
                net, example, forward_fn=lambda m, x: m(x), verbose=False
            )
            for module in self.order:
                if isinstance(module, DENSE) and not _depthwise(module):
                    self._group(module)
        except Exception as error:  # whatever torch-pruning stumbles over in a foreign net
            raise ParentError(
                "torch-pruning can't trace this net", got=first_line(error), hint=HINT
            ) from error
        for module in self.order:
            self._declare(module)
        for name, value in net.named_parameters():
            if (name, "out") in self.sides:  # a vector outside of any known layer
                self.axes[name] = tuple(
                    self.sides[name, "out"] if n > 1 else self._fixed(n) for n in value.shape
                )

    def _group(self, root: nn.Module) -> None:
        name = self.names[root]
        if (name, "out") in self.sides:
            return
        pruner = self.graph.get_pruner_of_module(root)
        size = int(pruner.get_out_channels(root))
        group = self.graph.get_pruning_group(root, pruner.prune_out_channels, list(range(size)))
        leaves = any(not item.dep.target.outputs for item in group if self._writes(item))
        space = f"{'outputs' if leaves else 'units'}.{name}"
        self.spaces[space] = Space(space, size, "fixed" if leaves else "mlp")
        writers = []
        for item in group:
            module = item.dep.target.module
            if isinstance(module, nn.Parameter):
                where, side = self.parameters[id(module)], "out"
                width = module.numel()
            elif module not in self.names:
                continue  # an operation without parameters
            else:
                where = self.names[module]
                side = "out" if self._writes(item) else "in"
                width = _width(module, side) or max(item.idxs) + 1
            role = Role.FIXED if leaves else Role.WRITE if side == "out" else Role.READ
            axis = self._axis(Leg(space, role), size, width, item.idxs, item.root_idxs)
            if axis is None or (where, side) in self.sides:
                self.problems.append(f"{where}: holds {space} among others, or only in part")
                continue
            self.sides[where, side] = axis
            if side == "out" and isinstance(module, DENSE) and not _depthwise(module):
                writers.append(Writer(where, self._norm(item.dep.target)))
        if not leaves:
            steps = {self.names[m]: i for i, m in enumerate(self.order)}
            self.writers[space] = tuple(sorted(writers, key=lambda w: steps[w.module]))

    def _writes(self, item: Any) -> bool:
        module = item.dep.target.module
        dense = isinstance(module, DENSE) and not _depthwise(module)
        return not dense or bool(self.graph.is_out_channel_pruning_fn(item.dep.handler))

    def _norm(self, node: Any) -> str | None:
        after = [n.module for n in node.outputs]
        return (
            self.names[after[0]] if len(after) == 1 and isinstance(after[0], BATCH_NORMS) else None
        )

    def _fixed(self, size: int) -> Axis:
        name = f"size.{size}"
        self.spaces[name] = Space(name, size, "fixed")
        return (Leg(name, Role.FIXED),)

    def _axis(self, leg: Leg, units: int, width: int, at: list[int], of: list[int]) -> Axis | None:
        """Return the legs of an axis of `width`, whose index at[i] belongs to unit of[i]."""
        unit = torch.full((width,), -1)
        unit[torch.tensor(at)] = torch.tensor(of)
        inside = width // units
        if inside > 1 and inside * units == width and sorted(at) == list(range(units)):
            # torch-pruning lost the flattening on the way: units first is usual, and proved below
            unit = torch.arange(units).repeat_interleave(inside)
        if torch.equal(unit, torch.arange(units).repeat_interleave(inside)):
            return (leg, *self._fixed(inside)) if inside > 1 else (leg,)
        if torch.equal(unit, torch.arange(units).repeat(inside)):
            return (*self._fixed(inside), leg)
        return None

    def _declare(self, module: nn.Module) -> None:
        """Give legs to everything that a layer holds itself."""
        name = self.names[module]
        for key, value in module.state_dict(prefix=f"{name}." * bool(name)).items():
            if not value.is_floating_point():
                continue
            sides = ["out"] + ["size"] * (value.ndim - 1)
            if isinstance(module, DENSE) and value.ndim > 1 and not _depthwise(module):
                sides[:2] = ["in", "out"] if isinstance(module, TRANSPOSED) else ["out", "in"]
            axes = []
            for side, size in zip(sides, value.shape, strict=True):
                axis = self.sides.get((name, side))
                # nothing writes the net's input, and a PReLU may share one slope
                fits = axis is not None and self._size(axis) == size
                axes.append(axis if axis is not None and fits else self._fixed(size))
            self.axes[key] = tuple(axes)

    def _size(self, axis: Axis) -> int:
        return prod(self.spaces[leg.space].size for leg in axis)


def _width(module: Any, side: str) -> int | None:
    if isinstance(module, nn.Linear):
        return int(module.out_features if side == "out" else module.in_features)
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return int(module.out_channels if side == "out" else module.in_channels)
    return None  # a norm or an activation: as wide as what passes through it


def _executed(net: nn.Module, example: Tensor) -> list[nn.Module]:
    """Return the layers of known kinds in the order in which they first run."""
    order: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if module not in order:
            order.append(module)

    hooks = [
        m.register_forward_hook(note) for m in net.modules() if isinstance(m, DENSE + DIAGONAL)
    ]
    try:
        _outputs(net, example)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _outputs(net: nn.Module, example: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            out = net(example)
    except Exception as error:  # a foreign net may raise anything
        raise ParentError(
            "the net doesn't run on the example input",
            got=f"{tuple(example.shape)}: {first_line(error)}",
        ) from error
    if not isinstance(out, Tensor):
        raise ParentError(
            "the net must return one tensor", got=type(out).__name__, hint="wrap its forward"
        )
    return out


def _prove(net: nn.Module, atlas: Atlas, example: Tensor) -> None:
    """Raise ParentError unless permuting all free spaces leaves a random net's outputs alone."""
    generator = torch.Generator().manual_seed(0)
    kept = net.state_dict()
    state = dict(kept)
    for name, value in floating(kept).items():
        if value.ndim > 1:
            fan = value.numel() / len(value)
            state[name] = torch.randn(value.shape, generator=generator).double() / fan**0.5
        else:  # no two units alike, none dead: gains and variances above 0, the rest about it
            centred = name.endswith(("bias", "running_mean"))
            low = -0.5 if centred else 0.5
            state[name] = torch.rand(value.shape, generator=generator).double() + low
    maps = {}
    for space in atlas.free:
        eye = torch.eye(atlas.spaces[space].size, dtype=torch.float64)
        shuffled = eye[torch.randperm(len(eye), generator=generator)]
        maps[space] = LinearMap(shuffled, shuffled)
    net.load_state_dict(state)
    before = _outputs(net, example)
    net.load_state_dict(state | transform(state, atlas, maps))
    gap = float((_outputs(net, example) - before).abs().max() / before.abs().max())
    if not gap <= TOLERANCE:
        raise ParentError(
            "the net's units aren't interchangeable as torch-pruning says",
            got=f"outputs change by {gap:.1e} of their size when units are permuted",
            allowed=f"up to {TOLERANCE:.0e}",
            hint=HINT,
        )
