"""Videos of a data set before they are opened. The readers of published layouts return them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from interpreter.data.datasets.annotations import Annotation
from interpreter.data.images import list_images
from interpreter.data.tree import LeftOut, split_frames
from interpreter.data.video import Video

Open = Callable[[], tuple[Video, Annotation | None]]


@dataclass(frozen=True)
class UnopenedVideo:
    """One video of a data set that is not opened yet.

    Attributes:
        name: its name, unique in the data set.
        path: its file or folder, for messages.
        open: opens it and returns the video with its masks or None. Raises `VideoError` or `OSError` if it is damaged
            or missing.
        files: its frames, if each is a separate file.
        others: images in its folder that are not frames.
        id: its id in the release's own index, if that is not the name.
    """

    name: str
    path: Path
    open: Open
    files: Sequence[Path] = ()
    others: Sequence[Path] = ()
    id: int | str | None = None


class UnopenedVideos(list[UnopenedVideo]):
    """The videos of a data set, and the files in it that are not read."""

    def __init__(self, sources: Iterable[UnopenedVideo], left_out: LeftOut | None = None) -> None:
        super().__init__(sources)
        self.left_out = left_out or LeftOut()
        for source in self:
            for image in source.others:
                self.left_out.add(image, " not numbered like the frames")


def unopened_folder(name: str, folder: Path, open: Open) -> UnopenedVideo:
    """A folder of frames, which may be missing, as an unopened video."""
    frames, others, _ = split_frames(list_images(folder) if folder.is_dir() else [])
    return UnopenedVideo(name, folder, open, frames, others)
