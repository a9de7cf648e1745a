"""Data sources: one function each, all returning a `DataSet`."""

from slimfuse.data.anarchism import load_anarchism
from slimfuse.data.base import DataSet, Image, ImageData, Kind, Split, TextData, unlabelled
from slimfuse.data.digits import load_digits
from slimfuse.data.fashion_mnist import load_fashion_mnist
from slimfuse.data.hub import load_hub
from slimfuse.data.texts import load_texts
from slimfuse.data.vader import load_vader
from slimfuse.data.wordnet import load_wordnet

__all__ = [
    "DataSet", "Image", "ImageData", "Kind", "Split", "TextData", "load_anarchism", "load_digits",
    "load_fashion_mnist", "load_hub", "load_texts", "load_vader", "load_wordnet", "unlabelled",
]  # fmt: skip
