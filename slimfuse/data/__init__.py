"""Data sources: one function each, all returning a `DataSet`."""

from slimfuse.data.base import DataSet, Image, ImageData, Split, TextData
from slimfuse.data.digits import load_digits
from slimfuse.data.fashion_mnist import load_fashion_mnist
from slimfuse.data.hub import load_hub
from slimfuse.data.texts import load_texts
from slimfuse.data.wordnet import load_wordnet

__all__ = [
    "DataSet", "Image", "ImageData", "Split", "TextData", "load_digits", "load_fashion_mnist",
    "load_hub", "load_texts", "load_wordnet",
]  # fmt: skip
