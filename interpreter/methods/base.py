"""The interface of a method: what it has to define so that all commands can use it.

A *method* is a published system, such as Interpreter or DINOSAUR. It has *stages*, which are trained one after the
other (none, if nothing is trained), and a *segmenter*, which uses the trained stages to segment a whole video::

    class MyStage(Stage[MyConfig]):
        name, config, presets = "model", MyConfig, {"demo": MyConfig(run=Path("runs/demo"))}

        def build(self, config, context): ...               # the module
        def inputs(self, config, context, settings): ...    # batches: of frames, clips, or slots of an earlier stage
        def maker(self, config, context, dtype, flip): ...  # computes these inputs for the cache
        def loss(self, model, features, noise): ...         # a scalar, and numbers to log
        def segmenter(self, config, model, context, settings=None, frame_size=None): ...

``FrameStage`` (interpreter/methods/frames.py) defines ``inputs`` and ``maker`` for stages that train on frames. Then ::

    MY_METHOD = Method("my-method", "One line.", "Authors, venue, year", (MyStage(),), MySettings)

and one line in ``METHODS`` (interpreter/methods/__init__.py) add a method. Everything else needs no further code:
batches, the notice about memory, resuming, compilation, CUDA graphs, several GPUs, caches, pictures, ``segment`` and
``evaluate``. docs/develop/add_a_method.md lists the steps. tests/interpreter/methods/test_contract.py checks every
method in ``METHODS``.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from interpreter.configs import BackboneConfig, DataConfig, Dtype, StageConfig
from interpreter.data import Video
from interpreter.engine.inputs import Inputs, InputSettings
from interpreter.engine.task import all_parameters
from interpreter.methods.programs import Program
from interpreter.models.backbones import Backbone
from interpreter.segmentation import Segmentation
from interpreter.store.features import FeatureMaker
from interpreter.store.fill import Maker

C = TypeVar("C", bound=StageConfig)
S = TypeVar("S")  # dataclass with the settings of a method


@dataclass(frozen=True)
class Trained:
    """An earlier stage that is trained already: frozen and in evaluation mode.

    Attributes:
        config: the options that it was trained with.
        model: its module.
        weights: hash of its weights.
    """

    config: Any
    model: Any
    weights: str


@dataclass(frozen=True)
class Context:
    """What a stage is built from, besides its own configuration.

    Attributes:
        run: the run directory.
        device: device of the backbone and of all stages.
        precision: "fp32", "bf16" or "fp8-backbone", of the backbone and of earlier stages.
        data: the data set, and the size that frames are resized to.
        backbone_config: how the backbone was loaded.
        backbone: the frozen feature extractor.
        store: directory of cached features and slots.
        earlier: the trained stages that this one builds on, by key.
    """

    run: Path
    device: torch.device
    precision: str
    data: DataConfig
    backbone_config: BackboneConfig
    backbone: Backbone
    store: Path
    earlier: Mapping[str, Trained] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (h, w) of the frames."""
        return self.backbone.grid(self.data.frame_size)

    def feature_maker(self, dtype: Dtype, flip: bool) -> FeatureMaker:
        """Computes the features of the backbone for the cache, with ``flip`` also those of mirrored frames."""
        size, precision = self.data.frame_size, self.precision
        return FeatureMaker(self.store, self.backbone, self.backbone_config, size, precision, dtype, flip)


class Stage(abc.ABC, Generic[C]):
    """One model that is trained by itself: its module, its inputs and its loss.

    Attributes:
        name: its name on the command line (``--stage``) and of its directory, RUN/NAME; a word without a hyphen.
        config: dataclass with the options of its training.
        presets: named defaults of these options; "demo" is required.
        additive: whether the loss is a mean over samples, so that a batch can be computed in parts. If False, as for a
            contrast between all samples of a batch, ``--micro-batch`` is refused.
    """

    name: ClassVar[str]
    config: type[C]
    presets: Mapping[str, C]
    additive: ClassVar[bool] = True

    def key(self, config: C) -> str:
        """Name of the directory of the stage, and of its entry in config.json.

        By default ``name``. If a run may hold several trainings of a stage, the stage has an option ``level`` and
        appends its value: video-3 is the video stage of level 3.
        """
        return self.name

    def needs(self, config: C) -> tuple[str, ...]:
        """Keys of the earlier stages that this one builds on; data and backbone come from the first of them."""
        return ()

    def to_segment(self, config: C) -> str:
        """Options that make ``segment`` and ``evaluate`` use this stage; empty if they use it by default."""
        return ""

    @abc.abstractmethod
    def build(self, config: C, context: Context) -> nn.Module:
        """Create the module, with random weights.

        Raises:
            ValueError: if sizes do not fit together; the message names the option.
        """

    @abc.abstractmethod
    def inputs(self, config: C, context: Context, settings: InputSettings) -> AbstractContextManager[Inputs]:
        """The batches that the stage trains on, such as :class:`interpreter.engine.inputs.FrameInputs`."""

    @abc.abstractmethod
    def maker(self, config: C, context: Context, dtype: Dtype, flip: bool) -> Maker:
        """Computes the files of the cache that :meth:`inputs` reads, with ``flip`` also for mirrored frames."""

    @abc.abstractmethod
    def loss(self, model: Any, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch, a scalar, and a dictionary of numbers to log.

        It runs under autocast, compiled, and inside a CUDA graph. So it may not draw random numbers, nor copy anything
        from or to the host.

        Args:
            model: the module.
            batch: the tensors of :meth:`inputs`, then the noise if :meth:`noise` returns a shape.
        """

    @abc.abstractmethod
    def segmenter(
        self,
        config: C,
        model: Any,
        context: Context,
        settings: Any = None,
        frame_size: tuple[int, int] | None = None,
    ) -> "Segmenter":
        """Create a segmenter with the current weights of ``model``.

        Args:
            config: the options of the training.
            model: the module of the stage.
            context: what the stage was built from.
            settings: an instance of ``Method.settings``. Default: its defaults.
            frame_size: (H, W) that frames are resized to before the backbone. Default: as in training.
        """

    def require_cacheable(self, config: C) -> None:
        """Raise an error if the inputs of the stage cannot be cached.

        Raises:
            ValueError: with the reason.
        """

    def noise(self, model: Any) -> tuple[int, ...] | None:
        """Shape, without the batch, of the standard normal noise that each step draws; None for no noise."""
        return None

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of AdamW. By default one group with all parameters that need a gradient.

        A group may have two more entries: ``lr_scale``, a factor of the learning rate, and ``starts_at``, the step from
        which on its weights are trained.
        """
        return all_parameters(model)

    def after_step(self, model: nn.Module) -> None:
        """Update state after each optimiser step, such as a moving average; runs inside the CUDA graph."""

    def attention(self, config: C, context: Context) -> tuple[int, int, int] | None:
        """Heads, tokens and width of a head of the largest self-attention of a step; None without self-attention.

        The fastest attention kernel is chosen for these sizes.
        """
        return None

    def describe(self, config: C, context: Context) -> str:
        """Describe the inputs, for the first line that training prints."""
        return f"{context.grid[0]}x{context.grid[1]} tokens of width {context.backbone.dim}"


@dataclass(frozen=True)
class Encoded:
    """An encoded video: the result of the expensive part of segmenting, which decodes the video and runs the backbone.

    Attributes:
        frames: number of frames T.
        by_seed: for each seed of the initial slots, what :meth:`Segmenter.segment` needs.
    """

    frames: int
    by_seed: Mapping[int, Any]


def with_settings(defaults: S, settings: Mapping[str, Any]) -> S:
    """Replace some settings of a method; a value of None leaves a setting unchanged."""
    given = {name: value for name, value in settings.items() if value is not None}
    changed: S = replace(defaults, **given)  # type: ignore[type-var]
    return changed


class Segmenter(abc.ABC):
    """A trained method, ready to segment videos.

    Attributes:
        name: name of its row in tables, such as "video stage".
        backbone: frozen feature extractor.
        frame_size: size (H, W) that frames are resized to before the backbone.
        num_segments: number of segments that it makes; baselines make as many by default.
        precision: "fp32", "bf16" or "fp8-backbone".
        weights: for the key of each stage that is used, the hash of its weights.
    """

    name: str
    backbone: Backbone
    frame_size: tuple[int, int]
    num_segments: int
    precision: str
    weights: Mapping[str, str] = MappingProxyType({})

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (h, w)."""
        return self.backbone.grid(self.frame_size)

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.backbone.device

    @abc.abstractmethod
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """Decode a video and run the backbone, once for several seeds.

        The video is decoded as a stream, so memory beyond the result does not grow with its length.

        Args:
            video: the video.
            seeds: seeds of the initial slots.
            advance: called after each chunk with its number of frames, for a progress bar.
            keep: called with the features [t, M, C] of each chunk. Baselines use it to get the same features.

        Raises:
            ValueError: if the video is damaged, or its file changes while it is read.
        """

    @abc.abstractmethod
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """Segment an encoded video. This decodes nothing, so it is fast enough to try many settings.

        Args:
            encoded: the result of :meth:`encode`.
            seed: one of the seeds that the video was encoded with.
            settings: settings that replace those of the segmenter, such as ``merge_threshold=0.2``. None leaves a
                setting unchanged.
        """

    def programs(self) -> list[Program]:
        """The parts of the method that ``interpreter.export`` writes, in the order in which a caller runs them.

        Raises:
            ValueError: if the method, or one of its settings, cannot be exported.
        """
        raise ValueError(f"{self.name} trains no network, so there is nothing to export but its backbone")

    def online(self, seed: int = 0, window: int | None = None) -> "Online":
        """Start to segment a live stream. Most methods need the whole video and raise an error.

        Args:
            seed: seed of the initial slots.
            window: number of frames that are segmented together. Default: the default of the method.

        Raises:
            ValueError: if the method, or one of its settings, needs the whole video.
        """
        raise ValueError("this method segments whole videos; a live stream needs a run of the method interpreter")


class Online(Protocol):
    """Segments a live stream, window by window.

    Attributes:
        window: number of frames that are segmented together; the last window of a stream may be shorter.
    """

    window: int

    def add(self, video: Video) -> Segmentation:
        """Segment the next window. Segments keep the numbers that they had in earlier windows.

        Memory does not grow with the length of the stream.
        """


# (device, settings, frame size or None for the default) -> segmenter of a method without training
OpenUntrained = Callable[[torch.device, Any, tuple[int, int] | None], Segmenter]


@dataclass(frozen=True)
class Method:
    """A published system to segment videos: what ``--method`` chooses.

    Attributes:
        name: its name on the command line (``--method``) and in config.json.
        summary: one line about it.
        citation: authors, title, venue and year.
        stages: its stages in the order of their training; empty if nothing is trained.
        settings: frozen dataclass with the settings at inference, which are options of ``segment`` and ``evaluate``.
        open: creates a segmenter, for a method without stages.
        segments_with: function from settings to the key of the stage that segments. Default: the field ``stage`` of the
            settings, or the last stage if there is no such field.
    """

    name: str
    summary: str
    citation: str
    stages: tuple[Stage[Any], ...]
    settings: type
    open: OpenUntrained | None = None
    segments_with: Callable[[Any], str] | None = None

    def segmenting_stage(self, settings: Any) -> str:
        """Key of the stage that segments with these settings."""
        if self.segments_with is not None:
            return self.segments_with(settings)
        key: str = getattr(settings, "stage", self.stages[-1].name)
        return key

    def stage(self, key: str) -> Stage[Any]:
        """Return the stage with this key, such as "video" or "video-3".

        Raises:
            ValueError: if the method has no such stage.
        """
        for stage in self.stages:
            if key == stage.name or key.startswith(f"{stage.name}-"):
                return stage
        names = ", ".join(stage.name for stage in self.stages) or "none"
        raise ValueError(f"method {self.name} has no stage {key!r}; its stages: {names}")
