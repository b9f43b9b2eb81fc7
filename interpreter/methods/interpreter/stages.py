"""Both stages of Interpreter under the contract of a stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from interpreter.configs import Dtype
from interpreter.console import console
from interpreter.data.frame_index import FrameIndex
from interpreter.engine.diagnostics import slot_diagnostics
from interpreter.engine.inputs import InputSettings, Windows
from interpreter.methods.base import Context, Stage, Trained
from interpreter.methods.frames import FrameStage
from interpreter.methods.interpreter.config import IMAGE_PRESETS, VIDEO_PRESETS, ImageTraining, VideoTraining
from interpreter.methods.interpreter.image_slots import SlotClips, SlotMaker, SlotSource, StoredSlots, StreamedSlots
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.segmenter import InterpreterSegmenter, Settings
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.store.features import StreamedFeatures
from interpreter.store.fill import default_workers, read_contents
from interpreter.store.open import complete_cache, streaming_loader


class ImageTrainingStage(FrameStage[ImageTraining]):
    """Image stage: slots of single frames reconstruct the features of the backbone."""

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
        """Squared error of features [B, M, D_features] that slots reconstruct, drawn by noise [B, N, D]."""
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
        return InterpreterSegmenter(context, model, None, settings or Settings(stage="image"), frame_size)

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
    """Video stage: slots of whole clips reconstruct the image slots of their frames."""

    name, config, presets = "video", VideoTraining, VIDEO_PRESETS
    to_segment = "--association learned"

    def needs(self, config: VideoTraining) -> tuple[str, ...]:
        """See :meth:`Stage.needs`."""
        return ("image",)

    def build(self, config: VideoTraining, context: Context) -> VideoStage:
        """See :meth:`Stage.build`."""
        return VideoStage(config.model, self._input_dim(config, context), config.num_frames)

    @contextmanager
    def inputs(self, config: VideoTraining, context: Context, settings: InputSettings) -> Iterator[SlotClips]:
        """See :meth:`Stage.inputs`."""
        image = self._image(context).config.model
        with self._slots(config, context, settings) as slots:
            shape = (image.num_slots, self._input_dim(config, context))
            yield SlotClips(slots, config.num_frames, config.draws, shape, settings)

    @contextmanager
    def _slots(self, config: VideoTraining, context: Context, settings: InputSettings) -> Iterator[SlotSource]:
        videos, size, device = settings.dataset.videos, context.data.frame_size, context.device
        contents = read_contents(videos, default_workers())
        make = partial(self.maker, config, context, flip=settings.optim.flip)
        if cache := complete_cache(config.features, make, videos, contents):
            yield StoredSlots(cache.table(), device, config.model.inputs)
            return
        console.print(
            "image slots are streamed: each batch is decoded, encoded and passed through the image stage anew"
        )
        with streaming_loader(config.decoding, videos, size, device) as loader:
            features = StreamedFeatures(context.backbone, loader, context.precision)
            digests = [content.digest for content in contents]
            image_stage = self._image(context).model
            index, inputs = FrameIndex.of(videos), config.model.inputs
            yield StreamedSlots(image_stage, features, digests, index, context.precision, inputs)

    def maker(self, config: VideoTraining, context: Context, dtype: Dtype, flip: bool) -> SlotMaker:
        """See :meth:`Stage.maker`."""
        image = self._image(context)
        features = context.feature_maker(dtype, flip)
        return SlotMaker(context.store, features, image.model, image.weights, config.draws, config.model.inputs)

    def noise(self, model: VideoStage) -> tuple[int, int]:
        """See :meth:`Stage.noise`."""
        return model.config.num_slots, model.config.dim

    def loss(self, model: VideoStage, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """How well video slots, drawn by noise [B, K, D], reconstruct the inputs [B, T, N, D_input]; the numbers to log
        describe the merged slots."""
        inputs, noise = batch
        loss, video = model(inputs, model.slot_attention.sample_slots(len(noise), noise=noise))
        diagnostics = slot_diagnostics(video.attention.flatten(1, 2), video.valid)
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
        settings = settings or Settings(association="learned")
        return InterpreterSegmenter(context, self._image(context).model, model, settings, frame_size)

    def attention(self, config: VideoTraining, context: Context) -> tuple[int, int, int] | None:
        """See :meth:`Stage.attention`."""
        model, image = config.model, self._image(context).config.model
        if not model.encoder_layers and model.decoder == "masks":
            return None
        return model.heads, config.num_frames * image.num_slots, model.dim // model.heads

    def describe(self, config: VideoTraining, context: Context) -> str:
        """See :meth:`Stage.describe`."""
        return f"{config.num_frames} frames of {self._image(context).config.model.num_slots} slots"

    def _input_dim(self, config: VideoTraining, context: Context) -> int:
        """Width of what the video stage gets of an image slot."""
        image: ImageStage = self._image(context).model
        return image.config.dim if config.model.inputs == "slots" else image.feature_dim + 2

    def _image(self, context: Context) -> Trained:
        return context.earlier["image"]
