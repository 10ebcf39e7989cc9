"""The base class of loggers. A logger only reads: it never changes a run, and a run never waits for it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class RunInfo:
    """The run that is logged.

    Attributes:
        folder: the run folder.
        experiment, name, seed, fingerprint: as in ``summary.json``.
        config: the whole resolved configuration as plain values.
        num_tasks: length of the sequence.
        label: the settings that were typed, or a text of the user's own; other runs are not known here.
        job: what tells this run from others that write on the same console; empty if it is alone there.
        data: a digest of the images and class names.
        class_order: the data set's own class ids in the order of learning.
    """

    folder: Path
    experiment: str
    name: str
    seed: int
    fingerprint: str
    config: dict[str, Any]
    num_tasks: int
    label: str = ""
    job: str = ""
    data: str | None = None
    class_order: list[int] = field(default_factory=list)


class Progress(NamedTuple):
    """The position of the loop: ``step`` of ``steps`` in ``epoch`` of ``epochs`` of ``phase`` of ``task``, from 0."""

    task: int
    num_tasks: int
    phase: int
    epoch: int
    epochs: int
    step: int
    steps: int


class Logger(ABC):
    """Receives the events of a run.

    Every event is a flat JSON object with ``event`` (``epoch``, ``task`` or ``sample``) and ``step``, the optimizer
    steps so far; the same objects, in the same order, are the lines of ``metrics.jsonl``:

    - ``epoch``: ``task``, ``phase``, ``epoch``, ``lr``, ``loss`` and ``losses`` (epoch means, by name)
    - ``task``: ``task``, ``class_il`` and ``task_il`` (accuracies in percent on tasks 0..task, null = no prediction),
      ``class_il_average``, ``task_il_average``; ``recurring_classes`` (true) if tasks share classes
    - ``sample``, with ``trainer.evaluate_every``: the same on a sample while ``task`` is learned, and once more right
      after it: ``sample_class_il``, ``sample_task_il`` and their averages. Of two of a task at one step the second
      counts.

    Events have no times, so that a run that was killed and resumed has the same lines as one that was not. A resumed
    run logs the events since its checkpoint again. ``number`` counts events from 0; a logger that cannot remove a line
    stores the number of events it has delivered.
    """

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """The run starts or resumes."""

    @abstractmethod
    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """Log one event."""

    def log_step(self, progress: Progress) -> None:  # noqa: B027 - most loggers look at epochs only
        """Log one optimizer step; this is called at every step, so it must cost almost nothing."""

    @abstractmethod
    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """End logging with status ``finished``, ``interrupted`` or ``failed``; this is called on every exit path."""
