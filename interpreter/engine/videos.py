"""Opens the data set of a run."""

from pathlib import Path

from interpreter.configs import WITHOUT_SPLITS, VideosConfig
from interpreter.console import console
from interpreter.data import VideoDataset, open_dataset
from interpreter.data.datasets import find_sources, split_parts
from interpreter.data.scenes.generate import generate_scenes


def open_videos(config: VideosConfig, run: Path) -> VideoDataset:
    """Open the data set; scenes that do not exist yet are generated.

    Prints the videos that are skipped and the files that are left out.

    With ``crop="random"``, as with "central", videos and masks show the central square, for pictures, segmentations and
    scores. In training, loaders cut random squares from the whole frames.
    """
    root, split = config.root, config.split
    if config.data == "synthetic":
        split, root = split or "train", root or run / "scenes"
        for part in split_parts(split):
            generate_scenes(
                root,
                config.num_videos,
                num_frames=config.scene_frames,
                split=part,
                objects=config.scene_objects,
                absences=config.scene_absences,
            )
    elif root is None:
        raise ValueError(f"--data {config.data} needs --root DIR")
    elif config.data in WITHOUT_SPLITS:
        split = None
    dataset = open_dataset(
        config.data,
        root,
        split,
        year=int(config.year),
        annotations=config.annotations,
        crop_borders=config.crop_borders,
        central_square=config.crop != "none",
    )
    for line in filter(None, (dataset.report(), dataset.left_out)):
        console.print(line, style="yellow", markup=False, highlight=False)  # names may hold [brackets]
    return dataset


def published_ids(config: VideosConfig) -> dict[str, int | str]:
    """Id of each video in the release's own index (YouTube-VIS: a number), by name; empty if there is no index."""
    if config.root is None:
        raise ValueError(f"--data {config.data} needs --root DIR")
    split = None if config.data in WITHOUT_SPLITS else config.split
    sources = find_sources(config.data, config.root, split, year=int(config.year), annotations=config.annotations)
    return {source.name: source.id for source in sources if source.id is not None}
