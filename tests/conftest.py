"""Fixtures that several tests share."""

from __future__ import annotations

import pytest
from tiny import random_vit
from torch import nn


@pytest.fixture
def vit() -> nn.Module:
    """A random float64 ViT."""
    return random_vit()
