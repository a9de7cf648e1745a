"""A finished folder, opened to be used: raw texts or images in, labels, scores, embeddings out."""

from slimfuse_export.deployed.description import POOLINGS, Description, Pooling, describe
from slimfuse_export.deployed.images import FORMATS, ImagePreparation, open_image, read_preparation
from slimfuse_export.deployed.model import Deployed, open_deployed
from slimfuse_export.deployed.options import Options
from slimfuse_export.deployed.texts import TextPreparation, Tokens, read_tokenizer

__all__ = [
    "FORMATS",
    "POOLINGS",
    "Deployed",
    "Description",
    "ImagePreparation",
    "Options",
    "Pooling",
    "TextPreparation",
    "Tokens",
    "describe",
    "open_deployed",
    "open_image",
    "read_preparation",
    "read_tokenizer",
]
