"""The DAVIS layout: editions, splits, kinds of masks, and errors that list the available choices."""

import numpy as np
import pytest
from PIL import Image

from interpreter.data import VideoError, open_dataset

from ..videos import cut, moving

SIZE = (24, 40)


def write_mask(path, mask, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if mode == "P":
        image.putpalette(np.random.default_rng(0).bytes(768))  # colours must not matter
    image.save(path)


@pytest.fixture
def davis(tmp_path):
    """A miniature release: two sequences with ids 1, 2 and void 255, in every flavour of image set."""
    root = tmp_path / "DAVIS"
    masks = np.zeros((4, *SIZE), np.uint8)
    masks[:, 2:9, 3:12], masks[:, 12:20, 20:33], masks[:, 20:22] = 1, 2, 255
    for seed, name in enumerate(("bear", "bmx-trees")):
        for t, frame in enumerate(moving(4, *SIZE, seed=seed)):
            path = root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(path)
            write_mask(root / "Annotations" / "480p" / name / f"{t:05d}.png", masks[t])
            write_mask(root / "Annotations_unsupervised" / "480p" / name / f"{t:05d}.png", masks[t][::-1])
    sets = {
        "2016/train": "bear\n",
        "2016/val": "/JPEGImages/480p/bmx-trees/00000.jpg /Annotations/480p/bmx-trees/00000.png \n"
        "/JPEGImages/480p/bmx-trees/00001.jpg /Annotations/480p/bmx-trees/00001.png \n",
        "2017/train": "bear\n\n",
        "2017/val": "bmx-trees\n",
    }
    for name, lines in sets.items():
        (root / "ImageSets" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / f"{name}.txt").write_text(lines)
    return root, masks


@pytest.mark.parametrize(("split", "name"), [("train", "bear"), ("val", "bmx-trees")])
def test_2016_has_one_object(davis, split, name):
    root, masks = davis
    dataset = open_dataset("davis", root, split, year=2016)
    assert [v.name for v in dataset.videos] == [name]
    assert dataset[0].num_frames == 4
    np.testing.assert_array_equal(dataset.masks(0), (masks > 0).astype(np.uint8))


def test_2016_archive_names_its_sets_by_resolution(davis):
    root, _ = davis
    (root / "ImageSets" / "2016").rename(root / "ImageSets" / "480p")
    assert [v.name for v in open_dataset("davis", root, "val", year=2016).videos] == ["bmx-trees"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "L"])
def test_2016_takes_masks_that_are_pictures(davis, mode):
    root, masks = davis
    path = root / "Annotations" / "480p" / "bear" / "00002.png"
    path.unlink()
    picture = Image.fromarray((masks[2] > 0).astype(np.uint8) * 255).convert(mode)
    picture.save(path)
    np.testing.assert_array_equal(open_dataset("davis", root, "train", year=2016).masks(0)[2], masks[2] > 0)


def test_2017_keeps_ids_and_void_of_the_unsupervised_masks(davis):
    root, masks = davis
    dataset = open_dataset("davis", root, "val")
    assert dataset.masks(0).dtype == np.uint8
    np.testing.assert_array_equal(dataset.masks(0), masks[:, ::-1])
    np.testing.assert_array_equal(dataset.mask_frames(0), range(4))


def test_2017_masks_are_chosen_not_guessed(davis):
    root, masks = davis
    chosen = open_dataset("davis", root, "val", annotations="semi-supervised")
    np.testing.assert_array_equal(chosen.masks(0), masks)
    (root / "Annotations_unsupervised").rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match="choose --annotations semi-supervised"):
        open_dataset("davis", root, "val")
    with pytest.raises(ValueError, match="unsupervised, semi-supervised, not 'first'"):
        open_dataset("davis", root, "val", annotations="first")


def test_empty_image_set_is_named(davis):
    root, _ = davis
    (root / "ImageSets" / "2017" / "val.txt").write_text("\n")
    with pytest.raises(FileNotFoundError, match="DAVIS: the index of val names no video"):
        open_dataset("davis", root, "val")


def test_2017_refuses_colours_as_ids(davis):
    root, _ = davis
    Image.new("RGB", SIZE[::-1], (128, 0, 0)).save(root / "Annotations_unsupervised" / "480p" / "bear" / "00001.png")
    with pytest.raises(VideoError, match="palette PNG"):
        open_dataset("davis", root, "train").masks(0)


def test_no_split_takes_all_sequences_once(davis):
    root, _ = davis
    (root / "ImageSets" / "2017" / "trainval.txt").write_text("bmx-trees\nbear\n")
    assert [v.name for v in open_dataset("davis", root).videos] == ["bear", "bmx-trees"]


def test_frames_without_annotation_are_void(davis):
    root, masks = davis
    folder = root / "Annotations_unsupervised" / "480p" / "bear"
    for t in (1, 3):
        (folder / f"{t:05d}.png").unlink()
    dataset = open_dataset("davis", root, "train")
    np.testing.assert_array_equal(dataset.mask_frames(0), [0, 2])
    np.testing.assert_array_equal(dataset.masks(0)[[0, 2]], masks[[0, 2], ::-1])
    assert (dataset.masks(0)[[1, 3]] == 255).all()


def test_sequence_without_any_annotation_has_no_masks(davis):
    root, _ = davis
    folder = root / "Annotations_unsupervised" / "480p"
    for mask in (folder / "bear").iterdir():
        mask.unlink()
    dataset = open_dataset("davis", root, "train")
    assert dataset.masks(0) is None
    assert dataset.mask_frames(0).shape == (0,)
    (folder / "bear").rmdir()
    assert open_dataset("davis", root, "train").masks(0) is None


def test_a_release_of_another_resolution_is_refused(davis):
    root, _ = davis
    for part in ("JPEGImages", "Annotations", "Annotations_unsupervised"):
        (root / part / "480p").rename(root / part / "Full-Resolution")
    with pytest.raises(FileNotFoundError, match="JPEGImages holds Full-Resolution"):
        open_dataset("davis", root, "val")


def test_wrong_root_split_and_year_say_what_is_there(davis, tmp_path):
    root, _ = davis
    with pytest.raises(FileNotFoundError, match=r"no JPEGImages/480p .* it holds DAVIS"):
        open_dataset("davis", tmp_path, "val")
    with pytest.raises(
        FileNotFoundError, match=r"no image set test\.txt; ImageSets holds 2016/train, 2016/val, 2017/t"
    ):
        open_dataset("davis", root, "test")
    with pytest.raises(ValueError, match="2016 or 2017, not 2018"):
        open_dataset("davis", root, "val", year=2018)
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        open_dataset("davis", root / "nowhere", "val")


def test_damaged_and_missing_sequences_are_skipped_and_named(davis):
    root, _ = davis
    with (root / "ImageSets" / "2017" / "val.txt").open("a") as file:
        file.write("bear\nnowhere\n")
    cut(root / "JPEGImages" / "480p" / "bear" / "00002.jpg")
    dataset = open_dataset("davis", root, "val")
    assert [v.name for v in dataset.videos] == ["bmx-trees"]
    assert [path.name for path, _ in dataset.skipped] == ["bear", "nowhere"]
    assert "00002.jpg: damaged" in dataset.report()
    assert dataset.report().startswith("Skipped 2 of 3 videos")


@pytest.mark.parametrize("damage", ["cut", "size"])
def test_sequence_with_a_damaged_mask_is_skipped(davis, damage):
    root, _ = davis
    path = root / "Annotations" / "480p" / "bear" / "00003.png"
    if damage == "cut":
        cut(path)
    else:
        write_mask(path, np.zeros((10, 10), np.uint8))
    dataset = open_dataset("davis", root, year=2016)
    assert [v.name for v in dataset.videos] == ["bmx-trees"]
    assert "00003.png" in dataset.skipped[0][1]


def test_real_davis(shared_data):
    dataset = open_dataset("davis", shared_data / "davis", "val", year=2016)
    assert [v.name for v in dataset.videos][:3] == ["blackswan", "camel", "car-shadow"]
    assert (len(dataset), dataset.skipped) == (8, [])
    masks = dataset.masks(0)
    assert masks.shape == (50, 336, 504)
    assert set(np.unique(masks)) == {0, 1}
    several = open_dataset("davis", shared_data / "davis", "val", year=2017)
    assert [v.name for v in several.videos] == ["bmx-trees", "dogs-jump"]
    assert set(np.unique(several.masks(1))) == {0, 1, 2, 3}
