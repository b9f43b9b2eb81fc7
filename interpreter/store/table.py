"""Rows of the frames of many videos, read from the store by global frame number."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from interpreter.data.frame_index import FrameIndex
from interpreter.store.files import Store


class FrameTable:
    """Stored rows by global frame number (see :class:`FrameIndex`).

    Args:
        stores: the store of frames (key False) and, if there is one, the store of mirrored frames (key True).
        digests: hash of each video, from :func:`interpreter.store.files.read_content`.
        index: the numbering of the frames.
    """

    def __init__(self, stores: Mapping[bool, Store], digests: Sequence[str], index: FrameIndex) -> None:
        self.stores, self.digests, self.index = stores, digests, index

    def rows(self, name: str, frames: Tensor, flips: Tensor, *index: Tensor) -> Tensor:
        """Rows [n, …] of frames [n] int64 with flips [n] bool. Each ``index`` [n] selects along a further axis."""
        videos, places = self.index.locate(frames)
        groups, members = np.unique(videos * 2 + flips.numpy(), return_inverse=True)
        gathered = None
        for number, group in enumerate(groups):
            chosen = torch.from_numpy(np.flatnonzero(members == number))
            tensor = self.stores[bool(group % 2)].tensor(self.digests[group // 2], name)
            rows = tensor[(torch.from_numpy(places)[chosen], *(i[chosen] for i in index))]
            if gathered is None:
                gathered = rows.new_empty(len(frames), *rows.shape[1:])
            gathered[chosen] = rows
        assert gathered is not None, "a batch has at least one frame"
        return gathered
