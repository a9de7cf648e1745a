"""Saliency: how much would be lost if a unit went."""

from slimfuse.saliency.magnitude import magnitude

__all__ = ["magnitude"]
