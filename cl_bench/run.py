"""One run from its configuration to its report."""

import contextlib
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from cl_bench import folder as files
from cl_bench.build import Parts, build, loggers
from cl_bench.checkpoint import Checkpoint
from cl_bench.config import INCOMPARABLE, comparable, fingerprint, plain
from cl_bench.errors import ConfigError, RunError
from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.group import Loggers
from cl_bench.loggers.jsonl import JsonLines
from cl_bench.memory import largest_tensors, peak_bytes, ran_out, reset_peak
from cl_bench.record import SCHEMA, SETTINGS, TITLES
from cl_bench.trainer import Interrupted


def run(config: DictConfig) -> float | None:
    """Run, resume or find finished what ``config`` describes.

    Returns:
        Class-IL average accuracy in percent on held-out validation images, for a search; None where the run was
        measured on test images, which a search must not see.
    """
    values = plain(config)
    _refuse_false_names(values)
    settings = comparable(values)
    place = run_folder(values, settings)
    if values["dry_run"]:
        from cl_bench.dry_run import dry_run

        dry_run(build(config), base_summary(values, settings))
        return None
    finished = None if values["overwrite"] else files.read_summary(place)
    if finished:
        if not (place / "report.html").exists():
            write_report(place)
        print(f"Already finished, nothing to do: {place} (overwrite=true starts afresh)", file=sys.stderr)
        print_result(place, finished)
        return _objective(finished)
    parts = build(config)
    chosen = loggers(config)
    with files.locked(place), files.writing(place):
        if values["overwrite"]:
            _empty(place)
        files.write_config(place, values)
        files.write_environment(place, parts.device)
        summary = _train(place, values, parts, chosen, base_summary(values, settings))
    try:
        write_report(place)
    except OSError as error:
        raise RunError(
            f"{place}: the run is finished, but its report could not be written: {error.strerror or error}. "
            "Make room or mend the folder; the same command writes it."
        ) from error
    print_result(place, summary)
    return _objective(summary)


def _refuse_false_names(values: dict[str, Any]) -> None:
    """``choices`` is a record of what was chosen; set by hand, a run would go under another method's name."""
    chosen = HydraConfig.get().runtime.choices
    for group, name in values["choices"].items():
        if name != chosen.get(group):
            raise ConfigError(
                f"choices.{group}",
                expected=f"{chosen.get(group)}, the {group} that was chosen",
                got=name,
                fix=f"Choose with {group}={name}.",
            )


def write_report(place: Path) -> None:
    """Plots and page of a finished run; matplotlib is loaded here and not before."""
    from cl_bench.report import page

    page.write_report(place)


def run_folder(values: dict[str, Any], settings: dict[str, Any]) -> Path:
    """``results/<experiment>/<name>-<fingerprint>/seed<seed>``."""
    for key in ("experiment", "name"):
        if not values[key].isprintable() or Path(values[key]).name != values[key] or values[key].startswith("."):
            raise ConfigError(
                key, expected="a plain name, a single folder", got=values[key], fix=f"Set {key}=NAME without slashes."
            )
    if not values["results_dir"]:
        raise ConfigError("results_dir", expected="a folder", got="nothing", fix="results_dir=results is the default.")
    name = f"{values['name']}-{fingerprint(settings)}"
    return Path(values["results_dir"]) / values["experiment"] / name / f"seed{values['seed']}"


def base_summary(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The part of ``summary.json`` that is known before training."""
    scenario = values["scenario"]
    summary = {"schema": SCHEMA, "status": "running", "experiment": values["experiment"], "name": values["name"]}
    summary |= values["choices"]
    summary |= {"scale": values["scale"], "seed": values["seed"]}
    summary |= {key: scenario.get(key) for key in ("class_order_seed", "data_seed")}
    summary |= {"fingerprint": fingerprint(settings), "comparable": settings}
    return summary | {"published": values["published"] if _as_published(values) else None}


def _as_published(values: dict[str, Any]) -> bool:
    """Whether nothing that matters differs from the experiment's file: else it is held to no published number."""
    if values["scale"] is not None or values["trainer"].get("evaluate_on") != "test":
        return False
    neutral = {*INCOMPARABLE, "scale"} - {"class_order_seed", "data_seed"}
    keys = [override.split("=", 1)[0].lstrip("+~") for override in HydraConfig.get().overrides.task]
    return all(key in neutral or key.split(".")[0] in ("logger", "metrics", "hydra") for key in keys)


def _train(
    place: Path, values: dict[str, Any], parts: Parts, chosen: dict[str, Logger], summary: dict[str, Any]
) -> dict[str, Any]:
    logger = Loggers([JsonLines(), *chosen.values()])
    scenario = parts.scenario
    status, done = "failed", None
    info = RunInfo(
        folder=place,
        experiment=values["experiment"],
        name=values["name"],
        seed=values["seed"],
        fingerprint=summary["fingerprint"],
        config=values,
        num_tasks=len(scenario.tasks),
    )
    try:
        with stop_signals() as caught:
            logger.start(info)
            reset_peak(parts.device)
            trainer = parts.trainer(logger, Checkpoint(place / "checkpoint"), stop=lambda: bool(caught))
            try:
                record = trainer.run()
            except Interrupted:
                status = "interrupted"
                command = "the same command without overwrite=true" if values["overwrite"] else "the same command"
                print(f"Stopped; {command} goes on from here: {place}", file=sys.stderr)
                raise SystemExit(128 + caught[0]) from None
            except Exception as error:
                if ran_out(error):
                    raise RunError(_memory_message(error, parts)) from error
                raise
            record.cost.peak_memory_bytes = peak_bytes(parts.device)
            record.cost.buffer_bytes = parts.buffer.nbytes
            record.write_csv(place / "accuracy_matrix.csv")
            assert trainer.answers is not None
            files.write_predictions(place, trainer.answers, scenario)
            summary = summary | parts.facts() | {"status": "finished"}
            for setting in SETTINGS:
                matrix = record.matrix(setting)
                summary[setting] = {name: _number(metric(matrix)) for name, metric in parts.metrics.items()}
            summary["cost"] = record.to_json()["cost"]
            summary |= {"alternatives": trainer.alternatives, "method_facts": parts.method.facts()}
            files.write_json(place / "summary.json", summary)  # from here on the run is finished
            status, done = "finished", summary
    finally:
        logger.finish(status, done)
    if caught:  # after the last step: nothing is lost, and a sweep must not start its next job
        print(f"Stopped; this run is finished: {place}", file=sys.stderr)
        raise SystemExit(128 + caught[0])
    return summary


def _memory_message(error: Exception, parts: Parts) -> str:
    """What takes the memory, and three ways out."""
    named: dict[str, Tensor] = {f"method.{name}": tensor for name, tensor in parts.method.named_parameters()}
    named |= {f"method.{name}": tensor for name, tensor in parts.method.named_buffers()}
    named |= {f"buffer.{name}": tensor for name, tensor in parts.buffer.named_buffers()}
    for task in parts.scenario.tasks:
        named |= {
            f"training images of task {task.id}": task.train.images,
            f"test images of task {task.id}": task.test.images,
        }
    size = parts.settings.batch_size
    return (
        f"out of memory on {parts.device} ({str(error).splitlines()[0]}). "
        f"The largest tensors: {'; '.join(largest_tensors(named))}. "
        f"Ways out: trainer.batch_size={max(1, size // 2)} (and method.replay_size where there is one); "
        "a narrower backbone or a smaller buffer.capacity; precision=bf16 or another device."
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _objective(summary: dict[str, Any]) -> float | None:
    return summary["class_il"]["average_accuracy"] if summary["evaluate_on"] == "val" else None


def _empty(place: Path) -> None:
    (place / "summary.json").unlink(missing_ok=True)  # first: from here on the run is not finished any more
    shutil.rmtree(place / "checkpoint", ignore_errors=True)
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; the second one of a kind is not collected any more."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, before[number])
        print("Stopping after this step; once more to stop at once.", file=sys.stderr)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, catch)
    except ValueError:  # a sweep may run jobs in a thread, where signals cannot be caught
        pass
    try:
        yield caught
    finally:
        for caught_before, handler in before.items():
            signal.signal(caught_before, handler)


def print_result(place: Path, summary: dict[str, Any]) -> None:
    """The accuracy table and where the report is, on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['experiment']}: {summary['name']}, seed {summary['seed']}")
    table.add_column("metric")
    for setting in SETTINGS:
        table.add_column(TITLES[setting], justify="right")
    for metric in summary["class_il"]:
        cells = [summary[setting][metric] for setting in SETTINGS]
        table.add_row(metric.replace("_", " "), *("-" if cell is None else f"{cell:.2f}" for cell in cells))
    console = Console()
    console.print(table)
    console.print(f"report: {place / 'report.html'}", soft_wrap=True, highlight=False)
