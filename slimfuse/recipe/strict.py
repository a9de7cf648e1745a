"""The strict frozen base of every recipe model, and the types its fields share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from slimfuse.recipe.problems import Loc

T = TypeVar("T")
BY_SCHEMA = "by the schema"  # a Finding's `allowed` that the field's own schema states
FINDING = "recipe"  # pydantic's `type` of our own errors; their ctx holds the Finding's fields


@dataclass(frozen=True)
class Finding:
    """A broken rule; `loc` is relative to the model or the field that has the rule."""

    loc: Loc
    what: str
    meant: str | None = None
    allowed: str | None = None

    def error(self) -> PydanticCustomError:
        """Return it as an error for pydantic."""
        context = {"what": self.what, "meant": self.meant, "allowed": self.allowed}
        return PydanticCustomError(FINDING, "{what}", context)

    def at(self, data: Any) -> InitErrorDetails:
        """Return it as one of several errors, with the value that it is about."""
        for key in self.loc:
            if isinstance(data, dict):
                data = data.get(key)
            elif isinstance(data, list | tuple) and isinstance(key, int) and key < len(data):
                data = data[key]
            else:
                data = None
        return InitErrorDetails(type=self.error(), loc=self.loc, input=data)


class Strict(BaseModel):
    """Frozen, no unknown key, no silent conversion, no infinite number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def cross_check(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Return the broken rules between keys; `raw` may hold values of wrong types."""
        return []

    @model_validator(mode="wrap")
    @classmethod
    def _report_all(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # pydantic's "after" validators are skipped when any field is wrong: the user would meet
        # the rules between keys only on the next try
        details: list[InitErrorDetails] = []
        try:
            model = handler(data)
        except ValidationError as error:
            raw = data
            findings = cls.cross_check(raw) if isinstance(raw, dict) else []
            if not findings:
                raise
            details = [_again(item) for item in error.errors(include_url=False)]
        else:
            raw = model.model_dump(by_alias=True)
            findings = cls.cross_check(raw)
            if not findings:
                return model
        details += [found.at(raw) for found in findings]
        raise ValidationError.from_exception_data(cls.__name__, details)


def _again(item: Any) -> InitErrorDetails:
    """Return an error that pydantic listed in the form in which it takes it back."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == FINDING:
        kind = PydanticCustomError(FINDING, "{what}", context)
    return InitErrorDetails(type=kind, loc=item["loc"], input=item["input"], ctx=context)


SLUG = r"^(?!.*\.\.)[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9_-])?$"
DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")


def _slug(text: str) -> str:
    """Return a name that is a folder's on any disk; in lower case, so that no two are one there."""
    if not re.fullmatch(SLUG[1:-1], text):
        allowed = (
            "1 to 64 of a-z 0-9 . _ -, the first a letter or digit, the last no dot, without '..'"
        )
        raise Finding((), "not a usable name", allowed=allowed).error()
    if DEVICE.fullmatch(text):
        allowed = "any but con, prn, aux, nul, com0-9 and lpt0-9, with or without a dot behind"
        raise Finding((), "is a device's name on Windows, no folder's", allowed=allowed).error()
    return text


def _text(text: str) -> str:
    # a control character spoils a terminal, and not every YAML writer can quote it
    if not text or any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text):
        raise Finding((), "not a usable text", allowed="text without control characters").error()
    return text


def _location(text: str) -> str:
    if re.match(r"~[^/]", text):
        allowed = "a path without another user's home (~user)"
        raise Finding((), "not a usable path", allowed=allowed).error()
    return _text(text)


def _shard(text: str) -> str:
    match = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", text, re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise Finding((), "not a shard", allowed="'i/n' with 1 <= i <= n, as in '1/2'").error()
    return text


def _size(value: Any) -> Any:
    if (type(value) is int and value >= 1) or (type(value) is float and 0 < value <= 1):
        return value
    raise Finding((), "not a size", allowed=BY_SCHEMA).error()


def _exact_int(value: Any) -> Any:
    if type(value) is not int:  # Literal[1] alone takes true and 1.0, which equal 1
        raise Finding((), "not an integer", allowed=BY_SCHEMA).error()
    return value


def as_tuple(value: Any) -> Any:
    """Return a YAML list as the tuple that a frozen model holds."""
    return tuple(value) if isinstance(value, list) else value


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise Finding((), "an item stands twice", allowed="each item once").error()
    return values


Slug = Annotated[str, AfterValidator(_slug), Field(json_schema_extra={"pattern": SLUG})]
Location = Annotated[str, AfterValidator(_location), Field(json_schema_extra={"minLength": 1})]
Shard = Annotated[
    str, AfterValidator(_shard), Field(json_schema_extra={"pattern": "^[1-9][0-9]*/[1-9][0-9]*$"})
]
Size = Annotated[
    int | float,
    PlainValidator(_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            ]
        }
    ),
]
ExactInt = BeforeValidator(_exact_int)
Listed = Annotated[tuple[T, ...], BeforeValidator(as_tuple)]
Distinct = Annotated[
    tuple[T, ...],
    BeforeValidator(as_tuple),
    AfterValidator(_distinct),
    Field(json_schema_extra={"uniqueItems": True}),
]
Several = Annotated[
    tuple[T, ...],
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    BeforeValidator(as_tuple),
    AfterValidator(_distinct),
]
Augment = Distinct[Literal["flip", "shift", "erase", "rand-augment"]]
Text = Annotated[str, AfterValidator(_text), Field(json_schema_extra={"minLength": 1})]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
