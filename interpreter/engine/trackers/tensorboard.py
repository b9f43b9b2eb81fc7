"""TensorBoard: events in RUN/tensorboard/STAGE."""

import sys
from collections.abc import Mapping
from types import ModuleType

import numpy as np

from interpreter.engine.trackers import TrackedStage

# If TensorFlow is installed (extra movi), TensorBoard imports it. TensorFlow and Triton each load an LLVM, which aborts
# the process. TensorBoard does not import TensorFlow if a module of this name exists.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
from torch.utils.tensorboard import SummaryWriter  # noqa: E402


class TensorBoardTracker:
    """Events of one stage.

    A process that ends normally stores its last step. A killed process may have lost events, and may have written
    events after its checkpoint. TensorBoard hides these, and they are written again.
    """

    whole = False

    def __init__(self, stage: TrackedStage) -> None:
        folder = stage.run / "tensorboard" / stage.name
        noted = stage.read_id("tensorboard") if any(folder.glob("events*")) else None
        self.last_step = self._newest = min(int(noted or -1), stage.step)
        stage.write_id("tensorboard", str(self.last_step))
        self._stage, self._writer = stage, SummaryWriter(str(folder), purge_step=self.last_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :meth:`Tracker.scalars`."""
        self._newest = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, image: np.ndarray) -> None:
        """See :meth:`Tracker.picture`."""
        self._newest = step
        self._writer.add_image("masks", image, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        """See :meth:`Tracker.close`."""
        self._writer.close()
        if not failed:
            self._stage.write_id("tensorboard", str(self._newest))


TRACKER = TensorBoardTracker
