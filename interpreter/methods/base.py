"""The contract of a method: what it has to define, so that every command and every tool of this project can use it.

A *method* is a published system, such as Interpreter or DINOSAUR. It has *stages* that are trained one after the other
(none, if nothing is trained), and a *segmenter* that finds the segments of a whole video with what was trained::

    class MyStage(Stage[MyConfig]):
        name, config, presets = "model", MyConfig, {"demo": MyConfig(run=Path("runs/demo"))}

        def build(self, config, context): ...               # the module
        def inputs(self, config, context, settings): ...    # what it trains on: frames, clips, slots of a stage
        def maker(self, config, context, dtype, flip): ...  # what computes these inputs for the cache
        def loss(self, model, features, noise): ...         # a scalar, and numbers to log
        def segmenter(self, config, model, context, settings=None, frame_size=None): ...

``FrameStage`` (interpreter/methods/frames.py) defines ``inputs`` and ``maker`` for stages that train on frames. Then ::

    MY_METHOD = Method("my-method", "One line.", "Authors, venue, year", (MyStage(),), MySettings)

and one line in ``METHODS`` (interpreter/methods/__init__.py). All else works without further code: batches, memory
notice, resuming, compilation, CUDA graphs, several GPUs, caches, pictures, ``segment`` and ``evaluate``.
CONTRIBUTING.md lists the steps, and tests/interpreter/methods/test_contract.py checks every method in ``METHODS``.
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
S = TypeVar("S")  # dataclass of a method's settings


@dataclass(frozen=True)
class Trained:
    """A stage that was trained before, frozen and in evaluation mode.

    Attributes:
        config: what it was trained with.
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
        device: where everything runs.
        precision: "fp32", "bf16" or "fp8-backbone", of the backbone and of earlier stages.
        data: where the videos come from, and the size that frames are resized to.
        backbone_config: how the backbone was loaded.
        backbone: the frozen feature extractor.
        store: directory of cached features and slots.
        earlier: the trained stages that this one needs, by key.
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
        """What computes the backbone's features for the cache; with ``flip`` those of mirrored frames too."""
        size, precision = self.data.frame_size, self.precision
        return FeatureMaker(self.store, self.backbone, self.backbone_config, size, precision, dtype, flip)


class Stage(abc.ABC, Generic[C]):
    """One training: a module, what it trains on, and its loss.

    Attributes:
        name: on the command line (``--stage``) and of its directory, RUN/NAME; a word without a hyphen.
        config: dataclass of its command line's options.
        presets: named defaults of these options; "demo" has to be among them.
        additive: whether the loss is a mean over samples. If not, such as with negatives from the whole batch,
            ``--micro-batch`` is refused.
    """

    name: ClassVar[str]
    config: type[C]
    presets: Mapping[str, C]
    additive: ClassVar[bool] = True

    def key(self, config: C) -> str:
        """Name of its directory and of its entry in config.json.

        By default ``name``. A stage that a run may hold several of has an option ``level`` and appends a hyphen and its
        value, such as video-3 for the third level of a hierarchy.
        """
        return self.name

    def needs(self, config: C) -> tuple[str, ...]:
        """Keys of the trained stages that this one is built on; the first of them supplies data and backbone."""
        return ()

    def to_segment(self, config: C) -> str:
        """Options with which ``segment`` and ``evaluate`` use this stage; empty if they do by default."""
        return ""

    @abc.abstractmethod
    def build(self, config: C, context: Context) -> nn.Module:
        """The module, with random weights.

        Raises:
            ValueError: if sizes do not fit; names the option.
        """

    @abc.abstractmethod
    def inputs(self, config: C, context: Context, settings: InputSettings) -> AbstractContextManager[Inputs]:
        """What the stage trains on, such as :class:`interpreter.engine.inputs.FrameInputs`."""

    @abc.abstractmethod
    def maker(self, config: C, context: Context, dtype: Dtype, flip: bool) -> Maker:
        """What computes the files of the cache that :meth:`inputs` reads, with ``flip`` mirrored frames too."""

    @abc.abstractmethod
    def loss(self, model: Any, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and numbers to log of a batch: the tensors of :meth:`inputs`, then noise if there is any.

        It runs under autocast, compiled and inside a CUDA graph: no random numbers, no copies to or from the host.
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
        """A segmenter with the weights of ``model`` as they are now.

        Args:
            config: options that the stage is, or was, trained with.
            model: its module.
            context: what it was built from.
            settings: of the method's dataclass ``settings``. Default: its defaults.
            frame_size: (H, W) that frames are resized to before the backbone. Default: as in training.
        """

    def require_cacheable(self, config: C) -> None:
        """Refuse to fill a cache that :meth:`inputs` would not read.

        Raises:
            ValueError: says why nothing can be cached.
        """

    def noise(self, model: Any) -> tuple[int, ...] | None:
        """Shape, without the batch, of standard normal noise that each step draws anew; None for no noise."""
        return None

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of AdamW; a group may have a factor ``lr_scale`` of the learning rate, and a step
        ``starts_at`` up to which its weights stay as they are. By default there is one group of all parameters that
        need a gradient."""
        return all_parameters(model)

    def after_step(self, model: nn.Module) -> None:
        """Called after each optimiser step, inside the CUDA graph: an exponential moving average, for example."""

    def attention(self, config: C, context: Context) -> tuple[int, int, int] | None:
        """Heads, tokens and width of a head of the largest self-attention of a step, for which the fastest kernel is
        chosen; None if there is no self-attention."""
        return None

    def describe(self, config: C, context: Context) -> str:
        """What it trains on, for the first line that training prints."""
        return f"{context.grid[0]}x{context.grid[1]} tokens of width {context.backbone.dim}"


@dataclass(frozen=True)
class Encoded:
    """Result of the expensive part of segmenting a video, from which the cheap part computes the segmentation.

    Attributes:
        frames: number of frames T.
        by_seed: for each seed of the slot prior, what :meth:`Segmenter.segment` needs.
    """

    frames: int
    by_seed: Mapping[int, Any]


def with_settings(defaults: S, settings: Mapping[str, Any]) -> S:
    """A method's settings with those replaced that are given; None leaves a setting as it is."""
    given = {name: value for name, value in settings.items() if value is not None}
    changed: S = replace(defaults, **given)  # type: ignore[type-var]
    return changed


class Segmenter(abc.ABC):
    """A trained method, ready to segment videos.

    Attributes:
        name: of its row in tables, such as "video stage".
        backbone: frozen feature extractor.
        frame_size: size (H, W) that frames are resized to before the backbone.
        num_segments: number of segments that it looks for; the default of the baselines.
        precision: "fp32", "bf16" or "fp8-backbone".
        weights: hash of the weights of each stage of the run that takes part, by its key.
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
        """Where it computes."""
        return self.backbone.device

    @abc.abstractmethod
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """Decode and encode a video once, for several seeds; memory beyond the result is constant.

        Args:
            video: the video; it is decoded as a stream.
            seeds: of the slot prior.
            advance: called with the number of frames that were encoded.
            keep: called with each chunk's features [t, M, D]; the baselines use it to reuse them.

        Raises:
            ValueError: if the video is damaged, or changes meanwhile.
        """

    @abc.abstractmethod
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """Segment an encoded video: nothing is decoded.

        Args:
            encoded: what :meth:`encode` returned.
            seed: one of its seeds.
            settings: fields of the method's settings that replace those it was opened with, such as
                ``merge_threshold=0.2``. None leaves a setting as it is.
        """

    def programs(self) -> list[Program]:
        """The parts of the method that ``interpreter.export`` writes, in the order in which a caller runs them.

        Raises:
            ValueError: if the method, or a setting that it was opened with, has no such parts.
        """
        raise ValueError(f"{self.name} trains no network, so there is nothing to export but its backbone")

    def online(self, seed: int = 0, window: int | None = None) -> "Online":
        """Begin to segment a live stream; by default no method can.

        Args:
            seed: of the slot prior.
            window: frames that are segmented together. Default: the method's own.

        Raises:
            ValueError: if the method, or a setting that it was opened with, needs the whole video.
        """
        raise ValueError("this method segments whole videos; a live stream needs a run of the method interpreter")


class Online(Protocol):
    """Segments a live stream, window by window.

    Attributes:
        window: frames that are segmented together; the last window of a stream may be shorter.
    """

    window: int

    def add(self, video: Video) -> Segmentation:
        """Segment the next window; a segment has the number that it had in the windows before.

        What is kept from window to window does not grow with the length of the stream.
        """


# (device, settings, frame size or None for the default) -> segmenter of a method that is not trained
OpenUntrained = Callable[[torch.device, Any, tuple[int, int] | None], Segmenter]


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        name: on the command line (``--method``) and in config.json.
        summary: what it is, in one line.
        citation: authors, title, venue and year.
        stages: its stages in the order of their training; empty if nothing is trained.
        settings: frozen dataclass of its settings at inference: options of ``segment`` and ``evaluate``.
        open: opens a segmenter of a method without stages.
        segments_with: of settings, the key of the stage that segments. By default that of the settings' field
            ``stage``; the last one, if they have none.
    """

    name: str
    summary: str
    citation: str
    stages: tuple[Stage[Any], ...]
    settings: type
    open: OpenUntrained | None = None
    segments_with: Callable[[Any], str] | None = None

    def segmenting_stage(self, settings: Any) -> str:
        """The key of the stage that segments with these settings."""
        if self.segments_with is not None:
            return self.segments_with(settings)
        key: str = getattr(settings, "stage", self.stages[-1].name)
        return key

    def stage(self, key: str) -> Stage[Any]:
        """The stage of a key, such as "video" or "video-3".

        Raises:
            ValueError: if there is none.
        """
        for stage in self.stages:
            if key == stage.name or key.startswith(f"{stage.name}-"):
                return stage
        names = ", ".join(stage.name for stage in self.stages) or "none"
        raise ValueError(f"method {self.name} has no stage {key!r}; its stages: {names}")
