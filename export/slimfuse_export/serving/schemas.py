"""What requests and answers look like, by task; OpenAPI is made of these."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from slimfuse_export.deployed import Deployed
from slimfuse_export.serving.limits import Limits

MOST_TOP_K = 100
MOST_SEED = 2**53 - 1  # what JavaScript counts exactly


class Strict(BaseModel):
    """No conversions and no unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Health(BaseModel):
    """That the service, or its model, is up."""

    status: str


class Score(BaseModel):
    """A class and its probability."""

    label: str
    score: float


class TokenScore(BaseModel):
    """A token in a mask's place, and its probability."""

    token: str
    score: float


class Label(BaseModel):
    """The likeliest class, and the best with their probabilities."""

    label: str
    score: float
    scores: list[Score]
    truncated: bool | None = None


class Labels(BaseModel):
    """The classes of probability ½ or more, and the best with their probabilities."""

    labels: list[str]
    scores: list[Score]
    truncated: bool | None = None


class Number(BaseModel):
    """A number, or several by name."""

    value: float | None = None
    values: dict[str, float] | None = None
    truncated: bool | None = None


class Embedding(BaseModel):
    """One vector."""

    embedding: list[float]
    truncated: bool | None = None


class Features(BaseModel):
    """A vector of every token or patch."""

    features: list[list[float]]
    truncated: bool | None = None


class Filled(BaseModel):
    """The text with its masks filled, and the best tokens of each mask."""

    text: str
    masks: list[list[TokenScore]]
    truncated: bool | None = None


class Continued(BaseModel):
    """The text behind the prompt; finish: end, length or limit (of the model)."""

    text: str
    tokens: int
    finish: str


class About(BaseModel):
    """The model and what it takes."""

    name: str
    task: str
    input: str
    labels: list[str]
    int8: bool
    mask: str | None
    limits: dict[str, float]


def answer_model(model: Deployed) -> type[BaseModel]:
    """Return what one answer of a model looks like."""
    told = model.description
    if told.task in ("sentence-embedding", "feature-extraction"):
        return Features if told.pooling == "none" else Embedding
    if told.task == "masked-lm":
        return Filled
    if told.task == "causal-lm":
        return Continued
    if told.problem == "regression":
        return Number
    return Labels if told.problem == "multi" else Label


def answers_model(model: Deployed) -> type[BaseModel]:
    """Return what a response looks like: one answer an input, in order."""
    each: Any = answer_model(model)
    return create_model(
        "Answers",
        answers=(list[each], ...),
        milliseconds=(Annotated[float, Field(ge=0)], ...),
        __doc__="One answer for each input, in order, and the time from the request's end on.",
    )


def request_model(model: Deployed, limits: Limits) -> type[BaseModel]:
    """Return what a JSON request looks like."""
    if model.takes_images:
        one: Any = Annotated[
            str, Field(min_length=1, json_schema_extra={"contentEncoding": "base64"})
        ]
    else:
        one = Annotated[str, Field(max_length=limits.characters)]
    several: Any = Annotated[list[one], Field(min_length=1, max_length=limits.inputs)]
    keys: dict[str, Any] = {"inputs": (one | several, ...)}
    task = model.description.task
    if task == "causal-lm":
        keys |= {
            "max_new_tokens": (Annotated[int, Field(ge=1, le=limits.new_tokens)], 32),
            "temperature": (Annotated[float, Field(ge=0, le=100)], 0.0),
            "seed": (Annotated[int, Field(ge=0, le=MOST_SEED)], 0),
        }
    elif task not in ("sentence-embedding", "feature-extraction"):
        keys["top_k"] = (Annotated[int, Field(ge=1, le=MOST_TOP_K)], 5)
    if not model.takes_images and task != "causal-lm":
        keys["truncate"] = (bool, True)
    return create_model("Inputs", __base__=Strict, __doc__="What to predict.", **keys)
