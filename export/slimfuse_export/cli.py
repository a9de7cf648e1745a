"""The command line: check, bench, quantize, doctor."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

import slimfuse_export
from slimfuse_export import _show
from slimfuse_export._files import replacing
from slimfuse_export.bench import bench as run_bench
from slimfuse_export.environment import environment
from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.folder import INT8, MODEL, check_folder
from slimfuse_export.quantize import int8_saturates, quantization_plan, quantize_dynamic_int8

app = typer.Typer(
    name="slimfuse-export",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Check, time and quantise a finished model folder, without torch.",
)

Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=SIZE", help="Size of a dynamic dim that is not the batch."),
]


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 fine, 1 internal fault, 2 bad input, 3 a check failed."""
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words  # wherever it stands
    words = [word for word in words if word != "--debug"]
    try:
        # the command itself: calling `app` would install typer's own excepthook
        typer.main.get_command(app)(args=words, prog_name="slimfuse-export")
    except ExportError as error:
        if debug:
            raise
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"internal fault: {text}; run with --debug for the traceback", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # see main
) -> None:
    if version:
        print(slimfuse_export.__version__)
        raise typer.Exit


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A finished model folder.")],
    dim: Dims = None,
    atol: Annotated[float, typer.Option(help="Absolute tolerance of float outputs.")] = 1e-3,
    rtol: Annotated[float, typer.Option(help="Relative tolerance of float outputs.")] = 1e-3,
) -> None:
    """Open a folder from its files alone and check what deployment relies on."""
    results = check_folder(folder, atol=atol, rtol=rtol, dims=_sizes(dim))
    _show.show_checks(Console(), results)
    if failed := [result.name for result in results if not result.passed]:
        raise CheckFailed(
            f"{len(failed)} of {len(results)} checks failed", where=folder, got=", ".join(failed)
        )


@app.command()
def bench(
    paths: Annotated[list[Path], typer.Argument(help="Model folders or .onnx files.")],
    threads: Annotated[str, typer.Option(help="Numbers of threads, as 1,2.")] = "1",
    batch: Annotated[str, typer.Option(help="Batch sizes, as 1,8.")] = "1",
    dim: Dims = None,
    warmup: Annotated[int, typer.Option(help="Untimed calls of each model.")] = 10,
    min_seconds: Annotated[float, typer.Option(help="Timed seconds of each model.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of inputs, order and intervals.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    """Time models against each other, interleaved; the first one is the base."""
    if json_file is not None and not json_file.parent.is_dir():
        raise ExportError("the folder to write into does not exist", where=json_file.parent)
    models = name_models([model for path in paths for model in _models(path)])
    with _show.progress(Console(stderr=True)) as tell:
        result = run_bench(
            models,
            dims=_sizes(dim),
            threads=_numbers("--threads", threads),
            batch=_numbers("--batch", batch),
            warmup=warmup,
            min_seconds=min_seconds,
            seed=seed,
            progress=tell,
        )
    ratios = result.ratios(next(iter(models)), seed=seed)
    _show.show_bench(Console(), result, ratios)
    if json_file is not None:
        report = {**result.as_dict(), "ratios": [asdict(ratio) for ratio in ratios]}
        with replacing(json_file) as part:
            part.write_text(json.dumps(report, indent=2) + "\n")


@app.command()
def quantize(
    folder: Annotated[Path, typer.Argument(help="A folder with onnx/model.onnx.")],
) -> None:
    """Write onnx/model_quantized.onnx: INT8 weights, dynamically quantised activations."""
    plan = quantization_plan()
    console = Console()
    if plan.mode == "float32":
        console.print(Text(f"this CPU may run INT8 slower than float: {plan.reason}", "yellow"))
    done = quantize_dynamic_int8(folder / MODEL, folder / INT8, reduce_range=plan.reduce_range)
    line = (
        f"{INT8.as_posix()}: {done.products} products in INT8, "
        f"{done.source_bytes:,} → {done.bytes:,} bytes; {plan.reason}"
    )
    console.print(Text(line), soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what this machine is, what INT8 mode suits it, and prove that onnxruntime runs."""
    plan = quantization_plan()
    with tempfile.TemporaryDirectory() as folder:
        saturates = int8_saturates(folder)
    rows = {
        "slimfuse-export": slimfuse_export.__version__,
        **environment(),
        "expected to be fast": f"{plan.mode}: {plan.reason}",
        "8-bit products": "saturate (measured)" if saturates else "exact (measured)",
    }
    console = Console()
    for name, value in rows.items():
        console.print(Text(f"{name:20} {'none' if value is None else value}"), soft_wrap=True)
    if saturates and not plan.reduce_range:
        raise CheckFailed(
            "8-bit products saturate here, and the CPU's flags don't say so",
            hint="quantise with reduce_range=True",
        )


def name_models(paths: Sequence[Path]) -> dict[str, Path]:
    """Name each model by as few trailing parts of its path as tell all of them apart.

    `x/model/onnx/model.onnx` is `model`, its quantised sibling `model/int8`; were there another
    folder called `model`, they would be `x/model` and `y/model`. No name is an absolute path.
    Raises: ExportError where a file is given twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = sorted({str(path) for path in paths if resolved.count(path.resolve()) > 1})
        raise ExportError("a model is given twice", got=twice)
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = [_name(path, depth) for path in resolved]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    raise AssertionError("distinct paths have distinct names at full depth")


def _name(path: Path, depth: int) -> str:
    ends = {MODEL.parts: (), INT8.parts: ("int8",)}
    tail = ends.get(path.parts[-2:])
    root, tail = (path.with_suffix(""), ()) if tail is None else (path.parent.parent, tail)
    return "/".join((*root.parts[1:][-depth:], *tail))


def _models(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [path / model for model in (MODEL, INT8) if (path / model).is_file()]
    if not found:
        raise ExportError("the folder holds no model", where=path, allowed=f"{MODEL} or {INT8}")
    return found


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ExportError(
            "not a list of whole numbers", where=option, got=text, allowed="as 1,2,4"
        ) from error


def _sizes(words: Sequence[str] | None) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for word in words or ():
        name, _, size = word.partition("=")
        if not name or not size.isdecimal() or int(size) < 1:
            raise ExportError("not a dim's size", where="--dim", got=word, allowed="NAME=SIZE")
        sizes[name] = int(size)
    return sizes
