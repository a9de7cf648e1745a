"""Data sources: one function each, all returning `ImageData`."""

from slimfuse.data.base import Image, ImageData, Split
from slimfuse.data.digits import load_digits
from slimfuse.data.fashion_mnist import load_fashion_mnist
from slimfuse.data.hub import load_hub

__all__ = ["Image", "ImageData", "Split", "load_digits", "load_fashion_mnist", "load_hub"]
