"""Diagnostics of a job's models as tables, each of which ends in a decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Batch, call
from slimfuse.diagnose.answers import Kind, Labelled, Read
from slimfuse.diagnose.curvature import Estimate
from slimfuse.diagnose.lipschitz import amplifications, slopes_of
from slimfuse.diagnose.probing import Patience
from slimfuse.diagnose.propagation import Signal, signals
from slimfuse.diagnose.rounding import (
    BLOCK,
    INT4,
    INT8,
    LayerForecast,
    Scheme,
    by_layer,
    in_float,
    linear_layers,
)
from slimfuse.diagnose.spectrum import Spectrum, allocate, spectra
from slimfuse.families import Layout
from slimfuse.fuse.memory import hold_steady
from slimfuse.pipeline.answering import kind_of, reading
from slimfuse.pipeline.calibration import calibration
from slimfuse.pipeline.job import Job
from slimfuse.progress import working
from slimfuse.recipe import Calibration
from slimfuse.recipe.diagnosing import Diagnose
from slimfuse.report import Finding, words

SMALL, TOKENS = 8, 512  # samples a pass, fewer of many tokens: a pass's graph is kept whole
SHARES = {"structure": 0.2, "signals": 0.1, "slopes": 0.4, "rounding": 0.3}  # of all the time
TOLERATED = 0.01  # nats: what INT8 may cost the answers
FRAGILE = 1.5  # times the parent's slope


@dataclass(frozen=True)
class Subject:
    """A model that is diagnosed, with where it keeps its parts."""

    name: str
    model: nn.Module
    layout: Layout


class Diagnosing:
    """The tables of one job's models: the first is the parent that others are compared with."""

    def __init__(self, job: Job, spec: Diagnose, subjects: Sequence[Subject]) -> None:
        self.job, self.spec, self.subjects = job, spec, subjects
        self.kind: Kind = kind_of(job.task)
        self.read: Read = reading(job.task, labels=False)
        draw = Calibration(samples=spec.samples, seed=spec.seed)
        tokens = max(job.opened.tokens(parent.config) for parent in job.parents)
        self.samples, self.chunks = calibration(
            job.task, job.data.test, job.processor, draw, min(SMALL, max(1, TOKENS // tokens)),
            lambda: job.task.samples(job.data.test, job.processor),
        )  # fmt: skip
        self.count = sum(map(len, self.chunks))

    def tables(self) -> tuple[Finding, ...]:
        """Return all tables."""
        hold_steady()  # else what passes freed adds up in the C library's heap
        made: dict[str, Callable[[], Sequence[Finding]]] = {
            "structure": self.structure, "signals": self.signals, "slopes": self.slopes,
            "rounding": self.rounding,
        }  # fmt: skip
        found: list[Finding] = []
        for name, make in made.items():
            with working(f"diagnosing: {name}"):
                found += make()
        return tuple(found)

    def _batches(self, size: int | None = None) -> Iterator[Labelled]:
        for chunk in self.chunks:
            for part in chunk.split(size or len(chunk)):
                yield self.job.task.examples(self.samples, part)

    def _patience(self, table: str, parts: int = 1) -> Patience:
        return Patience(self.spec.seconds * SHARES[table] / parts)

    # -- §1 ----------------------------------------------------------------------------------

    def structure(self) -> list[Finding]:
        """Say how narrow every space of the first model could be."""
        one = self.subjects[0]
        sites = {}
        for i, block in enumerate(one.layout.blocks):
            sites[f"layer {i} stream"] = block.path
            sites[f"layer {i} heads"] = block.o
            sites[f"layer {i} MLP"] = block.down
        found, count = spectra(
            one.model, self._batches(), sites, self.kind, self.read, seed=self.spec.seed,
            patience=self._patience("structure"),
        )  # fmt: skip
        mlps = [s for s in found if s.name.endswith("MLP")]
        total = sum(s.width for s in mlps)
        wanted = self.job.family.shape(self.job.target).intermediate_size * len(mlps)
        budget = wanted if wanted < total else total // 2
        best = allocate(mlps, [1.0] * len(mlps), budget, step=max(1, budget // 256))
        level = budget // len(mlps)
        uniform = sum(s.tail(min(level, s.width)) for s in mlps)
        widths = dict(zip((s.name for s in mlps), best.widths, strict=True))
        rows = tuple(_spectrum_row(s, widths.get(s.name)) for s in found)
        stream = max(s.effective(0.999) for s in found if s.name.endswith("stream"))
        told = (
            f"{one.name} needs about {stream} stream units for 99.9 % of what matters in its "
            f"widest layer. With {budget} MLP units in all, {level} in every layer cost at least "
            f"{uniform:.3f} nats, and shared out by the spectrum {best.rise:.3f}"
        )
        trust = (
            ": stock classes want one width, so take the uniform one."
            if best.trusted
            else ": outside the trust region, where these figures order nothing. Narrow less, or "
            "let the finetuned accuracy decide."
        )
        return [
            Finding(
                f"How narrow {one.name} can be",
                f"{count} held-out samples, up to {found[0].rows} tokens a space, seed "
                f"{self.spec.seed}; directions weighted by what they matter to the answers; "
                "predicted rise: the least one of the loss, in nats a sample.",
                ("space", "width", "rank for 99 %", "for 99.9 %", "proposed", "predicted rise"),
                rows,
                told + trust,
            )
        ]

    # -- §6 ----------------------------------------------------------------------------------

    def signals(self) -> list[Finding]:
        """Say how the signal goes through every model, side by side."""
        patience = [self._patience("signals", len(self.subjects)).seconds for _ in self.subjects]
        every: dict[str, list[Signal]] = {}
        count = self.count
        for one, seconds in zip(self.subjects, patience, strict=True):
            every[one.name], seen = signals(
                one.model, one.layout, self._batches(), self.kind, self.read, seed=self.spec.seed,
                patience=Patience(seconds),
            )  # fmt: skip
            count = min(count, seen)
        rows = []
        for name, found in every.items():
            for i, s in enumerate(found):
                rows.append(
                    (f"{name}, layer {i}", f"{s.cosine:.3f}", f"{s.stable_rank:.2f}",
                     f"{s.attention:.3f}", f"{s.mlp:.3f}", f"{s.score_share:.3f}")
                )  # fmt: skip
        return [
            Finding(
                "How the signal goes through",
                f"{count} held-out samples, seed {self.spec.seed}; behind each layer: the mean "
                "cosine of two tokens and their stable rank; branches over the stream in norm; "
                "gradients of queries and keys over those of values.",
                ("layer", "token cosine", "stable rank", "attention / stream", "MLP / stream",
                 "Q,K / V"),
                tuple(rows),
                _signal_decision(every),
            )
        ]  # fmt: skip

    # -- §5 ----------------------------------------------------------------------------------

    def slopes(self) -> list[Finding]:
        """Say how far answers move with inputs, and what each layer amplifies."""
        rows, most, seen = [], {}, []
        for one in self.subjects:
            values, kappas = self._slopes(one)
            most[one.name] = float(values.quantile(0.99))
            rows.append(
                (f"{one.name}, whole", f"{len(values)}", words.number(float(values.median())),
                 words.number(most[one.name]), words.number(float(values.max())), "–")
            )  # fmt: skip
            seen.append(kappas)
        for one, kappas in zip(self.subjects, seen, strict=True):
            for i, kappa in enumerate(kappas):
                rows.append((f"{one.name}, layer {i}", "–", "–", "–", "–", words.number(kappa)))
        return [
            Finding(
                "Whether it got brittle",
                "Largest slope of the answers by the input on held-out samples, from below "
                f"(8 power iterations, seed {self.spec.seed}); κ: a share e of a layer's input "
                "that is missed costs about ½ κ² e nats.",
                ("model", "samples", "median slope", "p99", "largest", "κ"),
                tuple(rows),
                _slope_decision(most),
            )
        ]

    def _slopes(self, one: Subject) -> tuple[Tensor, list[float]]:
        patience = self._patience("slopes", 2 * len(self.subjects))
        parts = []
        for inputs, _ in patience.over(self._batches()):
            assert isinstance(inputs, Batch)
            function, x, scale = self._from_input(one.model, inputs)
            parts.append(slopes_of(function, x, seed=self.spec.seed) * scale)
        blocks = [block.path for block in one.layout.blocks]
        kappas, _ = amplifications(
            one.model, self._batches(), blocks, self.kind, self.read, seed=self.spec.seed,
            patience=self._patience("slopes", 2 * len(self.subjects)),
        )  # fmt: skip
        return torch.cat(parts), kappas

    def _from_input(
        self, model: nn.Module, inputs: Batch
    ) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
        """Return the answers as a function of pixels or embeddings, those, and their unit.

        Of texts the unit is the mean length of an embedding, so that models compare.
        """
        like, output = next(model.parameters()), self.job.task.output
        given = dict(inputs.to(like.device, like.dtype).arguments)
        if "pixel_values" in given:
            x, name, scale = given.pop("pixel_values"), "pixel_values", torch.ones(())
        else:
            table: Any = model.get_input_embeddings()  # type: ignore[operator]
            x, name = table(given.pop("input_ids")).detach(), "inputs_embeds"
            scale = x.norm(dim=-1).mean()

        def function(value: Tensor) -> Tensor:
            found: Tensor = getattr(call(model, Batch({**given, name: value})), output)
            return found

        return function, x, scale

    # -- §4 ----------------------------------------------------------------------------------

    def rounded(
        self, schemes: Mapping[str, Scheme], patience: Patience
    ) -> tuple[list[LayerForecast], dict[str, Estimate]]:
        """Return what rounding each product of the last model costs, and all of them together."""
        model = self.subjects[-1].model
        return by_layer(
            model, self._batches(1), linear_layers(model), schemes, self.kind, self.read,
            probes=self.spec.probes, seed=self.spec.seed, patience=patience,
        )  # fmt: skip

    def rounding(self) -> list[Finding]:
        """Say what rounding each product of the last model costs."""
        one = self.subjects[-1]
        schemes = {"int8": INT8, "int4": INT4}
        found, every = self.rounded(schemes, self._patience("rounding"))
        kept = {what: in_float(found, what, TOLERATED) for what in schemes}
        rows = []
        for t in sorted(found, key=lambda t: -t.costs["int8"].value):
            keep = [what for what in schemes if t.layer in kept[what][0]]
            rows.append(
                (t.layer, words.count(t.numbers), _estimate(t.costs["int8"]),
                 _estimate(t.costs["int4"]), ", ".join(keep) or "–")
            )  # fmt: skip
        rows.append(("all together", words.count(sum(t.numbers for t in found)),
                     _estimate(every["int8"]), _estimate(every["int4"]), ""))  # fmt: skip
        return [
            Finding(
                f"What to keep in float of {one.name}",
                f"{every['int8'].samples} probes of held-out samples, seed {self.spec.seed}, ± "
                "standard error; KL in nats a sample by products of rounded numbers: int8 with "
                "a scale for each output and one for the inputs, int4 for "
                f"each {BLOCK} inputs, which are int8.",
                ("layer", "numbers", "KL int8", "KL int4", "keep in float for"),
                tuple(rows),
                _rounding_decision(kept, every["int8"].value),
            )
        ]


def _spectrum_row(s: Spectrum, proposed: int | None) -> tuple[str, ...]:
    width = s.effective(0.999) if proposed is None else proposed
    return (s.name, f"{s.width}", f"{s.effective(0.99)}", f"{s.effective(0.999)}", f"{width}",
            words.number(s.tail(width)))  # fmt: skip


def _signal_decision(every: Mapping[str, Sequence[Signal]]) -> str:
    (first, base), *others = every.items()
    if not others:
        last = base[-1].cosine
        return (
            f"{first} ends at a token cosine of {last:.2f}: a child of it should end near that; "
            "healthy classifiers reach .93, so compare, and don't judge by a constant."
        )
    odd = [n for n, found in others if found[-1].cosine > base[-1].cosine + 0.5 * (
        1 - base[-1].cosine)]  # fmt: skip
    if odd:
        return (
            f"{', '.join(odd)} makes tokens more alike than {first}: refit with more calibration "
            "samples or a wider stream; rescaling branches made such models worse."
        )
    return f"{', '.join(n for n, _ in others)} carries the signal as {first} does: nothing to do."


def _slope_decision(most: Mapping[str, float]) -> str:
    (first, base), *others = most.items()
    if not others:
        return (
            "Where κ is large a layer's reconstruction must be good: spend calibration samples and "
            "width there. There is no product bound for transformers."
        )
    odd = [f"{n} ({v / base:.1f}×)" for n, v in others if v > FRAGILE * base]
    if odd:
        return (
            f"{', '.join(odd)} is steeper than {first}: finetune it longer, or with augmentation."
        )
    return f"{', '.join(n for n, _ in others)} is no steeper than {first}: it didn't get brittle."


def _rounding_decision(kept: Mapping[str, tuple[tuple[str, ...], float]], whole: float) -> str:
    names, left = kept["int8"]
    four = len(kept["int4"][0])
    state = "fragile" if whole > TOLERATED else "flat"
    if not names:
        return (
            f"The products are {state}: quantise all of them to INT8 ({left:.4f} nats in sum). Of "
            f"int4 {four} layers would have to stay in float."
        )
    return (
        f"The products are {state}: keep {', '.join(names)} in float, and INT8 costs {left:.4f} "
        f"nats in sum. Of int4 {four} layers would have to stay."
    )


def _estimate(found: Any) -> str:
    return f"{words.number(found.value)} ± {words.number(found.error)}"


def subject(job: Job, name: str, folder: Path) -> Subject:
    """Return a saved model of the job's family, ready for derivatives."""
    model = job.family.load(folder, attention="eager").eval()
    return Subject(name, model, job.family.layout(model.config))
