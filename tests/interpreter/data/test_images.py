"""Single images: upright, as RGB or as numbers, resized in one way."""

import numpy as np
import pytest
from PIL import Image

from interpreter.data.images import list_images, natural_key, probe_size, read_rgb, resize

from ..videos import cut


def antialiased_bilinear(length, target):
    """Weights [target, length] of a triangle filter, computed from the definition in float64."""
    scale = max(length / target, 1)
    centre = (np.arange(target)[:, None] + 0.5) * length / target
    weight = np.maximum(0, 1 - np.abs(np.arange(length)[None] + 0.5 - centre) / scale)
    return weight / weight.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(20, 31), (63, 96), (7, 300), (128, 5)])
def test_resize_is_antialiased_bilinear(size):
    image = np.random.default_rng(0).integers(0, 256, (64, 97, 3), dtype=np.uint8)
    rows, columns = antialiased_bilinear(64, size[0]), antialiased_bilinear(97, size[1])
    expected = np.einsum("ih,hwc,jw->ijc", rows, image.astype(float), columns)
    result = resize(image, size)
    assert result.shape == (*size, 3)
    assert result.dtype == np.uint8
    assert np.abs(result - expected).max() <= 1.1  # rounded to a byte after each of the two passes


def test_resize_to_same_size_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert resize(image, None) is image
    assert resize(image, (5, 7)) is image


def test_natural_order_counts_numbers():
    names = ["frame10.png", "frame2.png", "frame1b.png", "frame1.png", "a.png", "10", "9", "²x"]
    assert sorted(names, key=natural_key) == ["9", "10", "a.png", "frame1.png", "frame1b.png", "frame2.png",
                                              "frame10.png", "²x"]  # fmt: skip


def test_only_visible_images_are_listed(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt", "c.webp", "d.jpeg", "e.bmp"):
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c.webp", "d.jpeg", "e.bmp"]


RGB = np.random.default_rng(1).integers(0, 256, (11, 17, 3), dtype=np.uint8)
GRAY = RGB[..., 0]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(Image.fromarray(RGB), RGB, id="rgb"),
        pytest.param(Image.fromarray(GRAY), np.stack([GRAY] * 3, -1), id="gray"),
        pytest.param(Image.fromarray(GRAY.astype(np.uint16) * 257), np.stack([GRAY] * 3, -1), id="gray16"),
        pytest.param(Image.fromarray(np.dstack([RGB, GRAY])), RGB, id="rgba"),
        pytest.param(Image.fromarray(GRAY > 99), np.stack([(GRAY > 99) * np.uint8(255)] * 3, -1), id="bits"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, image, expected):
    image.save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "image.png"), expected)


def test_palette_image_becomes_its_colours(tmp_path):
    image = Image.fromarray(GRAY % 4)
    image.putpalette([10, 20, 30, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "image.png")
    colours = np.array([[10, 20, 30], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    np.testing.assert_array_equal(read_rgb(tmp_path / "image.png"), colours[GRAY % 4])


def test_exif_orientation_turns_image_and_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(RGB).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "image.png"), np.rot90(RGB, -1))
    assert probe_size(tmp_path / "image.png") == (17, 11)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
def test_probe_finds_truncated_image(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(RGB.repeat(8, 0).repeat(8, 1)).save(path)
    assert probe_size(path) == (88, 136)
    cut(path)
    with pytest.raises((OSError, SyntaxError, ValueError)):
        probe_size(path)


def test_probe_accepts_bytes_after_the_end(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(RGB).save(path)
    path.write_bytes(path.read_bytes() + b"\0" * 9)  # as cameras and editors write them
    assert probe_size(path) == (11, 17)
