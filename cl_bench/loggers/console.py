"""The progress of a run on stderr: bars with the time left on a terminal, plain lines elsewhere.

Tasks, phases, epochs and batches are counted from 1 here, as in all that people read, and from 0 in files.
"""

import math
import os
import sys
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from cl_bench.core.errors import require
from cl_bench.core.record import SETTINGS, TITLES
from cl_bench.loggers.base import Logger, Progress, RunInfo

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDEST = 100  # columns; longer bars are no clearer
_SECONDS_BETWEEN_DRAWINGS = 0.2
_LARGEST_SHARE_OF_TIME = 0.01  # of drawing in the time of a run


class Console(Logger):
    """Shows the progress of the run and its results so far.

    Args:
        min_seconds: if stderr is not a terminal, the least time between two lines about epochs.
    """

    def __init__(self, *, min_seconds: float) -> None:
        require(min_seconds >= 0, "min_seconds", expected="a number >= 0", got=min_seconds, fix="Use 2.0 if unsure.")
        self._min_seconds = min_seconds
        self._latest: Progress | None = None
        self._look_at = math.inf  # time.monotonic() when log_step() shows the next step
        self._view: _View | None = None

    def start(self, run: RunInfo) -> None:
        """Print which run starts."""
        self._times = _Times()
        alone = has_terminal() and not run.job  # bars of several processes would draw over each other
        self._view = _Bars(self._times) if alone else _Lines(self._times, self._min_seconds, run.job)
        self._view.start(run)
        self._look_at = 0.0

    def log_step(self, progress: Progress) -> None:
        """Store the position of the loop, and show it now and then."""
        self._latest = progress
        if time.monotonic() >= self._look_at and self._view is not None:
            self._times.update(progress)
            self._look_at = self._view.show_step(progress)

    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """Show an epoch's losses or a task's accuracies."""
        if self._view is None:
            return
        if self._latest is not None:
            self._times.update(self._latest)
        if event["event"] == "epoch":
            self._view.show_epoch(event, self._latest)
        elif event["event"] == "task":
            self._view.show_task(event)

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Restore the terminal and print how the run ended."""
        view, self._view, self._look_at = self._view, None, math.inf
        if view is not None:
            view.stop()
            line = f"{status} after {_format_seconds(self._times.get_elapsed())}"
            if status != "finished" and self._latest is not None:
                line += f" in {_format_position(self._latest)}"
            view.print(line)


def has_terminal() -> bool:
    """Whether stderr is a terminal with a movable cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class _TimeLeft:
    """The time left of something, estimated from the share done since its first update."""

    def __init__(self) -> None:
        self._of: object = None
        self.left: float | None = None

    def update(self, of: object, share: float) -> None:
        """Take in that ``share`` (0 to 1) of the thing ``of`` is done now."""
        now = time.monotonic()
        if of != self._of:
            self._of, self._share, self._since = of, share, now
        gained = share - self._share
        self.left = (now - self._since) * (1 - share) / gained if gained > 0 else None


class _Times:
    """The shares done of the run, the phase and the epoch, and the time left of each."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._num_phases = 1  # the most that a task had so far; the number to come is unknown
        self.share = {"run": 0.0, "phase": 0.0, "epoch": 0.0}
        self.pace = {name: _TimeLeft() for name in self.share}

    def get_elapsed(self) -> float:
        """Seconds since this process started the run."""
        return time.monotonic() - self._begun

    def update(self, progress: Progress) -> None:
        """Take in the position of the loop."""
        self._num_phases = max(self._num_phases, progress.phase + 1)
        epoch = (progress.step + 1) / progress.steps
        phase = (progress.epoch + epoch) / progress.epochs
        run = (progress.task + (progress.phase + phase) / self._num_phases) / progress.num_tasks
        self.share = {"run": run, "phase": phase, "epoch": epoch}
        self.pace["run"].update(self._num_phases, run)
        self.pace["phase"].update((progress.task, progress.phase), phase)
        self.pace["epoch"].update((progress.task, progress.phase, progress.epoch), epoch)


class _View(ABC):
    """One of the two ways to show a run."""

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """The run begins or goes on."""

    def show_step(self, progress: Progress) -> float:
        """Show the position of the loop; the time of the next call is returned."""
        return math.inf

    @abstractmethod
    def show_epoch(self, event: dict[str, Any], progress: Progress | None) -> None:
        """Show a finished epoch."""

    def show_task(self, event: dict[str, Any]) -> None:
        """Show a finished task."""
        self.print(_format_accuracies(event, self._num_tasks, self._times))

    def stop(self) -> None:  # noqa: B027 - plain lines change nothing
        """Restore the terminal."""

    def print(self, line: str) -> None:
        """Print a line on stderr; rich puts it above the bars, if there are any."""
        print(line, file=sys.stderr, flush=True)

    def __init__(self, times: _Times) -> None:
        self._times = times
        self._num_tasks = 0


class _Lines(_View):
    """Plain lines, for files and pipes; those of a job that runs beside others begin with what tells it from them."""

    def __init__(self, times: _Times, min_seconds: float, job: str) -> None:
        super().__init__(times)
        self._min_seconds, self._job = min_seconds, job
        self._next = -math.inf

    def start(self, run: RunInfo) -> None:
        self._num_tasks = run.num_tasks
        self.print(f"{_format_title(run)}, in {run.folder}")

    def print(self, line: str) -> None:
        super().print(f"[{self._job}] {line}" if self._job else line)

    def show_epoch(self, event: dict[str, Any], progress: Progress | None) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._min_seconds
        position = f"task {_format_count(event['task'], self._num_tasks)}, epoch {event['epoch'] + 1}"
        if progress is not None:
            position = _format_position(progress)
        times = f"{_format_seconds(self._times.get_elapsed())}, {_format_seconds(self._times.pace['run'].left)} left"
        self.print(f"{position}: {_format_losses(event)} [{times}]")


class _Bars(_View):
    """Bars that are drawn again and again at the same place; other output appears above them."""

    def __init__(self, times: _Times) -> None:
        from rich.console import Console as Terminal
        from rich.live import Live

        super().__init__(times)
        self._progress: Progress | None = None
        self._numbers = ""
        self._terminal = Terminal(file=sys.stderr)
        self._live = Live(
            console=self._terminal,
            get_renderable=self._draw,
            auto_refresh=False,  # drawn from show_step(): no thread beside the training
            transient=True,
            # If stdout is the terminal too, it must not write into the bars; a file or a pipe gets its own output.
            redirect_stdout=sys.stdout.isatty(),
            vertical_overflow="crop",
        )

    def start(self, run: RunInfo) -> None:
        self._num_tasks = run.num_tasks
        self.print(_format_title(run))
        self.print(f"in {run.folder}")
        self._live.start()
        self._terminal.show_cursor(True)  # so that the terminal keeps its cursor even after SIGKILL

    def show_step(self, progress: Progress) -> float:
        self._progress = progress
        begun = time.monotonic()
        self._live.refresh()
        ended = time.monotonic()
        return ended + max(_SECONDS_BETWEEN_DRAWINGS, (ended - begun) / _LARGEST_SHARE_OF_TIME)

    def show_epoch(self, event: dict[str, Any], progress: Progress | None) -> None:
        self._numbers = _format_losses(event)

    def stop(self) -> None:
        self._live.stop()

    def _draw(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self._progress is None:
            return Text("preparing the first task")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.width = min(self._terminal.width, _WIDEST)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        for label, name in zip(_format_labels(self._progress), ("run", "phase", "epoch")):
            left = f"{_format_seconds(self._times.pace[name].left)} left"
            grid.add_row(Text(label), ProgressBar(total=1.0, completed=self._times.share[name]), Text(left))
        numbers = f"{_format_seconds(self._times.get_elapsed())}  {self._numbers}"
        return Group(grid, Text(numbers, no_wrap=True, overflow="ellipsis"))


def _format_title(run: RunInfo) -> str:
    tasks = "1 task" if run.num_tasks == 1 else f"{run.num_tasks} tasks"
    return f"{run.experiment}: {run.name}, seed {run.seed}, {tasks}"


def _format_labels(progress: Progress) -> tuple[str, str, str]:
    phase = f"phase {progress.phase + 1} " if progress.phase else ""
    return (
        f"task {_format_count(progress.task, progress.num_tasks)}",
        f"{phase}epoch {_format_count(progress.epoch, progress.epochs)}",
        f"batch {_format_count(progress.step, progress.steps)}",
    )


def _format_count(number: int, total: int) -> str:
    """A number from 0, counted from 1 and as wide as the total, so that the text beside it does not move."""
    return f"{number + 1:{len(str(total))}}/{total}"


def _format_position(progress: Progress) -> str:
    return ", ".join(" ".join(label.split()) for label in _format_labels(progress)[:2])


def _format_losses(event: dict[str, Any]) -> str:
    losses = event["losses"]
    terms = ", ".join(f"{name} {_format_number(value, '.4g')}" for name, value in losses.items())
    return (
        f"loss {_format_number(event['loss'], '.4g')}{f' ({terms})' if len(losses) > 1 else ''}, lr {event['lr']:.3g}"
    )


def _format_accuracies(event: dict[str, Any], num_tasks: int, times: _Times) -> str:
    of = f" {event['measure']}" if "measure" in event else ""
    told = [f"{TITLES[setting]}{of} {_format_percent(event[f'{setting}_average'])}" for setting in SETTINGS]
    position = _format_count(event["task"], num_tasks)
    return f"task {position} done: {', '.join(told)} [{_format_seconds(times.get_elapsed())}]"


def _format_percent(value: float | None) -> str:
    return f"{'-':>8}" if value is None or math.isnan(value) else f"{value:6.2f} %"


def _format_number(value: float | None, form: str) -> str:
    return f"{value:{form}}" if value is not None else "-"


def _format_seconds(seconds: float | None) -> str:
    """Seconds as h:mm:ss."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
