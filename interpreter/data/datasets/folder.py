"""Any folder of videos: files and folders of frames at any depth, with or without masks in a parallel folder."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from interpreter.data.datasets.annotations import Annotation, FolderMasks, UnusableMasks
from interpreter.data.datasets.unopened import UnopenedVideo, UnopenedVideos, unopened_folder
from interpreter.data.images import IMAGE_SUFFIXES, natural_key
from interpreter.data.tree import Folder, LeftOut, listing, locate, look, numbers, split_frames, walk
from interpreter.data.video import VIDEO_SUFFIXES, FrameFolder, Video, VideoError, open_video, video_files


def find_folder(root: Path) -> UnopenedVideos:
    """Find the videos below a folder:

    - Every file with the suffix of a video is a video. Exception: a single GIF or APNG next to two or more numbered
      images is their preview (`interpreter.data.video.video_files`).
    - A folder without video files is a video if it holds numbered images, whose names differ only in their numbers
      (``00000.jpg``, ``00001.jpg`` …). A single image must have a number, and its folder no subfolder. Subfolders of a
      folder of frames are not searched.
    - Every other folder is searched, at any depth and only once, even if several links lead to it.

    Hidden files and system files are ignored; all other files that are not read are listed in ``left_out``.

    Raises:
        FileNotFoundError: if there are no videos; lists the files found.
    """
    if root.is_file():
        return UnopenedVideos([_unopened(root, None, None)])
    left_out = LeftOut()
    videos, masks = root / "JPEGImages", root / "Annotations"
    if videos.is_dir():
        beside = look(root)
        for path in (*beside.folders, *beside.files):
            if path not in (videos, masks):
                left_out.add(path, f"{'folder' if path.is_dir() else 'file'} beside {videos.name}")
    else:
        videos, masks = root, root / "masks"
    paths = _find_videos(videos, masks, left_out)
    if not paths:
        raise FileNotFoundError(
            f"{root}: no video files and no folders of numbered frames in it or below it; it holds {listing(root)}"
            + (f"; {left_out}" if left_out.groups else "")
        )
    if paths == [videos]:
        return UnopenedVideos([_unopened(videos, root.resolve().name, masks)], left_out)
    names = _unique_names(paths, videos)
    return UnopenedVideos(
        (_unopened(path, name, locate(masks, name)) for path, name in zip(paths, names, strict=True)), left_out
    )


def _unopened(path: Path, name: str | None, masks: Path | None) -> UnopenedVideo:
    def load() -> tuple[Video, Annotation | None]:
        video = open_video(path, name)
        if masks is None:
            return video, None
        files = video.files if isinstance(video, FrameFolder) else [Path(f"{t:05d}") for t in range(video.num_frames)]
        try:
            return video, FolderMasks(masks, files, named=isinstance(video, FrameFolder))
        except (VideoError, OSError) as error:
            return video, UnusableMasks(str(error))

    called = name or path.resolve().stem
    return unopened_folder(called, path, load) if path.is_dir() else UnopenedVideo(called, path, load)


def _find_videos(top: Path, masks: Path, left_out: LeftOut) -> list[Path]:
    """Video files and folders of frames at any depth, in natural order."""
    paths: list[Path] = []
    for folder in walk(top, left_out, [masks]):
        videos = video_files(folder.files)
        broken = [path for path in folder.odd if path.is_symlink()]  # maybe missing frames
        images = [file for file in (*folder.files, *broken) if file.suffix.lower() in IMAGE_SUFFIXES]
        reason = " beside video files" if videos else "" if not images else _obstacle(folder, images)
        if images and not reason:
            paths.append(folder.path)
            for below in folder.folders:
                if below != masks:
                    left_out.add(below, "folder below frames")
            folder.folders.clear()
            folder.odd = [path for path in folder.odd if path not in images]
        for file in folder.files:
            if file.suffix.lower() in IMAGE_SUFFIXES:
                if reason:
                    left_out.add(file, reason)
            elif file.suffix.lower() not in VIDEO_SUFFIXES:
                left_out.add(file, " ")
            elif not videos:
                left_out.add(file, " beside frames")
        paths += videos
    files = {file.resolve() for file in paths if not file.is_symlink()}
    videos_found = []
    for path in paths:
        if path.is_symlink() and path.is_file():
            if (target := path.resolve()) in files:
                left_out.add(path, "link to a file that is read already")
                continue
            files.add(target)
        videos_found.append(path)
    return sorted(videos_found, key=natural_key)


def _obstacle(folder: Folder, images: Sequence[Path]) -> str:
    """Why images are not frames; empty if they are. `FrameFolder` may still refuse them."""
    frames = split_frames(images).frames
    if not frames:
        return " not numbered alike"
    if len(frames) == 1 and (folder.folders or not numbers(frames[0])):
        return " alone in a folder"
    return ""


def _unique_names(paths: Sequence[Path], top: Path) -> list[str]:
    """Paths below ``top``. The suffix is left out, unless two videos would then have the same name."""
    full = [path.relative_to(top) for path in paths]
    short = [p.with_suffix("") if path.is_file() else p for p, path in zip(full, paths, strict=True)]
    counts = Counter([*short, *(f for f, s in zip(full, short, strict=True) if f != s)])
    return [(s if counts[s] == 1 else f).as_posix() for s, f in zip(short, full, strict=True)]
