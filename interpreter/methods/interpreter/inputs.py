"""Where a training's features and image slots come from: the cache, or each batch anew."""

import contextlib
from collections.abc import Callable

import torch

from interpreter.configs import Dtype, Features, LoaderConfig, OptimConfig
from interpreter.console import console, progress_bar
from interpreter.data import VideoDataset
from interpreter.data.loaders import Loader, open_loader
from interpreter.engine.picture_grid import StoredSamples, stored_pictures
from interpreter.engine.precision import resolve_precision
from interpreter.methods.interpreter.config import ImageTraining, VideoTraining
from interpreter.methods.interpreter.image_slots import SlotMaker, SlotSource, StoredSlots, StreamedSlots
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.models.backbones import Backbone
from interpreter.store.features import FeatureMaker, FeatureSource, StoredFeatures, StreamedFeatures
from interpreter.store.fill import Cache, Shard, default_workers, read_contents


def open_features(
    config: ImageTraining,
    backbone: Backbone,
    dataset: VideoDataset,
    optim: OptimConfig,
    opened: contextlib.ExitStack,
) -> FeatureSource:
    """Features of all frames, stored or streamed as the configuration says; a loader is left in ``opened``."""
    videos, size = dataset.videos, config.data.frame_size
    if config.features != "streamed":
        contents = read_contents(videos, default_workers())
        root = config.cache or config.run / "cache"

        def cache(dtype: Dtype) -> Cache:
            maker = FeatureMaker(root, backbone, config.backbone, size, optim.precision, dtype, optim.flip)
            return Cache(maker, videos, contents)

        if stored := _stored(config.features, cache):
            return StoredFeatures(stored.table(), backbone.device)
    console.print("features are streamed: each batch is decoded and encoded anew")
    loader = start_loader(config.decoding, dataset, size, backbone.device, opened)
    return StreamedFeatures(backbone, loader, optim.precision)


def open_slots(
    config: VideoTraining,
    image_config: ImageTraining,
    backbone: Backbone,
    image_stage: ImageStage,
    weights: str,
    dataset: VideoDataset,
    opened: contextlib.ExitStack,
) -> tuple[SlotSource, StoredSamples | None]:
    """Image slots of all frames, stored or streamed as the configuration says; what the pictures need if stored."""
    videos, size, device = dataset.videos, image_config.data.frame_size, backbone.device
    precision = resolve_precision(image_config.optim.precision, device)
    contents = read_contents(videos, default_workers())
    if config.features != "streamed":
        root = config.cache or image_config.cache or config.run / "cache"

        def cache(dtype: Dtype) -> Cache:
            features = FeatureMaker(root, backbone, image_config.backbone, size, precision, dtype, config.optim.flip)
            return Cache(SlotMaker(root, features, image_stage, weights, config.samples), videos, contents)

        if stored := _stored(config.features, cache):
            slots = StoredSlots(stored.table(), device)
            return slots, StoredSamples(slots, stored_pictures(root, videos, contents, size))
    console.print("image slots are streamed: each batch is decoded, encoded and passed through the image stage anew")
    loader = start_loader(config.decoding, dataset, size, device, opened)
    features = StreamedFeatures(backbone, loader, precision)
    digests, lengths = [content.digest for content in contents], [v.num_frames for v in videos]
    return StreamedSlots(image_stage, features, digests, lengths, precision), None


def _stored(choice: Features, cache: Callable[[Dtype], Cache]) -> Cache | None:
    """The cache, complete: of either type if it is there, else fp16 is made. None if it is to be done without."""
    caches = [cache("fp16"), cache("bf16")]
    chosen = next((one for one in caches if not one.missing()), caches[0])
    missing = chosen.num_bytes(chosen.missing())
    # What is there already counts as free: a call that continues another one decides as that one did.
    if choice == "auto" and missing and chosen.num_bytes() > (chosen.free_bytes() + chosen.num_bytes() - missing) / 2:
        return None
    advice = "use --features streamed, or --cache DIR on a larger disk"
    chosen.fill(Shard.from_environment(), default_workers(), advice)
    chosen.wait_for_others()
    return chosen


def start_loader(
    config: LoaderConfig,
    dataset: VideoDataset,
    size: tuple[int, int],
    device: torch.device,
    opened: contextlib.ExitStack,
) -> Loader:
    """Open the loader that the configuration says; one that decodes everything first shows a progress bar."""
    with progress_bar("frames") as progress:
        bar = progress.add_task("decoding", total=sum(v.num_frames for v in dataset.videos), status="", visible=False)

        def advance(frames: int) -> None:
            progress.update(bar, advance=frames, visible=True)

        options = (config.workers, config.prefetch, advance)
        loader = opened.enter_context(open_loader(config.loader, dataset.videos, size, device, *options))
    console.print(f"frames are decoded by the {loader.name} loader")
    return loader
