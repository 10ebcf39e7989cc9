"""THE loop: the only place that iterates over training batches.

It is a generator, a *course*: it yields each :class:`~cl_bench.engine.step.Step` and is sent the step's loss terms.
One run performs them one after the other (:func:`follow`); :mod:`cl_bench.engine.replicas` leads several runs side by
side.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Generator as Course
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Generator, Tensor

from cl_bench.core.errors import require, void
from cl_bench.core.record import BASELINE, SETTINGS, Record
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.data.feed import open_feed
from cl_bench.engine.checkpoint import Checkpoint, State, cloned, rng_state, set_rng_state
from cl_bench.engine.evaluate import Evaluation, evaluate
from cl_bench.engine.step import Choice, Speed, Step
from cl_bench.loggers.base import Logger, Progress
from cl_bench.methods.base import Method, Predict
from cl_bench.scenarios.base import Scenario
from cl_bench.system.energy import Meter
from cl_bench.system.signals import Interrupted, allow_interruption, allow_interruption_between

T = TypeVar("T")


@void(
    "epochs",
    when=lambda v: v["config"].method.get("epochs", v["epochs"]) != v["epochs"],
    why="method.epochs counts them",
)
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a phase is run, unless the phase says otherwise.

    Attributes:
        epochs: passes over a phase's data.
        batch_size: images of the stream a step; the last batch of an epoch may be smaller.
        clip_norm: largest norm of the whole gradient; None for no clipping.
        evaluate_on: ``test``, or ``val`` for a search, which then never touches a test image.
        checkpoint_seconds: a checkpoint is written at the end of each task and this often in between.
        checkpoint_steps: and every so many optimizer steps; None for by time only.
        speed: how steps are performed, see :class:`~cl_bench.engine.step.Speed`.
        replicas: seeds trained side by side in one process: ``seed``, ``seed + 1``, ...
            (:mod:`cl_bench.engine.replicas`).
        cudnn_benchmark: whether cuDNN tries its algorithms on the first batch of each shape and takes the fastest,
            which need not round alike from run to run.
    """

    epochs: int
    batch_size: int
    clip_norm: float | None
    evaluate_on: Literal["test", "val"]
    checkpoint_seconds: float
    checkpoint_steps: int | None
    speed: Choice
    replicas: int
    cudnn_benchmark: bool

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "clip_norm", "checkpoint_seconds", "checkpoint_steps", "replicas"):
            value = getattr(self, key)
            require(
                value is None or value > 0, key, expected="above 0", got=value, fix="See configs/trainer/default.yaml."
            )


class Trainer:
    """Runs the phases that a method asks for, measures after each task, and can be stopped and resumed anywhere.

    Args:
        optimizer: parameters -> optimizer, the configured one.
        schedule: (epoch, epochs) -> factor on the learning rate, the configured one.
        generators: CPU generators by name; ``batches`` orders the stream, ``augment`` draws its crops and flips.
        device: where the steps are computed, with its index.
        stop: asked after every step whether to save and leave.
    """

    def __init__(
        self,
        *,
        method: Method,
        scenario: Scenario,
        settings: Settings,
        optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        schedule: Callable[[int, int], float],
        generators: Mapping[str, Generator],
        device: torch.device,
        autocast: torch.autocast,
        logger: Logger,
        checkpoint: Checkpoint,
        stop: Callable[[], bool],
    ) -> None:
        self.method, self.scenario, self.settings = method, scenario, settings
        self.optimizer, self.schedule, self.generators = optimizer, schedule, generators
        self.autocast, self.logger, self.checkpoint, self.stop = autocast, logger, checkpoint, stop
        self.record = Record.empty(len(scenario.tasks))
        self.answers: Evaluation | None = None
        self.alternatives: dict[str, dict[str, float | None]] = {}
        self.steps = self.events = self.parameters_after_first_task = self.saved_steps = 0
        self._excused: set[str] = set()  # buffers that were not finite when the phase began, e.g. "no loss yet"
        self.speed = Speed(settings.speed, device)
        self.task_start: State = {}
        self.phase_ends: list[State] = []
        self._unsaved: State | None = None  # what a request to stop has to save first: the end of a phase
        self._lap_began = time.monotonic()
        self._meter = Meter(device)

    def run(self) -> Record:
        """Learn every task that is not learned yet."""
        return follow(self.course())

    def run_phase(self, task: Task, number: int, phase: Phase, now: State | None) -> None:
        """Gradient descent over ``phase.data``; ``now`` is where an interrupted phase goes on."""
        follow(self.phase_course(task, number, phase, now))

    def course(self) -> Course[Step, Losses, Record]:
        """:meth:`run`, step by step."""
        try:
            return (yield from self._course())
        except Interrupted:
            if self._unsaved is not None:
                self._write(self._unsaved)
            raise

    def _course(self) -> Course[Step, Losses, Record]:
        saved = self.checkpoint.load()
        first = self._restore(saved) if saved else 0
        if not saved:
            self.record.cost.energy_joules = self._meter.start()
            self._measure(BASELINE)
        for task in self.scenario.tasks[first:]:
            ends, now = (saved["phase_ends"], saved["now"]) if saved else ([], None)
            self.task_start, self.phase_ends, saved = self._state(), [], None
            self._lap_began = time.monotonic()
            if now is None and not ends:
                self._save(task.id, None)
            if self.stop():
                raise Interrupted
            self.method.eval()
            for number, phase in enumerate(allow_interruption_between(self._phases(task))):
                self._excused = {name for name, buffer in self.method.named_buffers() if not _finite(buffer)}
                replayed = number < len(ends)  # finished before the interruption: lay its result over the method
                if replayed:
                    self._load(ends[number])
                else:
                    yield from self.phase_course(task, number, phase, now)
                    now = None
                self.phase_ends.append(self._finite_state(task, number))
                if not replayed:  # else the checkpoint has it, and the counters are beyond it
                    self._lap()
                    self._unsaved = self._whole(task.id, None)
                self.method.eval()
            self._refuse_unfinite(self.method.state_dict(), f"after task {task.id}", infinite_buffers=True)
            self._lap()
            self._measure(task.id)
        self.task_start, self.phase_ends = self._state(), []
        self._save(len(self.scenario.tasks), None)
        if self.answers is None:  # everything was learned before, and stopped just short of the results
            self.answers = self._evaluate(len(self.scenario.tasks))
        self._fill_costs()
        for name, rule in self.method.alternatives().items():
            self.alternatives[name] = self._accuracies(self._evaluate(len(self.scenario.tasks), rule))
        return self.record

    def _phases(self, task: Task) -> Iterator[Phase]:
        """The method's phases. What fails between them since its scores are no numbers any more is a divergence."""
        try:
            yield from self.method.learn(task)
        except Exception as error:
            try:
                self._evaluate(task.id + 1)
            except FloatingPointError:
                raise
            except Exception:  # it cannot answer yet: the error is its own
                raise error from None
            raise

    def phase_course(self, task: Task, number: int, phase: Phase, now: State | None) -> Course[Step, Losses, None]:
        """:meth:`run_phase`, step by step."""
        params = list(phase.params)
        optimizer = (phase.optimizer or self.optimizer)(params)
        schedule = phase.schedule or self.schedule
        peak = [phase.lr or group["lr"] for group in optimizer.param_groups]
        epochs = phase.epochs or self.settings.epochs
        size = self.settings.batch_size
        epoch, step, order, sums = 0, 0, None, {}
        if now:
            self._load(now["state"])
            optimizer.load_state_dict(now["optimizer"])
            epoch, step, order, sums = now["epoch"], now["step"], now["order"], _to(now["sums"], phase.data)
            count, steps = _images_and_steps(len(order), size)

        self.method.train()
        all_params = list(self.method.parameters())
        saved_at = time.monotonic()
        while epoch < epochs:
            # every epoch visits each image once, in an order of its own, unless the phase says otherwise
            if order is None:
                shuffle = self.generators["batches"]
                order = phase.order(shuffle) if phase.order else torch.randperm(len(phase.data), generator=shuffle)
                count, steps = _images_and_steps(len(order), size)
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * schedule(epoch, epochs)
            with open_feed(phase.data, order, size) as images:
                while step < steps:
                    batch = self.batch(*images.load_batch(step), task)
                    losses = yield Step(
                        method=self.method,
                        phase=phase,
                        batch=batch,
                        params=params,
                        all_params=all_params,
                        optimizer=optimizer,
                        clip_norm=self.settings.clip_norm,
                        autocast=self.autocast,
                        speed=self.speed,
                    )

                    # accumulate on the device: the epoch waits for it once, at its end
                    for name, loss in losses.items():
                        sums[name] = sums.get(name, 0.0) + loss * len(batch)
                    progress = Progress(task.id, len(self.scenario.tasks), number, epoch, epochs, step, steps)
                    step += 1
                    self.steps += 1
                    self.record.cost.samples_seen += len(batch)
                    self.logger.log_step(progress)
                    stopping = self.stop()
                    every = self.settings.checkpoint_steps
                    if stopping or (every and self.steps % every == 0) or self._due(saved_at):
                        self._lap()
                        self._means(task, number, epoch, sums, count)  # never save a run that has diverged
                        where = {"epoch": epoch, "step": step, "order": order, "sums": sums}
                        state = self._finite_state(task, number)
                        self._save(task.id, {"state": state, "optimizer": optimizer.state_dict()} | where)
                        if stopping:
                            raise Interrupted
                        saved_at = time.monotonic()
            self._log_epoch(task, number, epoch, optimizer.param_groups[0]["lr"], sums, count)
            if phase.after_epoch and phase.after_epoch(epoch):
                break
            epoch, step, order, sums = epoch + 1, 0, None, {}

    def batch(self, raw: Tensor, y: Tensor, task: Task) -> Batch:
        """A stream batch of images (B, C, H, W) uint8 with labels (B,), freshly augmented."""
        return Batch(self.scenario.transform.augment(raw, self.generators["augment"]), y, raw, task.id)

    def _lap(self) -> None:
        """Count the time since the last call, or since the task began, as training."""
        now = time.monotonic()
        self.record.cost.train_seconds += now - self._lap_began
        self._lap_began = now

    def _due(self, saved_at: float) -> bool:
        return time.monotonic() - saved_at > self.settings.checkpoint_seconds

    def _log_epoch(self, task: Task, phase: int, epoch: int, lr: float, sums: dict[str, Tensor], count: int) -> None:
        means = self._means(task, phase, epoch, sums, count)
        position = {"task": task.id, "phase": phase, "epoch": epoch}
        self._event("epoch", **position, lr=lr, loss=sum(means.values()), losses=means)

    def _means(self, task: Task, phase: int, epoch: int, sums: dict[str, Tensor], count: int) -> dict[str, float]:
        """Means of the loss terms over ``count`` images; an error where one is not finite."""
        means = {name: float(total) / count for name, total in sums.items()}
        if not all(map(math.isfinite, means.values())):
            where = f"(task {task.id}, phase {phase}, epoch {epoch})"
            self._diverged(f"a loss term is not finite by step {self.steps} {where}: {means}")
        return means

    def _diverged(self, found: str) -> NoReturn:
        raise FloatingPointError(
            f"{found}. "
            f"The last good checkpoint is {self.checkpoint.folder / 'last.pt'}, of step {self.saved_steps}. "
            "Lower optimizer.lr or set trainer.clip_norm=1."
        )

    def _finite_state(self, task: Task, phase: int) -> State:
        """:meth:`_state`, which is looked at on the CPU: a loss tells of the weights before its step, not after it."""
        state = self._state()
        self._refuse_unfinite(state["method"], f"at step {self.steps} (task {task.id}, phase {phase})")
        return state

    def _refuse_unfinite(self, state: Mapping[str, Any], where: str, infinite_buffers: bool = False) -> None:
        """An error where a weight is not finite, or a buffer that was when the phase began.

        ``infinite_buffers`` lets infinity pass in a buffer, which a method may have put there since.
        """
        weights = {name for name, _ in self.method.named_parameters()}
        found = []
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or name in self._excused:
                continue
            wrong = tensor.isnan() if infinite_buffers and name not in weights else ~tensor.isfinite()
            if count := int(wrong.sum()):
                found.append(f"{name} ({count} of {tensor.numel()} numbers)")
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            self._diverged(f"the method is not finite {where}: {', '.join(found[:3])}{more}")

    def _measure(self, after_task: int) -> None:
        """Enter a row of the accuracy matrix, or the untrained network's baseline."""
        self.answers = answers = self._evaluate(after_task + 1)
        num_tasks = len(self.scenario.tasks)
        for setting in SETTINGS:
            self.record.add(after_task, setting, answers.correct(setting, num_tasks), self._asked())
        if after_task == 0:
            self.parameters_after_first_task = count_parameters(self.method)
        if after_task != BASELINE:
            seen = {s: self.record.get_matrix(s).accuracy[after_task, : after_task + 1] for s in SETTINGS}
            averages = {f"{s}_average": float(row.mean()) for s, row in seen.items()}
            self._event("task", task=after_task, **{s: row.tolist() for s, row in seen.items()}, **averages)

    def _accuracies(self, answers: Evaluation) -> dict[str, float | None]:
        """Average accuracy in percent over all tasks of each setting, None where a task was not answered."""
        record = Record.empty(len(self.scenario.tasks))
        for setting in SETTINGS:
            record.add(0, setting, answers.correct(setting, len(self.scenario.tasks)), self._asked())
        means = {setting: float(record.get_matrix(setting).accuracy[0].mean()) for setting in SETTINGS}
        return {setting: mean if math.isfinite(mean) else None for setting, mean in means.items()}

    def _asked(self) -> list[int]:
        """Images that each task is measured on."""
        return [len(task.get_split(self.settings.evaluate_on)) for task in self.scenario.tasks]

    def _evaluate(self, learned: int, rule: Predict | None = None) -> Evaluation:
        began = time.monotonic()
        split = self.settings.evaluate_on
        try:
            with allow_interruption():
                answers = evaluate(
                    self.method, self.scenario, learned=learned, split=split, autocast=self.autocast, rule=rule
                )
        except FloatingPointError as error:
            self._diverged(f"{error} at step {self.steps}")
        self.record.cost.evaluate_seconds += time.monotonic() - began
        return answers

    def _event(self, kind: str, **values: Any) -> None:
        self.logger.log_event(self.events, {"event": kind, "step": self.steps, **values})
        self.events += 1

    def _fill_costs(self) -> None:
        cost, method = self.record.cost, self.method
        cost.parameters = count_parameters(method)
        cost.parameters_trainable = count_parameters(method, trainable=True)
        grown = cost.parameters / self.parameters_after_first_task
        own = method.capacity()
        cost.capacity = grown if own is None else own
        cost.method_bytes = method.memory_bytes()
        cost.images_per_second = cost.samples_seen / cost.train_seconds if cost.train_seconds else None

    # -- state -----------------------------------------------------------------------------------------------------

    def _state(self) -> State:
        return cloned({"method": self.method.state_dict(), "rng": rng_state(self.generators)})

    def _load(self, state: State) -> None:
        self.method.load_state_dict(state["method"])
        set_rng_state(state["rng"], self.generators)

    def _save(self, task: int, now: State | None) -> None:
        self._write(self._whole(task, now))

    def _whole(self, task: int, now: State | None) -> State:
        """All that a run goes on from, as of now: what a checkpoint holds."""
        return {
            "task": task,
            "task_start": self.task_start,
            "phase_ends": list(self.phase_ends),
            "now": now,
            "record": self.record.to_json(),
            "counters": [self.steps, self.events, self.parameters_after_first_task],
            "data": self.scenario.data,
        }

    def _write(self, whole: State) -> None:
        cost = self.record.cost
        whole["record"]["cost"]["energy_joules"] = cost.energy_joules = self._meter.add(cost.energy_joules)
        self.checkpoint.save(whole, boundary=whole["now"] is None and not whole["phase_ends"])
        self._unsaved = None
        self.saved_steps = whole["counters"][0]

    def _restore(self, saved: State) -> int:
        """Lay a checkpoint's task beginning over this trainer; returns the task."""
        known = saved.get("data", self.scenario.data)  # not in those of older versions
        require(
            known == self.scenario.data,
            str(self.checkpoint.folder),
            expected=f"a checkpoint of a run on these images (data {self.scenario.data})",
            got=f"one of a run on others (data {known})",
            fix="Put the images of that run back, or start this one afresh with overwrite=true.",
        )
        self._load(saved["task_start"])
        self.record = Record.from_json(saved["record"])
        self.steps, self.events, self.parameters_after_first_task = saved["counters"]
        self.saved_steps = self.steps
        return saved["task"]


def follow(course: Course[Step, Losses, T]) -> T:
    """Perform every step of a course; returns what it comes to. A step that fails is raised where it was asked for."""
    try:
        step = next(course)
        while True:
            try:
                losses = step.speed.perform(step)
            except BaseException as error:
                step = course.throw(error)
            else:
                step = course.send(losses)
    except StopIteration as end:
        return end.value


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def count_parameters(module: torch.nn.Module, *, trainable: bool = False) -> int:
    """Number of scalar parameters; of the trainable ones only where asked."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def _images_and_steps(visited: int, batch_size: int) -> tuple[int, int]:
    """Images that count in an epoch, and its steps.

    A last batch of one image is left out of the epoch: BatchNorm cannot normalise a single value.
    """
    count = visited - (visited > 1 and visited % batch_size == 1 and batch_size > 1)
    return count, math.ceil(count / batch_size)


def _to(sums: dict[str, Tensor], data: Data) -> dict[str, Tensor]:
    return {name: total.to(data.labels.device) for name, total in sums.items()}
