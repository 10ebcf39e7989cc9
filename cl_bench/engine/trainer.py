"""THE loop: the only place that iterates over training batches.

It is a generator (:data:`~cl_bench.engine.step.StepGenerator`): it yields each step and is sent the step's loss terms.
:func:`run_alone` performs the steps of one run; :mod:`cl_bench.engine.replicas` performs those of several runs
together.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NoReturn

import torch
from torch import Generator, Tensor

from cl_bench.core.errors import require, void
from cl_bench.core.record import BASELINE, SETTINGS, Record
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.data.feed import open_feed
from cl_bench.engine.checkpoint import Checkpoint, State, clone_state, get_final_state, get_rng_state, set_rng_state
from cl_bench.engine.detection import Detections
from cl_bench.engine.evaluate import Evaluation, draw_sample, measure
from cl_bench.engine.probe import LINEAR_PROBE, fit_linear_probe, require_features
from cl_bench.engine.step import Choice, PhaseContext, Step, StepExecutor, StepGenerator, T, warn
from cl_bench.loggers.base import Logger, Progress
from cl_bench.methods.base import Method, Predict
from cl_bench.scenarios.base import Scenario
from cl_bench.system.energy import Meter
from cl_bench.system.signals import Interrupted, allow_interruption, allow_interruption_between


@void(
    "epochs",
    when=lambda v: v["config"].method.get("epochs", v["epochs"]) != v["epochs"],
    why="method.epochs counts them",
)
@void(
    "evaluate_sample",
    when=lambda v: v["evaluate_every"] is None,
    why="trainer.evaluate_every=null measures nothing while learning",
)
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How phases are run, if a phase does not say otherwise.

    Attributes:
        epochs: passes over a phase's data.
        batch_size: images of the stream per step; the last batch of an epoch may be smaller.
        max_steps: optimizer steps after which a phase ends, also in the middle of an epoch; None for by epochs only.
        steps_per_batch: optimizer steps on each batch, each with new crops and flips and a new draw from the buffer.
            The buffer is offered the batch once, after the last of them.
        clip_norm: largest norm of the whole gradient; None for no clipping.
        evaluate_on: ``test``, or ``val`` for a search, which then never reads a test image.
        evaluate_after: ``each_task``, or ``last_task``: of the accuracy matrices only the last row is measured, and not
            the untrained network. It saves most of the time of a run of hundreds of tasks.
        evaluate_every: number of optimizer steps after which the tasks begun are measured on a sample of their images
            (:class:`~cl_bench.core.record.Curve`); None for no such measurement. It does not change the training.
        evaluate_sample: images of each task in the sample; all of them, if a task has fewer.
        alternatives: whether the method's other rules to answer by are measured, too (:meth:`Method.alternatives`).
        linear_probe: whether a linear classifier of the features is fitted after the last task
            (:mod:`cl_bench.engine.probe`). It sees the training images of all tasks.
        checkpoint_seconds: a checkpoint is written at the end of each task, and after this time within a task.
        checkpoint_steps: a checkpoint is also written after this number of optimizer steps; None for by time only.
        keep_tasks: whether the network after each task is kept (:meth:`Checkpoint.keep_network`).
        speed: how steps are performed, see :class:`~cl_bench.engine.step.StepExecutor`.
        replicas: number of seeds trained side by side in one process: ``seed``, ``seed + 1``, ...
            (:mod:`cl_bench.engine.replicas`).
        cudnn_benchmark: whether cuDNN tries its algorithms on the first batch of each shape and takes the fastest. It
            may take another one in the next run, which rounds differently.
    """

    epochs: int
    batch_size: int
    max_steps: int | None
    steps_per_batch: int
    clip_norm: float | None
    evaluate_on: Literal["test", "val"]
    evaluate_after: Literal["each_task", "last_task"]
    evaluate_every: int | None
    evaluate_sample: int
    alternatives: bool
    linear_probe: bool
    checkpoint_seconds: float
    checkpoint_steps: int | None
    keep_tasks: bool
    speed: Choice
    replicas: int
    cudnn_benchmark: bool

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "max_steps", "steps_per_batch", "clip_norm", "evaluate_every")
        for key in (*positive, "evaluate_sample", "checkpoint_seconds", "checkpoint_steps", "replicas"):
            value = getattr(self, key)
            require(
                value is None or value > 0, key, expected="above 0", got=value, fix="See configs/trainer/default.yaml."
            )
        require(
            self.max_steps is None or self.max_steps % self.steps_per_batch == 0,
            "max_steps",
            expected=f"a multiple of trainer.steps_per_batch={self.steps_per_batch}",
            got=self.max_steps,
            fix="Or leave it out.",
        )


class Trainer:
    """Runs the phases that a method yields, measures after each task, and can be stopped and resumed anywhere.

    Args:
        optimizer: parameters -> optimizer, the configured one.
        schedule: (epoch, epochs) -> factor on the learning rate, the configured one.
        generators: CPU generators by name; ``batches`` orders the stream, ``augment`` draws its crops and flips.
        device: where the steps are computed, with its index.
        stop: called after every step; if it returns true, the run is saved and left.
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
        require(
            not settings.keep_tasks or isinstance(getattr(method, "net", None), torch.nn.Module),
            "trainer.keep_tasks",
            expected="false, since this method has no network named net",
            got=True,
            fix="Name the method's network net, or leave the key out.",
        )
        if settings.linear_probe:
            require_features(method)
        self.method, self.scenario, self.settings = method, scenario, settings
        self.optimizer, self.schedule, self.generators = optimizer, schedule, generators
        self.autocast, self.logger, self.checkpoint, self.stop = autocast, logger, checkpoint, stop
        self.record = Record.empty(len(scenario.tasks))
        self.answers: Evaluation | Detections | None = None
        self.alternatives: dict[str, dict[str, Any]] = {}
        self.steps_done = self.events = self.parameters_after_first_task = self.steps_saved = 0
        self._excused: set[str] = set()  # buffers that were not finite when the phase began, e.g. "no loss yet"
        self.executor = StepExecutor(settings.speed, device)
        self.task_start: State = {}
        self.phase_ends: list[State] = []
        self._unsaved: State | None = None  # the end of a phase, which a request to stop has to save first
        self._training_since = time.monotonic()
        self._meter = Meter(device)

    def run(self) -> Record:
        """Learn every task that is not learned yet, and return what was measured."""
        return run_alone(self.generate_steps())

    def run_phase(self, task: Task, number: int, phase: Phase, now: State | None) -> None:
        """Gradient descent over ``phase.data``; ``now`` is the saved state of an interrupted phase."""
        run_alone(self.generate_phase_steps(task, number, phase, now))

    def generate_steps(self) -> StepGenerator[Record]:
        """:meth:`run`, step by step."""
        try:
            return (yield from self._generate_steps())
        except Interrupted:
            if self._unsaved is not None:
                self._write(self._unsaved)
            raise

    def _generate_steps(self) -> StepGenerator[Record]:
        saved = self.checkpoint.load()
        first = self._restore(saved) if saved else 0
        if not saved:
            self.record.cost.energy_joules = self._meter.start()
            if self._is_measured(BASELINE):
                self._measure(BASELINE)
        for task in self.scenario.tasks[first:]:
            ends, now = (saved["phase_ends"], saved["now"]) if saved else ([], None)
            self.task_start, self.phase_ends, saved = self._copy_state(), [], None
            self._training_since = time.monotonic()
            if now is None and not ends:
                self._save(task.id, None)
            if self.stop():
                raise Interrupted
            self.method.eval()
            for number, phase in enumerate(allow_interruption_between(self._learn(task))):
                self._excused = {name for name, buffer in self.method.named_buffers() if not _is_finite(buffer)}
                finished_before = number < len(ends)
                if finished_before:  # before the interruption: load the state saved at its end
                    self._load(ends[number])
                else:
                    yield from self.generate_phase_steps(task, number, phase, now)
                    now = None
                self.phase_ends.append(self._copy_finite_state(task, number))
                if not finished_before:  # else the checkpoint has this end, and the counters are beyond it
                    self._count_training_time()
                    self._unsaved = self._collect(task.id, None)
                self.method.eval()
            self._refuse_unfinite(self.method.state_dict(), f"after task {task.id + 1}", infinite_buffers=True)
            self._count_training_time()
            if self.settings.keep_tasks:
                self.checkpoint.keep_network(task.id, self.method.get_submodule("net"))
            if self.settings.evaluate_every is not None:
                self.measure_sample(task)
            if task.id == 0:
                self.parameters_after_first_task = count_parameters(self.method)
            if self._is_measured(task.id):
                self._measure(task.id)
        self.task_start, self.phase_ends = self._copy_state(), []
        self._save(len(self.scenario.tasks), None)
        if self.answers is None:  # all was learned before the interruption; only the results are missing
            self.answers = self._evaluate(len(self.scenario.tasks))
        self._fill_costs()
        for name, rule in self.method.alternatives().items() if self.settings.alternatives else ():
            self.alternatives[name] = self._average_accuracies(self._evaluate(len(self.scenario.tasks), rule))
        if self.settings.linear_probe:
            self.alternatives[LINEAR_PROBE] = self._measure_linear_probe()
        return self.record

    def _learn(self, task: Task) -> Iterator[Phase]:
        """The method's phases. An error between them is a divergence if the method's scores are not numbers."""
        try:
            yield from self.method.learn(task)
        except Exception as error:
            try:
                self._evaluate(task.id + 1)
            except FloatingPointError:
                raise
            except Exception:  # the method cannot answer yet, so this says nothing about the error
                raise error from None
            raise

    def generate_phase_steps(self, task: Task, number: int, phase: Phase, now: State | None) -> StepGenerator[None]:
        """:meth:`run_phase`, step by step; a phase with a loop of its own yields no step."""
        if phase.loop is not None:
            self.method.train()
            phase.loop(OwnLoop(self, task, number, phase))
            return
        params = list(phase.params)
        optimizer = (phase.optimizer or self.optimizer)(params)
        schedule = phase.schedule or self.schedule
        peak = [phase.lr or group["lr"] for group in optimizer.param_groups]
        epochs = phase.epochs or self.settings.epochs
        size, repeats = phase.batch_size or self.settings.batch_size, self.settings.steps_per_batch
        epoch, done, order, sums = 0, 0, None, {}  # done: steps of this epoch
        left = self.settings.max_steps  # steps of this phase from the beginning of this epoch on; None for any number
        if now:
            self._load(now["state"])
            optimizer.load_state_dict(now["optimizer"])
            epoch, done, order, sums = now["epoch"], now["step"], now["order"], _move(now["sums"], phase.data)
            num_images, num_steps = _measure_epoch(len(order), size, repeats)
            left = now.get("left")  # checkpoints of older versions have none

        self.method.train()
        context = PhaseContext(
            method=self.method,
            phase=phase,
            params=params,
            all_params=list(self.method.parameters()),
            optimizer=optimizer,
            clip_norm=self.settings.clip_norm,
            autocast=self.autocast,
        )
        saved_at = time.monotonic()
        while epoch < epochs:
            # every epoch visits each image once, in a new order, if the phase does not say otherwise
            if order is None:
                shuffle = self.generators["batches"]
                order = phase.order(shuffle) if phase.order else torch.randperm(len(phase.data), generator=shuffle)
                order = order if left is None else order[: math.ceil(left / repeats) * size]
                num_images, num_steps = _measure_epoch(len(order), size, repeats)
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * schedule(epoch, epochs)
            with open_feed(phase.data, order, size, repeats) as images:
                while done < num_steps:
                    offered = (done + 1) % repeats == 0
                    batch = self.make_batch(*images.load_batch(done), task, images.get_host_labels(done), offered)
                    losses = yield Step(context, batch), self.executor

                    # sums stay on the device: the epoch waits for it once, at its end
                    for name, loss in losses.items():
                        sums[name] = sums.get(name, 0.0) + loss * len(batch)
                    progress = Progress(task.id, len(self.scenario.tasks), number, epoch, epochs, done, num_steps)
                    done += 1
                    self.count_step(len(batch))
                    self.logger.log_step(progress)
                    if self.is_sample_due():
                        self.measure_sample(task)
                    stopping = self.stop()
                    if stopping or self._is_checkpoint_due(saved_at):
                        self._count_training_time()
                        self._average_losses(task, number, epoch, sums, num_images)  # a diverged run is never saved
                        reached = {"epoch": epoch, "step": done, "order": order, "sums": sums, "left": left}
                        state = self._copy_finite_state(task, number)
                        self._save(task.id, {"state": state, "optimizer": optimizer.state_dict()} | reached)
                        if stopping:
                            raise Interrupted
                        saved_at = time.monotonic()
            self.log_epoch(task, number, epoch, optimizer.param_groups[0]["lr"], sums, num_images)
            left = None if left is None else left - num_steps
            if (phase.after_epoch and phase.after_epoch(epoch)) or left == 0:
                break
            epoch, done, order, sums = epoch + 1, 0, None, {}

    def make_batch(
        self, raw: Tensor, y: Tensor, task: Task, host_y: Tensor | None = None, offered: bool = True
    ) -> Batch:
        """A stream batch of images (B, C, H, W) uint8 with labels (B,), freshly augmented."""
        x = self.scenario.transform.augment(raw, self.generators["augment"])
        return Batch(x, y, raw, task.id, host_y=host_y, offered=offered)

    def _count_training_time(self) -> None:
        """Count the time since the last call, or since the task began, as training."""
        now = time.monotonic()
        self.record.cost.train_seconds += now - self._training_since
        self._training_since = now

    def _is_checkpoint_due(self, saved_at: float) -> bool:
        by_steps = self._is_multiple(self.settings.checkpoint_steps)
        return by_steps or time.monotonic() - saved_at > self.settings.checkpoint_seconds

    def count_step(self, images: int) -> None:
        """Count a step and its images."""
        self.steps_done += 1
        self.record.cost.samples_seen += images

    def is_sample_due(self) -> bool:
        """Whether the tasks begun are to be measured after this step."""
        return self._is_multiple(self.settings.evaluate_every)

    def _is_multiple(self, every: int | None) -> bool:
        """Whether the steps done are a multiple of ``every``; never of None."""
        return every is not None and self.steps_done % every == 0

    def log_epoch(self, task: Task, phase: int, epoch: int, lr: float, sums: dict[str, Tensor], count: int) -> None:
        """Log the means of the loss terms over an epoch; an error if one is not finite."""
        means = self._average_losses(task, phase, epoch, sums, count)
        position = {"task": task.id, "phase": phase, "epoch": epoch}
        self._log_event("epoch", **position, lr=lr, loss=sum(means.values()), losses=means)

    def _average_losses(
        self, task: Task, phase: int, epoch: int, sums: dict[str, Tensor], count: int
    ) -> dict[str, float]:
        """Means of the loss terms over ``count`` images; an error if one is not finite."""
        means = {name: float(total) / count for name, total in sums.items()}
        if not all(map(math.isfinite, means.values())):
            position = f"(task {task.id + 1}, phase {phase + 1}, epoch {epoch + 1})"
            self._raise_diverged(f"a loss term is not finite by step {self.steps_done} {position}: {means}")
        return means

    def _raise_diverged(self, found: str) -> NoReturn:
        raise FloatingPointError(
            f"{found}. "
            f"The last good checkpoint is {self.checkpoint.folder / 'last.pt'}, of step {self.steps_saved}. "
            "Lower optimizer.lr or set trainer.clip_norm=1."
        )

    def _copy_finite_state(self, task: Task, phase: int) -> State:
        """:meth:`_copy_state`, or an error if it is not finite: a loss says nothing about the weights after its step.

        It is checked in the copy, on the CPU.
        """
        state = self._copy_state()
        self._refuse_unfinite(state["method"], f"at step {self.steps_done} (task {task.id + 1}, phase {phase + 1})")
        return state

    def _refuse_unfinite(self, state: Mapping[str, Any], where: str, infinite_buffers: bool = False) -> None:
        """Raise an error if a weight is not finite, or a buffer that was finite when the phase began.

        With ``infinite_buffers``, a buffer may hold infinity, since a method may have put it there after the phase.
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
            self._raise_diverged(f"the method is not finite {where}: {', '.join(found[:3])}{more}")

    def _is_measured(self, after_task: int) -> bool:
        return self.settings.evaluate_after == "each_task" or after_task == len(self.scenario.tasks) - 1

    def _measure(self, after_task: int) -> None:
        """Measure one row of the accuracy matrix, or the untrained network's baseline."""
        self.answers = answers = self._evaluate(after_task + 1)
        num_tasks = len(self.scenario.tasks)
        for setting in SETTINGS:
            self.record.add(after_task, setting, answers.count_correct(setting, num_tasks), self._count_asked())
        if after_task != BASELINE:
            seen = {s: self.record.get_matrix(s).accuracy[after_task, : after_task + 1] for s in SETTINGS}
            averages = {f"{s}_average": float(row.mean()) for s, row in seen.items()}
            more = self._name_measure()
            if self.scenario.recurring:
                more["recurring_classes"] = True
            if isinstance(answers, Detections):
                more["average_precision"] = answers.summarise()
                self.record.average_precision += more["average_precision"]
            rows = {s: row.tolist() for s, row in seen.items()}
            self._log_event("task", task=after_task, **rows, **averages, **more)

    def _name_measure(self) -> dict[str, Any]:
        """What events say of the numbers in them if they are not accuracies."""
        return {} if self.scenario.measure == "accuracy" else {"measure": self.scenario.measure}

    def measure_sample(self, task: Task) -> None:
        """Add a point to the curves: the tasks begun, in evaluation mode, on their samples.

        Modes and random generators are as before. It is short, so a request to stop is obeyed after it.
        """
        if self.executor.device.type != "cpu":
            torch.accelerator.synchronize(self.executor.device)  # what it still computes is training
        self._count_training_time()
        asked = copy.copy(self._sample)
        asked.tasks = asked.tasks[: task.id + 1]
        with keep_modes_and_draws(self.method, self.generators):
            answers = self._ask(asked, task.id + 1, None)
        count = [len(sampled.test) for sampled in self._sample.tasks]
        event: dict[str, Any] = {"task": task.id, **self._name_measure()}
        for setting in SETTINGS:
            correct = answers.count_correct(setting, len(asked.tasks))
            self.record.add_to_curve(self.steps_done, task.id, setting, correct, count)
            row = [100 * right / images if images else math.nan for right, images in zip(correct, count)]
            event |= {f"sample_{setting}": row, f"sample_{setting}_average": sum(row) / len(row)}
        self._log_event("sample", **event)
        now = time.monotonic()
        self.record.cost.curve_seconds += now - self._training_since
        self._training_since = now

    @cached_property
    def _sample(self) -> Scenario:
        return draw_sample(self.scenario, self.settings.evaluate_on, self.settings.evaluate_sample)

    def _measure_linear_probe(self) -> dict[str, Any]:
        """What ``summary.json`` says of the linear probe: its average accuracies, and the images it was fitted on."""
        began = time.monotonic()
        with allow_interruption():
            rule = fit_linear_probe(self.method, self.scenario, self.autocast)
        self.record.cost.evaluate_seconds += time.monotonic() - began
        images = sum(len(task.train) for task in self.scenario.tasks)
        seen = f"{images} training images of all tasks"
        return self._average_accuracies(self._evaluate(len(self.scenario.tasks), rule)) | {"fitted_on": seen}

    def _average_accuracies(self, answers: Evaluation | Detections) -> dict[str, Any]:
        """Average accuracy in percent over all tasks, for each setting; None if a task was not answered."""
        record = Record.empty(len(self.scenario.tasks))
        for setting in SETTINGS:
            record.add(0, setting, answers.count_correct(setting, len(self.scenario.tasks)), self._count_asked())
        means = {setting: float(record.get_matrix(setting).accuracy[0].mean()) for setting in SETTINGS}
        return {setting: mean if math.isfinite(mean) else None for setting, mean in means.items()}

    def _count_asked(self) -> list[int]:
        """How many images each task is measured on."""
        return [len(task.get_split(self.settings.evaluate_on)) for task in self.scenario.tasks]

    def _evaluate(self, learned: int, rule: Predict | None = None) -> Evaluation | Detections:
        began = time.monotonic()
        with allow_interruption():
            answers = self._ask(self.scenario, learned, rule)
        self.record.cost.evaluate_seconds += time.monotonic() - began
        return answers

    def _ask(self, scenario: Scenario, learned: int, rule: Predict | None) -> Evaluation | Detections:
        split = self.settings.evaluate_on
        try:
            return measure(self.method, scenario, learned=learned, split=split, autocast=self.autocast, rule=rule)
        except FloatingPointError as error:
            self._raise_diverged(f"{error} at step {self.steps_done}")

    def _log_event(self, kind: str, **values: Any) -> None:
        self.logger.log_event(self.events, {"event": kind, "step": self.steps_done, **values})
        self.events += 1

    def _fill_costs(self) -> None:
        cost, method = self.record.cost, self.method
        cost.parameters = count_parameters(method)
        cost.parameters_trainable = count_parameters(method, trainable=True)
        grown = cost.parameters / self.parameters_after_first_task
        own = method.capacity()
        cost.capacity = grown if own is None else own
        cost.method_bytes = None if method.own_loop else method.memory_bytes()
        cost.images_per_second = cost.samples_seen / cost.train_seconds if cost.train_seconds else None

    # -- state -----------------------------------------------------------------------------------------------------

    def _copy_state(self) -> State:
        return clone_state({"method": self.method.state_dict(), "rng": get_rng_state(self.generators)})

    def _load(self, state: State) -> None:
        self.method.load_state_dict(state["method"])
        set_rng_state(state["rng"], self.generators)

    def _save(self, task: int, now: State | None) -> None:
        self._write(self._collect(task, now))

    def _collect(self, task: int, now: State | None) -> State:
        """Everything that a run needs to go on from here: the content of a checkpoint."""
        return {
            "task": task,
            "final" if task == len(self.scenario.tasks) else "task_start": self.task_start,
            "phase_ends": list(self.phase_ends),
            "now": now,
            "record": self.record.to_json(),
            "counters": [self.steps_done, self.events, self.parameters_after_first_task],
            "data": self.scenario.data,
        }

    def _write(self, checkpoint: State) -> None:
        cost = self.record.cost
        checkpoint["record"]["cost"]["energy_joules"] = cost.energy_joules = self._meter.add(cost.energy_joules)
        self.checkpoint.save(checkpoint, boundary=checkpoint["now"] is None and not checkpoint["phase_ends"])
        self._unsaved = None
        self.steps_saved = checkpoint["counters"][0]

    def _restore(self, saved: State) -> int:
        """Load the state at the beginning of a checkpoint's task; returns the task, or their number at the end."""
        known = saved.get("data", self.scenario.data)  # checkpoints of older versions have none
        require(
            known == self.scenario.data,
            str(self.checkpoint.folder),
            expected=f"a checkpoint of a run on these images (data {self.scenario.data})",
            got=f"one of a run on others (data {known})",
            fix="Put the images of that run back, or start this one afresh with overwrite=true.",
        )
        finished = saved["task"] == len(self.scenario.tasks)
        self._load(get_final_state(saved) if finished else saved["task_start"])
        self.record = Record.from_json(saved["record"])
        self.steps_done, self.events, self.parameters_after_first_task = saved["counters"]
        self.steps_saved = self.steps_done
        return saved["task"]


class OwnLoop:
    """Counts, logs and measures the steps of a phase that has a loop of its own, and stops it if asked to."""

    def __init__(self, trainer: Trainer, task: Task, number: int, phase: Phase) -> None:
        self.trainer, self.task, self.number = trainer, task, number
        self._epochs = phase.epochs or trainer.settings.epochs
        self._steps = math.ceil(len(phase.data) / trainer.settings.batch_size)
        self._epoch = self._done = self._images = 0
        self._sums: dict[str, Tensor] = {}

    def step(self, losses: Losses, images: int) -> None:
        """Count a step; see :class:`~cl_bench.core.types.LoopReport`."""
        trainer, task = self.trainer, self.task
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss * images
        position = (self.number, self._epoch, self._epochs, self._done, self._steps)
        trainer.logger.log_step(Progress(task.id, len(trainer.scenario.tasks), *position))
        self._done, self._images = self._done + 1, self._images + images
        trainer.count_step(images)
        if trainer.is_sample_due():
            trainer.measure_sample(task)
        if trainer.stop():
            warn(
                f"task {task.id + 1} will be learned again from its beginning: its loop is not ours and cannot be saved"
            )
            raise Interrupted

    def end_epoch(self, lr: float) -> None:
        """Log an epoch."""
        self.trainer.log_epoch(self.task, self.number, self._epoch, lr, self._sums, self._images)
        self._epoch, self._done, self._images, self._sums = self._epoch + 1, 0, 0, {}


def run_alone(steps: StepGenerator[T]) -> T:
    """Perform every step of a run and return its result. The error of a step is raised inside the generator."""
    try:
        step, executor = next(steps)
        while True:
            try:
                losses = executor.perform(step)
            except BaseException as error:
                step, executor = steps.throw(error)
            else:
                step, executor = steps.send(losses)
    except StopIteration as end:
        return end.value


@contextmanager
def keep_modes_and_draws(method: Method, generators: Mapping[str, Generator]) -> Iterator[None]:
    """After it, each module is in the mode of before, and every generator draws what it would have drawn."""
    modes = [(module, module.training) for module in method.modules()]
    draws = get_rng_state(generators)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        set_rng_state(draws, generators)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def count_parameters(module: torch.nn.Module, *, trainable: bool = False) -> int:
    """Number of scalar parameters; with ``trainable``, of the trainable ones only."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def _measure_epoch(visited: int, batch_size: int, steps_per_batch: int) -> tuple[int, int]:
    """Images, counted at every step that trains on them, and steps of an epoch.

    A last batch of one image is left out: BatchNorm cannot normalise a single value.
    """
    count = visited - (visited > 1 and visited % batch_size == 1 and batch_size > 1)
    return count * steps_per_batch, math.ceil(count / batch_size) * steps_per_batch


def _move(sums: dict[str, Tensor], data: Data) -> dict[str, Tensor]:
    return {name: total.to(data.labels.device) for name, total in sums.items()}
