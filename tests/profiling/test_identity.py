"""Returns of objects, and links between windows."""

import numpy as np
import torch

from interpreter.methods.base import Encoded
from interpreter.methods.interpreter.hierarchy import Level, Slots
from interpreter.methods.interpreter.image_slots import EncodedVideo
from interpreter.metrics.contingency import contingency
from profiling import identity
from profiling.identity import Case
from profiling.identity_scores import AWAY, returns


def test_a_return_counts_after_a_long_absence_alone():
    """Object 1 is away for AWAY frames, then for one less, and object 2 comes back under another segment."""
    frames = 3 * AWAY
    true = np.zeros((frames, 1, 4), np.int64)
    true[:, 0, :2] = 1
    true[2 : 2 + AWAY, 0, :2] = 0
    true[-AWAY:-1, 0, :2] = 0
    true[:, 0, 2] = 2
    true[3 : 3 + AWAY, 0, 2] = 0
    pred = np.where(true == 2, 5, true)
    pred[3 + AWAY :, 0, 2] = 6
    assert sorted(returns(contingency(pred, true))) == [(False, False, False), (True, True, True)]


def test_a_segment_of_two_objects_is_matched_with_one_of_them():
    """A single segment for the whole video keeps every id, but it matches one object only and tracks none."""
    true = np.zeros((AWAY + 2, 1, 8), np.int64)
    true[[0, -1], 0, 0], true[[0, -1], 0, 1] = 1, 2
    assert sorted(returns(contingency(np.zeros_like(true), true))) == [(True, False, False), (True, True, False)]


def test_windows_are_linked_by_the_frames_that_both_have(monkeypatch):
    """Three patches are three objects in all frames; the second window numbers them in another order."""
    order = torch.tensor([2, 0, 1])
    attention = torch.stack([torch.eye(3), torch.eye(3)[:, order]])[:, None].expand(-1, 3, -1, -1)  # [W, L, N, K]
    slots = Slots(torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3))
    level, video = Level(slots, attention, [0, 2]), EncodedVideo(torch.zeros(5, 3, 4), torch.eye(3).expand(5, -1, -1))

    class Two:
        grid = (1, 3)

    segmenters = identity.Segmenters(*[Two()] * 4)  # type: ignore[arg-type]
    case = Case(segmenters, Encoded(5, {0: video}), 0, np.zeros((5, 1, 3), np.uint8))
    monkeypatch.setattr(Case, "windows", level)
    assert (identity.linked_masks(case) == [[0, 1, 2]]).all()
