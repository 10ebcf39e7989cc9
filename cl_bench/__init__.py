"""Continual-learning experiments, chosen by configuration.

From Python: :func:`run` makes a run as the command does, :func:`load` reads a finished one. Both give its model,
trained.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cl_bench.runs.load import FinishedRun

__version__ = "0.1.0"
__all__ = ["__version__", "load", "run"]


def run(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> "FinishedRun":
    """Run what the overrides say and load it, see :func:`cl_bench.runs.load.run`."""
    from cl_bench.runs.load import run as run_overrides  # torch and Hydra only where a run is wanted

    return run_overrides(overrides, config_dir=config_dir)


def load(run_dir: str | Path, *, device: str = "auto", data_dir: str | Path | None = None) -> "FinishedRun":
    """The finished run of a folder, its model ready to predict, see :func:`cl_bench.runs.load.load`."""
    from cl_bench.runs.load import load as load_run

    return load_run(run_dir, device=device, data_dir=data_dir)
