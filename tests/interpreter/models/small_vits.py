"""Small random ViTs in Hugging Face's own format, and frames for them."""

import pytest
import torch

from interpreter.models.backbones import IMAGENET_MEAN, IMAGENET_STD

DINO_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14, "image_size": 28,
}  # fmt: skip
VIT_SIZES = {**DINO_SIZES, "intermediate_size": 64, "patch_size": 16, "image_size": 32}
KINDS = ("Dinov2", "Dinov2WithRegisters", "ViT", "ViTMAE")


def frames(height, width, count=2, seed=0):
    return torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(seed)).byte()


def normalised(pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def save_vit(kind, folder, dtype=torch.float32):
    """A random ViT in Hugging Face's own format, and the model itself."""
    import transformers

    torch.manual_seed(1)
    sizes = VIT_SIZES if kind.startswith("ViT") else DINO_SIZES
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    with torch.no_grad():  # biases and norms start as 0 and 1, which would hide wrong assignments
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return model.float()


# Float8 products with a scale per row.
rows_on_a_cpu = pytest.mark.skipif(
    torch.__version__.startswith("2.11.") and not torch.cuda.is_available(),
    reason="PyTorch 2.11 multiplies float8 with a scale for each row on GPUs only",
)
