"""MLflow: a store in RUN/mlflow, or the one that the environment variable MLFLOW_TRACKING_URI names."""

import os
import time
from collections.abc import Mapping

import numpy as np

from interpreter.engine.trackers import TrackedStage

# Set before the import. By default MLflow sends usage statistics to a server, prints a message for each table that it
# creates, and lets a step wait for many minutes if its server does not answer.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}.items():
    os.environ.setdefault(_name, _value)
from mlflow.entities import Experiment, Metric, Param, Run  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

TAGS = ("method", "stage", "code")  # options that may change when a run is resumed
NEWEST = "last_step"  # tag: the newest step of a run that ended normally
LONGEST = 6000  # most characters of a parameter
MANY = 100  # most parameters of a request


class MlflowTracker:
    """One MLflow run per stage, in an experiment with the name of the run directory.

    MLflow cannot delete values of a run or change its parameters. So if a killed process logged steps after its
    checkpoint, or if options were changed, a new MLflow run with the whole history replaces the earlier one.
    """

    whole = False

    def __init__(self, stage: TrackedStage) -> None:
        folder = stage.run.resolve() / "mlflow"
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None if uri else (folder / "artifacts").as_uri()  # else that of the server
        if not uri:
            folder.mkdir(exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        experiment = self._client.get_experiment_by_name(stage.run.name)
        if artifacts and experiment and experiment.artifact_location != artifacts:
            raise ValueError(
                f"{folder} was made at another place, where its pictures still are: {experiment.artifact_location}. "
                f"Delete {folder}: the history is written again from metrics.jsonl"
            )
        self._params = {name: str(v)[:LONGEST] for name, v in stage.options.items() if name not in TAGS}
        known = stage.read_id("mlflow")
        earlier = self._find(known) if known else None
        if earlier and self._continues(earlier, stage.step):
            self._run, self.last_step = earlier.info.run_id, int(earlier.data.tags[NEWEST])
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run, self.last_step = self._start(stage, experiment, artifacts), -1
            stage.write_id("mlflow", self._run)
            if earlier:
                self._client.delete_run(earlier.info.run_id)
        self._newest = self.last_step
        for name in TAGS:
            if name in stage.options:
                self._client.set_tag(self._run, name, stage.options[name])

    def _start(self, stage: TrackedStage, experiment: Experiment | None, artifacts: str | None) -> str:
        if experiment is None:
            number = self._client.create_experiment(stage.run.name, artifact_location=artifacts)
        else:
            number = experiment.experiment_id
        run = self._client.create_run(number, run_name=stage.name).info.run_id
        params = [Param(name, value) for name, value in self._params.items()]
        for first in range(0, len(params), MANY):
            self._client.log_batch(run, params=params[first : first + MANY])
        return run

    def _find(self, number: str) -> Run | None:
        """A run by its id; None if it was deleted, or is in another store (MLFLOW_TRACKING_URI has changed)."""
        try:
            run = self._client.get_run(number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _continues(self, run: Run, step: int) -> bool:
        """Whether a run ended normally, has the current options, and has no records after ``step``."""
        newest = run.data.tags.get(NEWEST)
        finished = run.info.status == "FINISHED" and newest is not None
        return finished and run.data.params == self._params and int(newest) <= step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :meth:`Tracker.scalars`."""
        self._newest = step
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in values.items()])

    def picture(self, step: int, image: np.ndarray) -> None:
        """See :meth:`Tracker.picture`."""
        self._newest = step
        self._client.log_image(self._run, image, key="masks", step=step)

    def close(self, failed: bool) -> None:
        """See :meth:`Tracker.close`."""
        self._client.set_tag(self._run, NEWEST, self._newest)
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


TRACKER = MlflowTracker
