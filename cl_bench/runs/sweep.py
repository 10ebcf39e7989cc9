"""Sweeps: what became of each job, and how a signal to stop reaches the jobs in other processes.

A launcher may run jobs in processes that do not get the command's signals, that outlive it, or that are on other
machines. Two folders connect them. One is temporary, for processes on one machine: the command writes ``stop`` there,
and each running job has a file there. The other is in the results folder, which all machines share: each job writes
there what became of it. The command prints each failure when it appears, and a table of all jobs at the end.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cl_bench.config.explain import choose_exit_status, explain
from cl_bench.config.schema import list_typed_overrides, split_override
from cl_bench.core.errors import require
from cl_bench.core.labels import format_settings
from cl_bench.system.atomic import write_text
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
class Job:
    """What became of a job of a sweep.

    Attributes:
        number: its number in the sweep, from 0.
        overrides: what tells it from the other jobs, as typed.
        state: one of :data:`STATES`.
        runs: the folders of its runs that are known.
        reason: why it failed; else empty.
        status: the exit status of its failure; else 0.
    """

    number: int
    overrides: str
    state: str
    runs: tuple[str, ...] = ()
    reason: str = ""
    status: int = 0

    @property
    def failure(self) -> JobFailed:
        """The error of a failed job."""
        return JobFailed(f"job {self.number} ({self.overrides}): {self.reason}", self.status)


STATES = {
    "finished": "finished",
    "skipped": "finished before",
    "failed": "failed",
    "stopped": "stopped",
    "requeued": "waiting to go on",
    "started": "lost: its process ended without a word",
}
"""State of a job -> what the table at the end of a sweep says of it."""

JOBS = "jobs-"
"""What the name of the folder with the jobs' notes begins with."""


class NoteFolder(Callback):
    """Tells the command where the jobs of its sweep write their notes; Hydra calls it before the first job."""

    def on_multirun_start(self, config: DictConfig, **named: Any) -> None:
        """Remember the folder of the sweep."""
        global _sweep_dir
        _sweep_dir = Path(config.hydra.sweep.dir)
        _told_here.clear()


_sweep_dir: Path | None = None  # in the command's process


@dataclass(frozen=True)
class Sweep:
    """What the processes of a sweep share.

    Attributes:
        arguments: the command line; overrides of a job that are not in it belong to this job only.
        tracebacks: whether the user wants tracebacks.
        folder: the temporary folder; created when there is something to write.
        pid, machine: where the command's process is.
    """

    arguments: Sequence[str]
    tracebacks: bool = False
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / f"cl_bench-{uuid.uuid4().hex}")
    pid: int = field(default_factory=os.getpid)
    machine: str = field(default_factory=socket.gethostname)

    # -- the command ---------------------------------------------------------------------------------------------------

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Inside, SIGINT or SIGTERM stops the jobs, each after a checkpoint, then this process; a second kills it."""

        caught: list[int] = []

        def stop(number: int) -> None:
            caught.append(number)
            self._make_folder()
            (self.folder / "stop").touch()
            while any(_is_alive(int(file.suffix[1:])) for file in self.folder.glob("job.*")):
                time.sleep(POLL_SECONDS)
            raise SystemExit(128 + number)

        with handle_once(stop, "Stopping the jobs of this sweep; repeat the signal to stop at once."):
            try:
                yield
            except SystemExit:
                if caught:  # Ray makes a status 1 of every SystemExit
                    raise SystemExit(128 + caught[0]) from None
                raise

    @contextmanager
    def report_failures(self) -> Iterator[None]:
        """Inside, each failure of a job in another process is printed when it happens, wherever that process is."""
        told = set()

        def tell() -> None:
            for job in self.read_jobs():
                if job.state == "failed" and job.number not in told and job.number not in _told_here:
                    told.add(job.number)
                    print(f"cl_bench: {job.failure.message}", file=sys.stderr)

        try:
            with _repeat(tell):
                yield
        finally:
            tell()

    def read_jobs(self) -> list[Job]:
        """What the jobs of this sweep have written so far, by their numbers."""
        if _sweep_dir is None:
            return []
        jobs = []
        for file in self._get_notes(_sweep_dir).glob("*.json"):
            with suppress(OSError, ValueError):  # being written, by a system that does not write it at once
                found = json.loads(file.read_text(encoding="utf-8"))
                jobs.append(Job(**(found | {"runs": tuple(found["runs"])})))
        return sorted(jobs, key=lambda job: job.number)

    def choose_exit_status(self, error: JobFailed) -> int:
        """The exit status of this sweep after some jobs failed: 2 if all of them are wrong configurations, else 1."""
        failed = [error, *(job.failure for job in self.read_jobs() if job.state == "failed")]
        return 2 if all(failure.status == 2 for failure in failed) else 1

    def close(self) -> list[Job]:
        """What became of the jobs, by their numbers; the folders of the sweep are removed."""
        jobs = self.read_jobs()
        shutil.rmtree(self.folder, ignore_errors=True)
        if _sweep_dir is not None:
            shutil.rmtree(self._get_notes(_sweep_dir), ignore_errors=True)
            with suppress(OSError):  # a launcher or a search has files there
                _sweep_dir.rmdir()
        return jobs

    def _get_notes(self, sweep_dir: Path) -> Path:
        return sweep_dir / f"{JOBS}{self.folder.name}"

    # -- a job ---------------------------------------------------------------------------------------------------------

    def perform(self, job: Callable[[DictConfig], Any], config: DictConfig) -> Any:
        """Run a job of the sweep, in any process.

        Raises:
            JobFailed: it failed; the reason has been printed, or the command prints it.
        """
        if os.getpid() == self.pid:
            return self._run_and_report(job, config)
        outlive_readers()
        _limit_threads()
        mine = self.folder / f"job.{os.getpid()}"
        _label.set(self._label_job())
        if socket.gethostname() == self.machine:  # elsewhere nobody looks into this folder, or removes it
            with suppress(OSError):  # a job may see another temporary folder
                self._make_folder()
                mine.touch()  # before it checks for `stop`: the command waits for the job files that exist then
        requeue = Requeue.find()
        try:
            with requeue.catch(), self._watch_for_stop(requeue):
                return None if self._is_stopped() else self._run_and_report(job, config)
        except SystemExit:  # a signal; if it were passed on, the launcher would kill the other jobs during a step
            # Ctrl-C reaches all processes, perhaps the command last; SLURM sends SIGTERM with its signal to requeue
            time.sleep(0 if self._is_stopped() or requeue.wanted else 1)
            if requeue.wanted:
                return self._requeue(requeue)
            if not self._is_stopped():
                raise self._report_failure("stopped by a signal; the same command goes on from there", 1) from None
            return None
        finally:
            mine.unlink(missing_ok=True)
            if self._is_orphaned():  # nobody else would end this process or remove the folder
                if not list(self.folder.glob("job.*")):
                    shutil.rmtree(self.folder, ignore_errors=True)
                os._exit(1)

    def _requeue(self, requeue: "Requeue") -> None:
        self._note("requeued")
        try:
            requeue.act()
        except Exception as error:  # submitit's: it was requeued too often
            raise self._report_failure(" ".join(str(error).split()), 1) from None

    def _label_job(self) -> str:
        """The overrides that are not on the command line: they tell this job from the others."""
        known = HydraConfig.initialized()
        return format_settings(dict(map(split_override, self._list_own_overrides()))) if known else ""

    def _list_own_overrides(self) -> list[str]:
        given = list_typed_overrides()
        common = {argument.lower() for argument in self.arguments}  # Hydra writes True for true
        return [override for override in given if override.lower() not in common] or given

    def _run_and_report(self, job: Callable[[DictConfig], Any], config: DictConfig) -> Any:
        runs: list[tuple[str, bool]] = []
        _runs.set(runs)
        self._note("started")
        try:
            result = job(config)
        except SystemExit:
            self._note("stopped")
            raise
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
        self._note("skipped" if runs and all(before for _, before in runs) else "finished")
        return result

    def _report_failure(self, reason: str, status: int) -> JobFailed:
        """Save a failure, for the command to print now and at the end."""
        job = self._note("failed", reason=reason, status=status)
        if os.getpid() == self.pid:
            _told_here.add(job.number)
            print(f"cl_bench: {job.failure.message}", file=sys.stderr)
        return job.failure

    def _note(self, state: str, **facts: Any) -> Job:
        """Write down what became of this job."""
        if not HydraConfig.initialized():
            return Job(0, "", state, **facts)
        hydra, runs = HydraConfig.get(), tuple(path for path, _ in _runs.get() or ())
        job = Job(int(hydra.job.num), " ".join(self._list_own_overrides()), state, runs, **facts)
        notes = self._get_notes(Path(hydra.sweep.dir))
        with suppress(OSError):  # the command also gets the error itself, at least the first one
            notes.mkdir(parents=True, exist_ok=True)
            write_text(notes / f"{job.number}.json", json.dumps(asdict(job)))
        return job

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
    def _watch_for_stop(self, requeue: "Requeue") -> Iterator[None]:
        """Inside, a stopped sweep sends this process SIGTERM, again and again; so does a signal to requeue it."""
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets Ctrl-C and writes `stop`
            # for the time when the run does not catch it
            before = signal.signal(signal.SIGTERM, lambda *args: None)
        except ValueError:  # a launcher may run jobs in threads, where signals cannot be caught
            yield
            return

        def pass_on() -> None:
            if self._is_stopped() or requeue.wanted:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            with _repeat(pass_on):
                yield
        finally:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _repeat(action: Callable[[], None]) -> Iterator[None]:
    """Inside, a thread calls ``action`` every :data:`POLL_SECONDS`."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Requeue:
    """The signal by which submitit asks a job to leave, to be started again later, e.g. near SLURM's time limit.

    submitit's own handler ends the process at once. Here the run first stops after its next step, with a checkpoint.

    Args:
        number: the signal; None if this job does not belong to submitit.
    """

    def __init__(self, number: signal.Signals | None) -> None:
        self.number, self.wanted = number, False
        self._handler: Any = None

    @classmethod
    def find(cls) -> "Requeue":
        """The signal of this process's job."""
        if "SUBMITIT_EXECUTOR" not in os.environ:
            return cls(None)
        return cls(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Inside, the signal is only noted in ``wanted``."""
        if self.number is None:
            yield
            return
        self._handler = signal.signal(self.number, lambda *arguments: setattr(self, "wanted", True))
        try:
            yield
        finally:
            signal.signal(self.number, self._handler)

    def act(self) -> None:
        """Do what submitit does at the signal: it requeues the job and ends this process by ``SystemExit``."""
        self._handler(self.number, None)


def _limit_threads() -> None:
    """Use as many CPU threads as the launcher gives to a job, unless the environment says otherwise.

    Libraries read the variable when they are loaded, which is later. joblib and Ray set it themselves.
    """
    cpus = HydraConfig.get().launcher.get("cpus_per_task") if HydraConfig.initialized() else None
    if cpus:
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))


def format_table(jobs: Sequence[Job]) -> str:
    """The table that is printed at the end of a sweep: its jobs, and the command that compares their runs."""
    counts = {told.partition(":")[0]: sum(job.state == state for job in jobs) for state, told in STATES.items()}
    lines = [f"Sweep: {', '.join(f'{count} {told}' for told, count in counts.items() if count)}"]
    width = max(len(job.overrides) for job in jobs)
    for job in jobs:
        told = job.reason or f"{STATES[job.state]}{', '.join(['', *job.runs])}"
        lines.append(f"  {job.number:>3}  {job.overrides:<{width}}  {'failed: ' if job.reason else ''}{told}")
    done = [run for job in jobs if job.state in ("finished", "skipped") for run in job.runs]
    rows = list(dict.fromkeys(str(Path(run).parent) for run in done))
    if len(rows) > MOST_ROWS:
        rows = list(dict.fromkeys(str(Path(row).parent) for row in rows))
    if rows:
        lines.append(f"Compare: cl_bench compare {shlex.join(rows)}")
    return "\n".join(lines)


MOST_ROWS = 6
"""More rows than this are named by their experiments' folders."""


def note_run(folder: Path, *, finished_before: bool) -> None:
    """Say which run the job of this process has begun, or has found finished."""
    runs = _runs.get()
    if runs is not None:  # the job of a sweep
        runs.append((str(folder), finished_before))


def refuse_test_images(evaluate_on: Any, search: str) -> None:
    """Refuse a search that would choose settings by test images."""
    require(
        evaluate_on == "val",
        "trainer.evaluate_on",
        expected=f"val in a search ({search}), so that no setting is chosen on test images",
        got=str(evaluate_on),
        fix="Add trainer.evaluate_on=val scenario.val_fraction=0.1.",
    )


def refuse_minimizing(direction: str) -> None:
    """Refuse a search that would look for the smallest accuracy; some sweepers write ``Direction.maximize``."""
    direction = str(direction).lower().rpartition(".")[2]
    require(
        direction == "maximize",
        "hydra.sweeper.direction",
        expected="maximize, since a run returns its accuracy",
        got=direction,
        fix="Add hydra.sweeper.direction=maximize.",
    )


def check_searched_values(override: Override) -> None:
    """Refuse an override of a search that has no values to choose from."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        right = value.start < value.end and (value.start > 0 or "log" not in value.tags)
    else:
        right = not isinstance(value, Glob) and any(True for _ in override.sweep_string_iterator())
    require(
        right,
        override.key_or_group,
        expected="interval(LOW,HIGH), with log above 0, or a range or list of values",
        got=split_override(override.input_line or "")[1],
        fix="Correct the values.",
    )


_child = False  # whether the command is this process's parent: after its death this cannot be found out


_told_here: set[int] = set()  # numbers of the jobs whose failure this process has printed

_runs: ContextVar[list[tuple[str, bool]] | None] = ContextVar("runs of this process's job", default=None)

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
