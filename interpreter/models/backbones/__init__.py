"""Frozen feature extractors behind one interface: frames in, patch tokens out."""

from .base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from .efficientnet import EfficientNetLite0
from .load import OFFLINE_OPTIONS, load_backbone
from .vit import VisionTransformer

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "OFFLINE_OPTIONS",
    "Backbone",
    "EfficientNetLite0",
    "VisionTransformer",
    "load_backbone",
]
