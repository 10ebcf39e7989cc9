"""What a logger is told. A logger only reads: it never changes a run, and a run never waits for it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class RunInfo:
    """Who is logging.

    Attributes:
        folder: the run folder.
        experiment, name, seed, fingerprint: as in ``summary.json``.
        config: the whole resolved configuration as plain values.
        num_tasks: length of the sequence.
    """

    folder: Path
    experiment: str
    name: str
    seed: int
    fingerprint: str
    config: dict[str, Any]
    num_tasks: int


class Progress(NamedTuple):
    """Where the loop stands: ``step`` of ``steps`` in ``epoch`` of ``epochs`` of ``phase`` of ``task``; all from 0."""

    task: int
    num_tasks: int
    phase: int
    epoch: int
    epochs: int
    step: int
    steps: int


class Logger(ABC):
    """Reads a run's events.

    Every event is a flat JSON object with ``event`` (``epoch`` or ``task``) and ``step``, the
    optimizer steps so far; the same objects, in the same order, are the lines of ``metrics.jsonl``:

    - ``epoch``: ``task``, ``phase``, ``epoch``, ``lr``, ``loss`` and ``losses`` (epoch means, by name)
    - ``task``: ``task``, ``class_il`` and ``task_il`` (accuracies in percent on tasks 0..task, null = unanswerable),
      ``class_il_average``, ``task_il_average``

    Events carry no times, so that a run that was killed and resumed has the same lines as one that was not. A resumed
    run hands over again the events since its checkpoint: ``number`` counts them from 0, and a logger that cannot take
    a line back remembers the numbers it has delivered.
    """

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """The run begins or goes on."""

    @abstractmethod
    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """One event."""

    def log_step(self, progress: Progress) -> None:  # noqa: B027 - most loggers look at epochs only
        """One optimizer step was taken; called at every step, so it must cost next to nothing."""

    @abstractmethod
    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """The process leaves the run: ``finished``, ``interrupted`` or ``failed``. Called on every exit path."""
