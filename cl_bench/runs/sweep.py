"""Sweeps: why jobs failed, and how a signal to stop reaches the jobs in other processes.

A launcher may run jobs in processes that do not get the command's signals and that outlive it. So the command and its
jobs share a folder. The command writes ``stop`` there, each running job has a file there, and a job that fails adds a
line to ``failures``.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cl_bench.config.explain import choose_exit_status, explain
from cl_bench.config.schema import list_typed_overrides, split_override
from cl_bench.core.errors import ConfigError
from cl_bench.core.labels import format_settings
from cl_bench.system.signals import handle_once
from cl_bench.system.streams import outlive_readers

POLL_SECONDS = 0.2


class JobFailed(Exception):
    """A job of a sweep failed. The error has only a text and a number, which can be passed between any processes.

    Args:
        message: what is printed for the user.
        status: the exit status of such an error.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.message, self.status = message, status


@dataclass(frozen=True)
class Sweep:
    """What the processes of a sweep share.

    Attributes:
        arguments: the command line; overrides of a job that are not in it belong to this job only.
        tracebacks: whether the user wants tracebacks.
        folder: the shared folder; created when there is something to write.
        pid: the command's process.
    """

    arguments: Sequence[str]
    tracebacks: bool = False
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / f"cl_bench-{uuid.uuid4().hex}")
    pid: int = field(default_factory=os.getpid)

    # -- the command ---------------------------------------------------------------------------------------------------

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Inside, SIGINT or SIGTERM stops the jobs, each after a checkpoint, then this process; a second kills it."""

        def stop(number: int) -> None:
            self._make_folder()
            (self.folder / "stop").touch()
            while any(_is_alive(int(file.suffix[1:])) for file in self.folder.glob("job.*")):
                time.sleep(POLL_SECONDS)
            raise SystemExit(128 + number)

        with handle_once(stop, "Stopping the jobs of this sweep; repeat the signal to stop at once."):
            yield

    def close(self) -> list[JobFailed]:
        """The failures of all jobs, in the order in which they happened; the folder is removed."""
        file = self.folder / "failures"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        shutil.rmtree(self.folder, ignore_errors=True)
        return [JobFailed(*json.loads(line)) for line in lines]

    # -- a job ---------------------------------------------------------------------------------------------------------

    def perform(self, job: Callable[[DictConfig], Any], config: DictConfig) -> Any:
        """Run a job of the sweep, in any process.

        Raises:
            JobFailed: it failed; the reason has been printed.
        """
        if os.getpid() == self.pid:
            return self._run_and_report(job, config)
        outlive_readers()
        self._make_folder()
        mine = self.folder / f"job.{os.getpid()}"
        _label.set(self._label_job())
        mine.touch()  # before it checks for `stop`: the command waits for the job files that exist then
        try:
            with self._watch_for_stop():
                return None if self._is_stopped() else self._run_and_report(job, config)
        except SystemExit:  # a signal; if it were passed on, the launcher would kill the other jobs during a step
            time.sleep(0 if self._is_stopped() else 1)  # Ctrl-C reaches all processes, perhaps the command last
            if not self._is_stopped():
                raise self._report_failure("stopped by a signal; the same command goes on from there", 1) from None
            return None
        finally:
            mine.unlink(missing_ok=True)
            if self._is_orphaned():  # nobody else would end this process or remove the folder
                if not list(self.folder.glob("job.*")):
                    self.close()
                os._exit(1)

    def _label_job(self) -> str:
        """The overrides that are not on the command line: they tell this job from the others."""
        known = HydraConfig.initialized()
        return format_settings(dict(map(split_override, self._list_own_overrides()))) if known else ""

    def _list_own_overrides(self) -> list[str]:
        given = list_typed_overrides()
        return [override for override in given if override not in self.arguments] or given

    def _run_and_report(self, job: Callable[[DictConfig], Any], config: DictConfig) -> Any:
        try:
            return job(config)
        except Exception as error:
            status = choose_exit_status(error)
            if status is None or self.tracebacks:
                traceback.print_exc()
            message = (
                f"{type(error).__name__}: {error}"
                if status is None
                else explain(error, [*self.arguments, *list_typed_overrides()])
            )
            raise self._report_failure(message, status or 1) from None

    def _report_failure(self, message: str, status: int) -> JobFailed:
        """Print a failure now, and save it for the command to print at the end."""
        own = " ".join(self._list_own_overrides())
        failure = JobFailed(f"job {HydraConfig.get().job.num} ({own}): {message}", status)
        print(f"cl_bench: {failure.message}", file=sys.stderr)
        with suppress(OSError):  # the command also gets the error itself, at least the first one
            self._make_folder()
            with (self.folder / "failures").open("a", encoding="utf-8") as file:
                file.write(json.dumps(failure.args) + "\n")
        return failure

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def _is_stopped(self) -> bool:
        return (self.folder / "stop").exists() or self._is_orphaned()

    def _is_orphaned(self) -> bool:
        """Whether the command, this process's parent, has died."""
        global _child
        _child = _child or os.getppid() == self.pid
        return _child and os.getppid() != self.pid

    @contextmanager
    def _watch_for_stop(self) -> Iterator[None]:
        """Inside, a stopped sweep sends this process SIGTERM, again and again."""
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets Ctrl-C and writes `stop`
            # for the time when the run does not catch it
            before = signal.signal(signal.SIGTERM, lambda *args: None)
        except ValueError:  # a launcher may run jobs in threads, where signals cannot be caught
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(POLL_SECONDS):
                if self._is_stopped():
                    os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            signal.signal(signal.SIGTERM, before)


def refuse_test_images(evaluate_on: Any, search: str) -> None:
    """Refuse a search that would choose settings by test images."""
    if evaluate_on != "val":
        raise ConfigError(
            "trainer.evaluate_on",
            expected=f"val in a search ({search}), so that no setting is chosen on test images",
            got=str(evaluate_on),
            fix="Add trainer.evaluate_on=val scenario.val_fraction=0.1.",
        )


_child = False  # whether the command is this process's parent: after its death this cannot be found out


_label: ContextVar[str] = ContextVar("label of this process's job", default="")


def get_job_label() -> str:
    """What tells the job of this process from jobs in other processes; empty if the command itself runs it."""
    return _label.get()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
