"""What one client, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from slimfuse_export.errors import ExportError


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; whatever is beyond them is refused, never tried.

    body_bytes: of a request (413). pixels: of an image, characters: of a text, inputs: of one
    request, new_tokens: of a generated text (422). queue: inputs that wait or run (429). seconds:
    from the first byte of a request to its answer (408 while its body comes, then 503).
    connections: open at once (503). batch: inputs that run together. wait_ms: that an input waits
    for others to share its batch.
    """

    body_bytes: int = 8 * 2**20
    pixels: int = 20_000_000
    characters: int = 100_000
    inputs: int = 32
    new_tokens: int = 256
    queue: int = 256
    seconds: float = 30.0
    connections: int = 128  # × body_bytes: a GiB of bodies at most
    batch: int = 16
    wait_ms: float = 2.0

    def __post_init__(self) -> None:
        low = [
            f"{field.name} {value}"
            for field in fields(self)
            if not (value := getattr(self, field.name)) > 0
            and not (field.name == "wait_ms" and value == 0)
        ]
        if low:
            raise ExportError("a limit is not legal", got=", ".join(low), allowed="above 0")
        if self.queue < self.inputs:
            raise ExportError(
                "the queue is shorter than one request",
                got=f"queue {self.queue}",
                allowed=f"{self.inputs} inputs or more",
            )
