"""Convert a published checkpoint to a run: ``python -m interpreter.convert_checkpoint --help``."""

import inspect
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

from interpreter.commands import cli, run_command
from interpreter.configs import BackboneConfig, option
from interpreter.engine.checkpoint import TrainingState, save_checkpoint
from interpreter.engine.run import RunConfig, check_ranges, to_dict, write_config
from interpreter.methods.published import (
    AXES,
    BACKBONE,
    CORRECTOR,
    HIDDEN,
    PATCHES,
    POSITIONS,
    TOKENS,
    Layout,
    Published,
    convert_state,
    read_layout,
    read_state,
    side,
)
from interpreter.methods.slot_contrast import SlotContrast, SlotContrastStage
from interpreter.methods.videosaur import VideoSaur, VideoSaurStage
from interpreter.models.backbones import load_backbone

PROG = "python -m interpreter.convert_checkpoint"
MODELS: dict[str, Any] = {
    "slot-contrast": (SlotContrastStage(), SlotContrast),
    "videosaur": (VideoSaurStage(), VideoSaur),
}
PATCH_SIZES = {576: 14, 1369: 14, 784: 8, 196: 16}  # of the published models, by their number of patches
BACKBONES = {  # by width and patch size
    (384, 14): "facebook/dinov2-small",
    (768, 14): "facebook/dinov2-base",
    (384, 8): "facebook/dino-vits8",
    (384, 16): "facebook/dino-vits16",
    (768, 8): "facebook/dino-vitb8",
    (768, 16): "facebook/dino-vitb16",
}


@dataclass(frozen=True, kw_only=True)
class Converting:
    """Convert a published checkpoint of Slot Contrast or VideoSAUR to a run for `segment` and `evaluate`.

    Sizes, backbone and frame size are read from the tensors. The run computes as in the published training, for example
    with the published scale of the predictor's attention logits. Backbone weights in the file are not used: the
    backbone is loaded by its name when the run is used.

    Reads a Lightning checkpoint, {"state_dict": tensors} or the tensors alone (.ckpt, .pth, .pt), and .safetensors.
    A file with other objects than tensors is refused, because loading them can run code.

    Examples:
      python -m interpreter.convert_checkpoint movi_c.ckpt --method slot-contrast --out runs/slot-contrast-movi-c
      python -m interpreter.convert_checkpoint ytvis.ckpt --method videosaur --num-slots 7 --out runs/videosaur-ytvis
      python -m interpreter.segment clip.mp4 --run runs/videosaur-ytvis --out out
    """

    checkpoint: tyro.conf.Positional[Path]
    """The published checkpoint."""
    method: Published
    """The method of the checkpoint."""
    out: Path
    """Run directory to write; it must not exist yet."""
    num_slots: int | None = option(None, at_least=1)
    """Number of slots of VideoSAUR, which is not in its checkpoints. In the published trainings:
    11 for MOVi-C, 15 for MOVi-E, 7 for YouTube-VIS. For Slot Contrast, it is read from the file."""
    backbone: str | None = None
    """Backbone of the training: hub id, local folder or official DINOv2 checkpoint.
    Default: DINOv2 or DINO of Hugging Face, chosen by feature width and patch size."""
    frame_size: tuple[int, int] | None = option(None, at_least=1)
    """Height and width of the frames in the training. Default: the square with the same number of patches."""


class Frames(NamedTuple):
    """Data that a published model was trained on."""

    backbone: str
    size: tuple[int, int]  # H, W
    grid: tuple[int, int]  # of patches


def patch_count(method: Published, state: Mapping[str, Tensor]) -> int:
    """Number of patches M of a frame."""
    return side(state, POSITIONS, -2, rank=AXES[method][POSITIONS])


def model_sizes(options: Converting, state: Mapping[str, Tensor], layout: Layout) -> dict[str, Any]:
    """The model options that can be read from the tensors.

    Raises:
        ValueError: if the number of slots is missing, or was passed although the slots are learned.
    """
    sizes: dict[str, Any] = {
        "dim": side(state, f"{CORRECTOR}.to_q.weight", 0),
        "logit_scale": "published",
        "decoder_dim": side(state, f"{HIDDEN[options.method]}.0.weight", 0),
        "decoder_layers": layout.hidden_layers,
    }
    if options.method == "slot-contrast":
        if options.num_slots is not None:
            raise ValueError("Slot Contrast learns each of its slots, so the file fixes their number; omit --num-slots")
        return sizes | {"num_slots": side(state, "initializer.slots", 1, rank=3)}
    if options.num_slots is None:
        raise ValueError(
            "a VideoSAUR checkpoint does not contain its number of slots; give that of its training: --num-slots 11 "
            "for MOVi-C, 15 for MOVi-E, 7 for YouTube-VIS"
        )
    similarities_only = side(state, "decoder.module.output_transform.weight", 0) == patch_count(options.method, state)
    return sizes | {
        "num_slots": options.num_slots,
        "mixer_blocks": layout.blocks,
        "reconstruction_weight": 0.0 if similarities_only else 1.0,
    }


def find_frames(options: Converting, state: Mapping[str, Tensor]) -> Frames:
    """The backbone, and the frame size with as many patches as the tensors.

    Raises:
        ValueError: if they do not fit the tensors, or cannot be read from them. The message names the option.
        FileNotFoundError: if the backbone does not exist.
    """
    dim, patches = side(state, f"{TOKENS}.0.weight", 0, rank=1), patch_count(options.method, state)
    patch = side(state, PATCHES, 3, rank=4) if PATCHES in state else PATCH_SIZES.get(patches)
    name = options.backbone or BACKBONES.get((dim, patch or 0))
    if name is None:
        raise ValueError(
            f"unknown backbone with features of width {dim} and {patches} patches; name it with --backbone"
        )
    if options.backbone is not None:
        backbone = load_backbone(BackboneConfig(name, feature_norm=False))
        if backbone.dim != dim or (PATCHES in state and backbone.patch != patch):
            trained = f"width {dim}" + (f" and patches of {patch} pixels" if PATCHES in state else "")
            raise ValueError(
                f"--backbone {name} has features of width {backbone.dim} and patches of {backbone.patch} pixels; the "
                f"checkpoint was trained on {trained}"
            )
        patch = backbone.patch
    assert patch is not None  # a backbone that is not in BACKBONES was just loaded
    height, width = options.frame_size or (math.isqrt(patches) * patch,) * 2
    grid = height // patch, width // patch
    if (grid[0] * patch, grid[1] * patch) != (height, width) or grid[0] * grid[1] != patches:
        raise ValueError(
            f"frames of {height}x{width} do not have the {patches} patches of {patch}x{patch} pixels that the "
            "checkpoint was trained on; give their height and width with --frame-size"
        )
    return Frames(name, (height, width), grid)


def make_config(options: Converting, sizes: dict[str, Any], frames: Frames) -> Any:
    """Options of the stage: those of a preset with the same sizes, if there is one."""
    stage, _ = MODELS[options.method]
    config = stage.config(run=options.out)
    config = replace(config, model=replace(config.model, **sizes))
    for preset in stage.presets.values():
        if preset.data.frame_size == frames.size and replace(preset.model, **sizes) == preset.model:
            config = preset
    return replace(
        config,
        run=options.out,
        data=replace(config.data, frame_size=frames.size),
        backbone=replace(config.backbone, backbone=frames.backbone, feature_norm=False),
        optim=replace(config.optim, precision="fp32"),  # as in the training: large logits are sensitive to rounding
    )


def convert(options: Converting, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The options of the stage, and the weights by the names of this package.

    Raises:
        ValueError: if the tensors are not those of a published checkpoint, or the options do not fit them.
        FileNotFoundError: if the backbone does not exist.
    """
    layout = read_layout(options.method, state)
    sizes, frames = model_sizes(options, state, layout), find_frames(options, state)
    config = make_config(options, sizes, frames)
    with torch.device("meta"):  # only shapes, without memory
        model = MODELS[options.method][1](config.model, side(state, f"{TOKENS}.0.weight", 0, rank=1), frames.grid)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return config, convert_state(state, layout, shapes)


def write_run(run: Path, method: Published, config: Any, weights: dict[str, Tensor]) -> None:
    """Write a run whose stage counts as finished, completely or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    key = MODELS[method][0].name
    with tempfile.TemporaryDirectory(prefix=f".{run.name}-", dir=run.parent) as folder:
        whole = Path(folder) / "run"
        save_checkpoint(whole / key, TrainingState(config.optim.steps, weights))
        write_config(whole, RunConfig(method, {key: to_dict(config)}))
        whole.rename(run)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    words = sys.argv[1:] if arguments is None else arguments
    options = cli(Converting, words, prog=PROG, description=inspect.getdoc(Converting))
    check_ranges(options)
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists already; choose another --out")
    state = read_state(options.checkpoint)
    config, weights = convert(options, state)
    write_run(options.out, options.method, config, weights)
    print(
        f"{options.out}: {options.method} with {config.model.num_slots} slots of width {config.model.dim}, backbone "
        f"{config.backbone.backbone}, frames of {'x'.join(map(str, config.data.frame_size))} (height x width)"
    )
    if unused := sum(name.startswith(BACKBONE) for name in state):
        print(f"not used: {unused} tensors of the backbone, which is loaded by its name instead")
    print(f"segment a video with it: python -m interpreter.segment clip.mp4 --run {options.out} --out out")
    return 0


if __name__ == "__main__":
    run_command(main)
