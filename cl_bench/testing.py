"""What every method promises, as checks for tests: ``check_method`` for a method of one's own.

The tests of our own methods are these same checks (``tests/test_methods.py``). They train a tiny network on the bundled
digits in two tasks of five classes; a broken promise is an ``AssertionError``. They need no test framework.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from cl_bench.config.build import Parts, build
from cl_bench.config.schema import compose_config, find_unread
from cl_bench.core.record import SETTINGS, replace_non_finite
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.engine.trainer import Interrupted, Trainer
from cl_bench.loggers.group import Loggers

SMALL = (
    "scenario.classes_per_task=[5,5]",
    "scenario.train_per_class=10",
    "scenario.test_per_class=4",
    "trainer.epochs=2",
    "trainer.batch_size=16",
)
"""Digits in two tasks of 50 training images: a run of some seconds."""

LEARNING = ("scenario.train_per_class=100", "scenario.test_per_class=20", "trainer.epochs=8")
"""As many more as learning needs."""

BuildParts = Callable[..., Parts]
"""Builds the method's run at :data:`SMALL` scale; its arguments are further overrides."""


def check_method(
    method: str, *overrides: str, config_dir: str | Path | None = None, to_learn: Sequence[str] = (), seed: int = 0
) -> None:
    """Check all that a method promises. It takes about half a minute on one core.

    Args:
        method: as in ``method=NAME``.
        overrides: the network, buffer and keys that it is tried with; small ones.
        config_dir: a folder with YAML files of one's own, as ``--config-dir``.
        to_learn: further overrides with which it learns two tasks, e.g. another learning rate.
        seed: of the run that must learn something.

    Raises:
        AssertionError: the method breaks a promise.
        ConfigError: a key or value is wrong.
    """

    def build_parts(*more: str) -> Parts:
        return build(compose_read([*SMALL, "device=cpu", f"method={method}", *overrides, *more], config_dir))

    with tempfile.TemporaryDirectory() as folder:
        check_steps(build_parts, Path(folder, "steps"))
        check_scores(build_parts)
        check_learning(lambda *more: build_parts(*more, *to_learn), Path(folder, "learning"), seeds=[seed])
        for precision in ("fp32", "bf16"):
            check_resumption(
                lambda *more, precision=precision: build_parts(f"precision={precision}", *more),
                Path(folder, precision),
            )


def compose_read(overrides: Sequence[str], config_dir: str | Path | None = None) -> DictConfig:
    """The configuration of these overrides without those of steps, if the method takes none and would refuse them."""
    config = compose_config(overrides, config_dir)
    unread = find_unread(overrides, config)
    return compose_config([o for o in overrides if o not in unread], config_dir) if unread else config


def check_steps(build_parts: BuildParts, folder: Path) -> None:
    """Losses are finite, named scalars, and exactly the parameters of a phase get gradients and change.

    Args:
        build_parts: builds the run.
        folder: for its checkpoints.
    """
    parts = build_parts()
    trainer, method = make_trainer(parts, folder), parts.method
    phases, initial = 0, _copy_tensors(parts)
    for task in parts.scenario.tasks:
        method.eval()
        for phase in method.learn(task):
            phases += 1
            params = list(phase.params)
            trained = {id(p) for p in params}
            assert trained, "a phase trains no parameter"
            trainer.run_phase(task, 0, replace(phase, params=params), None)
            method.train()
            before = {name: p.detach().clone() for name, p in method.named_parameters()}
            method.zero_grad()
            batch = trainer.make_batch(phase.data.images[:12], phase.data.labels[:12], task)
            losses = phase.observe(batch)
            assert losses, "a step has no loss term"
            for name, loss in losses.items():
                assert name.isidentifier(), f"the name of the loss term {name!r} is not one of Python's"
                assert loss.shape == (), f"the loss term {name} is no scalar but has the shape {tuple(loss.shape)}"
                assert torch.isfinite(loss), f"the loss term {name} is {float(loss)}"
            total: Any = sum(losses.values())
            total.backward()
            method.after_backward()
            for name, p in method.named_parameters():
                has_gradient = p.grad is not None and bool(p.grad.abs().sum() > 0)
                assert has_gradient == (id(p) in trained), (
                    f"{name} has {'a' if has_gradient else 'no'} gradient, but the phase "
                    f"{'trains' if id(p) in trained else 'does not train'} it"
                )
            (phase.optimizer or parts.optimizer)(params).step()
            if phase.after_step:
                phase.after_step()
            for name, p in method.named_parameters():
                assert id(p) in trained or torch.equal(p, before[name]), f"{name} changes, but the phase has it not"
            method.eval()
    if parts.method.gradient_free:
        assert phases == 0, "a method without gradients yields a phase"
        _check_change(parts, initial)
    else:
        assert phases >= 1, "learn yields no phase"


def check_scores(build_parts: BuildParts) -> None:
    """``predict`` gives a score for every class of the scenario, before anything is learned too."""
    parts = build_parts()
    x = parts.scenario.transform.normalise(parts.scenario.tasks[0].test.images)
    task_id = torch.zeros(len(x), dtype=torch.int64, device=x.device) if _needs_task_id(parts) else None
    with torch.no_grad():
        scores = parts.method.eval().predict(x, task_id)
    expected = (len(x), parts.scenario.num_classes)
    assert scores.shape == expected, f"predict gives the shape {tuple(scores.shape)} instead of {expected}"
    assert not scores.isnan().any(), "predict gives scores that are no numbers"


def check_learning(build_parts: BuildParts, folder: Path, *, seeds: Sequence[int]) -> None:
    """Two tasks of five digits (or of other sizes) are learned far better than by chance, as a mean over the seeds.

    After the second task, the accuracy on it is above 70 % if the task is known and above 35 % if it is not, and the
    mean over both tasks above 45 % if it is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last_rows, unknown = [], []
    for seed in seeds:
        parts = build_parts(*LEARNING, f"seed={seed}")
        record = make_trainer(parts, folder / str(seed)).run()
        last_rows.append(record.task_il.accuracy[-1])
        if not _needs_task_id(parts):
            unknown.append(record.class_il.accuracy[-1, -1])
    last, mean = np.mean(last_rows, axis=0)[-1], np.mean(last_rows)
    assert last > 70, f"Task-IL accuracy on the last task is {last:.1f}"  # chance is 20 or 33
    assert mean > 45, f"mean Task-IL accuracy is {mean:.1f}"
    if unknown:
        assert np.mean(unknown) > 35, f"Class-IL accuracy on the last task is {np.mean(unknown):.1f}"  # chance is 10


def check_resumption(build_parts: BuildParts, folder: Path, *, few: bool = False) -> None:
    """A run that is stopped at any of seven moments goes on from its checkpoint to the same bits.

    A method that fails here keeps something from task to task that is no registered tensor, or draws from a generator
    of its own.

    Args:
        few: only three moments, in mid-epoch, early in the second task and before the last step: faster.
    """
    folder.mkdir(parents=True, exist_ok=True)
    straight = build_parts()
    trainer = make_trainer(straight, folder / "straight")
    record = trainer.run()
    total, expected = trainer.steps_done, _get_tensors(straight)
    if straight.method.gradient_free:
        stops = set(range(1, 1 + len(straight.scenario.tasks)))  # before each task
    else:
        assert total > 3, "fewer than four steps"
        stops = {2, total // 2 + 1, total - 1} if few else {1, 2, 4, total // 2, total // 2 + 1, total - 1, total}
    for stop_after in sorted(stops):
        at = f"stopped at step {stop_after} of {total}: "
        place = folder / f"stop{stop_after}"
        torch.manual_seed(1234)  # whatever state the first process is in
        parts = build_parts()
        try:
            make_trainer(parts, place, stop=_count_to(stop_after)).run()
        except Interrupted:
            pass
        else:
            raise AssertionError(f"{at}the run was not stopped")
        parts = build_parts("seed=0")
        torch.manual_seed(4321)  # a new process knows nothing of the old one's generators
        for generator in parts.generators.values():
            generator.manual_seed(99)
        resumed = make_trainer(parts, place)
        again = resumed.run()
        for setting in SETTINGS:
            np.testing.assert_array_equal(again.get_matrix(setting).correct, record.get_matrix(setting).correct, at)
        precision, before = (replace_non_finite(measured.average_precision) for measured in (again, record))
        assert precision == before, f"{at}average precisions differ"
        assert resumed.steps_done == total, f"{at}{resumed.steps_done} steps in all"
        for name, tensor in _get_tensors(parts).items():
            assert torch.equal(tensor, expected[name]), f"{at}{name} differs"
        assert resumed.answers is not None, f"{at}no answers"
        assert trainer.answers is not None
        confidence, before = (answers.confidence.nan_to_num() for answers in (resumed.answers, trainer.answers))
        assert torch.equal(confidence, before), f"{at}confidences differ"


def make_trainer(parts: Parts, folder: Path, stop: Callable[[], bool] = lambda: False) -> Trainer:
    """The training loop over ``parts`` without loggers, with its checkpoints in ``folder``."""
    return parts.build_trainer(Loggers([]), Checkpoint(folder), stop)


def _copy_tensors(parts: Parts) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in _get_tensors(parts).items()}


def _check_change(parts: Parts, before: dict[str, Tensor]) -> None:
    """A method without gradients has learned something, and its parameters are as they were."""
    after, parameters = _get_tensors(parts), {name for name, _ in parts.method.named_parameters()}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed, "nothing was learned"
    assert not changed & parameters, f"{', '.join(sorted(changed & parameters))} changed without a phase"


def _count_to(number: int) -> Callable[[], bool]:
    """A request to stop at the call with this number."""
    calls = count(1)
    return lambda: next(calls) == number


def _needs_task_id(parts: Parts) -> bool:
    return parts.method.task_id == "needed"


def _get_tensors(parts: Parts) -> dict[str, Tensor]:
    return {name: value for name, value in parts.method.state_dict().items() if isinstance(value, Tensor)}
