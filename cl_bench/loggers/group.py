"""One logger that passes events on to all loggers of a run."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from cl_bench.loggers.base import Logger, Progress, RunInfo
from cl_bench.loggers.jsonl import JsonLines


class Loggers(Logger):
    """Passes every call on to several loggers, in their order.

    A logger that raises is reported once on stderr and dropped: training is worth more than its curves. The exception
    is :class:`JsonLines`: if it cannot write, nothing of the run can be stored, so its errors are raised. So are
    ``KeyboardInterrupt`` and ``SystemExit``.

    Args:
        loggers: in the order of the calls; the one that repairs ``metrics.jsonl`` must come before its readers.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self._keep(loggers)

    def start(self, run: RunInfo) -> None:
        """The run starts or resumes."""
        self._tell(self._loggers, "start", run)

    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """Log one event."""
        self._tell(self._loggers, "log_event", number, event)

    def log_step(self, progress: Progress) -> None:
        """Log one optimizer step."""
        self._tell(self._steppers, "log_step", progress)

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """End all loggers, even if one of them raises."""
        raised: BaseException | None = None
        for logger in self._loggers:
            try:
                logger.finish(status, summary)
            except BaseException as error:
                if _is_harmless(logger, error):
                    _report(logger, "finish", error)
                else:
                    raised = raised or error
        if raised is not None:
            raise raised

    def _tell(self, loggers: tuple[Logger, ...], call: str, *arguments: Any) -> None:
        for logger in loggers:
            try:
                getattr(logger, call)(*arguments)
            except Exception as error:
                self._drop(logger, call, error)

    def _keep(self, loggers: Iterable[Logger]) -> None:
        self._loggers = tuple(loggers)
        # Most loggers ignore steps; those are not called at all.
        self._steppers = tuple(logger for logger in self._loggers if type(logger).log_step is not Logger.log_step)

    def _drop(self, logger: Logger, call: str, error: Exception) -> None:
        if not _is_harmless(logger, error):
            raise error
        self._keep(other for other in self._loggers if other is not logger)
        with suppress(Exception):  # frees terminal, files and connections; the error is known already
            logger.finish("failed", None)
        _report(logger, call, error)


def _is_harmless(logger: Logger, error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(logger, JsonLines)


def _report(logger: Logger, call: str, error: BaseException) -> None:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    with suppress(OSError, ValueError):  # stderr itself may be closed
        where = f"{type(logger).__name__} failed in {call.removeprefix('log_')}"
        print(f"cl_bench: logger {where} ({what}); training goes on without it", file=sys.stderr)
