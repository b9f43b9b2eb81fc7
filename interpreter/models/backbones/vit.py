"""Vision transformers of Hugging Face, such as DINOv2, DINO, DINOv3 and MAE."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interpreter.configs import FeatureOutput

from .base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from .depth import scaled_block
from .keys import Keys, TokensAndKeys, key_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Types of models whose blocks can be run one by one: positions enter a block only through the tokens or through
# DINOv3's rotations, and a block adds the outputs of an attention and of an MLP branch.
PLAIN = ("vit", "vit_mae", "vit_msn", "deit", "ijepa", "dinov2", "dinov2_with_registers", "dinov3_vit")


class VisionTransformer(Backbone):
    """Patch tokens of one block of a Hugging Face ViT (DINOv2, DINO, DINOv3, MAE, …), or its keys, or both.

    Args:
        model: the Hugging Face model.
        layer: block whose output is used (0 is the first, -1 the last); later blocks are removed.
        norm: apply the model's final norm to the output.
        mean, std: see :class:`Backbone`.
        output: "tokens", the block's output; "keys", the keys of its self-attention; "tokens-and-keys", both joined,
            so that ``dim`` is twice the model's width.

    Raises:
        ValueError: if the model is not a plain ViT, has no such block or norm, or its keys cannot be found.
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
        # In a tuple: as a submodule it would have a second name, and the hash of the weights would change.
        self.parts = (parent, name, norm_name or "layernorm")
        self.kwargs: dict[str, object] = {}
        if config.model_type in ("vit", "vit_mae", "vit_msn"):
            self.kwargs["interpolate_pos_encoding"] = True
        self.masked = config.model_type == "vit_mae"
        if self.masked:
            config.mask_ratio = 0.0

    @property
    def positions(self) -> str:
        """How position embeddings are interpolated to another patch grid than that of the training."""
        config = self.model.config
        if config.model_type.startswith("dinov3"):
            return "rotary, nothing is interpolated"
        if offset := getattr(config, "interpolate_offset", None):
            return f"bicubic with an offset of {offset}, as torch.hub's DINOv2 without registers"
        return f"bicubic to the exact size{', antialiased' * (config.model_type == 'dinov2_with_registers')}"

    def settings(self) -> dict[str, object]:
        """See :meth:`Backbone.settings`. It does not depend on where the model was loaded from."""
        config = self.model.config.to_dict()
        volatile = ("_name_or_path", "transformers_version")
        return super().settings() | {"model": {k: v for k, v in config.items() if k not in volatile}}

    def tokens(self, x: Tensor) -> Tensor:
        """Patch tokens [B, M, D], or their keys or both, without class and register tokens."""
        return self.model(pixel_values=x, **self._options(x)).last_hidden_state[:, -_count(x, self.patch) :]

    @property
    def num_blocks(self) -> int:
        """See :meth:`Backbone.num_blocks`. A last block that is replaced by its keys counts too."""
        parent, name, _ = self.parts
        return len(getattr(parent, name))

    @property
    def native_size(self) -> tuple[int, int]:
        """See :meth:`Backbone.native_size`."""
        size = self.model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.patch * self.patch, width // self.patch * self.patch

    def kept_tokens(self, x: Tensor, keep: Tensor) -> Tensor:
        """See :meth:`Backbone.kept_tokens`."""
        return self._block_by_block(x, keep=keep)

    def scaled_tokens(self, x: Tensor, depth: Tensor) -> Tensor:
        """See :meth:`Backbone.scaled_tokens`."""
        return self._block_by_block(x, depth=depth)

    def _block_by_block(self, x: Tensor, keep: Tensor | None = None, depth: Tensor | None = None) -> Tensor:
        """Run the model with tokens dropped before the blocks, or with branches of the blocks multiplied by factors."""
        model: Any = self.model
        parent, name, norm_name = self.parts
        embedded = model.embeddings(x, **self._options(x))
        hidden: Tensor = embedded[0] if self.masked else embedded
        others = hidden.shape[1] - _count(x, self.patch)  # class and register tokens
        rotations = model.rope_embeddings(x) if hasattr(model, "rope_embeddings") else None
        if keep is not None:
            kept = (others + keep)[..., None].expand(-1, -1, hidden.shape[2])
            hidden = torch.cat([hidden[:, :others], hidden.gather(1, kept)], 1)
            if rotations is not None:
                rotations = tuple(part[keep][:, None] for part in rotations)  # [B, 1, M', d], for all heads
        options = {} if rotations is None else {"position_embeddings": rotations}
        for number, block in enumerate(getattr(parent, name)):
            if depth is None:
                hidden = block(hidden, **options)
            else:
                hidden = scaled_block(block, hidden, depth[:, number], options)
        return getattr(model, norm_name)(hidden)[:, others:]

    def require_dropping(self) -> None:
        """See :meth:`Backbone.require_dropping`."""
        self._require_plain("patches cannot be dropped inside", "--token-drop-at features")

    def require_depth(self) -> None:
        """See :meth:`Backbone.require_depth`."""
        self._require_plain("branches cannot be left out inside", "--drop-path 0")

    def _require_plain(self, fault: str, remedy: str) -> None:
        kind = self.model.config.model_type
        if kind not in PLAIN:
            raise ValueError(
                f"{fault} a backbone of type {kind!r}; use {remedy}, or a model of type {', '.join(PLAIN)}"
            )

    def _options(self, x: Tensor) -> dict[str, object]:
        """Further arguments of the model, or of its embeddings, besides the frames."""
        if not self.masked:
            return self.kwargs
        # MAE shuffles its patches by this noise even if it masks none. Ascending noise keeps their order.
        noise = torch.arange(_count(x, self.patch), device=x.device, dtype=x.dtype).expand(x.shape[0], -1)
        return self.kwargs | {"noise": noise}


def _count(x: Tensor, patch: int) -> int:
    """Patches M of normalised frames [B, 3, H, W]."""
    return (x.shape[-2] // patch) * (x.shape[-1] // patch)


def _with_keys(
    model: "PreTrainedModel", block: nn.Module, norm_name: str | None, output: FeatureOutput
) -> Keys | TokensAndKeys:
    """The replacement of the last block. Removes the model's final norm and pooler, which expect tokens."""
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
    """The list of transformer blocks, the module that has it as an attribute, and the name of the attribute."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name, child
    raise ValueError(f"backbone of type {model.config.model_type!r} has no list of {depth} blocks")
