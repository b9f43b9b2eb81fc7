"""Weights & Biases: files in RUN/wandb, which are sent to a server only with the variable WANDB_MODE=online."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex

import numpy as np

from interpreter.engine.trackers import TrackedStage

# By default W&B sends reports of its errors to its developers, even offline, and contacts their server when it is
# imported.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
import wandb


class WandbTracker:
    """One W&B run per stage, grouped by the run directory.

    W&B cannot resume a run offline: on the server, files of a second process replace those of the first. Therefore each
    process writes the whole history, and then removes the earlier files. A process that ends before the history is
    complete removes its own files. Online, the server has the last step.
    """

    whole = False

    def __init__(self, stage: TrackedStage) -> None:
        known = stage.read_id("wandb")
        number, mode = known or token_hex(4), os.environ.get("WANDB_MODE", "offline")
        if not known:
            stage.write_id("wandb", number)
        self._offline = mode in ("offline", "dryrun")
        self._earlier = sorted((stage.run / "wandb").glob(f"offline-run-*-{number}"))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "interpreter"),
            dir=str(stage.run),
            id=number,
            name=f"{stage.run.name}/{stage.name}",
            group=stage.run.name,
            job_type=stage.name,
            config=dict(stage.options),
            allow_val_change=True,
            mode=mode,
            resume=None if self._offline else "allow",
            # W&B's own logs are off: the progress bar writes to the console, and the options contain the version of the
            # code.
            settings=wandb.Settings(console="off", disable_git=True, quiet=True),
        )
        self.last_step = self._run.starting_step - 1

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :meth:`Tracker.scalars`."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, image: np.ndarray) -> None:
        """See :meth:`Tracker.picture`."""
        self._run.log({"masks": wandb.Image(image)}, step=step)

    def close(self, failed: bool) -> None:
        """See :meth:`Tracker.close`."""
        self._run.finish(exit_code=int(failed))
        if self._offline:
            for folder in self._earlier if self.whole else [Path(self._run.dir).parent]:
                shutil.rmtree(folder, ignore_errors=True)


TRACKER = WandbTracker
