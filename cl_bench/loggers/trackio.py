"""Trackio; the only module that imports it. It is optional: ``pip install trackio``."""

from typing import TYPE_CHECKING, Any

from cl_bench.core.errors import ConfigError
from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.dashboard import Series, flatten_summary, list_pictures, make_config, make_group, make_name
from cl_bench.loggers.delivered import Delivered, Event

if TYPE_CHECKING:
    import trackio


class Trackio(Logger):
    """Logs each run folder as one Trackio run, which a resumed process continues.

    Trackio draws over its own step, the optimizer steps, and offers ``epoch`` and ``task`` as other axes. What it has
    not stored yet when the process is killed is missing there; ``cl_bench export`` from a finished run has everything.

    Args:
        project: Trackio's project.
    """

    def __init__(self, *, project: str) -> None:
        try:
            import trackio
        except ModuleNotFoundError as error:
            raise ConfigError(
                "logger", expected="the package trackio", got="none", fix="pip install trackio"
            ) from error
        self._project, self._library = project, trackio
        self._run: trackio.Run | None = None

    def start(self, run: RunInfo) -> None:
        """Open the run, or continue it."""
        self._folder, self._series = run.folder, Series(run.folder)
        self._delivered = Delivered(run.folder, "trackio/delivered.json")
        self._run = self._library.init(
            project=self._project,
            name=f"{make_name(run)} ({run.experiment} {run.fingerprint})",  # Trackio knows runs by their names
            group=make_group(run),
            config=make_config(run),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log_event(self, number: int, event: Event) -> None:
        """Log the event, unless it was delivered."""
        assert self._run is not None
        self._log(self._run, self._delivered.list_due(number, event))

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Add the summary and the pictures of the report, and end the run."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            if summary is not None:
                self._log(run, self._delivered.list_undelivered())
                end: dict[str, Any] = {f"summary/{name}": value for name, value in flatten_summary(summary).items()}
                pictures = list_pictures(self._folder, summary)
                run.log(end | {f"plots/{name}": self._library.Image(str(path)) for name, path in pictures.items()})
        finally:
            self._library.finish()  # the run that init() made current
        self._delivered.mark(self._delivered.count, finished=status == "finished")

    def _log(self, run: "trackio.Run", events: list[tuple[int, Event]]) -> None:
        for number, content in events:
            if point := self._series.extract(number, content):
                values = {**point.values, "epoch": point.axes["epoch"], "task": point.axes["task"]}
                run.log(values, step=point.axes["step"])
            self._delivered.mark(number + 1)
