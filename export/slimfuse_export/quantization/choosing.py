"""The quantised file that is small and fast and still good enough, or none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from slimfuse_export._files import replacing
from slimfuse_export.bench import InputMaker, Progress, bench
from slimfuse_export.errors import ExportError
from slimfuse_export.graph import load_header
from slimfuse_export.latency import Ratio
from slimfuse_export.quantization.cpu import QuantizationPlan, quantization_plan
from slimfuse_export.quantization.files import (
    Mode,
    Quantized,
    quantize_dynamic_int8,
    quantize_int4,
    quantize_static_int8,
)
from slimfuse_export.quantization.noise import fallbacks, product_noise
from slimfuse_export.quantization.products import products
from slimfuse_export.quantization.quality import Loss
from slimfuse_export.sessions import Arrays

Choice = Literal["auto", "dynamic", "static", "int4"]
MAX_DROP = 0.01
LARGE = 2**30  # bytes of float weights in products: more than caches hold, by far


@dataclass(frozen=True)
class Attempt:
    """One file that was made: how, what it loses, and what became of it.

    loss: against the float file, in the unit of `max_drop`. ratio: of its time to that of the
    first attempt that is good enough, where they were timed.
    """

    mode: Mode
    kept_float: tuple[str, ...]
    loss: float
    bytes: int
    good_enough: bool
    ratio: Ratio | None = None


@dataclass(frozen=True)
class Quantization:
    """What was tried; made: what was written, None where no file is good enough.

    reason: of the mode.
    """

    made: Quantized | None
    reason: str
    attempts: tuple[Attempt, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, fit for JSON."""
        return {
            "made": asdict(self.made) if self.made else None,
            "reason": self.reason,
            "attempts": [asdict(attempt) for attempt in self.attempts],
        }


def quantize_model(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    loss: Loss,
    inputs: Sequence[Arrays],
    mode: Choice = "auto",
    max_drop: float = MAX_DROP,
    keep_float: Sequence[str] = (),
    make_inputs: InputMaker | None = None,
    plan: QuantizationPlan | None = None,
    min_seconds: float = 3.0,
    progress: Progress | None = None,
) -> Quantization:
    """Write a quantised file that loses no more than `max_drop` to `dst`, or none.

    Where a file loses more, the noisiest products (`product_noise`) go back to float, an eighth
    after the other up to a half. `auto` tries dynamic and static INT8 (4-bit weights for a model
    whose weights are above 1 GiB) and, where both are good enough, times them in turns: static
    wins only where it is surely faster.
    loss: see `Loss`. inputs: of the model, for static ranges and for the noise. keep_float: names
    of products' nodes or weights that stay float32 in any case. make_inputs: batch → inputs to
    time with; None: nothing is timed, and dynamic is taken. plan: of this CPU by default.
    Raises: ExportError as `quantize_dynamic_int8`, and for an unknown mode.
    """
    if mode not in get_args(Choice):
        raise ExportError("unknown mode", got=mode, allowed=", ".join(get_args(Choice)))
    src, dst, plan = Path(src), Path(dst), plan or quantization_plan()
    modes, reason = choose_modes(src, mode, plan)
    with TemporaryDirectory(prefix="slimfuse-quantize-") as folder:
        attempts: list[Attempt] = []
        good: dict[Mode, tuple[Path, Quantized]] = {}
        for one in modes:
            made = _good_enough(src, Path(folder) / one, one, plan, loss, inputs, max_drop,
                                keep_float, attempts)  # fmt: skip
            if made is not None:
                good[one] = made
        if not good:
            return Quantization(None, reason, tuple(attempts))
        best = next(iter(good))
        if len(good) > 1 and make_inputs is not None:
            best, said = _faster(good, attempts, make_inputs, min_seconds, progress)
            reason = f"{reason}; {said}"
        file, made_of = good[best]
        with replacing(dst) as part:
            part.write_bytes(file.read_bytes())
        return Quantization(made_of, reason, tuple(attempts))


def choose_modes(src: Path, mode: Choice, plan: QuantizationPlan) -> tuple[list[Mode], str]:
    """Return the modes to try on a model, the simplest first, and why."""
    if mode != "auto":
        return [mode], f"{mode} was asked for; this CPU: {plan.reason}"
    model = load_header(src)
    read = {product.weight for product in products(model.graph)}
    size = sum(_float_bytes(t.dims) for t in model.graph.initializer if t.name in read)
    if size >= LARGE:
        return ["int4"], f"{size / 2**30:.1f} GiB of weights: reading them is what takes the time"
    return ["dynamic", "static"], plan.reason


def _float_bytes(dims: Sequence[int]) -> int:
    count = 4
    for dim in dims:
        count *= dim
    return count


def write_mode(
    src: Path,
    dst: Path,
    mode: Mode,
    *,
    plan: QuantizationPlan,
    inputs: Sequence[Arrays],
    keep_float: Sequence[str] = (),
) -> Quantized:
    """Write one quantised file as its mode and the CPU ask for, whatever it loses."""
    if mode == "int4":
        return quantize_int4(src, dst, keep_float=keep_float)
    if mode == "static":
        return quantize_static_int8(src, dst, inputs, reduce_range=plan.reduce_range,
                                    signed=plan.signed, keep_float=keep_float)  # fmt: skip
    return quantize_dynamic_int8(src, dst, reduce_range=plan.reduce_range, keep_float=keep_float)


def _good_enough(
    src: Path,
    stem: Path,
    mode: Mode,
    plan: QuantizationPlan,
    loss: Loss,
    inputs: Sequence[Arrays],
    max_drop: float,
    keep_float: Sequence[str],
    attempts: list[Attempt],
) -> tuple[Path, Quantized] | None:
    """Return the first file of a mode that loses no more than `max_drop`; note every attempt."""

    def attempt(kept: Sequence[str]) -> tuple[Path, Quantized] | None:
        path = stem.with_name(f"{stem.name}-{len(attempts)}.onnx")
        made = write_mode(src, path, mode, plan=plan, inputs=inputs, keep_float=kept)
        lost = loss(path)
        attempts.append(Attempt(mode, tuple(kept), lost, made.bytes, lost <= max_drop))
        return (path, made) if lost <= max_drop else None

    if (found := attempt(keep_float)) is not None:
        return found
    first = stem.with_name(f"{stem.name}-{len(attempts) - 1}.onnx")
    noisy = [one.product for one in product_noise(src, first, inputs)]
    for kept in fallbacks(noisy, keep_float):
        if (found := attempt(kept)) is not None:
            return found
    return None


def _faster(
    good: dict[Mode, tuple[Path, Quantized]],
    attempts: list[Attempt],
    make_inputs: InputMaker,
    min_seconds: float,
    progress: Progress | None,
) -> tuple[Mode, str]:
    """Return the mode to take of two, and what was measured."""
    base, other = good
    files: dict[str, Path] = {mode: path for mode, (path, _) in good.items()}
    result = bench(files, make_inputs=make_inputs, min_seconds=min_seconds, control=True,
                   progress=progress)  # fmt: skip
    ratio = result.ratio(base, other)
    for index, attempt in enumerate(attempts):
        if attempt.mode == other and attempt.good_enough:
            attempts[index] = replace(attempt, ratio=ratio)
    figures = (
        f"{other} takes {ratio.value:.2f} × {base}'s time (95 % {ratio.low:.2f}–{ratio.high:.2f})"
    )
    if ratio.verdict == "faster":
        return other, figures
    return base, f"{figures}: {ratio.verdict}, so {base}"
