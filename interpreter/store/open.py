"""Opens the inputs of a stage: the cache, which is filled first, or a loader that decodes each batch again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from interpreter.configs import Dtype, Features, LoaderConfig
from interpreter.console import console, progress_bar
from interpreter.data import Video
from interpreter.data.loaders import Loader, open_loader
from interpreter.data.options import Crop
from interpreter.models.backbones import Backbone
from interpreter.store.features import NOT_STORED, FeatureMaker, FeatureSource, StoredFeatures, StreamedFeatures
from interpreter.store.files import Content
from interpreter.store.fill import Cache, Maker, Shard, default_workers, read_contents

M = TypeVar("M", bound=Maker)


def complete_cache(
    choice: Features, make: Callable[[Dtype], Maker], videos: Sequence[Video], contents: Sequence[Content]
) -> Cache | None:
    """The complete cache, which is filled if files are missing; None if features are streamed.

    A complete cache of type fp16 or bf16 is used. If there is none, one of type fp16 is filled.

    Args:
        choice: "stored" always uses the cache, "auto" if it fits into half of the free disk, "streamed" never.
        make: returns what computes the files, for a type.
        videos: the videos.
        contents: result of :func:`read_contents` for them.

    Raises:
        OSError: if the disk is too small.
        ValueError: if a video is damaged.
    """
    if choice == "streamed":
        return None
    caches = [Cache(make("fp16"), videos, contents), Cache(make("bf16"), videos, contents)]
    chosen = next((cache for cache in caches if not cache.missing()), caches[0])
    missing = chosen.num_bytes(chosen.missing())
    # Existing files count as free space, so that a command that resumes another one makes the same decision.
    if choice == "auto" and missing and chosen.num_bytes() > (chosen.free_bytes() + chosen.num_bytes() - missing) / 2:
        return None
    advice = "use --features streamed, or --cache DIR on a larger disk"
    chosen.fill(Shard.from_environment(), default_workers(), advice)
    chosen.wait_for_others()
    return chosen


@contextmanager
def streaming_loader(
    config: LoaderConfig, videos: Sequence[Video], size: tuple[int, int], device: torch.device, squares: bool = False
) -> Iterator[Loader]:
    """Open the configured loader. If it decodes all frames first, it shows a progress bar.

    Args:
        config, videos, size, device, squares: see :func:`open_loader`.
    """
    with progress_bar("frames") as progress:
        bar = progress.add_task("decoding", total=sum(v.num_frames for v in videos), status="", visible=False)

        def advance(frames: int) -> None:
            progress.update(bar, advance=frames, visible=True)

        loader = open_loader(config.loader, videos, size, device, config.workers, config.prefetch, advance, squares)
    with loader:
        console.print(f"frames are decoded by the {loader.name} loader")
        yield loader


@contextmanager
def opened_features(
    choice: Features,
    make: Callable[[Dtype], FeatureMaker],
    backbone: Backbone,
    videos: Sequence[Video],
    size: tuple[int, int],
    precision: str,
    decoding: LoaderConfig,
    crop: Crop = "none",
) -> Iterator[FeatureSource]:
    """Features of all frames, from the cache or encoded for each batch.

    Args:
        choice, make, videos: see :func:`complete_cache`.
        backbone: frozen feature extractor.
        size: (H, W) that frames are resized to.
        precision: precision of the backbone.
        decoding: options of the loader, if features are streamed.
        crop: the option with which ``videos`` were opened. With "random", features are streamed, and each request needs
            offsets.

    Raises:
        ValueError: for ``choice="stored"`` with ``crop="random"``.
    """
    device = backbone.device
    if crop == "random":
        if choice == "stored":
            raise ValueError(NOT_STORED)
        choice = "streamed"
    contents = [] if choice == "streamed" else read_contents(videos, default_workers())
    if cache := complete_cache(choice, make, videos, contents):
        yield StoredFeatures(cache.table(), device)
        return
    console.print("features are streamed: each batch is decoded and encoded again")
    with streaming_loader(decoding, videos, size, device, crop == "random") as loader:
        yield StreamedFeatures(backbone, loader, precision)
