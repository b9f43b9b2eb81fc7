"""Vision transformers of Hugging Face: DINOv2, DINO, DINOv3, MAE and their like."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interpreter.configs import FeatureOutput

from .base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from .keys import Keys, TokensAndKeys, key_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Types of models whose blocks see the positions of patches in nothing but their tokens, or in DINOv3's rotations.
DROPPING = ("vit", "vit_mae", "vit_msn", "deit", "ijepa", "dinov2", "dinov2_with_registers", "dinov3_vit")


class VisionTransformer(Backbone):
    """Patch tokens of one block of a Hugging Face ViT (DINOv2, DINO, DINOv3, MAE, …), or its keys, or both.

    Args:
        model: the Hugging Face model.
        layer: block whose output is used (0 is the first, -1 the last); later blocks are dropped.
        norm: apply the model's final norm to it.
        mean, std: see :class:`Backbone`.
        output: "tokens", the block's output; "keys", the keys of its self-attention; "tokens-and-keys", both joined,
            so that ``dim`` is twice the model's width.

    Raises:
        ValueError: if the model is no plain ViT, lacks the block or the norm, or its keys cannot be found.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        layer: int | None,
        norm: bool,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        output: FeatureOutput = "tokens",
    ) -> None:
        config = model.config
        patch = getattr(config, "patch_size", None)
        if not isinstance(patch, int) or not hasattr(config, "num_hidden_layers"):
            raise ValueError(f"backbone of type {config.model_type!r} is not a plain vision transformer")
        super().__init__(config.hidden_size * (2 if output == "tokens-and-keys" else 1), patch, mean, std)
        parent, name, blocks = _blocks(model, config.num_hidden_layers)
        layer = len(blocks) - 1 if layer is None else layer
        if not -len(blocks) <= layer < len(blocks):
            raise ValueError(f"--feature-layer {layer}: this backbone has blocks 0 to {len(blocks) - 1}")
        used = blocks[: layer % len(blocks) + 1]
        setattr(parent, name, used)
        norm_name = next((n for n in ("layernorm", "norm") if hasattr(model, n)), None)
        if not norm:
            if norm_name is None:
                raise ValueError(f"backbone of type {config.model_type!r} has no final norm; use --feature-norm")
            setattr(model, norm_name, nn.Identity())
        if output != "tokens":
            used[-1] = _with_keys(model, used[-1], norm_name, output)
        self.model = model
        # In a tuple, and found by name: as a submodule under a second name it would be hashed as other weights.
        self.parts = (parent, name, norm_name or "layernorm")
        self.kwargs: dict[str, object] = {}
        if config.model_type in ("vit", "vit_mae", "vit_msn"):
            self.kwargs["interpolate_pos_encoding"] = True
        self.masked = config.model_type == "vit_mae"
        if self.masked:
            config.mask_ratio = 0.0

    @property
    def positions(self) -> str:
        """How position embeddings are interpolated to a patch grid that the model was not trained on."""
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
        """Patch tokens [B, M, D], or their keys or both, without class and register tokens."""
        return self.model(pixel_values=x, **self._options(x)).last_hidden_state[:, -_count(x, self.patch) :]

    def kept_tokens(self, x: Tensor, keep: Tensor) -> Tensor:
        """See :meth:`Backbone.kept_tokens`: what the model does, with tokens dropped between embeddings and blocks."""
        model: Any = self.model
        parent, name, norm_name = self.parts
        embedded = model.embeddings(x, **self._options(x))
        hidden: Tensor = embedded[0] if self.masked else embedded
        others = hidden.shape[1] - _count(x, self.patch)  # class and register tokens
        kept = (others + keep)[..., None].expand(-1, -1, hidden.shape[2])
        hidden = torch.cat([hidden[:, :others], hidden.gather(1, kept)], 1)
        options: dict[str, object] = {}
        if hasattr(model, "rope_embeddings"):
            # [B, 1, M', d], for all heads
            options["position_embeddings"] = tuple(part[keep][:, None] for part in model.rope_embeddings(x))
        for block in getattr(parent, name):
            hidden = block(hidden, **options)
        return getattr(model, norm_name)(hidden)[:, others:]

    def require_dropping(self) -> None:
        """See :meth:`Backbone.require_dropping`."""
        kind = self.model.config.model_type
        if kind not in DROPPING:
            raise ValueError(
                f"patches cannot be dropped inside a backbone of type {kind!r}; use --token-drop-at features, or a "
                f"model of type {', '.join(DROPPING)}"
            )

    def _options(self, x: Tensor) -> dict[str, object]:
        """What the model, or its embeddings, take besides the frames."""
        if not self.masked:
            return self.kwargs
        # MAE shuffles its patches by this noise even when it masks none: rising noise keeps their order.
        noise = torch.arange(_count(x, self.patch), device=x.device, dtype=x.dtype).expand(x.shape[0], -1)
        return self.kwargs | {"noise": noise}


def _count(x: Tensor, patch: int) -> int:
    """Patches M of normalised frames [B, 3, H, W]."""
    return (x.shape[-2] // patch) * (x.shape[-1] // patch)


def _with_keys(
    model: "PreTrainedModel", block: nn.Module, norm_name: str | None, output: FeatureOutput
) -> Keys | TokensAndKeys:
    """What replaces the last block; the model's final norm and its pooler, which expect tokens, are removed."""
    try:
        _, to_keys = key_layers(block)
        found = norm_name is not None and getattr(to_keys, "out_features", None) == model.config.hidden_size
    except LookupError:
        found = False
    if not found or norm_name is None:
        raise ValueError(
            f"--output {output}: the keys of a backbone of type {model.config.model_type!r} were not found; use a "
            "plain ViT of transformers, such as DINO, DINOv2, DINOv3 or MAE, or --output tokens"
        )
    norm = getattr(model, norm_name)
    setattr(model, norm_name, nn.Identity())
    if hasattr(model, "pooler"):
        model.pooler = None  # type: ignore[assignment]
    return Keys(block) if output == "keys" else TokensAndKeys(block, norm)


def _blocks(model: "PreTrainedModel", depth: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of transformer blocks, the module that holds it, and its name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name, child
    raise ValueError(f"backbone of type {model.config.model_type!r} has no list of {depth} blocks")
