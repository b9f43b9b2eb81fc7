"""SegTrack-v2, FBMS-59, and folders with masks."""

import numpy as np
import pytest
from PIL import Image

from interpreter.data import VideoError, open_dataset

from ..videos import encode, moving, picture, write_frames
from .releases import write_fbms, write_segtrack

SIZE = (20, 30)


def boxes(count, *starts):
    """For each start a square that moves one pixel a frame: bool [count, H, W]."""
    masks = np.zeros((len(starts), count, *SIZE), bool)
    for number, (top, left) in enumerate(starts):
        for t in range(count):
            masks[number, t, top : top + 6, left + t : left + t + 6] = True
    return masks


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_segtrack_objects_become_ids(tmp_path, suffix):
    first, second = boxes(4, (2, 2), (5, 5))
    write_segtrack(tmp_path, "bmx", [first, second], suffix)
    write_segtrack(tmp_path, "birdfall", [first], suffix, nested=False)
    dataset = open_dataset("segtrack", tmp_path)
    assert [video.name for video in dataset.videos] == ["birdfall", "bmx"]
    np.testing.assert_array_equal(dataset.masks(0), first)
    np.testing.assert_array_equal(dataset.masks(1), np.where(second, 2, first))  # the later object is in front
    np.testing.assert_array_equal(dataset.mask_frames(1), range(4))
    np.testing.assert_array_equal(dataset[1].read([2])[0].shape, (*SIZE, 3))


def test_segtrack_counts_objects_like_numbers_and_allows_gaps(tmp_path):
    masks = boxes(2, *((1, 2 * n) for n in range(11)))
    write_segtrack(tmp_path, "many", list(masks))
    (tmp_path / "GroundTruth/many/10/frame_00001.png").unlink()
    objects = open_dataset("segtrack", tmp_path).masks(0)
    assert objects.max() == 11
    assert (objects[0] == 10).any()
    assert not (objects[1] == 10).any()
    assert (objects[0, masks[10, 0]] == 11).all()  # folder 10 comes before 11, and not before 2


def test_segtrack_mistakes_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folders of frames in JPEGImages"):
        open_dataset("segtrack", tmp_path)
    write_segtrack(tmp_path, "bmx", list(boxes(2, (2, 2))))
    with pytest.raises(ValueError, match="no splits"):
        open_dataset("segtrack", tmp_path, "train")
    Image.new("L", (5, 5)).save(tmp_path / "GroundTruth/bmx/1/frame_00001.png")
    with pytest.raises(VideoError, match=r"frame_00001\.png: mask of 5x5"):
        open_dataset("segtrack", tmp_path)


def test_segtrack_without_truth_has_no_masks(tmp_path):
    write_frames(tmp_path / "JPEGImages" / "girl", 2, SIZE)
    assert open_dataset("segtrack", tmp_path).masks(0) is None


def regions(count):
    first, second = boxes(count, (2, 2), (9, 9))
    return np.where(second, 2, first.astype(int))


# Regions need not be in the order of their codes; the first one is the background.
CODES = [16777215, 255, 65280]


@pytest.mark.parametrize(("codes", "gray"), [(CODES, False), ([128, 0, 255], True)])
def test_fbms_regions_become_ids_on_the_annotated_frames(tmp_path, codes, gray):
    truth = regions(8)
    write_fbms(tmp_path, "Trainingset", "bear01", 8, {0: truth[0], 5: truth[5]}, codes, gray=gray)
    write_fbms(tmp_path, "Testset", "cats01", 3, {1: truth[1]}, codes, gray=gray)
    dataset = open_dataset("fbms", tmp_path, "train")
    assert [video.name for video in dataset.videos] == ["bear01"]
    np.testing.assert_array_equal(dataset.mask_frames(0), [0, 5])
    masks = dataset.masks(0)
    np.testing.assert_array_equal(masks[[0, 5]], truth[[0, 5]])
    assert (masks[[1, 2, 3, 4, 6, 7]] == 255).all()
    assert [video.name for video in open_dataset("fbms", tmp_path).videos] == ["bear01", "cats01"]
    assert [video.name for video in open_dataset("fbms", tmp_path, "test").videos] == ["cats01"]


def test_fbms_frames_are_known_by_name_before_number(tmp_path):
    """Sequences whose files are numbered from 1 while the definition counts from 0."""
    truth = write_fbms(tmp_path, "Testset", "cars1", 4, {2: regions(4)[2]}, CODES)
    definition = truth / "cars1Def.dat"
    definition.write_text(definition.read_text().replace("Frame number:\n2", "Frame number:\n1"))
    np.testing.assert_array_equal(open_dataset("fbms", tmp_path).mask_frames(0), [2])
    definition.write_text(definition.read_text().replace("cars1_0002.ppm", "elsewhere.ppm"))
    np.testing.assert_array_equal(open_dataset("fbms", tmp_path).mask_frames(0), [1])


def test_fbms_colour_that_is_no_region_is_void(tmp_path):
    truth = write_fbms(tmp_path, "Testset", "cats04", 2, {0: regions(2)[0]}, CODES)
    image = np.array(Image.open(truth / "cats04_0000_gt.ppm"))
    image[0, :4] = (1, 2, 3)
    Image.fromarray(image).save(truth / "cats04_0000_gt.ppm")
    mask = open_dataset("fbms", tmp_path).masks(0)[0]
    assert (mask[0, :4] == 255).all()
    np.testing.assert_array_equal(mask[1:], regions(2)[0][1:])


def test_fbms_without_definition_numbers_the_colours(tmp_path):
    truth = write_fbms(tmp_path, "Testset", "dogs01", 3, {0: regions(3)[0], 2: regions(3)[2]}, [0, 700, 90])
    (truth / "dogs01Def.dat").unlink()
    masks = open_dataset("fbms", tmp_path).masks(0)
    expected = np.array([0, 2, 1])[regions(3)]  # 90 comes before 700
    np.testing.assert_array_equal(masks[[0, 2]], expected[[0, 2]])
    assert (masks[1] == 255).all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("regions:\n3", "regions:\n4", "'Confusion penality matrix' where the code of a region should be"),
        ("regions:\n3", "regions:\n-3", "'-3' where the number of regions should be"),
        ("regions:\n3", "regions:\n999999999", "where the code of a region should be"),
        ("Total number of regions:", "", "no 'Total number of regions:'"),
        ("Frame number:\n0", "Frame number:", "where the number of a frame should be"),
        ("Frame number:\n0", "", "differ in count"),
        ("File name:\nbear01_0000_gt.ppm", "File name:\n../../../secret.ppm", "does not belong to this sequence"),
        ("File name:\nbear01_0000_gt.ppm", "File name:\n/etc/passwd", "does not belong to this sequence"),
        ("65280", "255", "not 3 different codes"),
    ],
)
def test_fbms_wrong_definition_skips_the_sequence_and_names_it(tmp_path, old, new, message):
    truth = write_fbms(tmp_path, "Testset", "bear01", 2, {0: regions(2)[0]}, CODES)
    write_fbms(tmp_path, "Testset", "bear02", 2, {0: regions(2)[0]}, CODES)
    definition = truth / "bear01Def.dat"
    text = definition.read_text()
    assert old in text
    definition.write_text(text.replace(old, new))
    dataset = open_dataset("fbms", tmp_path)
    assert [video.name for video in dataset.videos] == ["bear02"]
    assert str(definition) in dataset.report()
    assert message in dataset.report()


def test_fbms_mistakes_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sequences in Trainingset or Testset"):
        open_dataset("fbms", tmp_path)
    with pytest.raises(ValueError, match="splits train and test, not 'val'"):
        open_dataset("fbms", tmp_path, "val")


def write_mask(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8)).save(path)


@pytest.mark.parametrize(("videos", "masks"), [("JPEGImages", "Annotations"), (".", "masks")])
def test_folder_with_masks(tmp_path, videos, masks):
    truth = regions(3)
    write_frames(tmp_path / videos / "a" / "clip", 3, SIZE)
    write_frames(tmp_path / videos / "plain", 2, SIZE)
    encode(tmp_path / videos / "film.mp4", moving(3, *SIZE), crf=0)
    for t in (0, 2):
        write_mask(tmp_path / masks / "a" / "clip" / f"{t:05d}.png", truth[t])
        write_mask(tmp_path / masks / "film" / f"{t:05d}.png", truth[t][::-1])
    dataset = open_dataset("folder", tmp_path)
    index_of = {video.name: index for index, video in enumerate(dataset.videos)}
    assert sorted(index_of) == ["a/clip", "film", "plain"]
    np.testing.assert_array_equal(dataset.mask_frames(index_of["a/clip"]), [0, 2])
    np.testing.assert_array_equal(dataset.masks(index_of["a/clip"])[[0, 2]], truth[[0, 2]])
    assert (dataset.masks(index_of["a/clip"])[1] == 255).all()
    np.testing.assert_array_equal(dataset.masks(index_of["film"])[2], truth[2][::-1])
    assert dataset.masks(index_of["plain"]) is None


def test_mask_of_another_size_drops_all_masks_of_its_video(tmp_path):
    write_frames(tmp_path / "clip", 2, SIZE)
    write_frames(tmp_path / "fine", 2, SIZE)
    write_mask(tmp_path / "masks" / "clip" / "00001.png", picture(0, 4, 4)[..., 0])
    dataset = open_dataset("folder", tmp_path)
    assert [video.name for video in dataset.videos] == ["clip", "fine"]
    assert dataset.report() == ""
    assert "left out: the masks of 1 video (" in dataset.left_out
    with pytest.raises(VideoError, match=r"00001\.png: mask of 4x4"):
        dataset.masks(0)
