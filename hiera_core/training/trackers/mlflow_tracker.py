"""Measurements for MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from .sender import Outcome
from .tracker import TrackedRun

EXPERIMENT = "hiera"  # unless MLFLOW_EXPERIMENT_NAME names another one
FOLDER = "mlruns"  # in the folder of the run, unless MLFLOW_TRACKING_URI names a server
STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
MAX_VALUE = 500  # characters of a parameter, MLflow's limit for all stores


class MlflowTracker:
    """Sends measurements to the server that MLFLOW_TRACKING_URI names, or writes them to a folder
    in that of the run."""

    def __init__(self, run: TrackedRun) -> None:
        local = (run.folder / FOLDER).resolve().as_uri()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        self.id = self._existing(run.id) or self._create(run)

    def _existing(self, id: str) -> str | None:
        """Return the id of a run that resumes, if the server knows it."""
        try:
            self._client.update_run(id, "RUNNING")
        except MlflowException:
            return None
        return id

    def _create(self, run: TrackedRun) -> str:
        """Create a run, and return the id that MLflow gives it."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        created = self._client.create_run(number, run_name=run.folder.resolve().name)
        id = str(created.info.run_id)
        params = [Param(key, str(value)[:MAX_VALUE]) for key, value in run.facts.items()]
        self._client.log_batch(id, params=params)
        return id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics)

    def close(self, outcome: Outcome = "finished") -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self.id, STATUS[outcome])
