"""Weights & Biases: files in RUN/wandb, sent to a server only where the environment variable WANDB_MODE asks for it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex

import numpy as np

from interpreter.engine.trackers import TrackedStage

# W&B sends reports of its own errors to its makers, even offline, and looks up their server as it is imported.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
import wandb


class WandbTracker:
    """One W&B run per stage, grouped by the run directory.

    W&B cannot continue a run offline: files of a second process replace those of the first one on the server. Each
    process therefore writes the whole history, and the last one removes the earlier files; one that ends before the
    whole history is written removes its own. Online, the server knows the last step.
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
            # The progress bar writes to the console, and the version of the code is among the options.
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
