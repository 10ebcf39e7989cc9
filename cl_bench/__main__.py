"""The command: ``python -m cl_bench``.

Heavy packages are imported only when a run starts, so that ``--help`` and wrong keys are answered at once.
"""

import os
import sys
import traceback
from contextlib import ExitStack
from typing import Any

import hydra
from omegaconf import DictConfig

import cl_bench
from cl_bench.commands import complete, run_command
from cl_bench.config.explain import choose_exit_status, explain
from cl_bench.config.schema import CONFIGS, allow_typed_package
from cl_bench.runs.sweep import JobFailed, Sweep, format_table, refuse_minimizing, refuse_test_images
from cl_bench.system.streams import outlive_readers


def run_job(config: DictConfig) -> Any:
    """Run one job: the run itself, or one of a sweep."""
    from cl_bench.runs.run import run

    _refuse_search_on_test(config)
    allow_typed_package(config)
    return run(config)


def main() -> None:
    """Run the command line; exit status 0 finished, 2 wrong configuration or data, 130/143 stopped, 1 anything else."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises errors instead of printing them
    wait_passively()
    outlive_readers()
    asked, only_shown = {"-m", "--multirun", "hydra.mode=MULTIRUN"}, {"--cfg", "-c", "--info", "-i"}
    multirun = bool(asked & set(sys.argv)) and not only_shown & set(sys.argv)
    if sys.argv[1:2] == ["--version"]:
        print(f"cl_bench {cl_bench.__version__}")
        return
    if "-sc" in sys.argv and (line := os.environ.get("COMP_LINE")):
        words, more = complete(line)
        print("\n".join(words))
        if not more:
            return
    elif (status := run_command(sys.argv[1:])) is not None:
        sys.exit(status)
    sweep = Sweep(sys.argv[1:], tracebacks=wants_traceback)
    failures: list[Exception] = []
    started: list[bool] = []

    def task(config: DictConfig) -> Any:
        started.append(True)
        if _is_sweeping():
            return sweep.perform(run_job, config)  # Hydra keeps its error until the other jobs have run
        try:
            return run_job(config)
        except Exception as error:  # not raised: Hydra would print a line of its own
            failures.append(error)

    try:
        with ExitStack() as stack:
            if multirun:
                stack.enter_context(sweep.handle_signals())
                stack.enter_context(sweep.report_failures())
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(task)()
        if failures:
            raise failures[0]
    except KeyboardInterrupt:  # the second Ctrl-C
        sys.exit(130)
    except Exception as error:
        if isinstance(error, JobFailed):
            sys.exit(sweep.choose_exit_status(error))
        # If no job has started, the command line is wrong; the jobs of a sweep may start in other processes.
        composing = not started and not multirun
        status = 2 if composing else choose_exit_status(error)
        if status is None:
            raise
        if wants_traceback:
            traceback.print_exc()
        else:
            print(f"cl_bench: {explain(error, sys.argv[1:])}", file=sys.stderr)
        sys.exit(status)
    finally:
        if jobs := sweep.close():
            print(format_table(jobs))


def wait_passively() -> None:
    """Let waiting threads sleep. A thread that spins takes the core from the thread that it waits for.

    OpenMP reads these variables when torch is loaded. They change no result, and on shared cores a run is five times as
    fast (docs/speed.md). Variables that are set already stay as they are.
    """
    for name, value in {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}.items():  # GNU's OpenMP, and Intel's
        os.environ.setdefault(name, value)


def _is_sweeping() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.get().mode == RunMode.MULTIRUN


def _refuse_search_on_test(config: DictConfig) -> None:
    """Refuse a search that would choose settings by test images, or look for the smallest accuracy."""
    from hydra.core.hydra_config import HydraConfig

    hydra_config = HydraConfig.get()
    sweeper = hydra_config.runtime.choices.get("hydra/sweeper", "basic")
    if sweeper == "basic":
        return
    refuse_test_images(config.trainer.get("evaluate_on"), f"hydra/sweeper={sweeper}")
    refuse_minimizing(hydra_config.sweeper.get("direction", "maximize"))


if __name__ == "__main__":
    main()
