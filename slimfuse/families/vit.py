"""Hugging Face ViT (Dosovitskiy et al. 2021, arXiv 2010.11929): pre-norm, class token."""

from __future__ import annotations

from slimfuse.families.encoder import ImageEncoder


class ViT(ImageEncoder):
    """`ViTForImageClassification` with any width, depth, heads and MLP width."""

    name = body = "vit"
    stock = "ViTForImageClassification"
