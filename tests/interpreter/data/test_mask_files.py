"""Masks are read like frames (bit depth, orientation, names); one message names the present and expected files."""

import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from interpreter.data import VideoError, open_dataset
from interpreter.data.__main__ import main
from interpreter.data.datasets.annotations import read_mask
from interpreter.data.datasets.segtrack import ObjectMasks
from interpreter.data.images import probe_size, read_numbers, read_rgb
from interpreter.data.predictions import PredictionError, open_predictions
from interpreter.engine.picture_grid import sample_grid

from ..videos import encode, moving, write_frames

SIZE = (12, 20)
MASK = np.zeros(SIZE, np.uint8)
MASK[2:7, 3:9] = 1
MASK[8:11, 10:18] = 2


def gray_png(ids, depth, interlaced=False, colour=0):
    """A PNG with 1, 2, 4, 8 or 16 bits a channel, which Pillow cannot write: gray [H, W], or another colour type."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def rows(part):
        if depth == 16:
            return b"".join(b"\0" + row.astype(">u2").tobytes() for row in part)
        bits = (part[..., None].astype(int) >> np.arange(depth)[::-1]) & 1
        return b"".join(b"\0" + np.packbits(row.reshape(-1)).tobytes() for row in bits)

    height, width = ids.shape[:2]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [ids[top::down, left::right] for top, left, down, right in passes] if interlaced else [ids]
    data = b"".join(rows(part) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    """folder(save, names, frames=…) writes a video with a mask for each of its frames, and returns its root."""

    def make(save, names="{:05d}.png", count=3, frames="{:05d}.jpg"):
        write_frames(tmp_path / "JPEGImages" / "v", count, SIZE, name=frames)
        masks = tmp_path / "Annotations" / "v"
        masks.mkdir(parents=True)
        for t in range(count):
            save(masks / names.format(t))
        return tmp_path

    return make


def saved(pixels, mode=None, **options):
    def save(path):
        Image.fromarray(pixels).convert(mode).save(path, **options)

    return save


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_gray_of_any_depth_keeps_its_ids(tmp_path, depth, interlaced):
    ids = np.minimum(MASK, 2 ** min(depth, 7) - 1) * (7 if depth == 4 else 100 if depth > 4 else 1)
    path = tmp_path / "mask.png"
    path.write_bytes(gray_png(ids, depth, interlaced))
    np.testing.assert_array_equal(read_mask(path, SIZE), ids)
    np.testing.assert_array_equal(read_rgb(path)[..., 0] > 0, ids >= (128 if depth == 16 else 1))


@pytest.mark.parametrize(
    "pixels",
    [
        pytest.param(np.dstack([MASK] * 3), id="rgb"),
        pytest.param(np.dstack([MASK] * 3 + [np.full(SIZE, 255, np.uint8)]), id="rgba"),
        pytest.param(np.dstack([MASK, np.full(SIZE, 255, np.uint8)]), id="gray and alpha"),
    ],
)
def test_gray_in_disguise_is_gray(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", SIZE), MASK)


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (
            np.dstack([MASK * 128, MASK * 0, MASK]),
            {},
            r"colours \(RGB\) instead of object ids; save it as a palette PNG",
        ),
        (np.dstack([MASK * 0] * 3 + [MASK * 100]), {}, r"transparent pixels \(RGBA\) instead of object ids"),
        (MASK.astype(np.uint16) * 150, {}, r"id 300, but ids are 1 to 254 and 255 is void"),
        (MASK, {"format": "JPEG"}, r"JPEG, whose compression changes object ids"),
        (MASK, {"format": "WEBP"}, r"WEBP, whose compression changes object ids"),
        (MASK, {"save_all": True, "append_images": [Image.fromarray(MASK * 2)]}, "animated, 2 pictures where one"),
    ],
)
def test_what_is_no_map_of_ids_is_refused_by_name(tmp_path, pixels, options, message):
    path = tmp_path / "mask.png"
    Image.fromarray(pixels).save(path, **options)
    with pytest.raises(VideoError, match=message) as error:
        read_mask(path, SIZE)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(("colour", "channels", "mode"), [(2, 3, "RGB"), (4, 2, "LA"), (6, 4, "RGBA")])
@pytest.mark.parametrize("binary", [False, True])
def test_sixteen_bits_a_channel_are_refused_before_ids_are_lost(tmp_path, colour, channels, mode, binary):
    pixels = np.repeat(MASK[..., None].astype(np.uint16), channels, axis=-1)
    if mode.endswith("A"):
        pixels[..., -1] = 65535
    path = tmp_path / "mask.png"
    path.write_bytes(gray_png(pixels, 16, colour=colour))
    with pytest.raises(VideoError, match=rf"mask\.png: 16 bits a channel \({mode}\), .*; save it as a palette PNG"):
        read_mask(path, SIZE, binary)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "RGB"])
def test_orientation_turns_masks_as_it_turns_frames(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(MASK.astype(np.uint16) if mode == "I;16" else MASK * 255 if mode == "1" else MASK)
    if mode == "P":
        stored.putpalette([0, 0, 0, 90, 90, 90, 255, 255, 255])
    elif mode != "I;16":
        stored = stored.convert(mode)
    stored.save(tmp_path / "mask.png", exif=exif)
    levels = np.array([0, 90, 255], np.uint8)
    Image.fromarray(np.dstack([levels[MASK]] * 3)).save(tmp_path / "frame.webp", lossless=True, exif=exif)
    frame = read_rgb(tmp_path / "frame.webp")[..., 0]
    assert frame.shape == (SIZE if orientation < 5 else SIZE[::-1])
    mask = read_mask(tmp_path / "mask.png", frame.shape)
    np.testing.assert_array_equal(mask > 0, frame > 0)
    assert probe_size(tmp_path / "mask.png") == frame.shape
    if mode != "1":
        np.testing.assert_array_equal(levels[mask], frame)


def test_masks_of_truth_and_prediction_are_turned(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    root = folder(saved(MASK, exif=exif))
    for frame in (root / "JPEGImages" / "v").iterdir():
        Image.open(frame).save(frame, exif=exif)
    np.testing.assert_array_equal(open_dataset("folder", root).masks(0)[1], MASK[::-1, ::-1])
    np.testing.assert_array_equal(open_predictions(root / "Annotations").labels("v", 3, SIZE)[1], MASK[::-1, ::-1])


@pytest.mark.parametrize(
    ("masks", "frames"),
    [
        ("{:05d}.PNG", "{:05d}.jpg"),
        ("mask_{}.png", "{:05d}.jpg"),
        ("{:03d}_mask.png", "{:05d}.jpg"),
        ("{:05d}.jpg.png", "{:05d}.jpg"),
        ("mask{}.png", "cam2_{:04d}.JPG"),
        ("Frame-{}.png", "frame-{}.png"),
    ],
)
def test_masks_are_found_by_name_or_by_number(folder, masks, frames):
    root = folder(saved(MASK), masks, frames=frames, count=12)
    for t in (4, 10):  # each mask is another one, and one is missing
        saved(MASK * t)(root / "Annotations" / "v" / masks.format(t))
    (root / "Annotations" / "v" / masks.format(7)).unlink()
    dataset = open_dataset("folder", root)
    assert dataset.mask_frames(0).tolist() == [t for t in range(12) if t != 7]
    assert [int(dataset.masks(0)[t].max()) for t in (3, 4, 10)] == [2, 8, 20]


def test_masks_are_found_for_video_files_too(tmp_path):
    encode(tmp_path / "film.mp4", moving(3, 32, 48))
    masks = tmp_path / "masks" / "film"
    masks.mkdir(parents=True)
    for t in range(3):
        Image.fromarray(np.full((32, 48), t + 1, np.uint8)).save(masks / f"mask_{t}.png")
    assert open_dataset("folder", tmp_path).masks(0)[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("names", [(1, 2, 3), (0, 5, 10)])
def test_masks_numbered_unlike_the_frames_are_refused(tmp_path, folder, names):
    root = folder(saved(MASK))
    masks = root / "Annotations" / "v"
    for t, number in reversed(list(enumerate(names))):
        (masks / f"{t:05d}.png").rename(masks / f"{number:05d}.png")
    with pytest.raises(VideoError, match=r"masks belong to no frame .*, expected are 00000\.png to 00002\.png"):
        open_dataset("folder", root).masks(0)


@pytest.mark.parametrize("crop", [False, True])
def test_videos_are_opened_without_masks_that_are_unusable(folder, capsys, crop):
    root = folder(saved(MASK), "{:05d}.jpg")
    for path in (root / "JPEGImages" / "v").iterdir():
        pixels = np.zeros((*SIZE, 3), np.uint8)
        pixels[3:-3] = 200
        Image.fromarray(pixels).save(path, quality=100)
    dataset = open_dataset("folder", root, crop_borders=crop)
    assert (len(dataset), dataset.skipped) == (1, [])
    assert dataset.left_out.startswith(f"left out: the masks of 1 video ({root / 'Annotations' / 'v'}: 3 .jpg images")
    with pytest.raises(VideoError, match="where masks should be"):
        dataset.masks(0)
    assert main(["verify", "folder", "--root", str(root)]) == 1
    assert "3 frames, 0 of them with masks, 1 problems" in capsys.readouterr().out


def test_masks_of_frames_that_were_removed_do_no_harm(folder):
    root = folder(saved(MASK), count=4)
    (root / "JPEGImages" / "v" / "00003.jpg").unlink()
    np.testing.assert_array_equal(open_dataset("folder", root).masks(0)[2], MASK)


def test_masks_in_other_formats_are_refused(folder):
    with pytest.raises(VideoError, match=r"3 \.jpg images \(00000\.jpg …\) where masks should be; save them as PNG"):
        open_dataset("folder", folder(saved(MASK), "{:05d}.jpg")).masks(0)


def test_two_sizes_are_named_with_both_files(folder):
    with pytest.raises(VideoError) as error:
        open_dataset("folder", folder(saved(MASK[:7]))).masks(0)
    assert "Annotations/v/00000.png: mask of 7x20 (height x width), but " in str(error.value)
    assert "JPEGImages/v/00000.jpg is 12x20" in str(error.value)


def test_files_of_macs_are_no_masks(folder):
    root = folder(saved(MASK))
    for path in list((root / "Annotations" / "v").iterdir()):
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(60))
    np.testing.assert_array_equal(open_dataset("folder", root).masks(0)[0], MASK)
    np.testing.assert_array_equal(open_predictions(root / "Annotations").labels("v", 3, SIZE)[0], MASK)


WHITE = (MASK > 0).astype(np.uint8) * 255


def test_one_object_in_white_is_an_object_in_a_plain_folder(folder):
    root = folder(saved(WHITE))
    Image.fromarray(WHITE * 0).save(root / "Annotations" / "v" / "00001.png")  # the object leaves the picture
    masks = open_dataset("folder", root).masks(0)
    np.testing.assert_array_equal(masks, np.stack([MASK > 0, MASK * 0, MASK > 0]))
    assert (open_predictions(root / "Annotations").labels("v", 3, SIZE)[0] == WHITE).all()  # an ordinary segment


@pytest.mark.parametrize("other", [np.where(WHITE, 255, 1).astype(np.uint8), MASK])
def test_white_is_void_if_any_mask_of_the_video_has_another_id(folder, other):
    root = folder(saved(WHITE))
    Image.fromarray(other).save(root / "Annotations" / "v" / "00002.png")
    masks = open_dataset("folder", root).masks(0)
    np.testing.assert_array_equal(masks[0], WHITE)
    np.testing.assert_array_equal(masks[2], other)


def test_white_everywhere_is_void(folder):
    assert (open_dataset("folder", folder(saved(WHITE * 0 + 255))).masks(0) == 255).all()


def test_white_is_void_in_a_data_set_that_says_so(tmp_path):
    for path in write_frames(tmp_path / "JPEGImages" / "480p" / "bear", 2, SIZE):
        mask = tmp_path / "Annotations_unsupervised" / "480p" / "bear" / f"{path.stem}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(WHITE).save(mask)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("bear\n")
    np.testing.assert_array_equal(open_dataset("davis", tmp_path, "val").masks(0)[0], WHITE)


def test_predictions_may_have_ids_of_sixteen_bits(tmp_path):
    (tmp_path / "v").mkdir()
    for t in range(2):
        (tmp_path / "v" / f"{t}.PNG").write_bytes(gray_png(MASK.astype(np.uint16) * (300 * t + 1), 16))
    labels = open_predictions(tmp_path).labels("v", 2, SIZE)
    np.testing.assert_array_equal(labels, np.stack([MASK, MASK * np.uint16(301)]))


def test_a_picture_among_predictions_takes_the_place_of_no_mask(tmp_path):
    (tmp_path / "v").mkdir()
    for name in ("00000", "00001", "preview"):
        Image.fromarray(MASK).save(tmp_path / "v" / f"{name}.png")
    predictions = open_predictions(tmp_path)
    assert len(predictions.labels("v", 2, SIZE)) == 2
    with pytest.raises(
        PredictionError, match=r"2 masks \(00000\.png to 00001\.png, beside .*preview\.png\) for 3 frames"
    ):
        predictions.labels("v", 3, SIZE)
    Image.fromarray(MASK).save(tmp_path / "v" / "1.png")
    with pytest.raises(PredictionError, match=r"v: holds the same frame twice \(00001\.png, 1\.png\)"):
        open_predictions(tmp_path).labels("v", 3, SIZE)


def test_predictions_that_are_not_found_say_what_is_there(tmp_path):
    (tmp_path / "v").mkdir()
    Image.fromarray(MASK).save(tmp_path / "v" / "00000.jpg")
    with pytest.raises(FileNotFoundError, match=r"no \.png or \.npz files below it, it holds 1 \.jpg"):
        open_predictions(tmp_path)
    Image.fromarray(MASK).save(tmp_path / "00000.png")
    with pytest.raises(FileNotFoundError, match=r"no folders of PNG masks .*; it holds v, 00000\.png"):
        open_predictions(tmp_path)


def test_masks_that_are_not_there_say_where_they_would_be(folder):
    root = folder(saved(MASK))
    for path in (root / "Annotations" / "v").iterdir():
        path.unlink()
    (root / "Annotations" / "v" / "boxes.xml").touch()
    dataset = open_dataset("folder", root)
    assert dataset.masks(0) is None
    assert dataset.expected_masks(0).endswith("Annotations/v/00000.png …, but that folder holds boxes.xml")


def test_numbers_are_whole(tmp_path):
    Image.fromarray(np.zeros(SIZE, np.float32)).save(tmp_path / "mask.tiff")
    with pytest.raises(ValueError, match="fractions"):
        read_numbers(tmp_path / "mask.tiff")


def test_picture_grid_of_training_skips_unusable_masks(folder):
    """For example colours, which are noticed only when a mask is decoded."""
    dataset = open_dataset("folder", folder(saved(np.dstack([MASK * 100, MASK, MASK]))))
    segments = SimpleNamespace(labels=lambda frames, size: np.zeros((1, *size), np.uint8))
    assert sample_grid(lambda number, video: segments, dataset, SIZE).ndim == 3


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_masks_of_segtrack_may_have_any_white(tmp_path, white):
    blurred = np.where(MASK == 1, white, 0) + np.where(MASK == 2, white // 3, 0)
    (tmp_path / "mask.png").write_bytes(gray_png(blurred.astype(np.uint16), 16))
    files = [tmp_path / "mask.png"]
    if white < 256:
        Image.fromarray(np.dstack([blurred.astype(np.uint8), MASK * 0, MASK * 0])).save(tmp_path / "colour.png")
        files.append(tmp_path / "colour.png")
    Image.fromarray(MASK * 0).save(tmp_path / "empty.png")
    masks = ObjectMasks([[*files, tmp_path / "empty.png"]])
    for frame in range(len(files)):
        np.testing.assert_array_equal(masks.read(frame, SIZE), MASK == 1)
    assert not masks.read(len(files), SIZE).any()
