"""MOVi-C, D and E (Greff et al. 2022): converts their release for TensorFlow Datasets to the layout of DAVIS 2017.

The only file that imports TensorFlow.
"""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interpreter.console import tracked
from interpreter.data.datasets.layout import Picture, claim, has_video, locked, make_folders, write_set, write_video

INSTALL = "pip install tensorflow-cpu tensorflow-datasets"


def convert_movi(root: Path, out: Path, split: str | None = None) -> list[str]:
    """Convert splits of MOVi; ``open_dataset("movi", out, split)`` reads what is written.

    Frames and masks keep the bytes of the release's PNGs: no pixel changes, background is 0, and instance ids are
    unchanged. One record is in memory at a time. Videos are called SPLIT-NUMBER in the order of the release, and appear
    when they are complete. If interrupted, rerun the same command to resume.

    Args:
        root: the download, or any folder above it: ``…/movi_e/256x256/1.0.0``, with ``dataset_info.json``,
            ``features.json`` and the shards ``movi_e-train.tfrecord-00000-of-01024``.
        out: folder to write to; several splits can share it.
        split: ``train``, ``validation`` or ``test``; None takes every split that has a shard.

    Returns:
        The splits that are complete now.

    Raises:
        RuntimeError: if TensorFlow Datasets is not installed; names the command.
        FileNotFoundError: if the release or some of its shards are missing; names them.
        ValueError: if a shard is damaged (names it), or the split in ``out`` was made from another release.
    """
    release = _find_release(root)
    tfds = _tensorflow_datasets()
    try:
        builder = tfds.builder_from_directory(str(release))
    except Exception as error:  # protobuf, JSON and others raise different exceptions
        raise ValueError(f"{release}: damaged dataset_info.json or features.json ({_line(error)})") from error
    splits = [split] if split else [name for name in builder.info.splits if _shards(builder, name)[0]]
    if not splits:
        raise FileNotFoundError(f"{release}: no shards of {', '.join(builder.info.splits) or 'any split'} in it")
    for name in splits:
        if name not in builder.info.splits:
            raise ValueError(f"{release} has the splits {', '.join(builder.info.splits)}, not {name!r}")
        _, missing = _shards(builder, name)
        if missing:
            shown = ", ".join(path.name for path in missing[:3]) + (" …" if len(missing) > 3 else "")
            raise FileNotFoundError(f"{release}: {len(missing)} shards of {name} are missing: {shown}")
        _convert_split(builder, tfds, release, out, name)
    return splits


def _find_release(root: Path) -> Path:
    releases = sorted({path.parent for path in root.glob("**/dataset_info.json")}) if root.is_dir() else []
    if not releases:
        raise FileNotFoundError(
            f"{root}: no dataset_info.json in it or below it; get the release with "
            "gsutil -m cp -r gs://kubric-public/tfds/movi_e/256x256 DIR"
        )
    if len(releases) > 1:
        raise ValueError(f"{root} holds several releases: {', '.join(map(str, releases))}; name one of them")
    return releases[0]


def _tensorflow_datasets() -> Any:
    if "triton" in sys.modules:  # each contains an LLVM; loading the second one aborts the process
        raise RuntimeError(
            "TensorFlow and Triton cannot share a process; convert with python -m interpreter.data convert movi"
        )
    # Its libraries print messages in three ways, which would disturb the progress bar.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # which is announced otherwise; pictures stay encoded here
    try:
        import tensorflow  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        raise RuntimeError(f"reading MOVi needs TensorFlow Datasets ({error}): {INSTALL}") from error
    for name in ("tensorflow", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return tensorflow_datasets


def _shards(builder: Any, split: str) -> tuple[list[Path], list[Path]]:
    """Shards of a split that exist, and shards that are missing."""
    paths = [Path(path) for path in builder.info.splits[split].filepaths]
    return [path for path in paths if path.is_file()], [path for path in paths if not path.is_file()]


def _convert_split(builder: Any, tfds: Any, release: Path, out: Path, split: str) -> None:
    info = builder.info.splits[split]
    names = [f"{split}-{number:05d}" for number in range(info.num_examples)]
    make_folders(out)
    with locked(out):
        claim(out / f"movi-{split}.json", {"release": builder.info.full_name, "split": split, "num_videos": len(names)})
        done = next((number for number, name in enumerate(names) if not has_video(out, name)), len(names))
        records = _records(builder, tfds, split, done)
        for number in tracked(range(done, len(names)), len(names) - done, f"converting {split}"):
            shard, place = _place(info, number)
            try:
                record = next(records, None)
                problem = None
            except Exception as error:  # TensorFlow's exceptions, which name the fault but not always the place
                record, problem = None, error
            # Else the videos of the next shard would get the names of those that are missing in this one.
            if record is None or record["tfds_id"] != f"{shard}__{place}".encode():
                raise ValueError(
                    f"{release / shard}: damaged ({_line(problem) if problem else 'it ends too early'}); download this "
                    f"file again, then rerun the same command to continue from video {number} of {split}"
                ) from problem
            where = f"{release / shard}: video {number} of {split}"
            masks, frames = _pictures(record, "segmentations", where), _pictures(record, "video", where)
            if len(masks) != len(frames):
                raise ValueError(f"{where} has {len(frames)} frames and {len(masks)} masks")
            write_video(out, names[number], masks, frames)
        write_set(out, split, names)


def _records(builder: Any, tfds: Any, split: str, first: int) -> Iterator[dict[str, Any]]:
    """Records of a split in the order of the release, with pictures still encoded."""
    skip = tfds.decode.SkipDecoding
    decoders = tfds.decode.PartialDecoding(
        {"video": True, "segmentations": True}, decoders={"video": skip(), "segmentations": skip()}
    )
    order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, skip_prefetch=True, add_tfds_id=True)
    examples = builder.as_dataset(split=f"{split}[{first}:]", decoders=decoders, read_config=order, shuffle_files=False)
    yield from tfds.as_numpy(examples)


def _pictures(record: dict[str, Any], key: str, where: str) -> list[Picture]:
    pictures = [Picture(frame, ".png", bytes(content)) for frame, content in enumerate(record[key])]
    for picture in pictures:
        if not picture.content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"{where}: {key} {picture.frame} is no PNG")
    return pictures


def _place(info: Any, number: int) -> tuple[str, int]:
    """Name of the shard that holds a record, and the record's number in it."""
    for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
        if number < length:
            return Path(path).name, number
        number -= length
    raise IndexError(number)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
