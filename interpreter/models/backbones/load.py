"""Loading a backbone by name, hub id, folder or checkpoint file."""

from importlib.util import find_spec
from pathlib import Path

import torch

from interpreter.configs import BackboneConfig
from interpreter.versions import require_package

from .base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from .dinov2 import load_official_dinov2
from .efficientnet import EfficientNetLite0
from .vit import VisionTransformer

FROM_HUB = "hub:"  # prefix of names that are only looked up on the hub, such as those in runs that others shared
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # a model has one of these, or none
HUB_FILES = ["config.json", *PROCESSORS, "model*.safetensors", "model.safetensors.index.json"]
"""Files to download for a backbone with such a name: no pickles, no code, no adapters (they refer to other models)."""
CHECKPOINTS = (".pth", ".pt", ".safetensors")  # ends of the names of official DINOv2 checkpoints
OFFLINE_OPTIONS = (
    "Without access to the Hugging Face hub use "
    "--backbone efficientnet-lite0 (its weights come with the installation), "
    "--backbone DIR (a folder that holds a Hugging Face model) or "
    "--backbone FILE (an official DINOv2 checkpoint, .pth or .safetensors)."
)


def load_backbone(config: BackboneConfig) -> Backbone:
    """Load a frozen backbone by name, hub id, folder or checkpoint file.

    Example::

        backbone = load_backbone(BackboneConfig())  # efficientnet-lite0
        features = backbone.features(frames)  # [B, M, 192] of frames uint8 [B, H, W, 3]

    Raises:
        FileNotFoundError: if there is no such hub entry, folder or file; names the options that work offline.
        ValueError: if the file or model is not supported or has no keys, or the package transformers is missing or too
            old.
    """
    try:
        backbone = _efficientnet(config) if config.backbone == "efficientnet-lite0" else _vision_transformer(config)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {OFFLINE_OPTIONS}") from error
    return backbone.requires_grad_(False).eval()


def _efficientnet(config: BackboneConfig) -> Backbone:
    if config.feature_layer is not None:
        raise ValueError(
            f"--feature-layer {config.feature_layer} selects a block of a ViT, and efficientnet-lite0 is a CNN: add "
            "--feature-layer None"
        )
    if config.output != "tokens":
        raise ValueError(
            f"--output {config.output}: efficientnet-lite0 has no self-attention and so no keys; use a ViT, such as "
            "--backbone facebook/dino-vitb16, or --output tokens"
        )
    return EfficientNetLite0()


def _vision_transformer(config: BackboneConfig) -> Backbone:
    name = config.backbone
    if find_spec("transformers") is None:
        raise ValueError(
            f"--backbone {name} needs the package transformers: pip install 'transformers>=5.23', or use "
            "--backbone efficientnet-lite0, which needs nothing"
        )
    require_package("transformers")
    if not name.startswith(FROM_HUB) and (path := Path(name)).suffix in CHECKPOINTS:
        model = load_official_dinov2(path)
        return VisionTransformer(model, config.feature_layer, config.feature_norm, output=config.output)
    return _hugging_face(config)


def split_revision(name: str) -> tuple[str, str]:
    """The hub id or folder in a backbone's name, and the revision after ``@``, by default that of the branch main.

    >>> split_revision("facebook/dinov2-base@v1"), split_revision("facebook/dinov2-base")
    (('facebook/dinov2-base', 'v1'), ('facebook/dinov2-base', 'main'))
    >>> split_revision("hub:facebook/dinov2-base@v1")
    ('facebook/dinov2-base', 'v1')
    """
    if not name.startswith(FROM_HUB) and Path(name).exists():
        return name, "main"
    name, _, revision = name.removeprefix(FROM_HUB).partition("@")
    return name, revision or "main"


def _hugging_face(config: BackboneConfig) -> Backbone:
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.utils import logging

    name, revision = split_revision(config.backbone)
    from_hub = config.backbone.startswith(FROM_HUB)
    logging.disable_progress_bar()
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(f"no backbone at {name}")
    try:
        place = _fetched(name, revision) if from_hub else name
        # Half-precision checkpoints become fp32 too; autocast chooses the precision of products.
        # Code that comes with a model is never run.
        options = {"trust_remote_code": False, "use_safetensors": True if from_hub else None}
        model = AutoModel.from_pretrained(place, revision=revision, dtype=torch.float32, **options)
    except OSError as error:
        raise FileNotFoundError(f"backbone {config.backbone!r} could not be loaded ({_reason(error)})") from error
    except SafetensorError as error:
        raise ValueError(f"the weights of backbone {config.backbone!r} cannot be read: {error}") from error
    except ValueError as error:  # such as a model that needs its own code
        raise ValueError(f"backbone {config.backbone!r} cannot be used ({_reason(error)})") from error
    mean, std = _normalisation(place, revision, config.backbone)
    return VisionTransformer(model, config.feature_layer, config.feature_norm, mean, std, config.output)


def _fetched(repository: str, revision: str) -> str:
    """The folder of a hub model in the cache of the hub's client.

    Raises:
        OSError: if it cannot be fetched.
    """
    import httpx2
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES)
    except (httpx2.TransportError, ValueError) as error:
        raise OSError(str(error) or type(error).__name__) from error


def _normalisation(place: str, revision: str, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a model normalises pixels with.

    Raises:
        ValueError: if its processor cannot be used.
    """
    from transformers import AutoImageProcessor
    from transformers.utils import cached_file

    try:
        processor = AutoImageProcessor.from_pretrained(place, revision=revision, trust_remote_code=False)
        return tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        known = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        if isinstance(error, OSError) and all(cached_file(place, file, **known) is None for file in PROCESSORS):
            # Models saved without a processor: the normalisation that nearly all of these ViTs were trained with.
            return IMAGENET_MEAN, IMAGENET_STD
        raise ValueError(
            f"the processor of backbone {name!r} cannot be used ({_reason(error)}); copy it to a folder, and write "
            f'"image_processor_type": "ViTImageProcessor", "image_mean" and "image_std" into its {PROCESSORS[0]}'
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
