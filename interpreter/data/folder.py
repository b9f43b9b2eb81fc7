"""Any folder: video files and folders of frames at any depth, with masks in a parallel folder or without."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from interpreter.data.annotations import Annotation, MaskFiles, match_masks
from interpreter.data.images import list_images, natural_key
from interpreter.data.sources import Source, listing
from interpreter.data.video import VIDEO_SUFFIXES, FrameFolder, Video, open_video


def find_folder(root: Path) -> list[Source]:
    """Find the videos below a folder; see `interpreter.data.open_dataset` for the rules.

    Raises:
        FileNotFoundError: if there are none; lists what is there.
    """
    if root.is_file() or list_images(root):
        return [_source(root, None, None)]
    videos, masks = (root / "JPEGImages", root / "Annotations")
    if not videos.is_dir():
        videos, masks = root, root / "masks"
    paths = _find_videos(videos, masks)
    if not paths:
        raise FileNotFoundError(f"{root}: no video files and no folders of frames below it; it holds {listing(root)}")
    return [_source(path, name, masks / name) for path, name in zip(paths, _unique_names(paths, videos), strict=True)]


def _source(path: Path, name: str | None, masks: Path | None) -> Source:
    def load() -> tuple[Video, Annotation | None]:
        video = open_video(path, name)
        if masks is None or not masks.is_dir():
            return video, None
        numbered = [Path(f"{t:05d}") for t in range(video.num_frames)]
        frames = video.files if isinstance(video, FrameFolder) else numbered
        return video, MaskFiles(match_masks(frames, masks))

    return Source(name or path.resolve().stem, path, load, list_images(path) if path.is_dir() else ())


def _find_videos(folder: Path, masks: Path) -> list[Path]:
    """Video files and folders with images at any depth, in natural order; hidden ones and the masks are left out."""
    found: list[Path] = []
    for path in folder.iterdir():
        if path.name.startswith(".") or path == masks:
            continue
        if path.is_dir():
            found.extend([path] if list_images(path) else _find_videos(path, masks))
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            found.append(path)
    return sorted(found, key=natural_key)


def _unique_names(paths: Sequence[Path], top: Path) -> list[str]:
    """Paths below ``top`` without suffix, or with it where clip.mp4 stands beside clip.avi."""
    full = [path.relative_to(top) for path in paths]
    short = [p.with_suffix("") if path.is_file() else p for p, path in zip(full, paths, strict=True)]
    counts = Counter(short)
    return [(s if counts[s] == 1 else f).as_posix() for s, f in zip(short, full, strict=True)]
