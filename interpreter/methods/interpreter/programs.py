"""Both stages of Interpreter as programs (``python -m interpreter.export``)."""

import torch
from torch import Tensor, nn

from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.token_means import means_as_inputs, token_means
from interpreter.methods.interpreter.video_stage import VideoSlots, VideoStage
from interpreter.methods.programs import FRAMES, Input, Program


class ImageProgram(nn.Module):
    """Image slots of frames. Of several draws of initial slots, each frame keeps the one that reconstructs it best."""

    def __init__(self, stage: ImageStage, grid: tuple[int, int]) -> None:
        super().__init__()
        self.stage, self.grid = stage, grid

    def forward(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots [T, N, D], attention [T, M, N] and means [T, N, C + 2].

        Args:
            features: [T, M, C], features of the frames.
            noise: [R, T, N, D], standard normal.
        """
        stage, (draws, frames) = self.stage, noise.shape[:2]
        start = stage.slot_attention.sample_slots(draws * frames, noise=noise.flatten(0, 1))
        repeated = features.expand(draws, -1, -1, -1).flatten(0, 1)  # all draws at once: a smaller graph
        found = stage.encode(repeated, self.grid, start, stage.config.inference_iterations)
        slots, attention = (part.unflatten(0, (draws, -1)) for part in found[:2])
        if draws > 1:  # a single draw has nothing to be compared with
            best = stage.error(found, repeated, self.grid).unflatten(0, (draws, -1)).argmin(0)
            every = torch.arange(frames, device=features.device)
            slots, attention = slots[best, every], attention[best, every]
        else:
            slots, attention = slots[0], attention[0]
        means = token_means(features, attention, self.grid)
        return slots, attention, means_as_inputs(torch.cat([means.features, means.places], -1))


class VideoProgram(nn.Module):
    """Video slots of a whole video. Of several draws of initial slots, the one with the lowest loss is kept."""

    def __init__(self, stage: VideoStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, inputs: Tensor, attention: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Video slots [K, D], attention [T, N, K] over them, which of them exist [K], and masks [T, M, K].

        Slots that were merged into others are zero, as are their masks; the other slots come first.

        Args:
            inputs: [T, N, D_input], what the stage reads of each image slot.
            attention: [T, M, N], attention of the patches over the image slots.
            noise: [R, K, D], standard normal.
        """
        stage, config = self.stage, self.stage.config
        starts = stage.slot_attention.sample_slots(noise.shape[0], noise=noise)
        context = stage.encode_slots(inputs[None]).expand(noise.shape[0], -1, -1, -1)
        found = stage.group(context, starts, None, config.inference_iterations, config.inference_sharpness)
        if noise.shape[0] > 1:  # a single draw has nothing to be compared with
            # One after the other, since the loss of one draw must not depend on the others.
            errors = [stage.error(_row(found, draw), inputs[None]) for draw in range(noise.shape[0])]
            best = torch.cat(errors).argmin(0, keepdim=True)
            found = VideoSlots._make(None if part is None else part.index_select(0, best) for part in found)
        across = found.attention[0]
        return found.slots[0], across, found.valid[0], attention @ across


def _row(slots: VideoSlots, row: int) -> VideoSlots:
    return VideoSlots._make(None if part is None else part[row : row + 1] for part in slots)


def image_program(stage: ImageStage, grid: tuple[int, int], device: torch.device) -> Program:
    """Program from features to image slots."""
    config, tokens = stage.config, grid[0] * grid[1]
    features = torch.randn(3, tokens, stage.feature_dim, device=device)
    noise = torch.randn(config.restarts, 3, config.num_slots + 1, config.dim, device=device)
    return Program(
        "image_stage",
        "features to image slots, the parts of each frame",
        ImageProgram(stage, grid).eval(),
        {
            "features": Input(features, "T M C", "of the program backbone"),
            "noise": Input(
                noise,
                "R T N D",
                f"standard normal; N slots a frame: {config.num_slots} in training, segment takes up to twice as many",
            ),
        },
        {
            "slots": "T N D: image slots",
            "attention": "T M N: attention of the patches over the slots, their soft masks; each row sums to 1",
            "means": "T N C+2: mean feature and place of each slot's patches",
        },
        (FRAMES, "N"),
    )


def video_program(stage: VideoStage, image: ImageStage, grid: tuple[int, int], device: torch.device) -> Program:
    """Program from the image slots of a whole video to video slots."""
    config = stage.config
    read, width = ("slots", image.config.dim) if config.inputs == "slots" else ("means", image.feature_dim + 2)
    any_number = config.decoder == "masks"  # a Sinkhorn divergence is traced for one size of the sets
    slots = image.config.num_slots + any_number  # not the number of training, so that a trace does not fix it
    inputs = torch.randn(3, slots, width, device=device)
    attention = torch.randn(3, grid[0] * grid[1], slots, device=device).softmax(-1)
    noise = torch.randn(config.restarts, config.num_slots, config.dim, device=device)
    return Program(
        "video_stage",
        "image slots of all frames of a video to video slots, its objects",
        VideoProgram(stage).eval(),
        {
            read: Input(inputs, f"T N {'D' if read == 'slots' else 'C+2'}", "of the program image_stage"),
            "attention": Input(attention, "T M N", "of the program image_stage"),
            "noise": Input(noise, "R K E", "standard normal"),
        },
        {
            "video_slots": "K E: objects; those that were merged into others are zero",
            "across": "T N K: attention of the image slots over the objects",
            "valid": "K: whether the object exists",
            "masks": "T M K: soft masks of the objects; each row over K sums to 1",
        },
        (FRAMES, "N") if any_number else (FRAMES,),
    )
