"""Tasks that train in milliseconds: a regression, and both stages of Interpreter on random features."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn

from interpreter.configs import OptimConfig
from interpreter.engine.distributed import Ranks
from interpreter.engine.inputs import FrameInputs, InputSettings
from interpreter.engine.task import Task, all_parameters
from interpreter.methods.interpreter.config import ImageModelConfig, VideoModelConfig
from interpreter.methods.interpreter.image_slots import SlotClips, StreamedSlots
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.stages import ImageTrainingStage, VideoTrainingStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.methods.solv import SOLV
from interpreter.methods.solv.config import SolvModelConfig
from interpreter.methods.solv.model import Solv
from interpreter.methods.windows import FeatureWindows, WindowInputs

CPU = torch.device("cpu")
LENGTHS = [4, 9]  # frames of the videos


class Regression:
    """A task of one linear layer; `spoil` may break the loss of a step."""

    frames_per_step, after_step = 4, None
    parameter_groups = staticmethod(all_parameters)

    def __init__(self, spoil=None, at_step=None, steps=10):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.spoil = spoil or (lambda step, loss: loss)
        self.at_step = at_step or (lambda step: None)
        self.steps = steps

    def batches(self, first=0):
        for step in range(first, self.steps):
            self.at_step(step)
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(step)), torch.full((4,), step)

    def forward(self, x, step):
        loss = (self.model(x) - x[:, :2]).pow(2).mean()
        return self.spoil(step[0].item(), loss), {"mean_input": x.mean()}


class RandomFeatures:
    """Returns features [n, 6, 12] that depend only on the frame and its flip, and records every request."""

    def __init__(self, device=CPU):
        self.device, self.taken = device, []

    def batches(self, requests):
        for frames, flips, *_ in requests:
            self.taken.append((frames, flips))
            out = []
            for frame, flip in zip(frames.tolist(), flips.tolist(), strict=True):
                generator = torch.Generator().manual_seed(2 * frame + flip)
                out.append(torch.randn(6, 12, generator=generator))
            yield torch.stack(out).to(self.device)


def settings_of(optim):
    videos = [SimpleNamespace(num_frames=length) for length in LENGTHS]
    return InputSettings(SimpleNamespace(videos=videos), optim, Ranks())


SMALL = ImageModelConfig(num_slots=3, dim=16, decoder_layers=1, heads=2)


def image_task(iterations=3, device=CPU, config=SMALL, feature_shape=(6, 12), grid=(2, 3), **changes):
    """The image stage, by default with 3 slots on 6 tokens."""
    torch.manual_seed(0)
    config = replace(config, iterations=iterations, inference_iterations=iterations)
    model, optim = ImageStage(config, feature_shape[1], grid).to(device), OptimConfig(**{"batch_size": 4, **changes})
    stage, inputs = ImageTrainingStage(), FrameInputs(RandomFeatures(device), feature_shape, settings_of(optim))
    return Task(model, stage.loss, inputs, stage.noise(model), optim, device)


def video_task(iterations=3, device=CPU, gate=0.0, **changes):
    """The video stage with 4 slots on clips of 5 frames; image slots are computed for each batch."""
    frozen = image_task(device=device).model.requires_grad_(False)
    torch.manual_seed(1)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "heads": 2}
    config = VideoModelConfig(num_slots=4, dim=16, iterations=iterations, gate=gate, **layers)
    model, optim = VideoStage(config, 16, 5).to(device), OptimConfig(**{"batch_size": 2, **changes})
    settings, stage = settings_of(optim), VideoTrainingStage()
    index = FrameInputs(RandomFeatures(), (6, 12), settings).index
    source = StreamedSlots(frozen, RandomFeatures(device), ["0a", "0b"], index, "fp32")
    inputs = SlotClips(source, 5, 3, (3, 16), settings)
    return Task(model, stage.loss, inputs, stage.noise(model), optim, device)


def gated_task(**changes):
    """The same with a gate."""
    return video_task(gate=0.1, **changes)


def window_task(iterations=3, device=CPU, **changes):
    """SOLV with 4 slots on windows of 3 frames, keeping 4 of their 6 tokens."""
    torch.manual_seed(0)
    config = SolvModelConfig(num_slots=4, dim=16, iterations=iterations, heads=2, decoder_dim=16, min_clusters=1)
    model, optim = Solv(config, 12, (2, 3), 3).to(device), OptimConfig(**{"batch_size": 4, **changes})
    stage, source = SOLV.stages[0], FeatureWindows(RandomFeatures(device))
    inputs = WindowInputs(source, (6, 12), settings_of(optim), 1, 4, lambda step: 0.5)
    return Task(model, stage.loss, inputs, stage.noise(model), optim, device)


def batch_of(task, step=0):
    """The batch of one step."""
    return next(task.batches(step))
