"""Run the service until it is told to stop."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType

import uvicorn

from slimfuse_export.deployed import Deployed
from slimfuse_export.errors import ExportError
from slimfuse_export.serving.app import make_app
from slimfuse_export.serving.limits import Limits

_KEEP_ALIVE = 5  # seconds that an idle connection stays open


def serve(
    model: Deployed,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    drain_seconds: int = 30,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve a model until SIGTERM or SIGINT, then finish what was begun and return.

    port: 0 takes a free one. token: that clients must bear. drain_seconds: for requests that are
    under way when the signal comes; the rest is cut off. tell: is given the address, and a warning
    where others than this machine can ask without a token.
    Raises: ExportError where the address can't be had.
    """
    limits = limits or Limits()
    app = make_app(model, limits=limits, token=token)
    listening = _listen(host, port)
    if token is None and not _loopback(host):
        tell(
            f"warning: everyone who reaches {host} may ask this model; "
            "give a token or listen on 127.0.0.1"
        )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody's word is taken for who the client is
        limit_concurrency=limits.connections,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=drain_seconds,
        lifespan="on",
    )
    shown = f"[{host}]" if ":" in host else host
    tell(
        f"{model.description.name} ({model.description.task}) at "
        f"http://{shown}:{listening.getsockname()[1]}"
    )
    # uvicorn drains, puts these handlers back and raises the signal again
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server = uvicorn.Server(config)
        server.run(sockets=[listening])
        if not server.started:
            raise ExportError("the service could not start")
    except _Ended:
        return
    finally:
        listening.close()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Ended(BaseException):
    """The signal came; no handler of Exception may keep it."""


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2048)
    except (OSError, OverflowError) as error:
        found.close()
        raise ExportError(
            "the address can't be listened on",
            where=f"{host}:{port}",
            got=str(error),
            hint="take another --port, or an address of this machine as --host",
        ) from error
    return found


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
