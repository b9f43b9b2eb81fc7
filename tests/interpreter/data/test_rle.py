"""Run-length codes against pycocotools, and on damage that would crash pycocotools."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from interpreter.data.rle import LARGEST_MASK, decode_rle


@st.composite
def masks(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    coarse = rng.random((shape[0] // 7 + 1, shape[1] // 7 + 1)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return np.kron(coarse, np.ones((7, 7), bool))[: shape[0], : shape[1]] ^ (rng.random(shape) < 0.01)


def compressed(mask):
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


def runs_of(mask):
    """Uncompressed counts, pixel by pixel."""
    runs, colour = [0], False
    for pixel in mask.T.ravel():
        if pixel != colour:
            runs.append(0)
            colour = pixel
        runs[-1] += 1
    return runs


def decoded_or_refused(rle, size):
    """The mask, or None if the expected error was raised."""
    try:
        return decode_rle(rle, size, "a.json")
    except ValueError as refusal:
        error = str(refusal)
    assert error.startswith("a.json: ")
    return None


@settings(max_examples=100)
@given(masks())
def test_all_three_forms_of_counts_decode_to_the_mask(mask):
    rle = compressed(mask)
    forms = [rle["counts"], rle["counts"].decode("ascii"), runs_of(mask)]
    for counts in forms:
        assert np.array_equal(decode_rle({"size": list(mask.shape), "counts": counts}, mask.shape, "here"), mask)


def test_runs_of_millions_of_pixels_decode():
    mask = np.zeros((3000, 2000), bool)
    mask[:, 700:1900] = True
    assert np.array_equal(decode_rle(compressed(mask), mask.shape, "here"), mask)


@settings(max_examples=300)
@given(masks(), st.data())
def test_cut_and_flipped_codes_are_refused_or_fill_the_frame(mask, data):
    rle = compressed(mask)
    counts = bytearray(rle["counts"])
    if data.draw(st.booleans()):
        counts = counts[: data.draw(st.integers(0, len(counts) - 1))]
        with pytest.raises(ValueError, match=r"a\.json"):  # in a cut code, pixels are always missing
            decode_rle({"size": rle["size"], "counts": bytes(counts)}, mask.shape, "a.json")
        return
    for _ in range(data.draw(st.integers(1, 3))):
        counts[data.draw(st.integers(0, len(counts) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = {"size": rle["size"], "counts": bytes(counts)}
    decoded = decoded_or_refused(damaged, mask.shape)
    if decoded is not None:  # the damage happens to be a valid code of another mask: pycocotools may see it, and agrees
        assert np.array_equal(decoded, coco.decode(damaged).astype(bool))


NUMBERS = st.lists(st.integers(-5, 2**40) | st.none(), max_size=9)


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=40), st.text(max_size=40), NUMBERS))
def test_arbitrary_counts_never_decode_to_another_size(counts):
    decoded = decoded_or_refused({"size": [4, 5], "counts": counts}, (4, 5))
    assert decoded is None or decoded.shape == (4, 5)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [4, 5], "counts": [20, 1]}, "add up to 21"),
        ({"size": [4, 5], "counts": [19]}, "add up to 19"),
        ({"size": [4, 5], "counts": []}, "add up to 0"),
        ({"size": [4, 5], "counts": [30, -10]}, "from 0 to 20"),
        ({"size": [4, 5], "counts": [20.0]}, "from 0 to 20"),
        ({"size": [4, 5], "counts": [True] * 20}, "from 0 to 20"),
        ({"size": [4, 5], "counts": "d0P"}, "cut off"),
        ({"size": [4, 5], "counts": "PPPPPPPPPPPPPPPPPPP0"}, "longer"),
        ({"size": [4, 5], "counts": "\x00"}, "outside"),
        ({"size": [4, 5], "counts": "é"}, "ASCII"),
        ({"size": [4, 5], "counts": 20}, "must be a list"),
        ({"size": [4, 5]}, "'size' and 'counts'"),
        ({"counts": [20]}, "'size' and 'counts'"),
        ([20], "'size' and 'counts'"),
        (None, "'size' and 'counts'"),
        ({"size": [5, 4], "counts": [20]}, "size"),
        ({"size": 20, "counts": [20]}, "size"),
        ({"size": [2**31, 2**31], "counts": [2**62]}, "size"),
    ],
    ids=lambda value: json.dumps(value)[:40] if not isinstance(value, str) else value,
)
def test_malformed_codes_say_what_is_wrong(rle, message):
    with pytest.raises(ValueError, match=rf"^there: .*{message}"):
        decode_rle(rle, (4, 5), "there")


def test_huge_frames_are_refused_before_memory_is_taken():
    size = (2**20, 2**20)
    with pytest.raises(ValueError, match=str(LARGEST_MASK)):
        decode_rle({"size": list(size), "counts": [2**40]}, size, "bomb")
