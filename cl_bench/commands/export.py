"""Send finished runs to a dashboard, from their files: the same series, pictures and names as while they ran.

cl_bench export wandb|tensorboard|mlflow|trackio RUN_OR_FOLDER ... [KEY=VALUE ...] [--again]

A KEY is one of the logger's, as in logger.wandb.KEY: project, entity, mode, tags, ... A run is sent once; --again sends
it once more, after what RUN/NAME holds of the first time has been removed.
"""

import argparse
import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cl_bench.config.build import build_loggers
from cl_bench.config.explain import to_config_error
from cl_bench.config.schema import compose_config
from cl_bench.core.errors import ConfigError, require
from cl_bench.core.labels import shorten_label
from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.delivered import Delivered
from cl_bench.loggers.jsonl import METRICS, read_events
from cl_bench.report.page import Run
from cl_bench.report.rows import find_runs
from cl_bench.runs.run import prepare_report
from cl_bench.runs.run_dir import lock_run_dir

NAMES = ("wandb", "tensorboard", "mlflow", "trackio")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status: 0, 1 if a run could not be sent, 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="cl_bench export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES, help="where to")
    parser.add_argument("words", nargs="+", metavar="RUN_OR_FOLDER", help="finished runs; and KEY=VALUE")
    parser.add_argument("--again", action="store_true", help="also runs that were sent before")
    options = parser.parse_args(arguments)
    keys = [word for word in options.words if "=" in word and not Path(word).exists()]
    paths = [word for word in options.words if word not in keys]
    require(bool(paths), "RUN_OR_FOLDER", expected="a run folder or a folder of runs", got="none", fix="Name one.")
    runs, unfinished = find_runs(paths)
    failed = False
    for run in runs:
        try:
            sent = export(run, options.name, keys, again=options.again)
        except ConfigError:
            raise
        except Exception as error:  # of the network, or of the dashboard's package: the other runs may still be sent
            failed, why = True, " ".join(f"{type(error).__name__}: {error}".split())
            print(f"cl_bench: not sent: {run.folder} ({why})", file=sys.stderr)
            continue
        print(f"sent: {run.folder}" if sent else f"sent before, skipped (--again sends it again): {run.folder}")
    for left in unfinished:
        print(f"{left.state}, skipped: {left.folder}", file=sys.stderr)
    return int(failed)


def export(run: Run, name: str, keys: Sequence[str] = (), *, again: bool = False) -> bool:
    """Send a finished run to the logger ``name``; returns False if it was sent before, and is not sent again.

    Args:
        keys: ``KEY=VALUE`` of the logger.
        again: remove what is known of an earlier time, and send it again.

    Raises:
        ConfigError: a wrong key, a package that is not installed, or files that are not there.
    """
    notes = run.folder / name
    require(
        (run.folder / METRICS).is_file(),
        "RUN_OR_FOLDER",
        expected=f"a run folder with {METRICS}",
        got=str(run.folder),
        fix="Restore the file.",
    )
    logger = build_logger(name, keys)
    with lock_run_dir(run.folder):
        if again:
            shutil.rmtree(notes, ignore_errors=True)
        if Delivered(run.folder, f"{name}/delivered.json").note.get("finished"):
            return False
        if not (run.folder / "report.html").exists():
            prepare_report(run.folder)
        replay(run, logger)
    return True


def build_logger(name: str, keys: Sequence[str] = ()) -> Logger:
    """The logger ``name`` with some keys of its own."""
    overrides = (f"logger={name}", *(f"logger.{name}.{key}" for key in keys))
    try:
        config = _compose(overrides)
        config.logger = {name: config.logger[name]}
        logger = build_loggers(config)[name]
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        raise to_config_error(error, overrides) from error
    require(
        getattr(logger, "mode", None) != "disabled",
        "mode",
        expected="online or offline",
        got="disabled",
        fix="Unset WANDB_MODE, or type mode=offline.",
    )
    return logger


@functools.lru_cache(maxsize=1)  # of thousands of runs it would take most of the time
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    return compose_config(overrides)


def replay(run: Run, logger: Logger) -> None:
    """Tell a logger all events of a finished run, as the run did."""
    summary = run.summary
    logger.start(
        RunInfo(
            folder=run.folder,
            experiment=summary["experiment"],
            name=summary["name"],
            seed=summary["seed"],
            fingerprint=summary["fingerprint"],
            config=yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8")),
            num_tasks=len(summary["tasks"]),
            label=shorten_label(summary.get("label")),
            data=summary.get("data"),
            class_order=summary["class_order"],
        )
    )
    status = "failed"
    try:
        for number, event in enumerate(read_events(run.folder, 0, sys.maxsize)):
            logger.log_event(number, event)
        status = "finished"
    finally:
        logger.finish(status, summary if status == "finished" else None)
