"""TensorBoard: events in RUN/tensorboard/STAGE."""

import sys
from collections.abc import Mapping
from types import ModuleType

import numpy as np

from interpreter.engine.trackers import TrackedStage

# Where TensorFlow is installed (extra movi), TensorBoard would import it, and its LLVM aborts a process that also loads
# Triton's. If a module of this name exists, TensorBoard does not import TensorFlow.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
from torch.utils.tensorboard import SummaryWriter  # noqa: E402


class TensorBoardTracker:
    """Events of one stage. TensorBoard hides what a killed process wrote after the step that training resumes from."""

    def __init__(self, stage: TrackedStage) -> None:
        folder = stage.run / "tensorboard" / stage.name
        self.last_step = stage.step if any(folder.glob("events*")) else -1
        self._writer = SummaryWriter(str(folder), purge_step=stage.step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :meth:`Tracker.scalars`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, image: np.ndarray) -> None:
        """See :meth:`Tracker.picture`."""
        self._writer.add_image("masks", image, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        """See :meth:`Tracker.close`."""
        self._writer.close()


TRACKER = TensorBoardTracker
