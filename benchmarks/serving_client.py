"""Clients of the service: many that ask properly, and one that sends whatever is wrong."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from PIL import Image

PATIENCE = 120  # seconds for one answer


@dataclass(frozen=True)
class Service:
    """A service that runs: its process and port."""

    process: psutil.Process
    port: int

    @property
    def megabytes(self) -> float:
        """What it holds in memory."""
        return float(self.process.memory_info().rss) / 2**20


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[Service]:
    """Run `slimfuse-export serve` on a free port."""
    command = [sys.executable, "-m", "slimfuse_export", "serve", str(folder), "--port", "0", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = ""
            while not (found := re.search(r"at http://\S+:(\d+)", said)):
                line = process.stderr.readline()
                assert line, said
                said += line
            service = Service(psutil.Process(process.pid), int(found[1]))
            asyncio.run(_until_ready(service.port))
            yield service
        finally:
            process.terminate()
            _, rest = process.communicate(timeout=60)
            if process.returncode != 0:
                print(rest, file=sys.stderr)


async def _until_ready(port: int) -> None:
    for _ in range(1200):
        try:
            if await once(port, request("/ready", method="GET")) == 200:
                return
        except OSError:
            pass
        await asyncio.sleep(0.05)
    raise AssertionError("the service never got ready")


def request(
    path: str, body: bytes = b"", kind: str = "application/json", method: str = "POST"
) -> bytes:
    """Return a whole HTTP request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    if kind:
        head += f"Content-Type: {kind}\r\n"
    return head.encode("latin-1") + b"\r\n" + body


async def once(port: int, raw: bytes) -> int:
    """Send one request over a connection of its own; return the status, 0 without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        await writer.drain()
        status, _ = await asyncio.wait_for(_answer(reader), PATIENCE)
        return status
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    body = await reader.readexactly(int(length[1])) if length else b""
    return int(head.split(b" ", 2)[1]), body


@dataclass
class Load:
    """What many clients saw."""

    seconds: float = 0.0
    milliseconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.milliseconds) / self.seconds

    @property
    def errors(self) -> int:
        """Requests that got no proper answer."""
        return sum(n for status, n in self.statuses.items() if status != 200)


async def load(port: int, raws: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Let clients ask one request after the other, each over one connection."""
    found = Load()
    begin = time.perf_counter()
    end = begin + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        try:
            while (sent := time.perf_counter()) < end:
                writer.write(raws[turn % len(raws)])
                turn += 1
                status, _ = await asyncio.wait_for(_answer(reader), PATIENCE)
                found.statuses[status] += 1
                if status == 200:
                    found.milliseconds.append(1000 * (time.perf_counter() - sent))
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            found.statuses[0] += 1
        finally:
            writer.close()

    await asyncio.gather(*(client(i) for i in range(clients)))
    found.seconds = time.perf_counter() - begin
    return found


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    """Return an image file."""
    out = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(out, kind)
    return out.getvalue()


def bomb(side: int) -> bytes:
    """Return a small PNG of side × side pixels: black, and packed a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (1 + side)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(k, d) for k, d in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


def uploaded(content: bytes, name: str = "files") -> tuple[bytes, str]:
    """Return a multipart body with one file, and its content type."""
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'
    return head.encode() + content + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"


class Malformed:
    """Requests none of which is right, drawn at random; `kinds` tells what there is."""

    def __init__(self, seed: int, *, images: bool) -> None:
        self._rng = random.Random(seed)
        self._images = images
        self._bombs = [bomb(side) for side in (5000, 20_000)]
        self._whole = [picture(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP")]
        self.kinds = {
            "wrong types": self._wrong_types,
            "bad UTF-8": self._bad_utf8,
            "broken JSON": self._broken_json,
            "deep JSON": self._deep_json,
            "huge string": self._huge_string,
            "too large a body": self._too_large,
            "wrong content type": self._content_type,
            "broken multipart": self._multipart,
            "no HTTP": self._no_http,
            "wrong path or method": self._elsewhere,
        }
        if images:
            self.kinds |= {
                "truncated image": self._truncated,
                "damaged image": self._damaged,
                "decompression bomb": self._bomb,
                "no image": self._no_image,
            }

    def draw(self) -> tuple[str, bytes]:
        """Return a kind and a request of it."""
        name = self._rng.choice(list(self.kinds))
        return name, self.kinds[name]()

    def _noise(self, most: int = 300) -> bytes:
        return self._rng.randbytes(self._rng.randint(1, most))

    def _wrong_types(self) -> bytes:
        wrong = self._rng.choice([None, 1, -1.5, True, [], {}, [1], [None], [[]], {"a": "b"}])
        key = self._rng.choice(["inputs", "top_k", "x"])
        body = {"inputs": "a", key: wrong} if key != "x" else {"inputs": "a", "x": wrong}
        if key == "top_k" and wrong == 1:
            body["top_k"] = 0
        return request("/predict", json.dumps(body).encode())

    def _bad_utf8(self) -> bytes:
        bad = self._rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\\ud800", b"\xf8\x88"])
        return request("/predict", b'{"inputs": "' + bad + b'"}')

    def _broken_json(self) -> bytes:
        body = self._rng.choice([b"{", b"", b'{"inputs": ', b"NaN", b"[1,]", b"{'inputs': 'a'}"])
        return request("/predict", self._rng.choice([body, self._noise()]))

    def _deep_json(self) -> bytes:
        depth = self._rng.choice([200, 5000, 200_000])
        left, right = self._rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        return request("/predict", b'{"inputs": ' + left * depth + b"1" + right * depth + b"}")

    def _huge_string(self) -> bytes:
        length = self._rng.choice([100_001, 1_000_000, 5_000_000])
        return request("/predict", b'{"inputs": "' + b"!" * length + b'"}')

    def _too_large(self) -> bytes:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        if self._rng.random() < 0.5:
            return head + b"Content-Length: 99999999999\r\n\r\n{"
        block = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"  # chunks, without a length
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + block * 9 + b"0\r\n\r\n"

    def _content_type(self) -> bytes:
        kind = self._rng.choice(["", "text/plain", "image/png", "a/b; charset=\xff", "x" * 2000])
        return request("/predict", b'{"inputs": "a"}', kind)

    def _multipart(self) -> bytes:
        path = "/predict/images" if self._images else "/predict"
        body, kind = uploaded(self._noise(), self._rng.choice(["files", "x", "\r\n", "\0"]))
        cut = body[: self._rng.randint(0, len(body) - 1)]
        wrong = self._rng.choice([kind, "multipart/form-data", "multipart/form-data; boundary="])
        return request(path, cut, wrong)

    def _no_http(self) -> bytes:
        line = self._rng.choice([b"GET / HTTP/9.9", b"\0\0\0\0", b"POST", self._noise(80)])
        return line + b"\r\nHost x\r\n\r\n\r\n\r\n"

    def _elsewhere(self) -> bytes:
        path = self._rng.choice(["/none", "/predict/../model", "/%00", "/" + "x" * 3000, "//"])
        return request(path, b"x", method=self._rng.choice(["POST", "PUT", "DELETE", "PATCH"]))

    def _image(self, content: bytes) -> bytes:
        if self._rng.random() < 0.5:
            return request("/predict/images", *uploaded(content))
        coded = base64.b64encode(content).decode()
        return request("/predict", json.dumps({"inputs": coded}).encode())

    def _truncated(self) -> bytes:
        content = self._rng.choice(self._whole)
        return self._image(content[: self._rng.randint(1, len(content) * 3 // 4)])

    def _damaged(self) -> bytes:
        content = bytearray(self._rng.choice(self._whole))
        for _ in range(20):
            content[self._rng.randrange(len(content))] = self._rng.randrange(256)
        content[:4] = self._rng.randbytes(4)
        return self._image(bytes(content))

    def _bomb(self) -> bytes:
        return self._image(self._rng.choice(self._bombs))

    def _no_image(self) -> bytes:
        return self._image(self._noise())
