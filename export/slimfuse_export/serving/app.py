"""The service's routes."""

# no postponed annotations: those of one route are made for the model

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Security, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import slimfuse_export
from slimfuse_export.deployed import Deployed, Options
from slimfuse_export.environment import cores_allowed
from slimfuse_export.errors import CheckFailed, ExportError
from slimfuse_export.serving import schemas
from slimfuse_export.serving.batching import Batcher, QueueFull
from slimfuse_export.serving.guard import Guard
from slimfuse_export.serving.limits import Limits
from slimfuse_export.serving.metrics import Metrics

PAGES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_RETRY = {"Retry-After": "1"}
_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "description": said}
    for status, said in (
        (400, "The body can't be parsed."),
        (401, "The bearer token is missing or wrong."),
        (408, "The body came too slowly."),
        (413, "The body is too large."),
        (422, "An input is not legal; which one, and why, is in `detail`."),
        (429, "Too many inputs wait; try again."),
        (503, "The answer took too long, or too many connections are open."),
    )
}


def make_app(model: Deployed, *, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """Return the service of an opened model as an ASGI app.

    limits: of requests. token: that clients must bear for all but the page and the health checks.
    """
    limits = limits or Limits()
    metrics = Metrics()
    service = _Service(model, limits, metrics)
    app = FastAPI(
        title=f"{model.description.name}: {model.description.task}",
        version=slimfuse_export.__version__,
        description="A finished slimfuse folder, served by onnxruntime.",
        docs_url=None,  # both would load scripts from elsewhere
        redoc_url=None,
        lifespan=service.lifespan,
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    _add_pages(app)
    _add_checks(app, service)
    _add_predict(app, service)
    paths = [str(getattr(route, "path", "")) for route in app.routes]
    app.add_middleware(Guard, limits=limits, metrics=metrics, token=token, paths=paths)
    return app


class _Service:
    """What the routes share."""

    def __init__(self, model: Deployed, limits: Limits, metrics: Metrics) -> None:
        self.model, self.limits, self.metrics = model, limits, metrics
        self.ready = False
        self.batcher: Batcher | None = None
        self.preparing: ThreadPoolExecutor | None = None

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the model once, then take requests until the server is told to stop."""
        self.model.answer([self.model.example()])
        batcher = Batcher(
            self.model.answer_each,
            rows=self.limits.batch,
            wait=self.limits.wait_ms / 1000,
            queue=self.limits.queue,
            observe=self.metrics.batch,
        )
        self.metrics.waiting.set_function(lambda: len(batcher))
        # so many images are decoded at once, which bounds the memory
        with ThreadPoolExecutor(cores_allowed(), thread_name_prefix="prepare") as self.preparing:
            async with batcher as self.batcher:
                self.ready = True
                yield
                self.ready = False

    async def answers(self, items: Sequence[str | bytes], options: Options) -> JSONResponse:
        """Return the response for one request's inputs."""
        started = time.perf_counter()
        assert self.batcher is not None
        try:
            async with asyncio.timeout(self.limits.seconds):
                rows = [await self._prepared(i, item, options) for i, item in enumerate(items)]
                found = await self.batcher.submit(rows)
        except QueueFull:
            raise HTTPException(429, "too many inputs wait", _RETRY) from None
        except TimeoutError:
            raise HTTPException(
                503, f"the answer took longer than {self.limits.seconds:g} seconds", _RETRY
            ) from None
        for i, answer in enumerate(found):
            if isinstance(answer, ExportError):
                raise HTTPException(422, _told(i, answer))
        spent = round(1000 * (time.perf_counter() - started), 3)
        return JSONResponse({"answers": found, "milliseconds": spent})

    async def _prepared(self, index: int, item: str | bytes, options: Options) -> Any:
        def prepare() -> Any:
            return self.model.prepare(item, options, most_pixels=self.limits.pixels)

        try:
            return await asyncio.get_running_loop().run_in_executor(self.preparing, prepare)
        except ExportError as error:
            raise HTTPException(422, _told(index, error)) from None


def _add_pages(app: FastAPI) -> None:
    for path, (name, kind) in PAGES.items():
        app.add_api_route(path, _page(name, kind), include_in_schema=False)


def _page(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = files("slimfuse_export.serving").joinpath("page", name).read_bytes()

    async def endpoint() -> Response:
        return Response(content, media_type=kind, headers={"Content-Security-Policy": POLICY})

    return endpoint


def _add_checks(app: FastAPI, service: _Service) -> None:
    bearer = [Security(HTTPBearer(auto_error=False))]  # for OpenAPI: the guard looks at the token

    @app.get("/health")
    async def health() -> schemas.Health:
        """Say that the process answers."""
        return schemas.Health(status="ok")

    @app.get("/ready", responses={503: {"model": schemas.Health}})
    async def ready() -> Response:
        """Say whether the model has run and requests are taken."""
        status, code = ("ready", 200) if service.ready else ("not ready", 503)
        return JSONResponse({"status": status}, code)

    @app.get(
        "/metrics",
        dependencies=bearer,
        responses={401: _REFUSED[401]},
        response_class=PlainTextResponse,
    )
    async def counted() -> Response:
        """Return counters and histograms for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/model", dependencies=bearer, responses={401: _REFUSED[401]})
    async def about() -> schemas.About:
        """Say what the model is and what it takes."""
        told, limits = service.model.description, service.limits
        return schemas.About(
            name=told.name,
            task=told.task,
            input="image" if service.model.takes_images else "text",
            labels=list(told.labels),
            int8=service.model.int8,
            mask=service.model.mask,
            limits={
                "body_bytes": limits.body_bytes,
                "pixels": limits.pixels,
                "characters": limits.characters,
                "inputs": limits.inputs,
            },
        )


def _add_predict(app: FastAPI, service: _Service) -> None:
    model, limits = service.model, service.limits
    bearer = [Security(HTTPBearer(auto_error=False))]
    shape: Any = schemas.request_model(model, limits)
    responses = {200: {"model": schemas.answers_model(model)}, **_REFUSED}

    @app.post("/predict", dependencies=bearer, responses=responses)
    async def predict(body: shape) -> Response:
        """Predict texts; or images, their files in base64."""
        given = body.model_dump()
        inputs = given.pop("inputs")
        items: list[Any] = [inputs] if isinstance(inputs, str) else inputs
        if model.takes_images:
            items = [_decoded(i, item) for i, item in enumerate(items)]
        return await service.answers(items, Options(**given))

    if not model.takes_images:
        return

    @app.post("/predict/images", dependencies=bearer, responses=responses)
    async def predict_images(
        files: list[UploadFile],
        top_k: Annotated[int, Query(ge=1, le=schemas.MOST_TOP_K)] = 5,
    ) -> Response:
        """Predict uploaded images."""
        if len(files) > limits.inputs:
            raise HTTPException(422, f"got {len(files)} files; allowed {limits.inputs}")
        items = [await file.read() for file in files]
        return await service.answers(items, Options(top_k=top_k))


def _decoded(index: int, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise HTTPException(422, f"input {index}: not base64") from None


def _told(index: int, error: ExportError) -> str:
    """Return which input is wrong and why, in one line; raises where the model is at fault."""
    if isinstance(error, CheckFailed):
        raise error
    parts = [error.what]
    parts += [f"{name} {value}" for name, value in (("got", error.got), ("allowed", error.allowed))
              if value is not None]  # fmt: skip
    return _plain(f"input {index}: {'; '.join(parts)}")


def _plain(text: str) -> str:
    """Return a text that can be sent: short, and without lone surrogates of a client's."""
    return text[:500].encode("utf-8", errors="replace").decode()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Name what is not legal, without repeating it: it may be huge, or no JSON."""
    assert isinstance(error, RequestValidationError)
    told = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
    unread = any(e["type"] == "json_invalid" for e in error.errors())
    return JSONResponse({"detail": _plain("; ".join(told))}, 400 if unread else 422)
