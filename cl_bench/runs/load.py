"""Runs from Python: make one, and read a finished one with its trained model."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_bench.config.build import Parts, build
from cl_bench.config.explain import to_config_error
from cl_bench.config.schema import Images, Run, compose_config
from cl_bench.core.errors import ConfigError, require
from cl_bench.core.record import Record
from cl_bench.engine.checkpoint import Checkpoint, get_final_state
from cl_bench.engine.evaluate import MAX_BATCH, choose_classes, compute_scores, read_predictions
from cl_bench.methods.base import Method
from cl_bench.runs.run import run_all
from cl_bench.runs.run_dir import read_summary
from cl_bench.scenarios.base import Scenario


@dataclass(frozen=True)
class FinishedRun:
    """A finished run with its trained model, as of after the last task.

    Attributes:
        run_dir: its folder.
        summary: the content of ``summary.json``.
        record: its accuracy matrices and costs.
        state: the trained method's state.
        config: what it was configured by.
    """

    run_dir: Path
    summary: dict[str, Any]
    record: Record
    state: dict[str, Any]
    config: DictConfig

    def build_parts(self) -> Parts:
        """Scenario, network, method and the rest, newly built as the run built them, untrained.

        Raises:
            ConfigError: the images are not those that the run learned.
        """
        parts = build(self.config)
        require(
            self.summary.get("data", parts.scenario.data) == parts.scenario.data,
            "run_dir",
            expected=f"the images that it learned (data {self.summary.get('data')})",
            got=f"others (data {parts.scenario.data})",
            fix="Put them back where config.yaml says they were, or pass data_dir=PATH to cl_bench.load.",
        )
        return parts

    @cached_property
    def _parts(self) -> Parts:
        parts = self.build_parts()
        parts.method.load_state_dict(self.state)
        parts.method.eval()
        return parts

    @property
    def method(self) -> Method:
        """The trained method; its network is ``method.net``."""
        return self._parts.method

    @property
    def scenario(self) -> Scenario:
        """The tasks with their images."""
        return self._parts.scenario

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """The columns of ``predictions.npz``: an entry per test image."""
        return read_predictions(self.run_dir / "predictions.npz")

    def predict(self, images: np.ndarray | torch.Tensor, task: int | None = None) -> np.ndarray:
        """The class of each image, as the data set's own class id.

        Args:
            images: (N, C, H, W) uint8, of the size that the run learned.
            task: the task of all these images (Task-IL), or None if it is not known (Class-IL).

        Returns:
            (N,) int64 class ids; -1 if the method cannot answer without the task. ``scenario.class_names`` has a name
            for each. A method that guesses the task from a whole batch (``method.test_batches``) takes the images in
            batches as they come: ask about images of one task at a time.

        Raises:
            ConfigError: images of another shape or type, or a task that there is not.
        """
        parts, scenario = self._parts, self.scenario
        images = torch.as_tensor(images)
        require(
            images.dtype == torch.uint8 and images.ndim == 4 and tuple(images.shape[1:]) == scenario.image_shape,
            "images",
            expected=f"uint8 of shape (N, {', '.join(map(str, scenario.image_shape))})",
            got=f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}",
            fix="Take pixel values from 0 to 255, channels first.",
        )
        require(
            task is None or 0 <= task < len(scenario.tasks),
            "task",
            expected=f"0 to {len(scenario.tasks) - 1}, or None if it is not known",
            got=task,
            fix="Tasks are counted from 0, in the order of learning.",
        )
        allowed = torch.zeros(scenario.num_classes, dtype=torch.bool, device=parts.device)
        classes = scenario.tasks[task].classes if task is not None else range(scenario.num_classes)
        allowed[classes.start : classes.stop] = True
        original = torch.tensor([*scenario.class_order, -1])
        answers = [torch.empty(0, dtype=torch.int64)]
        with torch.no_grad():  # not inference_mode: some methods differentiate in order to answer
            for batch in images.to(parts.device).split(MAX_BATCH):
                tasks = None if task is None else torch.full((len(batch),), task, device=parts.device)
                x = scenario.transform.normalise(batch)
                with parts.autocast:
                    scores = compute_scores(parts.method, None, x, tasks, scenario.num_classes)
                answers.append(choose_classes(scores, allowed.expand_as(scores))[0].cpu())
        return original[torch.cat(answers)].numpy()


def load(run_dir: str | Path, *, device: str = "auto", data_dir: str | Path | None = None) -> FinishedRun:
    """The finished run of a folder, its model ready to predict.

    Args:
        run_dir: the folder with ``summary.json``, ``config.yaml`` and ``checkpoint/``.
        device: where the model is put: auto, cpu, cuda or mps.
        data_dir: where the images are now, if not where ``config.yaml`` says.

    Raises:
        ConfigError: there is no finished run, its checkpoint is not there or damaged, or its images are not there.
    """
    folder = Path(run_dir)
    summary = read_summary(folder)
    saved = Checkpoint(folder / "checkpoint").load() if summary else None
    if saved is None or saved["task"] < len(summary["tasks"]):
        raise ConfigError(
            "run_dir",
            expected="the folder of a finished run, with summary.json, config.yaml and checkpoint/",
            got=str(folder),
            fix="Finish the run with the command that began it.",
        )
    config = OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, DictConfig)
    config.device = device
    config.images = Images.device  # who looks at a finished run looks at every image
    if data_dir is not None:
        _move_data(config, Path(data_dir))
    record = Record.from_json({**saved["record"], "cost": summary["cost"]})
    return FinishedRun(folder, summary, record, get_final_state(saved)["method"], config)


def _move_data(config: DictConfig, new: Path) -> None:
    """Put the folder ``new`` in place of ``data_dir``, also in the keys that were below it."""
    old = Path(config.data_dir)
    for key in ("data_dir", "scenario.source.root", "scenario.source.cache"):
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and Path(value).is_relative_to(old):
            OmegaConf.update(config, key, str(new / Path(value).relative_to(old)))


def run(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> FinishedRun:
    """Run what the overrides say, as the command does, and load it; a run that is finished is loaded at once.

    Args:
        overrides: what would stand behind ``python -m cl_bench``, e.g. ``["+experiment=quickstart", "seed=1"]``.
        config_dir: a folder with YAML files of your own.

    Returns:
        The finished run; of several replicas the first.

    Raises:
        ConfigError: what the command would answer with exit status 2.
        FloatingPointError, RunError: what it would answer with exit status 1.
        KeyboardInterrupt: it was stopped; the same call goes on.
    """
    typed = list(overrides)
    arguments = [*typed, *([f"--config-dir={config_dir}"] if config_dir is not None else [])]
    try:
        config = compose_config(typed, config_dir)
        if config.dry_run:
            raise ConfigError("dry_run", expected="false", got=True, fix="Only the command makes dry runs.")
        run_dir, _ = run_all(config)[0]
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        raise to_config_error(error, arguments) from error
    except SystemExit as stop:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(int(stop.code or 0) - 128).name}") from None
    return load(run_dir, device=config.device)
