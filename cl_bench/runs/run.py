"""One run from its configuration to its report."""

import copy
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from cl_bench.config.build import KINDS, Parts, build, build_component, build_loggers, identify_run
from cl_bench.config.explain import refuse_unread_keys
from cl_bench.config.schema import (
    INCOMPARABLE,
    compute_fingerprint,
    list_typed_overrides,
    split_override,
    to_plain_dict,
)
from cl_bench.core.errors import ConfigError, RunError, require
from cl_bench.core.labels import shorten_label
from cl_bench.core.record import SCHEMA, SETTINGS, TITLES, Record, get_measure, name_measure, replace_non_finite
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.engine.step import StepGenerator
from cl_bench.engine.trainer import run_alone
from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.group import Loggers
from cl_bench.loggers.jsonl import JsonLines
from cl_bench.loggers.pace import Pace
from cl_bench.metrics.base import RECURRING, is_defined
from cl_bench.runs import run_dir as files
from cl_bench.runs.sweep import get_job_label, note_run
from cl_bench.scenarios.base import Scenario
from cl_bench.system.memory import get_peak_bytes, is_out_of_memory, list_largest_tensors, reset_peak
from cl_bench.system.signals import Interrupted, allow_interruption, collect_stop_signals

MOST_THREADS = 1024

Finished = tuple[Path, dict[str, Any]]
"""The folder of a finished run, and the content of its ``summary.json``."""


def run(config: DictConfig) -> float | None:
    """Run what ``config`` describes, or resume it, or find it finished; with replicas, the seeds from ``seed`` on.

    Returns:
        For a search: the Class-IL average accuracy in percent on validation images, as a mean over the replicas. None
        if the run was measured on test images, which a search must not see.
    """
    objectives = [o for _, summary in run_all(config) if (o := _read_objective(summary)) is not None]
    return sum(objectives) / len(objectives) if objectives else None


def run_all(config: DictConfig) -> list[Finished]:
    """:func:`run`: the folder and the summary of each seed; none of a dry run."""
    refuse_unread_keys(config, list_typed_overrides())
    values = to_plain_dict(config)
    _refuse_false_names(values)
    with limit_threads(config.threads):
        return _run(config, values)


@contextmanager
def limit_threads(number: Any) -> Iterator[None]:
    """Inside, torch uses this number of CPU threads; ``auto`` leaves the number to torch."""
    require(
        number == "auto" or (type(number) is int and 0 < number <= MOST_THREADS),
        "threads",
        expected=f"auto, or 1 to {MOST_THREADS}",
        got=number,
        fix="threads=1 is the least.",
    )
    if number == "auto":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(config: DictConfig, values: dict[str, Any]) -> list[Finished]:
    if values["dry_run"]:
        from cl_bench.runs.dry_run import dry_run

        settings, scenario = identify_run(config, values)
        parts = build(config, scenario)
        with explain_errors(parts):
            dry_run(parts, begin_summary(values, settings))
        return []
    replicas = build_component(config.trainer, "trainer", list(config.allow_packages), KINDS["trainer"]).replicas
    seeds = range(values["seed"], values["seed"] + replicas)
    with collect_stop_signals() as caught:
        try:
            if replicas == 1:
                finished = [run_alone(_generate_steps(config, caught))]
            else:
                finished = _run_replicas([_copy_with_seed(config, seed) for seed in seeds], caught)
        except Interrupted:
            raise SystemExit(128 + caught[0]) from None
    if caught:  # all is written, but a sweep must not start its next job
        raise SystemExit(128 + caught[0])
    return finished


def _copy_with_seed(config: DictConfig, seed: int) -> DictConfig:
    config = copy.deepcopy(config)
    config.seed = seed
    return config


def _run_replicas(configs: list[DictConfig], caught: list[int]) -> list[Finished]:
    """The runs of several seeds, with their steps computed together if that is possible."""
    from cl_bench.engine.replicas import find_obstacle, run_together

    with allow_interruption():
        parts = build(configs[0])
    reason = find_obstacle(parts.method, parts.device)
    scenario = None if parts.scenario.follows_seed else parts.scenario
    del parts  # frees its network; each replica builds its own
    if reason is None:
        return run_together(
            [_generate_steps(config, caught, scenario, terminal=n == 0) for n, config in enumerate(configs)]
        )
    _print(f"Replicas run one after the other: {reason}")
    return [run_alone(_generate_steps(config, caught, scenario)) for config in configs]


def _generate_steps(
    config: DictConfig, caught: list[int], scenario: Scenario | None = None, *, terminal: bool = True
) -> StepGenerator[Finished]:
    """One run from its configuration to its folder and summary, step by step.

    Args:
        caught: the signals received so far.
        scenario: of an earlier replica, to be shared.
        terminal: whether this run may show its progress on the terminal.
    """
    values = to_plain_dict(config)
    again = "the same command goes on from here"
    try:
        with allow_interruption():
            settings, scenario = identify_run(config, values, scenario)
        run_dir = choose_run_dir(values, settings)
        again = f"the same command goes on from here: {run_dir}"
        finished = None if values["overwrite"] else files.read_summary(run_dir)
        note_run(run_dir, finished_before=bool(finished))
        if finished:
            _print(f"Already finished, nothing to do: {run_dir} (overwrite=true starts again)")
            show_result(run_dir, finished, report=values["report"] and not (run_dir / "report.html").exists())
            return run_dir, finished
        with allow_interruption():
            parts = build(config, scenario)
        chosen = {name: logger for name, logger in build_loggers(config).items() if terminal or name != "console"}
        with files.lock_run_dir(run_dir):
            if values["overwrite"]:
                _clear(run_dir)
                again = f"the same command without overwrite=true goes on from here: {run_dir}"
            logger = Loggers([JsonLines(), Pace(), *chosen.values()])
            summary: dict[str, Any] | None = None
            status = "failed"
            try:
                with files.note_failure(run_dir), files.explain_write_errors(run_dir):
                    files.write_config(run_dir, values)
                    files.write_environment(run_dir, parts.device)
                    summary = yield from _train(run_dir, values, parts, logger, begin_summary(values, settings), caught)
                status = "finished"
                again = f"this run is finished: {run_dir}"
                if values["report"]:
                    again = f"this run is finished, and the same command writes its report: {run_dir}"
                    with allow_interruption():
                        prepare_report(run_dir)  # before loggers end: dashboards get its pictures
            except Interrupted:
                status = "interrupted" if summary is None else "finished"
                raise
            finally:
                with files.explain_write_errors(run_dir):
                    logger.finish(status, summary)
        assert summary is not None
        with allow_interruption():
            show_result(run_dir, summary, report=False)
    except Interrupted:
        _print(f"Stopped; {again}")
        raise
    return run_dir, summary


def _refuse_false_names(values: dict[str, Any]) -> None:
    """Refuse a ``choices`` entry that was set by hand: the run would get the name of another method."""
    chosen = HydraConfig.get().runtime.choices
    for group, name in values["choices"].items():
        require(
            group in chosen, f"choices.{group}", expected="a group of the configuration", got=group, fix="Leave it out."
        )
        if name != chosen.get(group):
            raise ConfigError(
                f"choices.{group}",
                expected=f"{chosen.get(group)}, the chosen {group}",
                got=name,
                fix=f"Choose with {group}={name}.",
            )


def show_result(run_dir: Path, summary: dict[str, Any], report: bool) -> None:
    """Print the table of a finished run, and write its report if asked; training does not need their packages."""
    if report:
        prepare_report(run_dir)
    try:
        print_result(run_dir, summary)
    except OSError as error:
        raise RunError(
            f"{run_dir}: the run is finished, but its table could not be written: {error.strerror or error}. "
            "Make room; the same command writes it."
        ) from error
    except ModuleNotFoundError as error:
        print(f"No table: {error.name} is not installed. Install it; the same command prints it.", file=sys.stderr)


def prepare_report(run_dir: Path) -> None:
    """Write the report of a finished run. If it cannot be made, say why; only a full disk is an error."""
    try:
        write_report(run_dir)
    except OSError as error:
        raise RunError(
            f"{run_dir}: the run is finished, but its report could not be written: {error.strerror or error}. "
            "Make room or fix the folder; the same command writes it."
        ) from error
    except ModuleNotFoundError as error:
        print(f"No report: {error.name} is not installed. Install it; the same command writes it.", file=sys.stderr)
    except Exception as error:  # the results of the run are complete, whatever is wrong with the page
        why = " ".join(f"{type(error).__name__}: {error}".split())
        _print(f"No report ({why}). The run is finished: {run_dir}")


def write_report(run_dir: Path) -> None:
    """Write plots and page of a finished run; matplotlib is loaded only here."""
    from cl_bench.report import page

    page.write_report(run_dir)


def choose_run_dir(values: dict[str, Any], settings: dict[str, Any]) -> Path:
    """The run folder, ``results/<experiment>/<name>-<fingerprint>/seed<seed>``."""
    for key in ("experiment", "name"):
        if not values[key].isprintable() or Path(values[key]).name != values[key] or values[key].startswith("."):
            raise ConfigError(
                key, expected="the name of a single folder", got=values[key], fix=f"Set {key}=NAME without slashes."
            )
    if not values["results_dir"]:
        raise ConfigError("results_dir", expected="a folder", got="nothing", fix="results_dir=results is the default.")
    _refuse_unwritable_names(values)
    name = f"{values['name']}-{compute_fingerprint(settings)}"
    return Path(values["results_dir"]) / values["experiment"] / name / f"seed{values['seed']}"


def _refuse_unwritable_names(values: dict[str, Any]) -> None:
    for key in ("results_dir", "experiment", "name"):
        try:
            os.fsencode(values[key])
        except UnicodeEncodeError as error:
            raise ConfigError(
                key,
                expected=f"a name that this locale can write ({error.encoding})",
                got=ascii(values[key]),
                fix="export PYTHONUTF8=1 first.",
            ) from error


def begin_summary(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The part of ``summary.json`` that is known before training."""
    scenario = values["scenario"]
    summary = {"schema": SCHEMA, "status": "running", "experiment": values["experiment"], "name": values["name"]}
    summary["label"] = values["label"] or " ".join(_list_changes()) or None
    summary |= values["choices"]
    summary |= {"scale": values["scale"], "seed": values["seed"]}
    summary |= {key: scenario.get(key) for key in ("class_order_seed", "data_seed")}
    summary |= {"fingerprint": compute_fingerprint(settings), "comparable": settings}
    return summary | {"published": values["published"] if _is_as_published(values) else None}


def _is_as_published(values: dict[str, Any]) -> bool:
    """Whether the run may be compared with the published number: nothing that matters differs from its experiment."""
    if values["scale"] is not None or values["trainer"].get("evaluate_on") != "test":
        return False
    return not _list_changes()


def _list_changes() -> list[str]:
    """The typed overrides that change what the experiment's file describes."""
    neutral = {*INCOMPARABLE, "scale"} - {"class_order_seed", "data_seed"}
    free = ("logger", "metrics", "hydra")
    typed = [(text, split_override(text)[0]) for text in list_typed_overrides()]
    return [text for text, key in typed if key not in neutral and key.split(".")[0] not in free]


def _print(line: str) -> None:
    """Print a line on stderr that begins with the job that it is about, if there are several."""
    print(f"[{get_job_label()}] {line}" if get_job_label() else line, file=sys.stderr)


def _train(
    run_dir: Path,
    values: dict[str, Any],
    parts: Parts,
    logger: Logger,
    summary: dict[str, Any],
    caught: list[int],
) -> StepGenerator[dict[str, Any]]:
    """Train and measure; returns the content of ``summary.json``, and all files but those of the report are written."""
    scenario = parts.scenario
    info = RunInfo(
        folder=run_dir,
        experiment=values["experiment"],
        name=values["name"],
        seed=values["seed"],
        fingerprint=summary["fingerprint"],
        config=values,
        num_tasks=len(scenario.tasks),
        label=shorten_label(summary["label"]),
        job=get_job_label(),
        data=scenario.data,
        class_order=list(scenario.class_order),
    )
    logger.start(info)
    reset_peak(parts.device)
    trainer = parts.build_trainer(logger, Checkpoint(run_dir / "checkpoint"), stop=lambda: bool(caught))
    with explain_errors(parts):
        record = yield from trainer.generate_steps()
    record.cost.peak_memory_bytes = get_peak_bytes(parts.device)
    record.cost.buffer_bytes = parts.buffer.nbytes
    record.write_csv(run_dir / "accuracy_matrix.csv")
    if record.curves:
        record.write_curve_csv(run_dir / "curve.csv")
    if record.average_precision:
        record.write_precision_csv(run_dir / "average_precision.csv")
    assert trainer.answers is not None
    files.write_predictions(run_dir, trainer.answers, scenario)
    summary = summary | parts.describe() | {"status": "finished"}
    for setting in SETTINGS:
        summary[setting] = replace_non_finite(_compute_metrics(record, parts, setting))
    if undefined := [name for name, metric in parts.metrics.items() if not is_defined(metric, scenario.recurring)]:
        summary["undefined_metrics"] = dict.fromkeys(undefined, RECURRING)
    areas = trainer.answers.compute_auroc(scenario.tasks)
    summary["task_il_auroc"] = replace_non_finite({"mean": math.fsum(areas) / len(areas), "tasks": areas})
    summary["cost"] = record.to_json()["cost"]
    if record.average_precision:
        summary["class_il"] |= replace_non_finite(record.list_precision())
    summary["speed"] = trainer.executor.describe() | {"replicas": parts.settings.replicas}
    summary |= {"alternatives": trainer.alternatives, "method_facts": parts.method.facts()}
    summary["buffer_by_class"] = _count_by_class(parts)
    files.write_json(run_dir / "summary.json", summary)  # from here on the run is finished
    return summary


def _compute_metrics(record: Record, parts: Parts, setting: str) -> dict[str, float]:
    """The metrics of one setting; nan if the scenario does not define one."""
    return {
        name: record.compute(metric, setting) if is_defined(metric, parts.scenario.recurring) else math.nan
        for name, metric in parts.metrics.items()
    }


def _count_by_class(parts: Parts) -> list[int] | None:
    """Images in the buffer of each class, in the order of ``class_names``; None if there is no buffer."""
    if not parts.buffer.capacity:
        return None
    position = parts.buffer.data().list_classes().cpu().bincount(minlength=parts.scenario.num_classes).tolist()
    counts = dict(zip(parts.scenario.class_order, position))
    return [counts.get(number, 0) for number in range(len(parts.scenario.class_names))]


@contextmanager
def explain_errors(parts: Parts) -> Iterator[None]:
    """Inside, errors of torch that a user can fix become one message."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(_explain_memory(error, parts)) from error
        if "more than 1 value per channel" in str(error):
            raise _explain_single_value(parts) from error
        raise


def _explain_single_value(parts: Parts) -> ConfigError:
    """The error for a batch of one value per channel; settings that always lead to one are refused earlier."""
    small = [str(task.id + 1) for task in parts.scenario.tasks if len(task.train) == 1]
    return ConfigError(
        "scenario",
        expected="training batches of two images or more, since BatchNorm cannot normalise a single value",
        got="a batch of one image" + (f" (tasks with one training image: {', '.join(small[:10])})" if small else ""),
        fix="Put more classes into a task or more images into a class, use larger images, or a network without "
        "BatchNorm (backbone=mlp, vit).",
    )


def _explain_memory(error: Exception, parts: Parts) -> str:
    """The message for missing memory: the largest tensors, and three ways out."""
    named: dict[str, Tensor] = {f"method.{name}": tensor for name, tensor in parts.method.named_parameters()}
    named |= {f"method.{name}": tensor for name, tensor in parts.method.named_buffers()}
    named |= {f"buffer.{name}": tensor for name, tensor in parts.buffer.named_buffers()}
    for task in parts.scenario.tasks:
        sets = {"training": task.train.images, "test": task.test.images}
        named |= {f"{of} images of task {task.id + 1}": t for of, t in sets.items() if isinstance(t, Tensor)}
    size = parts.settings.batch_size
    return (
        f"out of memory on {parts.device} ({str(error).splitlines()[0]}). "
        f"The largest tensors: {'; '.join(list_largest_tensors(named))}. "
        f"Ways out: trainer.batch_size={max(1, size // 2)} (and method.replay_size where there is one); "
        "a narrower backbone or a smaller buffer.capacity; precision=bf16 or another device."
    )


def _read_objective(summary: dict[str, Any]) -> float | None:
    return summary["class_il"]["average_accuracy"] if summary["evaluate_on"] == "val" else None


def _clear(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink(missing_ok=True)  # first: from here on the run is unfinished
    shutil.rmtree(run_dir / "checkpoint", ignore_errors=True)
    for path in run_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def print_result(run_dir: Path, summary: dict[str, Any]) -> None:
    """Print the accuracy table and the path of the report."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    job = f" ({get_job_label()})" if get_job_label() else ""
    table = Table(title=Text(f"{summary['experiment']}: {summary['name']}, seed {summary['seed']}{job}"))
    table.add_column("metric")
    for setting in SETTINGS:
        table.add_column(TITLES[setting], justify="right")
    for metric in summary["class_il"]:
        cells = [summary[setting].get(metric) for setting in SETTINGS]
        words = name_measure(metric.replace("_", " "), get_measure(summary))
        table.add_row(words, *("-" if cell is None else f"{cell:.2f}" for cell in cells))
    console = Console()
    console.print(table)
    page = run_dir / "report.html"
    line = f"report: {page}" if page.exists() else f"no report; cl_bench report {run_dir} makes it"
    console.print(line, soft_wrap=True, highlight=False)
