"""Verbs that use a model: predict, serve, package."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from slimfuse_export import packaging
from slimfuse_export.cli._words import AsJson, give
from slimfuse_export.deployed import POOLINGS, Deployed, Options, Pooling, open_deployed
from slimfuse_export.deployed.images import SUFFIXES
from slimfuse_export.environment import cores_allowed
from slimfuse_export.errors import CheckFailed, ExportError

TOKEN = "SLIMFUSE_EXPORT_TOKEN"  # noqa: S105 - its name

Layout = Literal["triton", "kserve", "zip"]
Folder = Annotated[Path, typer.Argument(help="A finished model folder.")]
Int8 = Annotated[bool, typer.Option("--int8", help="Run onnx/model_quantized.onnx.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of one call; by default every core.")]
Pooled = Annotated[
    str | None,
    typer.Option(metavar="|".join(POOLINGS), help="Of embeddings; by default as the folder says."),
]


def add(app: typer.Typer) -> None:
    """Add this module's verbs."""
    for verb in (predict, serve, package):
        app.command()(verb)


def predict(
    folder: Folder,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts; or image files and folders of them. - is lines of standard input."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes, or tokens of each mask.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Inputs that run together.")] = 16,
    pooling: Pooled = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of generated text.")] = 32,
    temperature: Annotated[float, typer.Option(help="Of generated text; 0: the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of generated text.")] = 0,
    int8: Int8 = False,
    threads: Threads = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, a list of all answers.")
    ] = False,
) -> None:
    """Print one JSON line for each text or image: label and scores, embedding or text."""
    options = Options(
        top_k=top_k, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    model = open_deployed(
        folder, int8=int8, threads=threads or cores_allowed(), pooling=known_pooling(pooling)
    )
    words = list(inputs or ())
    if not words and sys.stdin.isatty():
        raise ExportError(
            "there is nothing to predict",
            allowed="image files and folders" if model.takes_images else "texts",
            hint="give inputs, or - and lines on standard input",
        )
    ascii_only = sys.stdout.encoding.lower().replace("-", "") != "utf8"
    failed, count = 0, 0
    answered: list[dict[str, Any]] = []
    named = _named(model, words or ["-"])
    while part := list(itertools.islice(named, batch)):
        answers = model.predict((item for _, item in part), options, batch=batch)
        for (name, _), answer in zip(part, answers, strict=True):
            bad = isinstance(answer, ExportError)
            failed, count = failed + bad, count + 1
            told = {"error": one_line(answer)} if isinstance(answer, ExportError) else answer
            line = {"input": _printable(name), **told}
            if as_json:
                answered.append(line)
            else:
                print(json.dumps(line, ensure_ascii=ascii_only))
        sys.stdout.flush()  # whoever reads a pipe gets every batch as it is done
    give(answered, as_json)
    if failed:
        raise CheckFailed(f"{failed} of {count} inputs failed", hint="their lines say why")


def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"Holds the token that clients must bear; or set {TOKEN}."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Inputs that run together; by default 16, with --int8 one."),
    ] = None,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="That an input waits for others to share its batch.")
    ] = 2.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Inputs that wait or run.")] = 256,
    max_inputs: Annotated[int, typer.Option(min=1, help="Of one request.")] = 32,
    max_body_mb: Annotated[float, typer.Option(help="Of one request.")] = 8.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of one image.")] = 20_000_000,
    max_characters: Annotated[int, typer.Option(min=1, help="Of one text.")] = 100_000,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 30.0,
    drain: Annotated[int, typer.Option(min=0, help="Seconds to finish after SIGTERM.")] = 30,
    pooling: Pooled = None,
    int8: Int8 = False,
    threads: Threads = None,
) -> None:
    """Answer over HTTP: a page at /, POST /predict, /health, /ready, /metrics, /openapi.json.

    SIGTERM and Ctrl-C let the requests that are under way finish, then it exits with 0.
    """
    try:
        from slimfuse_export.serving import Limits
        from slimfuse_export.serving import serve as run
    except ModuleNotFoundError as error:
        raise ExportError(
            "the service's packages are not installed",
            got=f"no {error.name}",
            hint="pip install 'slimfuse-export[serve]'",
        ) from error
    limits = Limits(
        body_bytes=int(max_body_mb * 2**20),
        pixels=max_pixels,
        characters=max_characters,
        inputs=max_inputs,
        queue=max_queue,
        seconds=timeout,
        # INT8 scales are those of a batch: alone an input always gets the same answer
        batch=max_batch or (1 if int8 else 16),
        wait_ms=max_wait_ms,
    )
    token = _token(token_file)
    model = open_deployed(
        folder, int8=int8, threads=threads or cores_allowed(), pooling=known_pooling(pooling)
    )
    run(
        model,
        host=host,
        port=port,
        token=token,
        limits=limits,
        drain_seconds=drain,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )


def package(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="A new folder, or the zip.")],
    kind: Annotated[
        Layout, typer.Option("--format", help="Triton's repository, KServe's files, or one zip.")
    ],
    name: Annotated[str | None, typer.Option(help="Of the model; by default the run's.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Of the server's batching.")] = 16,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="Of the server's batching.")] = 2.0,
    storage_uri: Annotated[
        str | None, typer.Option(help="Where KServe will find `models`, as pvc://CLAIM/PATH.")
    ] = None,
    int8: Int8 = False,
    as_json: AsJson = False,
) -> None:
    """Write a folder's model as other servers take it, or all of its files as a zip."""
    batching: dict[str, Any] = {
        "name": name,
        "max_batch": max_batch,
        "wait_ms": max_wait_ms,
        "int8": int8,
    }
    if kind == "zip":
        written = packaging.write_zip(folder, out)
        told, more = f"{out}: {len(written)} files", {"files": written}
    elif kind == "triton":
        told, more = str(packaging.write_triton(folder, out, **batching)), {}
    elif storage_uri is None:
        raise ExportError(
            "KServe must know where the model will lie",
            where="--storage-uri",
            allowed="pvc://CLAIM/PATH, s3://…, gs://…",
        )
    else:
        made = packaging.write_kserve(folder, out, storage_uri=storage_uri, **batching)
        told, more = str(made), {}
    print(told, file=sys.stderr if as_json else sys.stdout)
    give({"out": str(out), "format": kind, **more}, as_json)


def _token(file: Path | None) -> str | None:
    """Return the token of a file or of the environment, never of an argument that others see."""
    try:
        token = os.environ.get(TOKEN) if file is None else file.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ExportError(
            "the token can't be read", where=file, got=type(error).__name__, allowed="ASCII"
        ) from error
    if token is None:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ExportError(
            "the token is not legal", where=file or TOKEN, allowed="printable ASCII without spaces"
        )
    return token


def known_pooling(word: str | None) -> Pooling | None:
    """Return a pooling by its name; raises ExportError for another word."""
    for pooling in POOLINGS:
        if word == pooling:
            return pooling
    if word is None:
        return None
    raise ExportError("unknown pooling", where="--pooling", got=word, allowed=", ".join(POOLINGS))


def one_line(error: ExportError) -> str:
    """Return what an error says without its line breaks."""
    told = [str(error.what)]
    told += [f"got {error.got}"] if error.got is not None else []
    told += [f"allowed {error.allowed}"] if error.allowed is not None else []
    return "; ".join(told)


def _named(model: Deployed, words: Sequence[str]) -> Iterator[tuple[str, str | Path]]:
    """Yield what each input is called and what it is; of a folder its images, in order."""
    for word in words:
        for line in _lines() if word == "-" else [word]:
            if not model.takes_images:
                yield line, line
            elif (path := Path(line)).is_dir():
                yield from ((str(file), file) for file in _images(path))
            elif line:
                yield line, path


def _lines() -> Iterator[str]:
    """Yield lines of standard input; bytes that are no UTF-8 stay what they are, as in paths."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="surrogateescape").rstrip("\r\n")


def _images(folder: Path) -> list[Path]:
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not found:
        raise ExportError(
            "the folder holds no images", where=folder, allowed=f"files {', '.join(SUFFIXES)}"
        )
    return found


def _printable(name: str) -> str:
    return name.encode("utf-8", errors="replace").decode()
