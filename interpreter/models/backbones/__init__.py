"""Feature extractors behind one interface: frames in, patch tokens out."""

from .base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from .depth import depth_factors
from .efficientnet import EfficientNetLite0
from .load import load_backbone
from .trainable import trainable
from .vit import VisionTransformer

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Backbone",
    "EfficientNetLite0",
    "VisionTransformer",
    "depth_factors",
    "load_backbone",
    "trainable",
]
