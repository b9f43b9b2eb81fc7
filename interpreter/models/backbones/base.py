"""The interface of a feature extractor."""

import abc

import torch
from slotkernels.ranges import annotate
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module, abc.ABC):
    """A network that turns frames into patch tokens. Always in evaluation mode.

    It is frozen, except for the copy that :func:`trainable` makes. Subclasses implement :meth:`tokens` and, if tokens
    can be dropped inside, :meth:`kept_tokens`; if branches of blocks can be left out, :meth:`scaled_tokens`.

    Args:
        dim: width D of the features.
        patch: pixels per patch side.
        mean, std: per-channel normalisation of RGB in [0, 1].
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
        """Where its weights are, and where it computes."""
        return self.mean.device

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    def settings(self) -> dict[str, object]:
        """What the features depend on besides weights and buffers, in JSON's types."""
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
            keep: numbers [B, M'] int64 of patches, ascending in each frame, 1 <= M' <= M. All other patches are dropped
                before the transformer's blocks, which saves their cost: the kept ones attend to each other and to the
                class and register tokens alone. Checked in full if it is on the CPU.

        Returns:
            [B, M, D], or [B, M', D] of the patches in ``keep``.

        Raises:
            ValueError: if the frames are not of that type and shape, their size does not fit the patch, ``keep`` is
                none of the above, or the backbone cannot drop patches.
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
            ValueError: as :meth:`features`; if ``depth`` has another shape, or the backbone is no plain transformer.
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
        """Patch grid of frames, if they are frames."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [B, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
        return self.grid((frames.shape[1], frames.shape[2]))

    def _normalised(self, frames: Tensor) -> Tensor:
        return (frames.permute(0, 3, 1, 2).float() - self.mean) / self.std

    @property
    def num_blocks(self) -> int:
        """Blocks L of a transformer."""
        return 0

    @property
    def native_size(self) -> tuple[int, int]:
        """A frame size (H, W) that it takes, of a transformer the one that it was trained on."""
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
        """Refuse a backbone that cannot drop patches; others define :meth:`kept_tokens`.

        Raises:
            ValueError: names the option for such a backbone.
        """
        raise ValueError(
            f"{type(self).__name__} is no vision transformer, so patches cannot be dropped inside it; use "
            "--token-drop-at features"
        )

    def require_depth(self) -> None:
        """Refuse a backbone without stochastic depth; others define :meth:`scaled_tokens`.

        Raises:
            ValueError: names the option for such a backbone.
        """
        raise ValueError(
            f"{type(self).__name__} is no vision transformer, so branches cannot be left out inside it; use "
            "--drop-path 0"
        )


def _check_kept(keep: Tensor, count: int, patches: int) -> None:
    """Refuse numbers of kept patches that are not those of ``count`` frames of ``patches`` patches."""
    fits = keep.dtype == torch.int64 and keep.ndim == 2 and len(keep) == count and 1 <= keep.shape[1] <= patches
    if not fits:
        raise ValueError(
            f"keep must be int64 [{count}, 1 to {patches}] for {count} frames of {patches} patches, got {keep.dtype} "
            f"{tuple(keep.shape)}"
        )
    # On a GPU, looking at the values would wait for it.
    if (
        keep.device.type == "cpu"
        and count
        and not (keep[:, 0].min() >= 0 and keep[:, -1].max() < patches and (keep.diff(dim=1) > 0).all())
    ):
        raise ValueError(f"each row of keep must hold ascending numbers from 0 to {patches - 1}, got {keep.tolist()}")
