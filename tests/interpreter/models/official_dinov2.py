"""Random weights under the official key names of DINOv2, and the official forward pass, from its description."""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from interpreter.models.backbones import IMAGENET_MEAN, IMAGENET_STD

DIM, PATCH, SIDE, DEPTH = 64, 14, 3, 2


def official_weights(registers=0, swiglu=False, chunked=False, seed=0):
    """Random weights under the official key names (facebookresearch/dinov2)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=0.2, offset=0.0):
        return offset + scale * torch.randn(*shape, generator=generator)

    hidden = 176 if swiglu else 4 * DIM  # SwiGLU: two thirds of 4·DIM, rounded up to a multiple of 8
    weights = {
        "cls_token": random(1, 1, DIM),
        "pos_embed": random(1, 1 + SIDE * SIDE, DIM),
        "mask_token": random(1, DIM),
        "patch_embed.proj.weight": random(DIM, 3, PATCH, PATCH, scale=0.05),
        "patch_embed.proj.bias": random(DIM),
        "norm.weight": random(DIM, offset=1),
        "norm.bias": random(DIM),
    }
    if registers:
        weights["register_tokens"] = random(1, registers, DIM)
    for i in range(DEPTH):
        block = f"blocks.0.{i}." if chunked else f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            weights |= {f"{block}{norm}.weight": random(DIM, offset=1), f"{block}{norm}.bias": random(DIM)}
        weights |= {f"{block}ls{n}.gamma": random(DIM, offset=0.5) for n in (1, 2)}
        shapes = {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM)}
        shapes |= (
            {"mlp.w12": (2 * hidden, DIM), "mlp.w3": (DIM, hidden)}
            if swiglu
            else {"mlp.fc1": (hidden, DIM), "mlp.fc2": (DIM, hidden)}
        )
        for name, shape in shapes.items():
            weights |= {f"{block}{name}.weight": random(*shape, scale=0.1), f"{block}{name}.bias": random(shape[0])}
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def official_forward(w, pixels, blocks=None, norm=True, heads=DIM // 64, dim=DIM, patch=PATCH, keep=None):
    """Patch tokens of the official model, computed from its description, in the dtype of the weights.

    With ``keep`` [B, M'] the other patches are dropped before the blocks.
    """
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    x = (pixels.permute(0, 3, 1, 2).to(w["cls_token"].dtype) / 255 - mean) / std
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    grid = x.shape[-2:]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    side = round((w["pos_embed"].shape[1] - 1) ** 0.5)
    places = w["pos_embed"][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if grid != (side, side) and "register_tokens" in w:
        places = F.interpolate(places, size=grid, mode="bicubic", antialias=True)
    elif grid != (side, side):
        places = F.interpolate(places, scale_factor=[(n + 0.1) / side for n in grid], mode="bicubic")
    x = x + torch.cat([w["pos_embed"][:, :1], places.flatten(2).transpose(1, 2)], 1)
    count = grid[0] * grid[1]
    if keep is not None:
        x = torch.stack([torch.cat([frame[:1], frame[1:][kept]]) for frame, kept in zip(x, keep, strict=True)])
        count = keep.shape[1]
    if "register_tokens" in w:
        x = torch.cat([x[:, :1], w["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    names = sorted(
        {k.rsplit(".norm1", 1)[0] for k in w if k.endswith("norm1.weight")}, key=lambda n: int(n.split(".")[-1])
    )
    for block in names[:blocks]:

        def layer(name, h, block=block):
            return F.linear(h, w[f"{block}.{name}.weight"], w[f"{block}.{name}.bias"])

        def normalise(name, h, block=block):
            return F.layer_norm(h, (dim,), w[f"{block}.{name}.weight"], w[f"{block}.{name}.bias"], eps=1e-6)

        q, k, v = layer("attn.qkv", normalise("norm1", x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-1, -2)) * (dim // heads) ** -0.5).softmax(-1) @ v
        x = x + w[f"{block}.ls1.gamma"] * layer("attn.proj", mixed.transpose(1, 2).flatten(2))
        h = normalise("norm2", x)
        if f"{block}.mlp.w12.weight" in w:
            gate, value = layer("mlp.w12", h).chunk(2, -1)
            h = layer("mlp.w3", F.silu(gate) * value)
        else:
            h = layer("mlp.fc2", F.gelu(layer("mlp.fc1", h)))
        x = x + w[f"{block}.ls2.gamma"] * h
    x = F.layer_norm(x, (dim,), w["norm.weight"], w["norm.bias"], eps=1e-6) if norm else x
    return x[:, -count:]


def save(weights, path):
    torch.save(weights, path) if path.suffix == ".pth" else save_file(weights, path)
    return str(path)
