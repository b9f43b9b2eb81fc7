"""The interface of a feature extractor."""

import abc

import torch
from slotkernels.ranges import annotate
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module, abc.ABC):
    """A network that turns frames into patch tokens. Always in evaluation mode.

    It is frozen, except for the copy that :func:`trainable` makes. Subclasses implement :meth:`tokens`. They also
    implement :meth:`kept_tokens` if they can drop tokens inside, and :meth:`scaled_tokens` if they can leave out
    branches of blocks.

    Args:
        dim: width D of the features.
        patch: side of a patch in pixels.
        mean: mean of each channel, for RGB in [0, 1].
        std: standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, patch: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.dim, self.patch = dim, patch
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """The device of the weights, which it computes on."""
        return self.mean.device

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    def settings(self) -> dict[str, object]:
        """All that the features depend on besides weights and buffers, as JSON types."""
        return {"type": type(self).__name__, "patch": self.patch}

    def grid(self, frame_size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (h, w) of frames of ``frame_size`` (H, W).

        Raises:
            ValueError: if a side is not a positive multiple of the patch.
        """
        if any(side < self.patch or side % self.patch for side in frame_size):
            nearest = tuple(max(1, round(side / self.patch)) * self.patch for side in frame_size)
            raise ValueError(
                f"frame size {frame_size[0]}x{frame_size[1]} is not a multiple of this backbone's patch of "
                f"{self.patch} pixels; the nearest is --frame-size {nearest[0]} {nearest[1]}"
            )
        return frame_size[0] // self.patch, frame_size[1] // self.patch

    @torch.no_grad()
    def features(self, frames: Tensor, keep: Tensor | None = None) -> Tensor:
        """Patch tokens [B, M, D] (fp32, row by row of the patch grid) of RGB frames uint8 [B, H, W, 3].

        Args:
            frames: the frames.
            keep: numbers [B, M'] int64 of the patches to keep, ascending in each frame, 1 <= M' <= M. All other patches
                are dropped before the transformer's blocks, which saves time: the kept ones attend only to each other
                and to the class and register tokens. The values are checked if ``keep`` is on the CPU.

        Returns:
            [B, M, D], or [B, M', D] of the patches in ``keep``.

        Raises:
            ValueError: if the frames have another type or shape, their size is not a multiple of the patch, ``keep`` is
                not as described, or the backbone cannot drop patches.
        """
        height, width = self._checked_grid(frames)
        if keep is not None:
            self.require_dropping()
            _check_kept(keep, len(frames), height * width)
        with annotate("backbone"):
            x = self._normalised(frames)
            return (self.tokens(x) if keep is None else self.kept_tokens(x, keep.to(x.device))).float()

    def encode(self, frames: Tensor, depth: Tensor | None = None) -> Tensor:
        """The same as :meth:`features`, with gradients if parameters need them; see :func:`trainable`.

        Args:
            frames: uint8 [R, H, W, 3], RGB.
            depth: factors [R, L, 2] of the attention and the MLP branch of each of the L = ``num_blocks`` blocks, for
                stochastic depth; see :func:`depth_factors`. Default: all 1.

        Returns:
            [R, M, D] fp32.

        Raises:
            ValueError: as :meth:`features`, or if ``depth`` has another shape, or the backbone is not a plain
                transformer.
        """
        self._checked_grid(frames)
        if depth is not None:
            self.require_depth()
            if depth.shape != (len(frames), self.num_blocks, 2):
                raise ValueError(f"depth must be [{len(frames)}, {self.num_blocks}, 2], got {list(depth.shape)}")
        with annotate("backbone"):
            x = self._normalised(frames)
            return (self.tokens(x) if depth is None else self.scaled_tokens(x, depth)).float()

    def _checked_grid(self, frames: Tensor) -> tuple[int, int]:
        """Patch grid of frames, after checking their type and shape."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [B, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
        return self.grid((frames.shape[1], frames.shape[2]))

    def _normalised(self, frames: Tensor) -> Tensor:
        return (frames.permute(0, 3, 1, 2).float() - self.mean) / self.std

    @property
    def num_blocks(self) -> int:
        """Number of blocks L of a transformer."""
        return 0

    @property
    def native_size(self) -> tuple[int, int]:
        """A frame size (H, W) that it accepts; for a transformer, the size that it was trained on."""
        return 2 * self.patch, 2 * self.patch

    @abc.abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """Patch tokens [B, M, D] of normalised frames [B, 3, H, W]."""

    def kept_tokens(self, x: Tensor, keep: Tensor) -> Tensor:
        """Patch tokens [B, M', D] of the patches ``keep`` [B, M'] alone; see :meth:`features`."""
        raise NotImplementedError

    def scaled_tokens(self, x: Tensor, depth: Tensor) -> Tensor:
        """Patch tokens [B, M, D] with the branches of the blocks multiplied by ``depth``; see :meth:`encode`."""
        raise NotImplementedError

    def require_dropping(self) -> None:
        """Check that the backbone can drop patches (see :meth:`kept_tokens`).

        Raises:
            ValueError: if it cannot. The message says which option to use instead.
        """
        raise ValueError(
            f"{type(self).__name__} is no vision transformer, so patches cannot be dropped inside it; use "
            "--token-drop-at features"
        )

    def require_depth(self) -> None:
        """Check that the backbone supports stochastic depth (see :meth:`scaled_tokens`).

        Raises:
            ValueError: if it does not. The message says which option to use instead.
        """
        raise ValueError(
            f"{type(self).__name__} is no vision transformer, so branches cannot be left out inside it; use "
            "--drop-path 0"
        )


def _check_kept(keep: Tensor, count: int, patches: int) -> None:
    """Raise ValueError unless ``keep`` has numbers of patches for ``count`` frames with ``patches`` patches each."""
    fits = keep.dtype == torch.int64 and keep.ndim == 2 and len(keep) == count and 1 <= keep.shape[1] <= patches
    if not fits:
        raise ValueError(
            f"keep must be int64 [{count}, 1 to {patches}] for {count} frames of {patches} patches, got {keep.dtype} "
            f"{tuple(keep.shape)}"
        )
    # On a GPU, reading the values would make the host wait.
    if (
        keep.device.type == "cpu"
        and count
        and not (keep[:, 0].min() >= 0 and keep[:, -1].max() < patches and (keep.diff(dim=1) > 0).all())
    ):
        raise ValueError(f"each row of keep must hold ascending numbers from 0 to {patches - 1}, got {keep.tolist()}")
