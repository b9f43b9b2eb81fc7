"""Label maps of a video as a data set that other programs import: COCO, YouTube-VIS, Label Studio."""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from interpreter.files import write_text
from interpreter.render import Format
from interpreter.render.palette import DISPLAY_PALETTE
from interpreter.render.rle import CATEGORY

CATEGORIES = [{"id": CATEGORY, "name": "segment"}]  # segments have no classes
QUALITY = 95  # of the frames, which are JPEG in all formats


class About(NamedTuple):
    """Facts about the video for the files."""

    id: int
    name: str
    height: int
    width: int
    fps: float


class FormatWriter(Protocol):
    """Writes a video to a folder, frame by frame, and its index at the end."""

    def write(self, frame: np.ndarray, labels: np.ndarray) -> None:
        """Append a frame, uint8 [H, W, 3], and the segment of each pixel, uint8 [H, W], counted from 0."""

    def close(self) -> None:
        """Write the index."""


def check_formats(formats: Sequence[str], out: Path) -> None:
    """Refuse unknown formats, missing packages, and folders that were not written by this command.

    Raises:
        ValueError: if a format is refused. The message says what to do.
    """
    for name in formats:
        if name not in get_args(Format):
            raise ValueError(f"format {name!r}: choose from {', '.join(get_args(Format))}")
        if (out / name).exists() and not (out / "slots.safetensors").exists():
            raise ValueError(f"{out / name} already exists and is not from this command; give another --out")
    if "label-studio" in formats:
        brush()


def brush() -> Any:
    """Label Studio's own encoder of masks.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.import_module("label_studio_sdk.converter.brush")
    except ImportError as error:
        raise ValueError(
            f"the format label-studio needs Label Studio's SDK ({error}): pip install label-studio-sdk"
        ) from error


@contextmanager
def format_writers(formats: Sequence[str], out: Path, about: About) -> Iterator[Sequence[FormatWriter]]:
    """Yield a writer for each format, to a folder with its name in ``out``. Indices are written at the end."""
    makers: dict[str, Callable[[Path, About], FormatWriter]]
    makers = {"coco": CocoWriter, "youtube-vis": YoutubeVisWriter, "label-studio": LabelStudioWriter}
    with ExitStack() as stack:
        writers = [makers[name](out / name, about) for name in dict.fromkeys(formats)]
        yield writers
        for writer in writers:
            stack.callback(writer.close)


class CocoWriter:
    """COCO: ``data/00000.jpg`` … and ``labels.json``, the layout that FiftyOne calls COCODetectionDataset.

    Each frame is an image, with ``video_id`` and ``frame_id`` (counted from 0). Each segment with a pixel in the frame
    is an annotation, with a compressed RLE. Its ``track_id`` is the number of the segment, counted from 1, the same in
    all frames.

    Args:
        folder: to write to.
        about: the video.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about = folder, about
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        (folder / "data").mkdir(parents=True)

    def write(self, frame: np.ndarray, labels: np.ndarray) -> None:
        """See :class:`FormatWriter`."""
        number, about = len(self._images), self.about
        name = f"{number:05d}.jpg"
        _save(frame, self.folder / "data" / name)
        size = {"height": about.height, "width": about.width}
        self._images.append(
            {"id": number + 1, "file_name": name, **size, "video_id": about.id, "frame_id": number},
        )
        for segment, code in _codes(labels):
            annotation = {"id": len(self._annotations) + 1, "image_id": number + 1, "video_id": about.id}
            annotation |= {"category_id": CATEGORY, "track_id": segment, "iscrowd": 0}
            self._annotations.append(annotation | {"segmentation": _text(code), **_extent(code)})

    def close(self) -> None:
        """See :class:`FormatWriter`."""
        about = self.about
        video = {"id": about.id, "name": about.name, "height": about.height, "width": about.width}
        content = {
            "info": {"description": f"segments of {about.name}"},
            "videos": [video | {"length": len(self._images), "fps": about.fps}],
            "images": self._images,
            "categories": CATEGORIES,
            "annotations": self._annotations,
        }
        write_text(self.folder / "labels.json", json.dumps(content) + "\n")


class YoutubeVisWriter:
    """YouTube-VIS ground truth: ``train.json`` and ``train/JPEGImages/NAME/00000.jpg`` …

    Each segment with a pixel is one annotation, whose ``id`` is its number, counted from 1. ``segmentations``,
    ``bboxes`` and ``areas`` have an entry for each frame, which is null in frames without the segment.

    Args:
        folder: to write to.
        about: the video.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about, self._length = folder, about, 0
        self._tracks: dict[int, dict[int, Any]] = {}

    def write(self, frame: np.ndarray, labels: np.ndarray) -> None:
        """See :class:`FormatWriter`."""
        _save(frame, self.folder / "train" / "JPEGImages" / self._name(self._length))
        for segment, code in _codes(labels):
            self._tracks.setdefault(segment, {})[self._length] = code
        self._length += 1

    def close(self) -> None:
        """See :class:`FormatWriter`."""
        about, size = self.about, {"height": self.about.height, "width": self.about.width, "length": self._length}
        names = [self._name(number) for number in range(self._length)]
        content = {
            "info": {"description": f"segments of {about.name}"},
            "videos": [{"id": about.id, **size, "file_names": names}],
            "categories": CATEGORIES,
            "annotations": [self._annotation(segment) | size for segment in sorted(self._tracks)],
        }
        write_text(self.folder / "train.json", json.dumps(content) + "\n")

    def _name(self, number: int) -> str:
        return f"{self.about.name}/{number:05d}.jpg"

    def _annotation(self, segment: int) -> dict[str, Any]:
        codes = [self._tracks[segment].get(number) for number in range(self._length)]
        extents = [None if code is None else _extent(code) for code in codes]
        return {
            "id": segment,
            "video_id": self.about.id,
            "category_id": CATEGORY,
            "iscrowd": 0,
            "segmentations": [None if code is None else _text(code) for code in codes],
            "bboxes": [extent and extent["bbox"] for extent in extents],
            "areas": [extent and extent["area"] for extent in extents],
        }


class LabelStudioWriter:
    """Label Studio: ``tasks.json`` with a brush mask for each segment of each frame, ``config.xml``, ``images``.

    Masks are predictions, which users accept or correct. The label of a segment is its number, counted from 1, the
    same in all frames. Label Studio serves ``images`` if this folder is its document root for local files.

    Args:
        folder: to write to.
        about: the video.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about = folder, about
        self._length = 0
        self._labels: set[int] = set()
        self._encode = brush().mask2rle
        (folder / "images").mkdir(parents=True)

    def write(self, frame: np.ndarray, labels: np.ndarray) -> None:
        """See :class:`FormatWriter`."""
        number = self._length
        name = f"images/{number:05d}.jpg"
        _save(frame, self.folder / name)
        segments = (np.unique(labels) + 1).tolist()
        self._labels.update(segments)
        masks = [
            {
                "id": f"{number:05d}-{segment}",
                "type": "brushlabels",
                "from_name": "segment",
                "to_name": "image",
                "original_width": self.about.width,
                "original_height": self.about.height,
                "image_rotation": 0,
                "value": {
                    "format": "rle",
                    "rle": self._encode((labels == segment - 1).astype(np.uint8) * 255),
                    "brushlabels": [str(segment)],
                },
            }
            for segment in segments
        ]
        data = {"image": f"/data/local-files/?d={name}", "video": self.about.name, "frame": number}
        task = {"data": data, "predictions": [{"model_version": "interpreter", "result": masks}]}
        self._append((", " if number else "[") + json.dumps(task))
        self._length += 1

    def close(self) -> None:
        """See :class:`FormatWriter`."""
        self._append("]\n")
        labels = [
            f'    <Label value={quoteattr(str(segment))} background="#{bytes(DISPLAY_PALETTE[segment - 1]).hex()}"/>'
            for segment in sorted(self._labels)
        ]
        lines = [
            "<View>",
            '  <Image name="image" value="$image" zoom="true"/>',
            '  <BrushLabels name="segment" toName="image">',
            *labels,
            "  </BrushLabels>",
            "</View>",
        ]
        write_text(self.folder / "config.xml", "\n".join(lines) + "\n")

    def _append(self, text: str) -> None:
        """Append to the tasks. They are too large for memory, because they have a number for each byte of a code."""
        with (self.folder / "tasks.json").open("a", encoding="ascii") as file:
            file.write(text)


def _save(frame: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(path, quality=QUALITY)


def _codes(labels: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Number of each segment of a frame, counted from 1, and its mask in the encoding of pycocotools."""
    columns_first = np.asfortranarray(labels)  # the order of COCO's runs
    for label in np.unique(labels).tolist():
        yield label + 1, coco.encode((columns_first == label).view(np.uint8))


def _text(code: Any) -> dict[str, Any]:
    return {"size": code["size"], "counts": code["counts"].decode("ascii")}


def _extent(code: Any) -> dict[str, Any]:
    """Pixels of a mask, and its box: left, top, width, height."""
    return {"area": int(coco.area(code)), "bbox": coco.toBbox(code).tolist()}
