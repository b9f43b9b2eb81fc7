"""Programs: the parts of a trained method that run outside of this package (``python -m interpreter.export``).

A program is a module that maps tensors to tensors. It draws no random numbers, reads no files and has no loop over a
video: the caller passes noise and state as inputs. Each method lists its programs in
:meth:`interpreter.methods.base.Segmenter.programs`. Two of them, below, are the same for all methods: the backbone, and
label maps from masks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpreter.models.backbones import Backbone

FRAMES = "T"  # the dimension of frames, which may have any size in every program


@dataclass(frozen=True)
class Input:
    """An input of a program.

    Attributes:
        example: a tensor of its type and shape. Open dimensions with the same name have the same size in all inputs.
        dims: a name for each dimension, in capital letters: "T M C". Those in ``Program.open`` may have any size.
        about: one line about it, for the list of programs.
    """

    example: Tensor
    dims: str
    about: str


@dataclass(frozen=True)
class Program:
    """A module with example inputs.

    Attributes:
        name: name of its file.
        about: what it computes, in one line.
        module: called with the inputs in order; returns a tensor, or a tuple of tensors.
        inputs: the inputs by name, in order.
        outputs: for the name of each output, in order, its dimensions and a description, such as
            ``"slots": "T N D: image slots"``.
        open: names of the dimensions that may have any size from 1 on (T without limit, others up to 1024). All other
            dimensions are fixed.
    """

    name: str
    about: str
    module: nn.Module
    inputs: Mapping[str, Input]
    outputs: Mapping[str, str]
    open: tuple[str, ...] = (FRAMES,)

    def shape(self, name: str) -> list[int | str]:
        """Shape of an input: the size of each fixed dimension, and the name of each open one."""
        each = self.inputs[name]
        named = zip(each.dims.split(), each.example.shape, strict=True)
        return [dim if dim in self.open else size for dim, size in named]


class Features(nn.Module):
    """A backbone as a module whose input are frames."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, frames: Tensor) -> Tensor:
        """Features [T, M, C] of frames uint8 [T, H, W, 3]."""
        return self.backbone.features(frames)


class Labels(nn.Module):
    """Label maps from soft masks of patches, as with ``--edges none``: bilinear upsampling, then the largest mask.

    Args:
        grid: patch grid (h, w).
        size: (H, W) of the label maps.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.size = grid, size

    def forward(self, masks: Tensor) -> Tensor:
        """Segment of each pixel, int64 [T, H, W], from masks [T, M, S]."""
        maps = masks.mT.unflatten(2, self.grid)
        return F.interpolate(maps, self.size, mode="bilinear", align_corners=False).argmax(1)


def backbone_program(backbone: Backbone, frame_size: tuple[int, int]) -> Program:
    """Program from frames to features."""
    frames = torch.randint(256, (3, *frame_size, 3), device=backbone.device).byte()
    grid = backbone.grid(frame_size)
    return Program(
        "backbone",
        "frames to features of their patches",
        Features(backbone),
        {"frames": Input(frames, "T H W 3", "RGB frames")},
        {"features": f"T M C: features of the {grid[0]}x{grid[1]} patches, row by row"},
    )


def labels_program(grid: tuple[int, int], size: tuple[int, int], device: torch.device) -> Program:
    """Program from soft masks of patches to label maps of ``size`` (H, W)."""
    masks = torch.randn(3, grid[0] * grid[1], 5, device=device).softmax(-1)
    return Program(
        "labels",
        "soft masks of patches to the segment of each pixel (bilinear, then the largest)",
        Labels(grid, size),
        {"masks": Input(masks, "T M S", "soft masks, each row over S sums to 1")},
        {"labels": "T H W: number of the segment, from 0"},
        (FRAMES, "S"),
    )
