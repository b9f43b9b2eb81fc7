"""Both stages of Interpreter as subclasses of ``Stage``. The video stage also trains every level above it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from interpreter.configs import Dtype
from interpreter.console import console
from interpreter.data.frame_index import FrameIndex
from interpreter.engine.diagnostics import slot_diagnostics
from interpreter.engine.inputs import Inputs, InputSettings, Windows
from interpreter.methods.base import Context, Stage, Trained
from interpreter.methods.frames import FrameStage
from interpreter.methods.interpreter.config import (
    IMAGE_PRESETS,
    VIDEO_PRESETS,
    ImageTraining,
    VideoTraining,
    level_key,
)
from interpreter.methods.interpreter.hierarchy import windows_below
from interpreter.methods.interpreter.image_slots import SlotClips, SlotMaker, SlotSource, StoredSlots, StreamedSlots
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.level_slots import LevelBelow, LevelClips, LevelMaker
from interpreter.methods.interpreter.segmenter import InterpreterSegmenter
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.store.features import StreamedFeatures
from interpreter.store.fill import Maker, default_workers, read_contents
from interpreter.store.open import complete_cache, streaming_loader


class ImageTrainingStage(FrameStage[ImageTraining]):
    """Image stage: slots of single frames, trained to reconstruct the features of the backbone."""

    name, config, presets = "image", ImageTraining, IMAGE_PRESETS

    def build(self, config: ImageTraining, context: Context) -> ImageStage:
        """See :meth:`Stage.build`."""
        return ImageStage(config.model, context.backbone.dim, context.grid, config.windows)

    def windows(self, config: ImageTraining, context: Context) -> Windows | None:
        """See :meth:`FrameStage.windows`."""
        return None if config.windows is None else Windows(context.grid, config.windows, config.whole_frames)

    def noise(self, model: ImageStage) -> tuple[int, int]:
        """See :meth:`Stage.noise`."""
        return model.config.num_slots, model.config.dim

    def loss(self, model: ImageStage, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of features [B, M, D_features], reconstructed from slots that start from noise [B, N, D]."""
        features, noise = batch
        loss, encoded = model(features, model.slot_attention.sample_slots(len(noise), noise=noise))
        return loss, slot_diagnostics(encoded.attention)

    def segmenter(
        self,
        config: ImageTraining,
        model: ImageStage,
        context: Context,
        settings: Settings | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> InterpreterSegmenter:
        """See :meth:`Stage.segmenter`."""
        return InterpreterSegmenter(context, model, (), settings or Settings(stage="image"), frame_size)

    def attention(self, config: ImageTraining, context: Context) -> tuple[int, int, int] | None:
        """See :meth:`Stage.attention`."""
        model = config.model
        if model.decoder != "transformer":
            return None
        return model.heads, context.grid[0] * context.grid[1], model.dim // model.heads

    def describe(self, config: ImageTraining, context: Context) -> str:
        """See :meth:`Stage.describe`."""
        whole = super().describe(config, context)
        return whole if config.windows is None else f"windows of {config.windows[0]}x{config.windows[1]} of {whole}"


class VideoTrainingStage(Stage[VideoTraining]):
    """Video stage: slots of whole clips, trained to reconstruct the image slots of their frames.

    Above level 2, the slots of several windows reconstruct the slots of the level below in each window.
    """

    name, config, presets = "video", VideoTraining, VIDEO_PRESETS

    def key(self, config: VideoTraining) -> str:
        """See :meth:`Stage.key`."""
        return level_key(config.level)

    def to_segment(self, config: VideoTraining) -> str:
        """See :meth:`Stage.to_segment`."""
        return "--association learned" if config.level == 2 else f"--level {config.level}"

    def needs(self, config: VideoTraining) -> tuple[str, ...]:
        """See :meth:`Stage.needs`."""
        return (level_key(config.level - 1),)

    def build(self, config: VideoTraining, context: Context) -> VideoStage:
        """See :meth:`Stage.build`."""
        model = VideoStage(config.model, self._input_shape(config, context)[1], config.num_frames)
        if config.level > 2 and config.start == "below":
            below: VideoStage = context.earlier[level_key(config.level - 1)].model
            if model.config.inputs == below.config.inputs == "means" and _shapes(model) == _shapes(below):
                # Means are comparable on all levels, and the level below was trained on many more of them.
                model.load_state_dict(below.state_dict())
        return model

    @contextmanager
    def inputs(self, config: VideoTraining, context: Context, settings: InputSettings) -> Iterator[Inputs]:
        """See :meth:`Stage.inputs`."""
        if config.level > 2:
            yield self._window_inputs(config, context, settings)
            return
        shape = self._input_shape(config, context)
        with self._slots(config, context, settings) as slots:
            yield SlotClips(slots, config.num_frames, config.draws, shape, settings, config.masked)

    def _window_inputs(self, config: VideoTraining, context: Context, settings: InputSettings) -> LevelClips:
        videos = settings.dataset.videos
        if config.features == "streamed":
            raise ValueError(
                "--features streamed: a level above 2 trains on the stored slots of the level below, which take little "
                "room; use --features stored"
            )
        contents = read_contents(videos, default_workers())
        cache = complete_cache("stored", self._maker(config, context, settings), videos, contents)
        assert cache is not None, "a stored cache is always filled"
        shape, inputs = self._input_shape(config, context), config.model.inputs
        clips = config.num_frames, config.draws, inputs, shape, settings, config.masked
        return LevelClips(cache.table(), context.device, *clips)

    @contextmanager
    def _slots(self, config: VideoTraining, context: Context, settings: InputSettings) -> Iterator[SlotSource]:
        videos, size, device = settings.dataset.videos, context.data.frame_size, context.device
        contents = read_contents(videos, default_workers())
        if cache := complete_cache(config.features, self._maker(config, context, settings), videos, contents):
            yield StoredSlots(cache.table(), device, config.model.inputs)
            return
        console.print(
            "image slots are streamed: each batch is decoded, encoded and passed through the image stage again"
        )
        with streaming_loader(config.decoding, videos, size, device) as loader:
            features = StreamedFeatures(context.backbone, loader, context.precision)
            digests = [content.digest for content in contents]
            image_stage = self._image(context).model
            index, inputs = FrameIndex.of(videos), config.model.inputs
            yield StreamedSlots(image_stage, features, digests, index, context.precision, inputs)

    def _maker(self, config: VideoTraining, context: Context, settings: InputSettings) -> Callable[[Dtype], Maker]:
        return partial(self.maker, config, context, flip=settings.optim.flip)

    def maker(self, config: VideoTraining, context: Context, dtype: Dtype, flip: bool) -> Maker:
        """See :meth:`Stage.maker`."""
        image, inputs = self._image(context), config.model.inputs
        features = context.feature_maker(dtype, flip)
        if config.level == 2:
            return SlotMaker(context.store, features, image.model, image.weights, config.draws, inputs)
        levels = self._below(config, context)
        return LevelMaker(context.store, features, image.model, image.weights, levels, config.draws, inputs)

    def noise(self, model: VideoStage) -> tuple[int, int]:
        """See :meth:`Stage.noise`; if there is a gate, the last number of each slot is for the gate."""
        return model.config.num_slots, model.config.dim + (model.gate is not None)

    def loss(self, model: VideoStage, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Stage.loss`: how well video slots reconstruct the inputs.

        A batch is the inputs [B, T, N, D_input], their masses [B, T, N] if they have any, and noise [B, K, D] from
        which the video slots start. The numbers to log describe the merged slots.
        """
        inputs, *rest, noise = batch
        masses, gate_noise = rest[0] if rest else None, None
        if model.gate is not None:
            noise, gate_noise = noise[..., :-1], noise[..., -1]
        loss, video = model(inputs, model.slot_attention.sample_slots(len(noise), noise=noise), masses, gate_noise)
        tokens = None if masses is None else (masses > 0).flatten(1)
        diagnostics = slot_diagnostics(video.attention.flatten(1, 2), video.valid, tokens)
        return loss, diagnostics | {"merged_slots": video.valid.sum(1).float().mean()}

    def segmenter(
        self,
        config: VideoTraining,
        model: VideoStage,
        context: Context,
        settings: Settings | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> InterpreterSegmenter:
        """See :meth:`Stage.segmenter`."""
        settings = settings or Settings(association="learned", levels=config.level)
        stages = [*((level.stage, level.windows) for level in self._below(config, context)), (model, None)]
        return InterpreterSegmenter(context, self._image(context).model, stages, settings, frame_size)

    def attention(self, config: VideoTraining, context: Context) -> tuple[int, int, int] | None:
        """See :meth:`Stage.attention`."""
        model = config.model
        if config.masked or config.level > 2 or (not model.encoder_layers and model.decoder == "masks"):
            return None  # no attention, or with a mask, for which there is only one kernel
        return model.heads, config.num_frames * self._input_shape(config, context)[0], model.dim // model.heads

    def describe(self, config: VideoTraining, context: Context) -> str:
        """See :meth:`Stage.describe`."""
        slots = self._input_shape(config, context)[0]
        if config.level == 2:
            return f"{config.num_frames} frames of {slots} slots"
        windows = self._below(config, context)[-1].windows
        unit = "frames" if config.level == 3 else "windows"
        return f"{config.num_frames} windows of {windows.length} {unit} (overlap {windows.overlap}), {slots} slots each"

    def _input_shape(self, config: VideoTraining, context: Context) -> tuple[int, int]:
        """Number of slots in a step of the level below, and the width of the inputs for them."""
        image: ImageStage = self._image(context).model
        below = context.earlier[level_key(config.level - 1)].config.model
        return below.num_slots, below.dim if config.model.inputs == "slots" else image.feature_dim + 2

    def _below(self, config: VideoTraining, context: Context) -> list[LevelBelow]:
        """Levels 2, 3, … below this one, each with the windows that the level above it reads."""
        stages = [context.earlier[level_key(level)] for level in range(2, config.level)]
        above = [*(stage.config for stage in stages[1:]), config]
        return [
            LevelBelow(stage.model, stage.weights, windows_below(stage.config, over))
            for stage, over in zip(stages, above, strict=False)
        ]

    def _image(self, context: Context) -> Trained:
        return context.earlier["image"]


def _shapes(module: VideoStage) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
