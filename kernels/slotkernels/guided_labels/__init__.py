"""Label maps whose edges follow the edges of the frame: soft masks through a fast guided filter, then the argmax."""

from .op import bytes_moved, flops, guided_labels

__all__ = ["bytes_moved", "flops", "guided_labels"]
