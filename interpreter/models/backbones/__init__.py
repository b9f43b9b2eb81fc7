"""Frozen feature extractors behind one interface: frames in, patch tokens out."""

from .base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from .efficientnet import EfficientNetLite0
from .load import load_backbone
from .vit import VisionTransformer

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Backbone",
    "EfficientNetLite0",
    "VisionTransformer",
    "load_backbone",
]
