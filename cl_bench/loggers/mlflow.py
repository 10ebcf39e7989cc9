"""MLflow; the only module that imports it. It is optional: ``pip install mlflow``."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_bench.core.errors import ConfigError
from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.dashboard import (
    Series,
    flatten_summary,
    list_pictures,
    make_config,
    make_group,
    make_name,
    write_files,
)
from cl_bench.loggers.delivered import Delivered, Event

if TYPE_CHECKING:
    from mlflow import MlflowClient

STATUSES = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
"""Status of a run -> status in MLflow."""

_MOST_PARAMETERS = 100  # in one request
_LONGEST = 500  # characters of a parameter


class MLflow(Logger):
    """Logs each run folder as one MLflow run, which a resumed process continues.

    The series of :mod:`~cl_bench.loggers.dashboard` are drawn over the optimizer steps: MLflow has no other axis. An
    event counts as delivered when MLflow has stored it.

    Args:
        uri: MLflow's tracking URI; None is MLflow's own default (``MLFLOW_TRACKING_URI``, or a file in the working
            directory).
        experiment: MLflow's experiment; created if it is not there.
    """

    def __init__(self, *, uri: str | None, experiment: str) -> None:
        try:
            import mlflow
        except ModuleNotFoundError as error:
            raise ConfigError(
                "logger", expected="the package mlflow", got="none", fix="pip install 'cl-bench[dashboards]'"
            ) from error
        self._experiment, self._uri = experiment, uri
        self._library = mlflow
        self._client: MlflowClient | None = None

    def start(self, run: RunInfo) -> None:
        """Create the run, or continue it."""
        self._folder, self._series = run.folder, Series(run.folder)
        self._delivered = Delivered(run.folder, "mlflow/delivered.json")
        client = self._client = self._library.MlflowClient(tracking_uri=self._uri)
        if "id" not in self._delivered.note:
            found = client.get_experiment_by_name(self._experiment)
            experiment = found.experiment_id if found else client.create_experiment(self._experiment)
            tags = {"group": make_group(run), "fingerprint": run.fingerprint, "job_type": run.name}
            created = client.create_run(experiment, run_name=make_name(run), tags=tags)
            self._delivered.mark(0, id=created.info.run_id)
            parameters = [self._library.entities.Param(*pair) for pair in _flatten(make_config(run))]
            for first in range(0, len(parameters), _MOST_PARAMETERS):
                client.log_batch(created.info.run_id, params=parameters[first : first + _MOST_PARAMETERS])
        self._id: str = self._delivered.note["id"]
        client.update_run(self._id, status="RUNNING")

    def log_event(self, number: int, event: Event) -> None:
        """Log the event, unless it was delivered."""
        assert self._client is not None
        self._log(self._client, self._delivered.list_due(number, event))

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Add the summary, the pictures of the report and the files, and end the run."""
        client, self._client = self._client, None
        if client is None:
            return
        try:
            if summary is not None:
                self._log(client, self._delivered.list_undelivered())
                for name, value in flatten_summary(summary).items():
                    client.log_metric(self._id, f"summary/{name}", value)
                for path in list_pictures(self._folder, summary).values():
                    client.log_artifact(self._id, str(path), "plots")
                with tempfile.TemporaryDirectory() as copies:
                    for path in write_files(self._folder, Path(copies)):
                        client.log_artifact(self._id, str(path))
        finally:
            client.set_terminated(self._id, STATUSES.get(status, "FAILED"))
        self._delivered.mark(self._delivered.count, finished=status == "finished")

    def _log(self, client: "MlflowClient", events: list[tuple[int, Event]]) -> None:
        for number, content in events:
            if point := self._series.extract(number, content):
                now, step = int(1000 * time.time()), point.axes["step"]
                values = {**point.values, "epoch": point.axes["epoch"], "task": point.axes["task"]}
                metrics = [self._library.entities.Metric(name, value, now, step) for name, value in values.items()]
                client.log_batch(self._id, metrics=metrics)
            self._delivered.mark(number + 1)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)[:_LONGEST]
