"""Miniature copies of the published data sets, written byte for byte as their releases are."""

import io
import json
import struct

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from ..videos import picture, write_frames


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def damage(content, rng):
    """Cut, flip bits, overwrite a stretch, or insert: one of them, at random."""
    content = bytearray(content)
    place = int(rng.integers(0, max(1, len(content))))
    match rng.integers(0, 4):
        case 0:
            del content[place:]
        case 1:
            for at in rng.integers(0, max(1, len(content)), 1 + int(rng.integers(0, 4))):
                content[at] ^= 1 << int(rng.integers(0, 8))
        case 2:
            content[place : place + 8] = rng.bytes(8)
        case 3:
            content[place:place] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(content)


# --- YouTube-VIS ---------------------------------------------------------------------------------------------------


def uncompressed(mask):
    """A mask bool [H, W] as in train.json of 2019: run lengths down the columns, the first one of background."""
    flat = mask.T.ravel()
    borders = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *borders, len(flat)]).tolist()
    return {"counts": [0, *runs] if flat[0] else runs, "size": list(mask.shape)}


def compressed(mask):
    """The same as pycocotools writes it."""
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"counts": code["counts"].decode("ascii"), "size": list(mask.shape)}


def ytvis_video(identity, name, length, size):
    height, width = size
    return {
        "id": identity,
        "width": width,
        "height": height,
        "length": length,
        "date_captured": "2019-04-11 00:55:41.903902",
        "license": 1,
        "flickr_url": "",
        "coco_url": "",
        "file_names": [f"{name}/{5 * t:05d}.jpg" for t in range(length)],
    }


def ytvis_annotation(identity, video, tracks, crowd=0):
    """``tracks``: a code or None for each frame."""
    return {
        "id": identity,
        "video_id": video["id"],
        "category_id": 1 + identity % 40,
        "iscrowd": crowd,
        "height": video["height"],
        "width": video["width"],
        "length": 1,
        "segmentations": tracks,
        "bboxes": [None if code is None else [0, 0, 1, 1] for code in tracks],
        "areas": [None if code is None else 1 for code in tracks],
    }


def write_ytvis(root, videos, annotations, part="train", index=None):
    """The index, and a folder of frames for each video with one frame more than the index names."""
    content = {"info": {}, "licenses": [], "videos": videos, "categories": [{"id": 1, "name": "person"}]}
    if annotations is not None:
        content["annotations"] = annotations
    path = root / (index or f"{part}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for video in videos:
        folder = root / part / "JPEGImages" / video["file_names"][0].split("/")[0]
        frames = write_frames(folder, video["length"], (video["height"], video["width"]), video["id"], "{:05d}.jpg")
        for t, frame in reversed(list(enumerate(frames))):
            frame.rename(folder / f"{5 * t:05d}.jpg")
        write_frames(folder, 1, (video["height"], video["width"]), 99, "00003.jpg")  # as in train_all_frames
    return path


# --- YouTube-VOS ---------------------------------------------------------------------------------------------------


def write_ytvos(root, name, masks, part="train", size=(24, 40), every=5, all_frames=False):
    """A video with a frame for each of ``masks`` (ids [H, W], or None where no mask is published), and its entry in the
    index; with ``all_frames`` the frames in between too, but no masks and no index."""
    folder, indices = root / f"{part}{'_all_frames' * all_frames}", [every * t for t in range(len(masks))]
    numbers = range(indices[-1] + 1) if all_frames else indices
    frames = write_frames(folder / "JPEGImages" / name, len(numbers), size, sum(name.encode()), "{:05d}.jpg")
    for number, frame in reversed(list(zip(numbers, frames, strict=True))):
        frame.rename(frame.with_name(f"{number:05d}.jpg"))
    if all_frames:
        return
    truth = folder / "Annotations" / name
    truth.mkdir(parents=True)
    objects = {}
    for number, mask in zip(indices, masks, strict=True):
        if mask is not None:
            image = Image.fromarray(mask.astype(np.uint8))
            image.putpalette(np.random.default_rng(0).bytes(768))
            image.save(truth / f"{number:05d}.png")
            for label in np.unique(mask[mask > 0]).tolist():
                entry = objects.setdefault(str(label), {"category": "penguin", "frames": []})
                entry["frames"].append(f"{number:05d}")
    index = folder / "meta.json"
    content = json.loads(index.read_text()) if index.exists() else {"videos": {}}
    content["videos"][name] = {"objects": objects}
    index.write_text(json.dumps(content))


# --- MOVi, as TensorFlow Datasets writes it --------------------------------------------------------------------------


def _crc32c(content):
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in content:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(content):
    crc = _crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(records):
    """The bytes of a TFRecord file: length, its checksum, content, its checksum."""
    parts = []
    for content in records:
        length = struct.pack("<Q", len(content))
        parts += [length, _masked(length), content, _masked(content)]
    return b"".join(parts)


def _field(number, content):
    """A length-delimited protobuf field."""
    header = [number << 3 | 2]
    length = len(content)
    while length > 127:
        header.append(length & 127 | 128)
        length >>= 7
    return bytes([*header, length]) + content


def example(features):
    """A serialised tf.train.Example: lists of bytes, or one number below 128."""
    entries = []
    for name, value in sorted(features.items()):
        if isinstance(value, int):
            feature = _field(3, _field(1, bytes([value])))
        else:
            feature = _field(1, b"".join(_field(1, content) for content in value))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def _images(dtype, channels, size, length):
    package = "tensorflow_datasets.core.features"
    shape = {"dimensions": [str(side) for side in (*size, channels)]}
    feature = {"pythonClassName": f"{package}.image_feature.Image", "image": {"dtype": dtype, "shape": shape}}
    return {
        "pythonClassName": f"{package}.sequence_feature.Sequence",
        "sequence": {"feature": feature, "length": str(length)},
    }


def write_movi(root, shards, size=(16, 16), length=3, split="train"):
    """A release of ``shards`` (lists of record contents), as below gs://kubric-public/tfds/movi_e/256x256/1.0.0."""
    package = "tensorflow_datasets.core.features"
    whole = {"dimensions": [str(side) for side in (length, *size, 3)]}
    metadata = {
        "num_frames": {
            "pythonClassName": f"{package}.tensor_feature.Tensor",
            "tensor": {"dtype": "int32", "encoding": "none", "shape": {}},
        },
        "video_name": {"pythonClassName": f"{package}.text_feature.Text", "text": {}},
    }
    features = {
        "depth": _images("uint16", 1, size, length),
        "segmentations": _images("uint8", 1, size, length),
        "video": {
            "pythonClassName": f"{package}.video_feature.Video",
            "video": {"dtype": "uint8", "encodingFormat": "png", "shape": whole},
        },
        "metadata": {
            "pythonClassName": f"{package}.features_dict.FeaturesDict",
            "featuresDict": {"features": metadata},
        },
    }
    kind = {"pythonClassName": f"{package}.features_dict.FeaturesDict", "featuresDict": {"features": features}}
    info = {
        "configName": "256x256",
        "moduleName": "movi_e",
        "name": "movi_e",
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1000",
                "shardLengths": [str(len(records)) for records in shards],
            }
        ],
        "version": "1.0.0",
    }
    folder = root / "movi_e" / "256x256" / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features.json").write_text(json.dumps(kind))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for number, records in enumerate(shards):
        (folder / f"movi_e-{split}.tfrecord-{number:05d}-of-{len(shards):05d}").write_bytes(tfrecord(records))
    return folder


def movi_video(seed, size=(16, 16), length=3):
    """Frames uint8 [T, H, W, 3], masks uint8 [T, H, W] with the ids of instances as they are, and the record."""
    rng = np.random.default_rng(seed)
    frames = np.stack([picture(1000 * seed + t, *size) for t in range(length)])
    masks = np.repeat(rng.integers(0, 24, (length, *size), dtype=np.uint8), 1, axis=0)
    record = example(
        {
            "video": [png(frame) for frame in frames],
            "segmentations": [png(mask) for mask in masks],
            "depth": [png(mask.astype(np.uint16) * 1000) for mask in masks],
            "metadata/video_name": [str(seed).encode()],
            "metadata/num_frames": length,
        }
    )
    return frames, masks, record


# --- SegTrack-v2 and FBMS-59 -----------------------------------------------------------------------------------------


def write_segtrack(root, name, objects, suffix=".png", nested=True, size=(20, 30)):
    """Frames and, for each object, binary masks 0/255 in RGB; ``objects``: bool [T, H, W] each."""
    write_frames(root / "JPEGImages" / name, len(objects[0]), size, name="frame_{:05d}" + suffix)
    for number, masks in enumerate(objects, 1):
        folder = root / "GroundTruth" / name
        folder = folder / str(number) if nested else folder
        folder.mkdir(parents=True)
        for t, mask in enumerate(masks):
            Image.fromarray(np.stack([mask * np.uint8(255)] * 3, -1)).save(folder / f"frame_{t:05d}{suffix}")
    (root / "JPEGImages" / "CSI_NY.jpg").touch()  # a stray file of the release


def write_fbms(root, part, name, count, masks, codes, size=(20, 30), gray=False):
    """``masks``: region numbers [H, W] by frame; ``codes``: the code of each region."""
    folder = root / part / name
    write_frames(folder, count, size, name=f"{name}_{{:04d}}.jpg")
    truth = folder / "GroundTruth"
    truth.mkdir()
    suffix = "pgm" if gray else "ppm"
    lines = ["Ground truth definition file; do not change!", "", "Total number of regions:", str(len(codes))]
    for code in codes:
        lines += ["", str(code)]
    lines += ["", "Confusion penality matrix", *(" ".join("1" for _ in codes) for _ in codes), ""]
    lines += ["Total number of frames in this shot:", str(count)]
    lines += ["Total number of labeled frames for this shot:", str(len(masks))]
    for frame, mask in masks.items():
        file = f"{name}_{frame:04d}_gt.{suffix}"
        lines += ["Frame number:", str(frame), "File name:", file, "Input file name:", f"{name}_{frame:04d}.ppm"]
        pixels = np.array(codes)[mask]
        colours = np.stack([pixels >> 16, pixels >> 8 & 255, pixels & 255], -1)
        Image.fromarray((pixels if gray else colours).astype(np.uint8)).save(truth / file)
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(truth / f"{name}_{frame:04d}_PROB_gt.ppm")
    (truth / f"{name}Def.dat").write_text("\n".join(lines) + "\n", encoding="ascii")
    return truth
