"""Official DINOv2 checkpoints (facebookresearch key names) on the Hugging Face model."""

import re
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Checkpoints without registers were trained with positions scaled by (patches + 0.1) / side (torch.hub's
# ``interpolate_offset``); those with registers by the exact size, antialiased, as in the Hugging Face model.
INTERPOLATE_OFFSET = 0.1

# Official name -> Hugging Face name, for everything but the fused qkv and SwiGLU weights.
_RENAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^register_tokens$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(?:\d+\.)?(\d+)\.", r"encoder.layer.\1."),  # giant models nest blocks in chunks
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w3\.", ".mlp.down_proj."),
)


def load_official_dinov2(path: Path) -> "PreTrainedModel":
    """Load an official DINOv2 checkpoint; sizes are read from its tensors.

    Position embeddings are made for 37 x 37 patches. For another grid they are interpolated as in ``torch.hub``:
    without registers bicubic with an offset of 0.1 (``config.interpolate_offset``), with registers bicubic and
    antialiased to the exact size. ``VisionTransformer.positions`` names the rule. (A folder or hub id in Hugging Face's
    format is loaded by transformers instead, which interpolates to the exact size, antialiased only with registers.)

    Args:
        path: a ``.pth`` or ``.pt`` file (read without running code in it), or a ``.safetensors`` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds something else.
    """
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    official = {k: v.float() for k, v in read_tensors(path).items()}
    first = official.keys() & {"blocks.0.norm1.weight", "blocks.0.0.norm1.weight"}
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}
    missing = (expected | (first or {"blocks.0.norm1.weight"})) - official.keys()
    if missing:
        raise ValueError(f"{path} is not an official DINOv2 checkpoint: it has no {', '.join(sorted(missing))}")
    state = _rename(official)
    dim, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layer."))
    side = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    sizes = {
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": dim // 64,
        "patch_size": patch,
        "image_size": side * patch,
        "use_swiglu_ffn": "encoder.layer.0.mlp.down_proj.weight" in state,
        "use_mask_token": "embeddings.mask_token" in state,
    }
    model: PreTrainedModel
    if "embeddings.register_tokens" in state:
        registers = state["embeddings.register_tokens"].shape[1]
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **sizes))
    else:
        # The configuration records the offset, so the keys of cached features depend on it.
        model = Dinov2Model(Dinov2Config(**sizes | {"interpolate_offset": INTERPOLATE_OFFSET}))
        embeddings: Any = model.embeddings
        embeddings.interpolate_pos_encoding = MethodType(interpolate_with_offset, embeddings)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit a DINOv2 of width {dim} and {depth} blocks: {error}") from error
    return model


def interpolate_with_offset(embeddings: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Class and patch positions [1, 1 + h w, D] for frames of height x width pixels, as in ``torch.hub``."""
    positions = embeddings.position_embeddings
    count = positions.shape[1] - 1
    side, (patch_height, patch_width) = round(count**0.5), embeddings.patch_embeddings.patch_size
    if tokens.shape[1] - 1 == count and height == width:
        return positions
    grid = height // patch_height, width // patch_width
    scales = tuple((patches + INTERPOLATE_OFFSET) / side for patches in grid)
    places = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    places = F.interpolate(places, scale_factor=scales, mode="bicubic")
    return torch.cat((positions[:, :1], places.flatten(2).transpose(1, 2).to(positions.dtype)), 1)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint file; no code in it is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds something else.
    """
    content = _read(path)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} is not an official DINOv2 checkpoint: it holds more than named tensors")
    return content


def _read(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"no backbone weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser may raise any error for arbitrary bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error


def _rename(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of the Hugging Face model."""
    state: dict[str, Tensor] = {}
    for key, value in official.items():
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        if ".attn.qkv." in key:
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                state[key.replace(".attn.qkv.", f".attention.{part}_proj.")] = tensor
        elif ".mlp.w12." in key:
            for part, tensor in zip(("gate", "up"), value.chunk(2), strict=True):
                state[key.replace(".mlp.w12.", f".mlp.{part}_proj.")] = tensor
        else:
            state[key] = value
    return state
