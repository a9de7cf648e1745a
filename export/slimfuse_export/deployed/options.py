"""What a caller may ask of one input."""

from __future__ import annotations

from dataclasses import dataclass

from slimfuse_export.errors import ExportError


@dataclass(frozen=True)
class Options:
    """What is wanted of one input; what a task has no use for is ignored.

    top_k: classes, or tokens of each mask. truncate: cut texts that are too long, else refuse them.
    max_new_tokens, temperature, seed: of generated text; 0 takes the likeliest token, else the
    logits are divided by it and a token is drawn.
    Raises: ExportError for values that are not legal.
    """

    top_k: int = 5
    truncate: bool = True
    max_new_tokens: int = 32
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {value}"
            for name, value, legal in (
                ("top_k", self.top_k, self.top_k >= 1),
                ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1),
                ("temperature", self.temperature, 0 <= self.temperature <= 100),
                ("seed", self.seed, self.seed >= 0),
            )
            if not legal
        ]
        if wrong:
            raise ExportError(
                "an option is not legal",
                got=", ".join(wrong),
                allowed="top_k and max_new_tokens from 1, temperature 0 to 100, seed from 0",
            )
