"""From what the graph gives to what the user asked for: labels, scores, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfuse_export.deployed.description import Description, Pooling
from slimfuse_export.deployed.texts import TextPreparation, Tokens
from slimfuse_export.errors import CheckFailed

Answer = dict[str, Any]
_DIGITS = 7  # of embeddings behind the point: more than float32 holds of values about one
_HALF = 0.5  # from which probability on one of several labels counts


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return probabilities along the last axis, computed in float64."""
    shifted = logits.astype(np.float64)
    shifted = np.exp(shifted - shifted.max(-1, keepdims=True))
    found: NDArray[np.float64] = shifted / shifted.sum(-1, keepdims=True)
    return found


def classified(logits: NDArray[Any], description: Description, top_k: int) -> Answer:
    """Return one input's answer of logits (classes,).

    single: label, score and the `top_k` best scores. multi: labels of probability ½ or more, and
    scores, which are sigmoids. regression: value, or values by name where there are several.
    """
    names = description.labels or tuple(f"LABEL_{i}" for i in range(len(logits)))
    if len(names) != len(logits):
        raise CheckFailed(
            "the model gives other classes than its config names",
            got=len(logits),
            allowed=len(names),
        )
    if description.problem == "regression":
        values = [float(v) for v in logits]
        return {"value": values[0]} if len(values) == 1 else {
            "values": dict(zip(names, values, strict=True))
        }  # fmt: skip
    if description.problem == "single":
        scores = softmax(logits)
    else:
        scores = 0.5 * (1 + np.tanh(logits.astype(np.float64) / 2))  # a sigmoid that can't overflow
    order = np.argsort(-scores, kind="stable")
    best = [{"label": names[i], "score": _short(scores[i])} for i in order[:top_k]]
    if description.problem == "single":
        return {**best[0], "scores": best}
    return {"labels": [names[i] for i in order if scores[i] >= _HALF], "scores": best}


def embedded(
    states: NDArray[Any], mask: NDArray[np.int64] | None, pooling: Pooling, unit: bool
) -> list[Answer]:
    """Return one answer a row of last hidden states (rows, tokens, d).

    mask: (rows, tokens) of real tokens, None where all are. Without pooling an answer holds every
    real token's state.
    """
    states = states.astype(np.float64)
    kept = np.ones(states.shape[:2]) if mask is None else mask
    if pooling == "none":
        return [
            {"features": row[: int(n)].round(_DIGITS).tolist()}
            for row, n in zip(states, kept.sum(1), strict=True)
        ]
    if pooling == "mean":
        share = kept[:, :, None]
        pooled = (states * share).sum(1) / np.maximum(share.sum(1), 1)
    else:
        pooled = states[:, 0]
    if unit:
        pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    return [{"embedding": row.round(_DIGITS).tolist()} for row in pooled]


def unmasked(logits: NDArray[Any], row: Tokens, preparation: TextPreparation, top_k: int) -> Answer:
    """Return the text with its masks filled, and the `top_k` best tokens of each mask.

    logits: (tokens, vocabulary) of one text.
    """
    places = [i for i, token in enumerate(row.ids) if token == preparation.mask]
    filled, masks = list(row.ids), []
    for place in places:
        scores = softmax(logits[place])
        order = np.argsort(-scores, kind="stable")[:top_k]
        filled[place] = int(order[0])
        masks.append([
            {"token": preparation.decode([int(i)]).strip() or preparation.token(int(i)),
             "score": _short(scores[i])}
            for i in order
        ])  # fmt: skip
    return {"text": preparation.decode(filled), "masks": masks}


def in_chunks(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Return the rows in order, `size` at a time."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _short(value: float) -> float:
    """Return a probability in six figures: what lies behind them is rounding error."""
    return float(f"{value:.6g}")
