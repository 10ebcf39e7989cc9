"""What ``hydra/launcher=ray`` and ``hydra/sweeper=optuna`` name: Hydra accepts plugins only from this namespace.

Hydra imports this file at every start, so the work is elsewhere.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RayLauncher(Launcher):
    """Runs jobs on Ray; its keys and what they mean are in ``configs/hydra/launcher/ray.yaml``."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before the jobs are known."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs; what each returned, in their order."""
        from cl_bench.runs.ray_jobs import launch

        return launch(self, [list(overrides) for overrides in job_overrides], initial_job_idx)


class OptunaSweeper(Sweeper):
    """Searches with Optuna; its keys and what they mean are in ``configs/hydra/sweeper/optuna.yaml``."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra first."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials of a search."""
        from cl_bench.runs.search import search

        assert self.config is not None
        assert self.launcher is not None
        search(self.config, self.settings, self.launcher, arguments)
