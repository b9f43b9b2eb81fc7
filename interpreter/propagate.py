"""Propagate the masks of a first frame through a video: ``python -m interpreter.propagate --help``."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np
import tyro

from interpreter.commands import cli, run_command
from interpreter.configs import WITHOUT_SPLITS, BackboneConfig, VideosConfig, option, require_square
from interpreter.console import console, progress_bar
from interpreter.data import Video, VideoDataset, VideoError, open_video
from interpreter.data.predictions import open_predictions
from interpreter.engine.run import check_ranges
from interpreter.engine.videos import open_videos
from interpreter.evaluation.first_masks import PropagatedMasks, not_scorable, protocols_for
from interpreter.evaluation.gallery import Gallery
from interpreter.evaluation.output import write_evaluation
from interpreter.evaluation.provenance import code_version
from interpreter.evaluation.record import Provenance
from interpreter.evaluation.scoring import Scores, score_dataset
from interpreter.hub.fetching import local_run
from interpreter.hub.names import folder_to_write, run_name
from interpreter.models.label_propagation import Propagation
from interpreter.output_folder import make_output_folder
from interpreter.propagation import (
    Encoder,
    FirstMask,
    check_output,
    files_of,
    first_mask,
    open_encoder,
    propagated,
    read_first_mask,
    record_of,
    write_propagated,
)
from interpreter.segmentation import Edges

PROG = "python -m interpreter.propagate"
DEFAULT_BACKBONE = "facebook/dinov2-small"


@dataclass(frozen=True, kw_only=True)
class PropagateOptions:
    """Propagate the object masks of the first frame through a video, or through every video of a data set.

    Each patch of a frame takes its label from the most similar patches of the first frame and of the previous frames
    (label propagation). Nothing is trained. The features come from a run, or from a backbone without a run.

    Writes to OUT: Annotations/NAME/00000.png … (a palette PNG for each frame; a pixel's value is its object as in the
    first mask, 0 is background), overlays/NAME.mp4, previews/NAME.png and propagation.json. If a data set has masks of
    later frames, the result is scored (protocol davis-2017, J&F), with copies of the first mask as the baseline.
    OUT/evaluation then contains tables and a report.

    Examples:
      python -m interpreter.propagate frames --mask first.png --out out
      python -m interpreter.propagate clip.mp4 --mask first.png --run runs/clips --out out
      python -m interpreter.propagate --data davis --root DAVIS --run runs/davis --out out
    """

    clip: tyro.conf.Positional[Path | None] = None
    """Video file, or folder of numbered images (00000.jpg, 00001.jpg …). Without it, a data set: --data and --root."""
    mask: Path | None = None
    """Mask of the first frame, a palette or gray PNG of the video's size: a pixel's value is its object, 0 background.
    255 is void and counts as background; but in a mask with only 0 and 255, 255 is the object."""
    out: Path
    """Directory to write to."""
    run: Path | None = None
    """Directory of a trained run of any method, or hub:OWNER/NAME[@REVISION]; its backbone gives the features.
    Default: --backbone."""
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(DEFAULT_BACKBONE))
    """The backbone that computes the features without --run."""
    frame_size: tuple[int, int] | None = option(None, at_least=1)
    """Height and width that frames are resized to before the backbone. A larger size gives finer masks.
    Default: as in training with --run; otherwise the video's size, at most 480 pixels on the shorter side."""
    propagation: Propagation = field(default_factory=Propagation)
    edges: Edges = "none"
    """none: upsample the soft labels of the patches bilinearly, as published evaluations do.
    guided: move the edges of the masks to those of the frames, as `segment` does."""
    alpha: float = 0.5
    """Opacity of the colours in the overlay, 0 to 1; 0 draws only contours."""
    data: VideosConfig = field(
        default_factory=lambda: VideosConfig(
            data="davis", split="val", year="2017", annotations="semi-supervised", num_videos=12
        )
    )
    pictures: int = option(3, at_least=0)
    """Number of best and of worst videos of a data set to draw."""


def propagate_video(
    clip: str | Path,
    mask: str | Path | np.ndarray,
    *,
    run: str | Path | None = None,
    backbone: str | BackboneConfig = DEFAULT_BACKBONE,
    frame_size: tuple[int, int] | None = None,
    how: Propagation | None = None,
    edges: Edges = "none",
) -> Iterator[np.ndarray]:
    """Propagate the mask of the first frame through a video. Writes nothing.

    For example ``for ids in propagate_video("frames", "first.png", run="runs/clips")``.

    Args:
        clip: video file or folder of frames.
        mask: of its first frame: a PNG, or uint8 [H, W] of the video's size, 0 background, 255 void.
        run: directory of a run, or ``hub:OWNER/NAME[@REVISION]``; its backbone gives the features.
        backbone: name of the backbone, used without a run.
        frame_size: (H, W) that frames are resized to before the backbone. Default: as in training with a run; otherwise
            the video's size, at most 480 pixels on the shorter side.
        how: parameters of label propagation.
        edges: of the masks: "none", or "guided" by the frames.

    Returns:
        The object of each pixel, uint8 [H, W], frame by frame. Only a few frames are in memory at a time.

    Raises:
        ValueError: if video or mask is damaged or unsuitable, or an option is out of range.
        OSError: if video, mask, run or backbone does not exist.
    """
    if edges not in get_args(Edges):
        raise ValueError(f"edges {edges!r}: choose from {', '.join(get_args(Edges))}")
    how = how or Propagation()
    check_ranges(how)
    video = open_video(clip)
    if isinstance(mask, np.ndarray):
        if mask.dtype != np.uint8 or mask.shape != (video.height, video.width):
            raise ValueError(
                f"mask must be uint8 [{video.height}, {video.width}] like the video, got {mask.dtype} {mask.shape}"
            )
        first = first_mask(mask, "mask")
    else:
        first = read_first_mask(Path(mask), video)
    config = BackboneConfig(backbone) if isinstance(backbone, str) else backbone
    encoder = open_encoder(None if run is None else local_run(run), config, frame_size)
    return (ids for _, ids in propagated(video, first, encoder, how, edges))


def check_options(options: PropagateOptions) -> None:
    """Refuse options that are out of range or contradict each other, before anything is computed.

    Raises:
        ValueError: names the option.
    """
    check_ranges(options)
    scenes_of_run = options.data.data == "synthetic" and options.run is not None
    refused = {
        "give a CLIP with --mask PNG, or a data set with --data NAME --root DIR": options.clip is None
        and options.mask is None
        and options.data.root is None
        and not scenes_of_run,
        "a CLIP needs --mask PNG, the object ids of its first frame": options.clip is not None and options.mask is None,
        "--mask needs a CLIP: give the video or its folder of frames": options.clip is None
        and options.mask is not None,
        "--root is a data set, which has its own masks; leave out either --root or the CLIP": options.clip is not None
        and options.data.root is not None,
        f"--out {options.out} is the data set itself, which must not change; give another directory": options.data.root
        is not None
        and options.out.resolve() == options.data.root.resolve(),
        "leave out --backbone, --feature-layer, --feature-norm and --output: a run has its own features": (
            options.run is not None and options.backbone != BackboneConfig(DEFAULT_BACKBONE)
        ),
    }
    for message, wrong in refused.items():
        if wrong:
            raise ValueError(message)


def propagate_clip(options: PropagateOptions) -> None:
    """Propagate ``options.mask`` through ``options.clip``, and write the files of :class:`PropagateOptions`."""
    assert options.clip is not None
    assert options.mask is not None
    video = open_video(options.clip)
    check_output(options.out, video, options.alpha)
    mask = read_first_mask(options.mask, video)
    total = video.num_frames  # counting is fast compared with encoding, and detects damage at the end of a file early
    encoder = open_encoder(options.run, options.backbone, options.frame_size)
    make_output_folder(options.out)
    with progress_bar("frames") as progress:
        bar = progress.add_task("propagate", total=total, status=video.name)
        seen = _write(options, video, mask, encoder, lambda: progress.advance(bar))
    print(f"{video.name}: {total} frames of {video.height}x{video.width} (height x width)")
    for number in mask.ids[1:].tolist():
        print(f"object {number}: in {seen[number]} of {total} frames")
    for name in files_of(video)[::-1]:
        print(options.out / name)


def propagate_dataset(options: PropagateOptions) -> Scores | None:
    """Propagate the first mask of every video of a data set, and score the result.

    Returns:
        The scores; None if no video has masks of later frames.

    Raises:
        ValueError: if no video has a usable first mask.
    """
    commit = code_version()  # before anything is written to the checkout
    dataset = open_videos(options.data, folder_to_write(options.run or Path()))
    for video in dataset.videos:
        check_output(options.out, video, options.alpha)
    encoder = open_encoder(options.run, options.backbone, options.frame_size)
    if encoder.frame_size:
        require_square(options.data.crop, encoder.frame_size)
    make_output_folder(options.out)
    failed: dict[str, str] = {}
    with progress_bar("frames") as progress:
        bar = progress.add_task("propagate", total=sum(video.num_frames for video in dataset.videos), status="")
        done = 0
        for index, video in enumerate(dataset.videos):
            progress.update(bar, status=video.name)
            try:
                mask = _mask_of(dataset, index)
                _write(options, video, mask, encoder, lambda: progress.advance(bar))
            except VideoError as error:
                failed[video.name] = str(error)
            done += video.num_frames
            progress.update(bar, completed=done)
    for reason in failed.values():
        console.print(f"left out: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(failed) == len(dataset.videos):
        raise ValueError(f"no video has a usable mask of its first frame: {next(iter(failed.values()))}")
    print(f"masks: {options.out / 'Annotations'}\noverlays: {options.out / 'overlays'}")
    print(f"previews: {options.out / 'previews'}")
    unscored = failed | not_scorable(dataset)
    if len(unscored) == len(dataset.videos):
        print("nothing to score: the data set has no masks of later frames")
        return None
    return _score(options, dataset, encoder, unscored, commit)


def _write(
    options: PropagateOptions, video: Video, mask: FirstMask, encoder: Encoder, advance: Callable[[], None]
) -> np.ndarray:
    maps = propagated(video, mask, encoder, options.propagation, options.edges)
    return write_propagated(options.out, video, maps, record_of(options), options.alpha, advance)


def _mask_of(dataset: VideoDataset, index: int) -> FirstMask:
    """The mask of a video's first frame."""
    video, frames = dataset.videos[index], dataset.mask_frames(index).tolist()
    if 0 not in frames:
        others = f"the first one with a mask is frame {frames[0]}" if frames else "it has no masks at all"
        raise VideoError(f"{video.path}: no mask of its first frame, {others}. {dataset.expected_masks(index)}".strip())
    return first_mask(dataset.mask(index, 0), video.path)


def _score(
    options: PropagateOptions, dataset: VideoDataset, encoder: Encoder, unscored: Mapping[str, str], commit: str
) -> Scores:
    """Score the written masks, and write and print the tables."""
    data = options.data
    masks = PropagatedMasks(open_predictions(options.out / "Annotations"), f"propagated, {encoder.name}", unscored)
    gallery = Gallery(options.pictures)
    scores = score_dataset(dataset, masks, protocols_for(data), gallery)
    name = f"{data.data}{'-' + data.year if data.data == 'davis' else ''}"
    split = "all" if data.data in WITHOUT_SPLITS else data.split or "all"
    provenance = Provenance(name, split, encoder.name, commit)
    record = asdict(options) | ({"run": run_name(options.run)} if options.run else {})
    write_evaluation(options.out / "evaluation", scores, provenance, record, gallery)
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = cli(PropagateOptions, sys.argv[1:] if arguments is None else arguments, prog=PROG)
    check_options(options)
    options = replace(options, run=None if options.run is None else local_run(options.run))
    if options.clip is None:
        propagate_dataset(options)
    else:
        propagate_clip(options)
    return 0


if __name__ == "__main__":
    run_command(main)
