"""Trained parents that benchmarks share: found under runs/, or trained there on first use."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from weights import minilm
from wordnet import halves, tiny_halves, trained
from zoo import ZOO, anchor, fashion, some_classes

WORDNET = ZOO.parent / "bench-wordnet"
SHARED = ("runtime.threads=1", "gates=[]")
BERT_TINY = tuple(f"bench-wordnet/tiny/stages/parent-{name}-*" for name in "ab")
MINILM = tuple(f"bench-wordnet/stages/parent-{name}-*" for name in "ab")


def maker(pattern: str) -> Callable[[], object] | None:
    """Return what trains the parent of a pattern, None of one that nothing here makes."""
    if found := re.fullmatch(r"zoo/fashion-(\d+)-([ab])", pattern):
        return lambda: fashion(int(found[1]), "ab".index(found[2]))
    if found := re.fullmatch(r"zoo/anchor-(\d+)", pattern):
        return lambda: anchor(int(found[1]))
    if found := re.fullmatch(r"zoo/classes-(\d)-(\d)-seed-(\d+)", pattern):
        first, last, seed = map(int, found.groups())
        return lambda: some_classes(seed, first, last + 1 - first)
    if pattern in BERT_TINY:
        return lambda: trained(SHARED, tiny_halves(SHARED), WORDNET / "tiny")
    if pattern in MINILM:
        return lambda: trained(SHARED, halves(SHARED, minilm()), WORDNET)
    return None


def parent_folder(runs: Path, pattern: str) -> Path:
    """Return the one folder of a pattern under `runs`, trained first where it isn't there yet."""
    for make in (maker(pattern), None):
        found = [f for f in runs.glob(pattern) if f.suffix != ".partial"]
        if len(found) == 1:
            return found[0].resolve()
        if make is None or found or runs.resolve() != ZOO.parent.resolve():
            break
        make()
    raise SystemExit(f"{pattern}: {len(found)} in {runs}, one is needed")
